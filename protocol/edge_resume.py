"""An edge session between two connections: suspended, resumed, and what of its steps must be sent again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from isthmus.protocol.edge_steps import EdgeSteps, Send, Sent
from isthmus.protocol.errors import SequenceError
from isthmus.protocol.events import Replay, SessionResumed
from isthmus.protocol.frames import Flag, Frame, MsgType, json_frame, parse_json
from isthmus.protocol.messages import Cancel, Open, Resume, Resumed, Welcome
from isthmus.protocol.states import EDGE_TABLE, EdgeInput, EdgeState, advance


class ResumableSteps(EdgeSteps):
    """What EdgeSession does when its connection ends; the fields are explained there."""

    _drop_unsent: Callable[[], None]

    def __init__(self, stream: int, request: Open, terms: Welcome, send: Send) -> None:
        super().__init__(stream, request, terms, send)
        self.attempt = 0
        self._terms = terms
        self._resume_token = ""
        self._answered_seq = 0  # the newest step with a RESULT
        self._taken_seq = 0  # the newest step that the cloud is known to have taken
        self._acked_index = 0

    def suspend(self) -> bool:
        """The connection is gone: whether the session may go on elsewhere. If not, `end` it."""
        if not self._resume_token or (self.state, EdgeInput.SUSPEND) not in EDGE_TABLE:
            return False
        self._move(EdgeInput.SUSPEND)
        return True

    def resume(self, stream: int, terms: Welcome, send: Send, drop_unsent: Callable[[], None]) -> None:
        """Send RESUME on `stream` of another connection. SequenceError (nothing sent): not suspended, another
        model there (`other_terms`), or the owner's digests don't cover what was sent."""
        state = advance(EDGE_TABLE, self.state, EdgeInput.SEND_RESUME)
        here, there = self._terms, terms
        if (there.hidden, there.vocab_size) != (here.hidden, here.vocab_size):
            raise SequenceError(
                f"the cloud has {there.hidden} channels and {there.vocab_size} tokens, the session's had "
                f"{here.hidden} and {here.vocab_size}",
                code="other_terms",
            )
        self._check_digests()
        assert self.opened is not None  # only an opened session has a resume token
        rows, digest = self._cloud_chain or self.digests.state
        self.stream, self._send, self._drop_unsent = stream, send, drop_unsent
        self.state = state
        self.attempt += 1
        body = Resume(
            session_id=self.opened.session_id,
            resume_token=self._resume_token,
            attempt=self.attempt,
            next_index=self.next_index,
            last_seq=self._last_seq,
            rows=rows,
            digest=digest,
        )
        self._send(json_frame(MsgType.RESUME, body, stream=stream, epoch=self.epoch), False)

    def _check_digests(self) -> None:
        """In offload the KV holds rows that the chain doesn't."""
        expected = self._owed.start if self._owed else self._stop()
        if self.digests.stop != expected and not self.open.streams:
            raise SequenceError(
                f"the digests end at row {self.digests.stop}, {expected} rows were sent",
                code="digests_incomplete",
                hint="append the rows of every step to session.digests",
            )

    def _stop(self) -> int:
        """One beyond the newest row sent; of an unanswered VERIFY, one beyond its last."""
        return self._step_end if self._outputs_due else self.kv_len

    # ---- RESUMED

    def _on_resumed(self, frame: Frame) -> SessionResumed | None:
        """The cloud's answer; its header is of the epoch that begins with it."""
        body = parse_json(frame, Resumed)
        if frame.epoch <= self.epoch:
            return None  # seen before
        state = advance(EDGE_TABLE, self.state, EdgeInput.RECV_RESUMED)
        if state is EdgeState.CLOSING:  # cancelled meanwhile
            self.epoch = frame.epoch
            self._send(json_frame(MsgType.CANCEL, Cancel(), stream=self.stream, epoch=self.epoch), False)
            return None
        lost = [sent for sent in self._unanswered if sent.seq > body.seq]
        self._check_resumed(frame, body, lost)
        rebuild = body.action == "rebuild" or not self._has_chain_of(body, lost)
        self.state = state
        self.epoch = frame.epoch
        self._resume_token = body.resume_token
        self._taken_seq = body.seq
        self._chunk_rows = min(self._terms.limits.max_rows_per_step, body.chunk_rows)
        self._rows_sent = 0
        self._granted = body.credits
        self._acked_index = self.next_index
        if not (lost or rebuild or self._owed):
            return SessionResumed(self.stream, "ok", None)
        replay = self._replay(body, lost, rebuild)
        return SessionResumed(self.stream, "rebuild" if rebuild else "replay", replay)

    def _check_resumed(self, frame: Frame, body: Resumed, lost: Sequence[Sent]) -> None:
        if body.epoch != frame.epoch or not self._taken_seq <= body.seq <= self._last_seq:
            raise SequenceError(
                f"RESUMED in epoch {frame.epoch} says epoch {body.epoch} and step {body.seq}; steps "
                f"{self._taken_seq} to {self._last_seq} were possible",
                code="bad_resumed",
            )
        if body.action != "rebuild" and (body.action == "replay") is not bool(lost):
            raise SequenceError(
                f"RESUMED says {body.action} after step {body.seq}, {self._last_seq} was sent",
                code="bad_resumed",
            )
        least = most = lost[0].kv_len if lost else self.kv_len
        if not lost and self._outputs_due:
            most = self._step_end  # a VERIFY may be answered
        if not lost and self.open.streams:  # so may a prompt, and all that follows
            most = max(least, self.open.prompt_tokens + self.open.max_tokens - 1)
        if not least <= body.kv_len <= most:
            raise SequenceError(
                f"RESUMED says {body.kv_len} rows after step {body.seq}, expected "
                f"{least}{'' if most == least else f' to {most}'}",
                code="bad_kv_len",
            )

    def _has_chain_of(self, body: Resumed, lost: Sequence[Sent]) -> bool:
        """Whether the cloud's rows are what they were after step `body.seq`. SequenceError where it says so
        itself and they are not."""
        if any(sent.pos < body.kv_len for sent in lost):
            return True  # our chain has other rows there by now; the next RESUME compares
        if self._cloud_chain is not None:
            agrees = (body.rows, body.digest) == self._cloud_chain
        else:  # the cloud's is shorter by what it has not got, or by what a VERIFY's RESULT cut
            agrees = body.rows <= len(self.digests) and self.digests.at(body.rows) == body.digest
        if not agrees and body.action == "ok":
            raise SequenceError(
                f"RESUMED says ok with {body.rows} rows that are not those sent", code="bad_digest"
            )
        return agrees

    def _replay(self, body: Resumed, lost: Sequence[Sent], rebuild: bool) -> Replay | None:
        """What is to be sent again; the session stands at the step where the cloud stands."""
        owed = self._owed or self._goal()
        start = 0 if rebuild else min([owed.start, *(sent.pos for sent in lost)])
        self.kv_len = body.kv_len
        self._last_seq = body.seq
        self._outputs_due = 0
        self._drafts = ()
        self._unanswered = []
        self._cloud_chain = (body.rows, body.digest)
        self.digests.truncate(start)
        self._owed = owed._replace(start=start, truncate=body.kv_len > start)
        return self._owed

    def _goal(self) -> Replay:
        """What the newest step led up to: a replay of nothing, yet."""
        stop = self._stop()
        if not self._outputs_due:
            return Replay(stop, stop)
        newest = self._unanswered[-1]
        final, all_rows = Flag.FINAL in newest.flags, Flag.ALL_ROWS in newest.flags
        last_rows = newest.n_tok if newest.ids or all_rows else 1
        return Replay(stop, stop, False, final, all_rows, newest.ids, last_rows)

    def _move(self, happened: EdgeInput) -> None:
        self.state = advance(EDGE_TABLE, self.state, happened)

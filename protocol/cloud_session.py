"""The cloud's half of one session: takes each step once and in order, answers it, meters the stream.

Made by CloudConnection from an accepted OPEN; the server talks to it through the connection's methods, and
while no connection holds it (DETACHED) by the same methods here.

    stream: int; epoch: int; open: Open; state: CloudState; kv_bytes: int (charged to the tenant)
    attempt: int           of the newest RESUME accepted        resumable: bool   OPENED gave a resume token
    last_seq: int          newest step taken
    kv_len: int            rows accepted (uploaded ones plus, in offload, those of the cloud's own tokens);
                           of an unanswered VERIFY in the prefix shape the first alone
    digests: RowDigests    over the uploaded rows; for each step, in order, the owner cuts it to step.pos
                           and appends the raw rows or ids
    rows_received: int     all rows ever taken, those cut by TRUNCATE too
    outputs_due: int       rows of step last_seq whose output the engine owes (VERIFY in the prefix shape:
                           at most; at least one)
    generating: bool       offload: the engine goes on by itself
    next_index: int        index of the next token the engine will produce
    unacked: deque[StreamBody]        STREAM frames not acknowledged, which a RESUME sends again
    check_resume(Resume)   raises where `resumed` would; resume_action(Resume): what it will say; evict()
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from isthmus.protocol.admission import check_step, first_index, num_outputs, row_codec, rows_kept
from isthmus.protocol.cloud_outputs import CloudOutputs, Send, end_of
from isthmus.protocol.drafts import split_drafts
from isthmus.protocol.errors import NotFoundError, SequenceError
from isthmus.protocol.events import StepReceived
from isthmus.protocol.frames import Flag, Frame, MsgType, json_frame
from isthmus.protocol.messages import Close, Credit, Open, Resume, ResumeAction, Resumed, Welcome
from isthmus.protocol.states import CloudInput, CloudState


class CloudSession(CloudOutputs):
    """Rule 1 lives in `step`: KV length and seq advance there together, or not at all."""

    def __init__(self, stream: int, request: Open, terms: Welcome, kv_bytes: int, send: Send) -> None:
        super().__init__(stream, request, terms, kv_bytes, send)
        self.attempt = 0
        self._vocab_size = terms.vocab_size
        self._codec = row_codec(request, terms.hidden)
        self._last_digest = b""

    # ---- from the edge

    def step(self, frame: Frame) -> StepReceived | None:
        """Rule 1, for STEP and VERIFY. None: a repetition (its RESULT is sent again if there is one), an old
        step, or one that crossed the end. Raises without any change where the step can't be taken."""
        verify = frame.type is MsgType.VERIFY
        self._move(CloudInput.RECV_VERIFY if verify else CloudInput.RECV_STEP)
        if self.state is CloudState.CLOSING or 0 < frame.seq < self.last_seq:
            return None
        if frame.seq != self.last_seq + 1 and (frame.seq != self.last_seq or frame.seq == 0):
            raise SequenceError(
                f"step {frame.seq} came, step {self.last_seq + 1} was expected", code="sequence_gap"
            )
        digest = _digest(frame)
        if frame.seq == self.last_seq:
            self._repeat(frame, digest)
            return None
        drafts, rows = split_drafts(frame, self._vocab_size) if verify else ((), frame)
        self._check(rows, drafts)
        self.last_seq = frame.seq
        self._last_digest = digest
        self._last_result = None
        self.rows_received += frame.n_tok
        self._step_end = frame.pos + frame.n_tok
        self.kv_len = rows_kept(frame, self.open)
        self.outputs_due = num_outputs(frame)
        index = first_index(frame, self.open)
        if index is None:
            index = self.open.index_after(self._step_end)
        if self.outputs_due:
            self.next_index = index
        return StepReceived(
            self.stream,
            frame.seq,
            frame.pos,
            frame.n_tok,
            Flag.TRUNCATE in frame.flags,
            Flag.FINAL in frame.flags,
            verify or Flag.ALL_ROWS in frame.flags,
            index,
            rows,
            drafts if self.open.shape == "prefix" else (),
        )

    def _repeat(self, frame: Frame, digest: bytes) -> None:
        if digest != self._last_digest:
            raise SequenceError(
                f"step {frame.seq} came twice, with {frame.n_tok} rows at {frame.pos} that differ from the "
                "first",
                code="duplicate_seq_payload",
            )
        if self._last_result is not None:
            self._send(self._last_result)

    def _check(self, frame: Frame, drafts: Sequence[int]) -> None:
        if self.state is CloudState.OPENING and self.open.offer.entries:
            raise SequenceError(
                "a step before OPENED tells how many rows of the offered prefix are cached",
                code="offer_pending",
            )
        if self.outputs_due or self.generating:
            raise SequenceError(
                f"step {frame.seq} came while step {self.last_seq} is unanswered", code="step_pending"
            )
        check_step(
            frame,
            self.open,
            self._codec,
            kv_len=self.kv_len,
            credits=self.credits,
            max_rows=self._limits.max_rows_per_step,
            drafts=drafts,
            begins_at=self._begins_at,
        )

    def acknowledge(self, credit: Credit) -> bool:
        """CREDIT from the edge: what of the stream has arrived. False: the session is closing."""
        self._move(CloudInput.RECV_CREDIT)
        if self.state is CloudState.CLOSING:
            return False
        if not self.open.streams:
            raise SequenceError("CREDIT for a session that does not stream", code="unexpected_credit")
        if credit.ack_index > self._sent_index:
            raise SequenceError(
                f"token {credit.ack_index} acknowledged, {self._sent_index} were sent", code="ack_ahead"
            )
        self._stream_window = min(credit.window, self._limits.stream_window_tokens)
        self._forget_acknowledged(credit.ack_index)
        self._flush()
        return True

    def _forget_acknowledged(self, index: int) -> None:
        self._acked_index = max(self._acked_index, index)
        while self.unacked and end_of(self.unacked[0]) <= self._acked_index:
            self.unacked.popleft()

    def cancel(self) -> bool:
        """Whether the engine must be told (the first CANCEL or CLOSE)."""
        return self._leave(CloudInput.RECV_CANCEL)

    def close(self, close: Close) -> bool:
        """As `cancel`. SequenceError if the offer names rows that were never sent."""
        entries = close.offer.entries
        if entries and entries[-1][0] > self.kv_len and self.state is not CloudState.CLOSING:
            raise SequenceError(
                f"CLOSE offers {entries[-1][0]} rows, the session holds {self.kv_len}", code="bad_offer"
            )
        return self._leave(CloudInput.RECV_CLOSE)

    def _leave(self, how: CloudInput) -> bool:
        before = self.state
        self._move(how)
        return before is not CloudState.CLOSING

    def end(self, happened: CloudInput) -> None:
        """ERROR or LOST: over without CLOSED."""
        self._move(happened)

    # ---- loss and resume

    def detach(self) -> None:
        """No connection holds this session any more. What the engine puts out is kept, and sent after a
        RESUME; nothing is queued anywhere."""
        self._move(CloudInput.DETACH)
        self._send = _nowhere

    def evict(self) -> None:
        """The session was given up while detached. The caller frees pages and quota."""
        self._move(CloudInput.EVICT)

    def check_resume(self, resume: Resume) -> None:
        """What can be said before the session is taken from its old connection. NotFoundError
        `unknown_session`: it is ending. SequenceError: `stale_attempt`, `resume_behind` (steps are here that
        the edge never sent), `digest_mismatch` (other rows, whose output is due or streams)."""
        if self.state not in (CloudState.ACTIVE, CloudState.DETACHED):
            raise NotFoundError(f"the session is {self.state}", code="unknown_session")
        if resume.attempt <= self.attempt:
            raise SequenceError(
                f"RESUME attempt {resume.attempt} came after attempt {self.attempt}", code="stale_attempt"
            )
        if resume.last_seq < self.last_seq:
            raise SequenceError(
                f"RESUME after step {resume.last_seq}, step {self.last_seq} is here", code="resume_behind"
            )
        if resume.last_seq > self.last_seq:
            return
        if not self._has_rows_of(resume) and (self.outputs_due or self.open.streams):
            raise SequenceError(
                f"the {resume.rows} rows sent are not the {len(self.digests)} that the output comes from",
                code="digest_mismatch",
                hint="open the session anew",
            )

    def resumed(self, stream: int, resume: Resume, send: Send, *, resume_token: str, chunk_rows: int) -> None:
        """Go on in a new epoch, on `stream` of the connection behind `send`. The owner has decoded every step
        taken and given it to the engine. Raises as check_resume, without any change."""
        self.check_resume(resume)
        self._move(CloudInput.RECV_RESUME)
        self.attempt = resume.attempt
        self.epoch += 1
        self.stream = stream
        self._send = send
        # What is not computed yet stays outstanding; both ends count from 0 again.
        self._epoch_base = self.rows_received
        self._stream_window = self._limits.stream_window_tokens
        action = self.resume_action(resume)
        rows, digest = self.digests.state
        body = Resumed(
            epoch=self.epoch,
            seq=self.last_seq,
            kv_len=self.kv_len,
            rows=rows,
            digest=digest,
            action=action,
            credits=self.credits,
            chunk_rows=chunk_rows,
            resume_token=resume_token,
        )
        send(json_frame(MsgType.RESUMED, body, stream=stream, epoch=self.epoch))
        self._send_again(resume, action)

    def resume_action(self, resume: Resume) -> ResumeAction:
        """How `resume` will be answered, if check_resume lets it pass."""
        if resume.last_seq > self.last_seq:
            return "replay"
        return "ok" if self._has_rows_of(resume) else "rebuild"

    def _has_rows_of(self, resume: Resume) -> bool:
        """Whether the rows are those that the edge sent up to the same step: as they are, or as they were
        before a RESULT cut them that the edge may not have."""
        claimed = (resume.rows, resume.digest)
        return claimed == self.digests.state or (self.last_seq, *claimed) == self._uncut

    def _send_again(self, resume: Resume, action: ResumeAction) -> None:
        if self._last_result is not None:
            # Kept in the new epoch, for a step that is repeated there.
            self._last_result = replace(self._last_result, stream=self.stream, epoch=self.epoch)
            if action == "ok":
                self._send(self._last_result)
        if action == "ok":
            # The edge may already count from where a step that was lost is to begin.
            self._forget_acknowledged(min(resume.next_index, self._sent_index))
            for body in self.unacked:
                self._send_stream(body)
            self._flush()


def _nowhere(frame: Frame) -> None:
    """Where a detached session sends to."""


def _digest(frame: Frame) -> bytes:
    """What makes two steps the same: all that the step would change, nothing of how often it travelled."""
    numbers = (frame.type, frame.pos, frame.n_tok, frame.flags, frame.dtype, frame.codec, frame.raw_len)
    head = " ".join(str(int(number)) for number in numbers)
    return hashlib.blake2b(f"{head} ".encode() + frame.body, digest_size=16).digest()

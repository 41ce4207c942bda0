"""The sending side of an edge session: numbers its steps, spends its credits, keeps rule 7."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from isthmus.protocol.activations import Encoded, encode_ids
from isthmus.protocol.admission import (
    check_step,
    first_due,
    first_index,
    num_outputs,
    row_codec,
    rows_kept,
)
from isthmus.protocol.connection import FIRST_EPOCH
from isthmus.protocol.digests import RowDigests
from isthmus.protocol.drafts import with_drafts
from isthmus.protocol.errors import FrameError, SequenceError
from isthmus.protocol.events import Replay
from isthmus.protocol.frames import HEADER_BYTES, Codec, Dtype, Flag, Frame, MsgType
from isthmus.protocol.messages import Open, Opened, Welcome
from isthmus.protocol.states import EDGE_TABLE, EdgeInput, EdgeState, advance

Send = Callable[[Frame, bool], None]
"""Queue a frame; True: it may be dropped if the session is cancelled before it left."""


class Sent(NamedTuple):
    """A step that may be lost; `kv_len` is the session's before it."""

    seq: int
    pos: int
    n_tok: int
    flags: Flag
    ids: tuple[int, ...]  # of a VERIFY
    kv_len: int


class EdgeSteps:
    """What EdgeSession sends once it is open; the fields are explained there."""

    def __init__(self, stream: int, request: Open, terms: Welcome, send: Send) -> None:
        self.stream = stream
        self.epoch = FIRST_EPOCH
        self.open = request
        self.opened: Opened | None = None
        self.state = EdgeState.IDLE
        self.kv_len = 0
        self.next_index = 0
        self.digests = RowDigests()
        self._limits = terms.limits
        self._vocab_size = terms.vocab_size
        self._codec = row_codec(request, terms.hidden)
        self._send = send
        self._chunk_rows = terms.limits.max_rows_per_step
        self._last_seq = 0
        self._rows_sent = 0
        self._window = terms.limits.initial_credits_rows
        self._granted = self._window  # rows that may have been sent since the epoch began
        self._outputs_due = 0  # rows of step _last_seq whose output is still to come
        self._step_end = 0  # one beyond the last of them
        self._drafts: tuple[int, ...] = ()  # the ids that step _last_seq showed, if it was a VERIFY
        self._streaming = False  # offload: the cloud generates by itself
        self._begins_at = first_due(request)
        self._unanswered: list[Sent] = []  # since the newest RESULT or replay
        self._owed: Replay | None = None  # what is left of a replay
        # The cloud's digest chain, while ours is cut for a replay of which nothing was sent.
        self._cloud_chain: tuple[int, str] | None = None

    # ---- what may be sent

    @property
    def awaiting_result(self) -> bool:
        """Rule 7: an output-producing step is unanswered, or the cloud generates by itself."""
        return self._outputs_due > 0 or self._streaming

    @property
    def credits(self) -> int:
        """Rows that may be sent now; none before OPENED tells what an offered prefix left to send."""
        if self.state is EdgeState.OPENING and self.open.offer.entries:
            return 0
        return self._granted - self._rows_sent

    @property
    def chunk_rows(self) -> int:
        """The most rows one step may carry, by the cloud's wish and by the message size."""
        row_bytes = 4 if self.open.split == 0 else self._codec.row_bytes
        return min(self._chunk_rows, (self._limits.max_message_bytes - HEADER_BYTES) // row_bytes)

    def can_send(self, n_rows: int) -> bool:
        """Whether a step of `n_rows` may go out now; events of this stream are what changes the answer."""
        live = self.state in (EdgeState.OPENING, EdgeState.PREFILL, EdgeState.DECODE)
        return live and not self.awaiting_result and 1 <= n_rows <= min(self.credits, self.chunk_rows)

    # ---- sending

    def step_rows(
        self,
        encoded: Encoded,
        pos: int,
        n_tok: int,
        *,
        final: bool,
        all_rows: bool = False,
        truncate: bool = False,
    ) -> int:
        """Queue `n_tok` rows for KV positions [pos, pos + n_tok); the step's seq.

        `encoded` as RowCodec.encode gives it. `final`: the last row produces output, `all_rows` (U-shape):
        every row does. `truncate`: the KV is first cut back to `pos`. SequenceError (nothing sent) where
        order, credits, the agreed lengths or rule 7 forbid it.
        """
        self._expect_rows()
        return self._step(Encoded(*encoded), pos, n_tok, _flags(final, all_rows, truncate))

    def step_ids(
        self,
        ids: Sequence[int],
        pos: int,
        *,
        final: bool,
        all_rows: bool = False,
        truncate: bool = False,
    ) -> int:
        """Queue token ids (split 0 only); otherwise as `step_rows`."""
        return self._step(self._encoded(ids), pos, len(ids), _flags(final, all_rows, truncate))

    def verify_rows(self, ids: Sequence[int], encoded: Encoded, pos: int, *, truncate: bool = False) -> int:
        """Queue a draft chain, one row per id: `ids[0]` is the newest token, the rest the draft.

        Prefix shape: ResultTokens answers with the tokens up to the first that differs from the draft, and
        with the `kv_len` left once the rows after it are cut off. U-shape: ResultRows answers with every
        row's hidden state; the ids stay on the edge, which cuts off what it rejects by `truncate` in its next
        step. Otherwise as `step_rows`.
        """
        self._expect_rows()
        return self._verify(ids, Encoded(*encoded), pos, truncate)

    def verify_ids(self, ids: Sequence[int], pos: int, *, truncate: bool = False) -> int:
        """Queue a draft chain as token ids (split 0, U-shape only); otherwise as `verify_rows`."""
        return self._verify(ids, self._encoded(ids), pos, truncate)

    def _verify(self, ids: Sequence[int], rows: Encoded, pos: int, truncate: bool) -> int:
        return self._step(rows, pos, len(ids), _flags(False, False, truncate), tuple(ids))

    def _expect_rows(self) -> None:
        if self.open.split == 0:
            raise SequenceError("rows at split 0, which takes token ids", code="bad_dtype")

    def _encoded(self, ids: Sequence[int]) -> Encoded:
        if self.open.split != 0:
            raise SequenceError(f"token ids at split {self.open.split}, which takes rows", code="bad_dtype")
        body = encode_ids(ids)
        return Encoded(body, Dtype.TOKEN_IDS, Codec.NONE, len(body))

    def _step(
        self, encoded: Encoded, pos: int, n_tok: int, flags: Flag, ids: tuple[int, ...] | None = None
    ) -> int:
        """Queue a STEP, or where `ids` are given a VERIFY."""
        verify = ids is not None
        state = advance(EDGE_TABLE, self.state, EdgeInput.SEND_VERIFY if verify else EdgeInput.SEND_STEP)
        frame = Frame(
            MsgType.VERIFY if verify else MsgType.STEP,
            self.stream,
            self.epoch,
            self._last_seq + 1,
            pos,
            n_tok,
            flags,
            encoded.dtype,
            encoded.codec,
            encoded.raw_len,
            encoded.body,
        )
        drafts = ids if self.open.shape == "prefix" else ids and (0,) * len(ids)
        if self.awaiting_result:
            raise SequenceError(
                f"step {frame.seq} while step {self._last_seq} is unanswered", code="step_pending"
            )
        check_step(
            frame,
            self.open,
            self._codec,
            kv_len=self.kv_len,
            credits=self.credits,
            max_rows=self._limits.max_rows_per_step,
            drafts=drafts or (),
            begins_at=self._begins_at,
        )
        sent = frame if drafts is None else with_drafts(drafts, frame, self._vocab_size)
        size = HEADER_BYTES + max(len(sent.body), sent.raw_len)
        if size > self._limits.max_message_bytes:
            raise FrameError(
                f"a step of {size} bytes, the cloud takes {self._limits.max_message_bytes}",
                code="too_large",
                hint=f"send at most {self.chunk_rows} rows in one step",
            )
        index = first_index(frame, self.open)
        if index is not None and self.open.shape == "prefix":
            if index < self.next_index:
                raise SequenceError(
                    f"step {frame.seq} would produce token {index} again; the next one is {self.next_index}",
                    code="index_emitted",
                )
            self.next_index = index
        self._send(sent, True)
        self.state = state
        self._remember(Sent(frame.seq, pos, n_tok, flags, ids or (), self.kv_len))
        self._last_seq = frame.seq
        self._rows_sent += n_tok
        self._step_end = pos + n_tok
        self.kv_len = rows_kept(frame, self.open)
        self._outputs_due = num_outputs(frame)
        self._drafts = drafts or ()
        return frame.seq

    # ---- what may have to be sent again

    def _remember(self, sent: Sent) -> None:
        self._unanswered.append(sent)
        self._cloud_chain = None
        if self._owed is not None:
            end = sent.pos + sent.n_tok
            goes_on = sent.pos == self._owed.start and end < self._owed.stop
            self._owed = self._owed._replace(start=end) if goes_on else None


def _flags(final: bool, all_rows: bool, truncate: bool) -> Flag:
    return (
        (Flag.FINAL if final else Flag.NONE)
        | (Flag.ALL_ROWS if all_rows else Flag.NONE)
        | (Flag.TRUNCATE if truncate else Flag.NONE)
    )

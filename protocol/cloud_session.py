"""The cloud's half of one session: takes each step once and in order, answers it, meters the stream.

Made by CloudConnection from an accepted OPEN; the server talks to it through the connection's methods.

    stream: int; epoch: int; open: Open; state: CloudState; kv_bytes: int (charged to the tenant)
    last_seq: int          newest step taken
    kv_len: int            rows accepted (uploaded ones plus, in offload, those of the cloud's own tokens);
                           of an unanswered VERIFY in the prefix shape the first alone
    rows_received: int     all rows ever taken, those cut by TRUNCATE too
    outputs_due: int       rows of step last_seq whose output the engine owes (VERIFY in the prefix shape:
                           at most; at least one)
    generating: bool       offload: the engine goes on by itself
    next_index: int        index of the next token the engine will produce
    unacked: deque[StreamBody]        STREAM frames sent and not acknowledged (issue C resends them)
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from isthmus.protocol.activations import Encoded
from isthmus.protocol.admission import (
    check_body,
    check_step,
    first_index,
    num_outputs,
    result_codec,
    row_codec,
    rows_kept,
)
from isthmus.protocol.connection import FIRST_EPOCH, with_pos
from isthmus.protocol.drafts import split_drafts
from isthmus.protocol.errors import SequenceError
from isthmus.protocol.events import StepReceived
from isthmus.protocol.frames import Flag, Frame, MsgType, json_frame
from isthmus.protocol.messages import (
    Close,
    Closed,
    Credit,
    Finish,
    Open,
    Opened,
    ResultBody,
    StreamBody,
    TopTokens,
    Welcome,
)
from isthmus.protocol.states import CLOUD_TABLE, CloudInput, CloudState, advance

_Body = TypeVar("_Body", ResultBody, StreamBody)


class CloudSession:
    """Rule 1 lives in `step`: KV length and seq advance there together, or not at all."""

    def __init__(
        self, stream: int, request: Open, terms: Welcome, kv_bytes: int, send: Callable[[Frame], None]
    ) -> None:
        self.stream = stream
        self.epoch = FIRST_EPOCH
        self.open = request
        self.kv_bytes = kv_bytes
        self.state = advance(CLOUD_TABLE, CloudState.NEW, CloudInput.RECV_OPEN)
        self.last_seq = 0
        self.kv_len = 0
        self.rows_received = 0
        self.outputs_due = 0
        self.generating = False
        self.next_index = 0
        self.unacked: deque[StreamBody] = deque()
        self._limits = terms.limits
        self._vocab_size = terms.vocab_size
        self._codec = row_codec(request, terms.hidden)
        self._result_codec = result_codec(request, terms.hidden)
        self._send = send
        self._last_digest = b""
        self._step_end = 0  # one beyond the last row of step last_seq
        self._last_result: Frame | None = None
        self._window = terms.limits.initial_credits_rows
        self._granted = self._window  # rows that may have been received since the epoch began
        self._unsent: deque[StreamBody] = deque()  # generated beyond the edge's window
        self._sent_index = 0
        self._acked_index = 0
        self._stream_window = terms.limits.stream_window_tokens

    @property
    def credits(self) -> int:
        """Rows the edge may still send."""
        return self._granted - self.rows_received

    @property
    def stream_room(self) -> int:
        """Tokens that would go out at once."""
        return max(0, self._acked_index + self._stream_window - self.next_index)

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
        self._acked_index = max(self._acked_index, credit.ack_index)
        self._stream_window = min(credit.window, self._limits.stream_window_tokens)
        while self.unacked and _end(self.unacked[0]) <= self._acked_index:
            self.unacked.popleft()
        self._flush()
        return True

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

    # ---- from the engine

    def opened(self, opened: Opened) -> None:
        state = advance(CLOUD_TABLE, self.state, CloudInput.SEND_OPENED)
        if state is CloudState.CLOSING:
            return
        entries = self.open.offer.entries
        most = min(entries[-1][0], self.open.prompt_tokens - 1) if entries else 0
        if opened.cached_rows > most or opened.credits < self._window:
            raise SequenceError(
                f"OPENED with {opened.cached_rows} cached rows of at most {most} and {opened.credits} "
                f"credits of at least {self._window}",
                code="bad_opened",
            )
        self.state = state
        if entries:
            self.kv_len = opened.cached_rows
        self._window = self._granted = opened.credits
        self._send(json_frame(MsgType.OPENED, opened, stream=self.stream, epoch=self.epoch))

    def credit(self, rows: int) -> None:
        """`rows` more rows are computed and their memory is free again. Never more than were received."""
        self._move(CloudInput.SEND_CREDIT)
        granted = min(self._granted + rows, self.rows_received + self._window)
        if self.state is CloudState.CLOSING or granted == self._granted:
            return
        self._granted = granted
        self._send(json_frame(MsgType.CREDIT, Credit(rows=granted), stream=self.stream, epoch=self.epoch))

    def result_tokens(
        self,
        tokens: Sequence[int],
        kv_len: int,
        logprobs: Sequence[float | None] | None,
        top: Sequence[TopTokens] | None,
        finish: Finish | None,
    ) -> None:
        if not self._may_answer(kv_len, len(tokens), "prefix"):
            return
        body = _tokens(ResultBody, self.next_index, tokens, logprobs, top, finish)
        self.next_index += len(tokens)
        if self.open.streams and finish is None:
            self.generating = True
            self._sent_index = self._acked_index = self.next_index
        self._answer(with_pos(self._json(MsgType.RESULT, body, self.last_seq), kv_len))

    def result_rows(self, encoded: Encoded, n_tok: int, kv_len: int) -> None:
        if not self._may_answer(kv_len, n_tok, "u"):
            return
        frame = Frame(
            MsgType.RESULT,
            self.stream,
            self.epoch,
            self.last_seq,
            kv_len,
            n_tok,
            dtype=encoded.dtype,
            codec=encoded.codec,
            raw_len=encoded.raw_len,
            body=encoded.body,
        )
        check_body(frame, self._result_codec)
        self._answer(frame)

    def _may_answer(self, kv_len: int, n_outputs: int, shape: str) -> bool:
        self._move(CloudInput.SEND_RESULT)
        if self.state is CloudState.CLOSING:
            return False
        # Of the outputs due, only VERIFY in the prefix shape leaves some out, and their rows with them.
        missing = self.outputs_due - n_outputs
        least = most = self.outputs_due
        if shape == "prefix":
            least, most = 1, min(most, self.open.max_tokens - self.next_index)
        if shape != self.open.shape or not least <= n_outputs <= most or kv_len != self._step_end - missing:
            raise SequenceError(
                f"the engine answers with {n_outputs} outputs in shape {shape} at {kv_len} rows; "
                f"{self.outputs_due} in shape {self.open.shape} at {self._step_end} are due",
                code="engine_mismatch",
            )
        self.kv_len = kv_len
        return True

    def _answer(self, frame: Frame) -> None:
        """RESULT returns the credits of every row up to its step, on both sides without a CREDIT."""
        self._last_result = frame
        self.outputs_due = 0
        self._granted = self.rows_received + self._window
        self._send(frame)

    def stream_tokens(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None] | None,
        top: Sequence[TopTokens] | None,
        finish: Finish | None,
    ) -> None:
        self._move(CloudInput.SEND_STREAM)
        if self.state is CloudState.CLOSING:
            return
        end = self.next_index + len(tokens)
        if not self.generating or end > self.open.max_tokens:
            raise SequenceError(
                f"the engine streams up to token {end} of {self.open.max_tokens}"
                + ("" if self.generating else " without a step to answer"),
                code="engine_mismatch",
            )
        self._unsent.append(_tokens(StreamBody, self.next_index, tokens, logprobs, top, finish))
        self.next_index = end
        self.kv_len = self.open.prompt_tokens + end - 1  # the newest token is not in the KV yet
        self.generating = finish is None
        self._flush()

    def _flush(self) -> None:
        """Send what the edge's window allows, cutting a run of tokens where it must."""
        limit = self._acked_index + self._stream_window
        while self._unsent:
            body = self._unsent[0]
            if _end(body) > limit:
                if body.first_index >= limit:
                    return
                self._unsent[0] = body.part(limit)
                body = body.part(body.first_index, limit)
            else:
                self._unsent.popleft()
            self._sent_index = _end(body)
            self.unacked.append(body)
            held = self.open.prompt_tokens + self._sent_index - 1
            self._send(with_pos(self._json(MsgType.STREAM, body, self.last_seq), held))

    def closed(self, closed: Closed) -> None:
        self._move(CloudInput.SEND_CLOSED)
        self._send(json_frame(MsgType.CLOSED, closed, stream=self.stream, epoch=self.epoch))

    def end(self, happened: CloudInput) -> None:
        """ERROR or LOST: over without CLOSED."""
        self._move(happened)

    def _json(self, msg_type: MsgType, body: ResultBody | StreamBody, seq: int) -> Frame:
        return json_frame(msg_type, body, stream=self.stream, epoch=self.epoch, seq=seq)

    def _move(self, happened: CloudInput) -> None:
        self.state = advance(CLOUD_TABLE, self.state, happened)


def _tokens(
    kind: type[_Body],
    first_index: int,
    tokens: Sequence[int],
    logprobs: Sequence[float | None] | None,
    top: Sequence[TopTokens] | None,
    finish: Finish | None,
) -> _Body:
    return kind(
        first_index=first_index,
        tokens=tuple(tokens),
        logprobs=None if logprobs is None else tuple(logprobs),
        top=None if top is None else tuple(top),
        finish=finish,
    )


def _end(body: StreamBody) -> int:
    return body.first_index + len(body.tokens)


def _digest(frame: Frame) -> bytes:
    """What makes two steps the same: all that the step would change, nothing of how often it travelled."""
    numbers = (frame.type, frame.pos, frame.n_tok, frame.flags, frame.dtype, frame.codec, frame.raw_len)
    head = " ".join(str(int(number)) for number in numbers)
    return hashlib.blake2b(f"{head} ".encode() + frame.body, digest_size=16).digest()

"""The outgoing side of a cloud session: the engine's answers, metered by credits and the stream's window."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from isthmus.protocol.activations import Encoded
from isthmus.protocol.admission import check_body, first_due, result_codec
from isthmus.protocol.connection import FIRST_EPOCH, with_pos
from isthmus.protocol.digests import RowDigests
from isthmus.protocol.errors import SequenceError
from isthmus.protocol.frames import Frame, MsgType, json_frame
from isthmus.protocol.messages import (
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

Send = Callable[[Frame], None]
_Body = TypeVar("_Body", ResultBody, StreamBody)


class CloudOutputs:
    """What CloudSession sends; the fields are explained there."""

    def __init__(self, stream: int, request: Open, terms: Welcome, kv_bytes: int, send: Send) -> None:
        self.stream = stream
        self.epoch = FIRST_EPOCH
        self.open = request
        self.kv_bytes = kv_bytes
        self.state = advance(CLOUD_TABLE, CloudState.NEW, CloudInput.RECV_OPEN)
        self.resumable = False
        self.last_seq = 0
        self.kv_len = 0
        self.digests = RowDigests()
        self.rows_received = 0
        self.outputs_due = 0
        self.generating = False
        self.next_index = 0
        self.unacked: deque[StreamBody] = deque()
        self._limits = terms.limits
        self._result_codec = result_codec(request, terms.hidden)
        self._send = send
        self._begins_at = first_due(request)
        self._step_end = 0  # one beyond the last row of step last_seq
        self._last_result: Frame | None = None
        # The chain before RESULT cut it: of (step, rows, digest). An edge without that RESULT still names it.
        self._uncut = (0, 0, "")
        self._window = terms.limits.initial_credits_rows
        self._granted = self._window  # rows that may have been received since the session began
        self._epoch_base = 0  # rows_received when the epoch began
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
            self.digests = RowDigests(opened.cached_rows)
        self.resumable = bool(opened.resume_token)
        self._window = self._granted = opened.credits
        self._send(json_frame(MsgType.OPENED, opened, stream=self.stream, epoch=self.epoch))

    def credit(self, rows: int) -> None:
        """`rows` more rows are computed and their memory is free again. Never more than were received."""
        self._move(CloudInput.SEND_CREDIT)
        granted = min(self._granted + rows, self.rows_received + self._window)
        if self.state is CloudState.CLOSING or granted == self._granted:
            return
        self._granted = granted
        credit = Credit(rows=granted - self._epoch_base)
        self._send(json_frame(MsgType.CREDIT, credit, stream=self.stream, epoch=self.epoch))

    def result_tokens(
        self,
        tokens: Sequence[int],
        kv_len: int,
        logprobs: Sequence[float | None] | None,
        top: Sequence[TopTokens] | None,
        finish: Finish | None,
        cloud_us: int = 0,
    ) -> None:
        if not self._may_answer(kv_len, len(tokens), "prefix"):
            return
        body = _tokens(ResultBody, self.next_index, tokens, logprobs, top, finish, cloud_us)
        self.next_index += len(tokens)
        self._begins_at = None
        if self.open.streams:
            self.generating = finish is None
            self._sent_index = self._acked_index = self.next_index
        if kv_len < self._step_end:
            self._uncut = (self.last_seq, *self.digests.state)
            self.digests.truncate(kv_len)
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
        cloud_us: int = 0,
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
        self._unsent.append(_tokens(StreamBody, self.next_index, tokens, logprobs, top, finish, cloud_us))
        self.next_index = end
        self.kv_len = self.open.prompt_tokens + end - 1  # the newest token is not in the KV yet
        self.generating = finish is None
        self._flush()

    def _flush(self) -> None:
        """Send what the edge's window allows, cutting a run of tokens where it must."""
        limit = self._acked_index + self._stream_window
        while self._unsent:
            body = self._unsent[0]
            if end_of(body) > limit:
                if body.first_index >= limit:
                    return
                self._unsent[0] = body.part(limit)
                body = body.part(body.first_index, limit)
            else:
                self._unsent.popleft()
            self._sent_index = end_of(body)
            self.unacked.append(body)
            self._send_stream(body)

    def _send_stream(self, body: StreamBody) -> None:
        held = self.open.prompt_tokens + end_of(body) - 1
        self._send(with_pos(self._json(MsgType.STREAM, body, self.last_seq), held))

    def closed(self, closed: Closed) -> None:
        self._move(CloudInput.SEND_CLOSED)
        self._send(json_frame(MsgType.CLOSED, closed, stream=self.stream, epoch=self.epoch))

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
    cloud_us: int,
) -> _Body:
    return kind(
        first_index=first_index,
        tokens=tuple(tokens),
        logprobs=None if logprobs is None else tuple(logprobs),
        top=None if top is None else tuple(top),
        finish=finish,
        cloud_us=cloud_us,
    )


def end_of(body: StreamBody) -> int:
    """One beyond the last output index of `body`."""
    return body.first_index + len(body.tokens)

"""The edge's half of one session: numbers the steps, spends the credits, emits each token once.

Made by EdgeConnection.open(). Signatures (stable):

    stream: int; epoch: int; open: Open; state: EdgeState; opened: Opened | None
    kv_len: int            rows the cloud holds once everything sent has arrived
    next_index: int        index of the next token not yet reported
    credits: int           rows that may still be sent now
    chunk_rows: int        most rows one step may carry now (credits aside)
    awaiting_result: bool  an output-producing step is unanswered (rule 7)
    can_send(n_rows) -> bool
    step_rows(encoded, pos, n_tok, *, final, all_rows=False, truncate=False) -> int   seq
        encoded = (body, dtype, codec, raw_len) of activations.RowCodec.encode
    step_ids(ids, pos, *, final, all_rows=False, truncate=False) -> int               seq; split 0 only
    cancel() -> None       close(offer=PrefixOffer(), reason="") -> None               both idempotent
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from isthmus.protocol.activations import Encoded, encode_ids
from isthmus.protocol.admission import check_body, check_step, num_outputs, result_codec, row_codec
from isthmus.protocol.connection import FIRST_EPOCH, unexpected
from isthmus.protocol.errors import CodecError, FrameError, RequestError, SequenceError
from isthmus.protocol.events import (
    CreditGranted,
    EdgeEvent,
    ResultRows,
    ResultTokens,
    SessionClosed,
    SessionOpened,
    StreamTokens,
)
from isthmus.protocol.frames import HEADER_BYTES, Codec, Dtype, Flag, Frame, MsgType, json_frame, parse_json
from isthmus.protocol.messages import (
    Cancel,
    Close,
    Closed,
    Credit,
    Open,
    Opened,
    ResultBody,
    StreamBody,
    Welcome,
)
from isthmus.protocol.prefix import PrefixOffer
from isthmus.protocol.states import EDGE_TABLE, EdgeInput, EdgeState, advance

Send = Callable[[Frame, bool], None]
"""Queue a frame; True: it may be dropped if the session is cancelled before it left."""


class EdgeSession:
    """One generation on one stream. Methods queue frames on the connection; nothing here waits."""

    def __init__(
        self, stream: int, request: Open, terms: Welcome, send: Send, drop_unsent: Callable[[], None]
    ) -> None:
        self.stream = stream
        self.epoch = FIRST_EPOCH
        self.open = request
        self.opened: Opened | None = None
        self.state = EdgeState.IDLE
        self.kv_len = 0
        self.next_index = 0
        self._limits = terms.limits
        self._vocab_size = terms.vocab_size
        self._codec = row_codec(request, terms.hidden)
        self._result_codec = result_codec(request, terms.hidden)
        self._send = send
        self._drop_unsent = drop_unsent
        self._chunk_rows = terms.limits.max_rows_per_step
        self._last_seq = 0
        self._rows_sent = 0
        self._window = terms.limits.initial_credits_rows
        self._granted = self._window  # rows that may have been sent since the epoch began
        self._answered_seq = 0  # the newest step with a RESULT
        self._outputs_due = 0  # rows of step _last_seq whose output is still to come
        self._streaming = False  # offload: the cloud generates by itself
        self._acked_index = 0
        self._move(EdgeInput.SEND_OPEN)
        self._send(json_frame(MsgType.OPEN, request, stream=stream, epoch=self.epoch), False)

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
        if self.open.split == 0:
            raise SequenceError("rows at split 0, which takes token ids", code="bad_dtype")
        return self._step(Encoded(*encoded), pos, n_tok, final, all_rows, truncate)

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
        if self.open.split != 0:
            raise SequenceError(f"token ids at split {self.open.split}, which takes rows", code="bad_dtype")
        body = encode_ids(ids)
        encoded = Encoded(body, Dtype.TOKEN_IDS, Codec.NONE, len(body))
        return self._step(encoded, pos, len(ids), final, all_rows, truncate)

    def _step(
        self, encoded: Encoded, pos: int, n_tok: int, final: bool, all_rows: bool, truncate: bool
    ) -> int:
        state = advance(EDGE_TABLE, self.state, EdgeInput.SEND_STEP)
        flags = (
            (Flag.FINAL if final else Flag.NONE)
            | (Flag.ALL_ROWS if all_rows else Flag.NONE)
            | (Flag.TRUNCATE if truncate else Flag.NONE)
        )
        frame = Frame(
            MsgType.STEP,
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
        )
        size = HEADER_BYTES + max(len(encoded.body), encoded.raw_len)
        if size > self._limits.max_message_bytes:
            raise FrameError(
                f"a step of {size} bytes, the cloud takes {self._limits.max_message_bytes}",
                code="too_large",
                hint=f"send at most {self.chunk_rows} rows in one step",
            )
        if final and self.open.shape == "prefix":
            index = self.open.index_after(pos + n_tok)
            if index < self.next_index:
                raise SequenceError(
                    f"step {frame.seq} would produce token {index} again; the next one is {self.next_index}",
                    code="index_emitted",
                )
            self.next_index = index
        self._send(frame, True)
        self.state = state
        self._last_seq = frame.seq
        self._rows_sent += n_tok
        self.kv_len = pos + n_tok
        self._outputs_due = num_outputs(frame)
        return frame.seq

    def cancel(self) -> None:
        """Stop and keep nothing. Steps that have not left are dropped. Idempotent."""
        if self._leave(EdgeInput.SEND_CANCEL):
            self._drop_unsent()
            self._send(json_frame(MsgType.CANCEL, Cancel(), stream=self.stream, epoch=self.epoch), False)

    def close(self, offer: PrefixOffer | None = None, reason: str = "") -> None:
        """Stop; the cloud may keep its KV under `offer`, whose lengths are at most `kv_len`. Idempotent."""
        body = Close(offer=offer or PrefixOffer(), reason=reason)
        if body.offer.entries and body.offer.entries[-1][0] > self.kv_len:
            raise RequestError(
                f"the offer names {body.offer.entries[-1][0]} rows, the cloud holds {self.kv_len}",
                code="bad_offer",
            )
        if self._leave(EdgeInput.SEND_CLOSE):
            self._send(json_frame(MsgType.CLOSE, body, stream=self.stream, epoch=self.epoch), False)

    def _leave(self, how: EdgeInput) -> bool:
        """Whether this is the first CANCEL or CLOSE."""
        before = self.state
        self._move(how)
        return before not in (EdgeState.CLOSING, EdgeState.CLOSED)

    # ---- receiving; called by the connection

    def receive(self, frame: Frame) -> EdgeEvent | None:
        """Take in a frame of this stream and epoch. Raises for what the cloud must not send."""
        if frame.type is MsgType.CLOSED:
            closed = parse_json(frame, Closed)
            self._move(EdgeInput.RECV_CLOSED)
            return SessionClosed(self.stream, closed)
        if frame.type not in _INPUTS:
            raise unexpected(frame)
        self._move(_INPUTS[frame.type])
        if self.state is EdgeState.CLOSING:
            return None  # it crossed our CANCEL or CLOSE
        if frame.type is MsgType.OPENED:
            return self._on_opened(parse_json(frame, Opened))
        if frame.type is MsgType.CREDIT:
            self._granted = max(self._granted, parse_json(frame, Credit).rows)
            return CreditGranted(self.stream, self.credits)
        if frame.type is MsgType.STREAM:
            return self._on_stream(frame, parse_json(frame, StreamBody))
        return self._on_result(frame)

    def end(self, happened: EdgeInput) -> None:
        """ERROR or LOST: the session is over without CLOSED."""
        self._move(happened)

    def _on_opened(self, opened: Opened) -> SessionOpened:
        offered = self.open.offer.entries[-1][0] if self.open.offer.entries else 0
        if opened.cached_rows > min(offered, self.open.prompt_tokens - 1):
            raise SequenceError(
                f"the cloud claims {opened.cached_rows} cached rows; {offered} were offered, of a prompt of "
                f"{self.open.prompt_tokens}",
                code="bad_cached_rows",
            )
        if opened.credits < self._window:
            raise SequenceError(
                f"OPENED credits {opened.credits} rows, WELCOME promised {self._window}", code="bad_credits"
            )
        if offered:
            self.kv_len = opened.cached_rows
        self.opened = opened
        self._chunk_rows = min(self._chunk_rows, opened.chunk_rows)
        self._window = self._granted = opened.credits
        return SessionOpened(self.stream, opened)

    def _on_result(self, frame: Frame) -> ResultTokens | ResultRows | None:
        if frame.seq <= self._answered_seq:
            return None  # resent
        if self._outputs_due == 0 or frame.seq != self._last_seq:
            raise SequenceError(
                f"RESULT for step {frame.seq}, "
                + (f"step {self._last_seq} is due" if self._outputs_due else "none is due"),
                code="unexpected_result",
            )
        if frame.pos != self.kv_len:
            raise SequenceError(
                f"the cloud holds {frame.pos} rows after step {frame.seq}, {self.kv_len} were sent",
                code="bad_kv_len",
            )
        event = self._result_tokens(frame) if self.open.shape == "prefix" else self._result_rows(frame)
        self._answered_seq = frame.seq
        self._outputs_due = 0
        self._granted = self._rows_sent + self._window
        return event

    def _result_tokens(self, frame: Frame) -> ResultTokens:
        body = parse_json(frame, ResultBody)
        if body.first_index != self.next_index or len(body.tokens) != 1:
            raise SequenceError(
                f"RESULT of step {frame.seq} holds {len(body.tokens)} tokens from {body.first_index}, "
                f"expected 1 from {self.next_index}",
                code="bad_output_index",
            )
        self._check_ids(body.tokens)
        self.next_index += 1
        self._acked_index = self.next_index
        self._streaming = self.open.streams and body.finish is None
        return ResultTokens(
            self.stream,
            frame.seq,
            frame.pos,
            body.first_index,
            body.tokens,
            body.logprobs,
            body.top,
            body.finish,
        )

    def _result_rows(self, frame: Frame) -> ResultRows:
        check_body(frame, self._result_codec)
        if frame.n_tok != self._outputs_due:
            raise SequenceError(
                f"RESULT of step {frame.seq} holds {frame.n_tok} rows, expected {self._outputs_due}",
                code="bad_output_rows",
            )
        return ResultRows(self.stream, frame.seq, frame.pos, frame)

    def _on_stream(self, frame: Frame, body: StreamBody) -> StreamTokens | None:
        end = body.first_index + len(body.tokens)
        if end <= self.next_index and not (self._streaming and body.finish and end == self.next_index):
            return None  # seen before
        if not self._streaming:
            raise SequenceError(
                f"STREAM up to token {end}, but the cloud is not generating", code="unexpected_stream"
            )
        if body.first_index > self.next_index:
            raise SequenceError(
                f"STREAM begins at token {body.first_index}, the next one is {self.next_index}",
                code="token_gap",
            )
        held = self.open.prompt_tokens + end - 1  # the newest token is not in the KV yet
        if end > self.open.max_tokens or frame.pos != held:
            raise SequenceError(
                f"STREAM up to token {end} of {self.open.max_tokens} with {frame.pos} rows held, "
                f"expected {held}",
                code="bad_kv_len",
            )
        self._check_ids(body.tokens)
        fresh = body.part(self.next_index)
        self.next_index = end
        self.kv_len = held
        self._streaming = body.finish is None
        self._acknowledge()
        return StreamTokens(
            self.stream, fresh.first_index, fresh.tokens, fresh.logprobs, fresh.top, fresh.finish
        )

    def _check_ids(self, tokens: Sequence[int]) -> None:
        if tokens and max(tokens) >= self._vocab_size:
            raise CodecError(
                f"token id {max(tokens)}, the vocabulary has {self._vocab_size}", code="bad_token_id"
            )

    def _acknowledge(self) -> None:
        """Twice per window: often enough that the cloud never waits, seldom enough to cost nothing."""
        window = self._limits.stream_window_tokens
        if self._streaming and 2 * (self.next_index - self._acked_index) >= window:
            self._acked_index = self.next_index
            credit = Credit(ack_index=self.next_index, window=window)
            self._send(json_frame(MsgType.CREDIT, credit, stream=self.stream, epoch=self.epoch), False)

    def _move(self, happened: EdgeInput) -> None:
        self.state = advance(EDGE_TABLE, self.state, happened)


_INPUTS = {
    MsgType.OPENED: EdgeInput.RECV_OPENED,
    MsgType.RESULT: EdgeInput.RECV_RESULT,
    MsgType.STREAM: EdgeInput.RECV_STREAM,
    MsgType.CREDIT: EdgeInput.RECV_CREDIT,
}

"""The edge's half of one session: numbers the steps, spends the credits, emits each token once.

Made by EdgeConnection.open(). Signatures (stable):

    stream: int; epoch: int; open: Open; state: EdgeState; opened: Opened | None
    kv_len: int            rows the cloud holds once everything sent has arrived (of an unanswered VERIFY in
                           the prefix shape only the first is sure, and counted)
    next_index: int        index of the next token not yet reported
    credits: int           rows that may still be sent now
    chunk_rows: int        most rows one step may carry now (credits aside)
    awaiting_result: bool  an output-producing step is unanswered (rule 7)
    can_send(n_rows) -> bool
    step_rows(encoded, pos, n_tok, *, final, all_rows=False, truncate=False) -> int   seq
        encoded = (body, dtype, codec, raw_len) of activations.RowCodec.encode
    step_ids(ids, pos, *, final, all_rows=False, truncate=False) -> int               seq; split 0 only
    verify_rows(ids, encoded, pos, *, truncate=False) -> int                          seq
    verify_ids(ids, pos, *, truncate=False) -> int                       seq; split 0 in the U-shape only
    digests: RowDigests    over the rows sent; with each of the four calls above the owner cuts it to `pos`
                           and appends the raw rows (RowCodec.encode_raw) or ids (<i4)
    cancel() -> None       close(offer=PrefixOffer(), reason="") -> None               both idempotent

Outlives its connection: after SessionSuspended, EdgeConnection.resume takes it to another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from isthmus.protocol.admission import check_body, result_codec
from isthmus.protocol.connection import unexpected
from isthmus.protocol.digests import RowDigests
from isthmus.protocol.edge_resume import ResumableSteps
from isthmus.protocol.edge_steps import Send
from isthmus.protocol.errors import CodecError, RequestError, SequenceError
from isthmus.protocol.events import (
    CreditGranted,
    EdgeEvent,
    ResultRows,
    ResultTokens,
    SessionClosed,
    SessionOpened,
    StreamTokens,
)
from isthmus.protocol.frames import Frame, MsgType, json_frame, parse_json
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
from isthmus.protocol.states import EdgeInput, EdgeState


class EdgeSession(ResumableSteps):
    """One generation on one stream. Methods queue frames on the connection; nothing here waits."""

    def __init__(
        self, stream: int, request: Open, terms: Welcome, send: Send, drop_unsent: Callable[[], None]
    ) -> None:
        super().__init__(stream, request, terms, send)
        self._result_codec = result_codec(request, terms.hidden)
        self._drop_unsent = drop_unsent
        self._move(EdgeInput.SEND_OPEN)
        self._send(json_frame(MsgType.OPEN, request, stream=stream, epoch=self.epoch), False)

    def cancel(self) -> None:
        """Stop and keep nothing. Steps that have not left are dropped. Idempotent."""
        if self._leave(EdgeInput.SEND_CANCEL):
            self._drop_unsent()
            self._send(json_frame(MsgType.CANCEL, Cancel(), stream=self.stream, epoch=self.epoch), False)

    def close(self, offer: PrefixOffer | None = None, reason: str = "") -> None:
        """Stop; the cloud may keep its KV under `offer`, whose lengths are at most `kv_len`. Idempotent. Rows
        that a replay had yet to overwrite are left out: the cloud holds others there."""
        entries = list(offer.entries) if offer else []
        if self._owed is not None:
            entries = [entry for entry in entries if entry[0] <= self._owed.start]
        body = Close(offer=PrefixOffer(entries=entries), reason=reason)
        if body.offer.entries and body.offer.entries[-1][0] > self.kv_len:
            raise RequestError(
                f"the offer names {body.offer.entries[-1][0]} rows, the cloud holds {self.kv_len}",
                code="bad_offer",
            )
        if self._leave(EdgeInput.SEND_CLOSE):
            self._send(json_frame(MsgType.CLOSE, body, stream=self.stream, epoch=self.epoch), False)

    def _leave(self, how: EdgeInput) -> bool:
        """Whether this is the first CANCEL or CLOSE, and it can be sent."""
        before = self.state
        self._move(how)
        return before in (EdgeState.OPENING, EdgeState.PREFILL, EdgeState.DECODE)

    # ---- receiving; called by the connection

    def receive(self, frame: Frame) -> EdgeEvent | None:
        """Take in a frame of this stream and epoch. Raises for what the cloud must not send."""
        if frame.type is MsgType.CLOSED:
            closed = parse_json(frame, Closed)
            self._move(EdgeInput.RECV_CLOSED)
            return SessionClosed(self.stream, closed)
        if frame.type is MsgType.RESUMED:
            return self._on_resumed(frame)
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
            self.digests = RowDigests(opened.cached_rows)
        self.opened = opened
        self._resume_token = opened.resume_token
        self._chunk_rows = min(self._chunk_rows, opened.chunk_rows)
        self._window = opened.credits
        self._granted = max(self._granted, opened.credits)
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
        event = self._result_tokens(frame) if self.open.shape == "prefix" else self._result_rows(frame)
        self.kv_len = frame.pos
        self._answered_seq = self._taken_seq = frame.seq
        self._unanswered.clear()
        if frame.pos < self._step_end:  # the rest of a draft chain
            self.digests.truncate(frame.pos)
        self._outputs_due = 0
        self._granted = self._rows_sent + self._window
        return event

    def _result_tokens(self, frame: Frame) -> ResultTokens:
        body = parse_json(frame, ResultBody)
        count, due = len(body.tokens), self._outputs_due
        most = min(due, self.open.max_tokens - self.next_index)
        if body.first_index != self.next_index or not 1 <= count <= most:
            raise SequenceError(
                f"RESULT of step {frame.seq} holds {count} tokens from {body.first_index}, expected "
                f"{'1' if most == 1 else f'1 to {most}'} from {self.next_index}",
                code="bad_output_index",
            )
        self._check_held(frame, self._step_end - (due - count))
        if body.tokens[:-1] != self._drafts[1:count]:
            raise SequenceError(
                f"RESULT of step {frame.seq} keeps {count} rows of the draft, which differs from its tokens "
                "before the last",
                code="bad_verification",
            )
        self._check_ids(body.tokens)
        self.next_index += count
        self._begins_at = None
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
            body.cloud_us,
        )

    def _check_held(self, frame: Frame, expected: int) -> None:
        if frame.pos != expected:
            raise SequenceError(
                f"the cloud holds {frame.pos} rows after step {frame.seq}, {expected} were expected",
                code="bad_kv_len",
            )

    def _result_rows(self, frame: Frame) -> ResultRows:
        self._check_held(frame, self._step_end)
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
            self.stream,
            fresh.first_index,
            fresh.tokens,
            fresh.logprobs,
            fresh.top,
            fresh.finish,
            fresh.cloud_us,
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


_INPUTS = {
    MsgType.OPENED: EdgeInput.RECV_OPENED,
    MsgType.RESULT: EdgeInput.RECV_RESULT,
    MsgType.STREAM: EdgeInput.RECV_STREAM,
    MsgType.CREDIT: EdgeInput.RECV_CREDIT,
}

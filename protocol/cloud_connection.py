"""The cloud's end of a connection, sans-IO: messages in → events and messages out.

Signatures (stable):

    ServerInfo(identity, cloud_precision, num_layers, …)         frozen dataclass, see handshake.py
    CloudConnection(info: ServerInfo, limits: Limits, *, tenant: str, now: float, load: Load = Load(),
                    usage: TenantUsage | None = None,            shared by the tenant's connections
                    canaries: CanaryCache | None = None,         shared by all connections (a plain dict)
                    refusal: RejectedError | None = None)        answers HELLO with this REJECT
    receive(data, now) -> list[CloudEvent]   data_to_send(max_bytes=None)   has_data   is_closed
    on_tick(now) -> list[CloudEvent]                             HELLO deadline, silent edge
    lost() -> list[CloudEvent]                                   SessionFailed each, ConnectionFailed
    opened(stream, *, session_id: str, cached_rows=0, credits=None, chunk_rows=None, resume_token="")
    credit(stream, rows)                                         `rows` more non-output rows are computed
    result_tokens(stream, tokens, *, kv_len, logprobs=None, top=None, finish=None)    prefix shape
    result_rows(stream, encoded, n_tok, *, kv_len)               U-shape; encoded as RowCodec.encode gives
    stream_tokens(stream, tokens, *, logprobs=None, top=None, finish=None)            offload, after RESULT
    stream_room(stream) -> int                                   tokens that would go out at once now
    closed(stream, *, pages_freed=0, kv_len=None, cached=False)  answers CANCEL and CLOSE
    fail(stream, error: IsthmusError)                            ends one session with ERROR
    fail_connection(error) -> list[CloudEvent]                   ends all with a fatal ERROR
    status(load)   canary_result(seq, split, *, ok, error, tolerance)   go_away(deadline_s, alternative="")
    sessions: dict[int, CloudSession] (live)   hello: Hello | None

Calls for a stream that is gone or closing (CANCEL raced the engine) are dropped quietly, so the server need
not look first. An engine that contradicts the session (kv_len differs, tokens without a step) raises
SequenceError: a bug of this side. After ConnectionFailed: flush, close the socket.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from isthmus.protocol.activations import Encoded
from isthmus.protocol.admission import check_open
from isthmus.protocol.canaries import CanaryCache, CloudCanaries
from isthmus.protocol.cloud_session import CloudSession
from isthmus.protocol.connection import FIRST_EPOCH, Connection, is_stale, unexpected
from isthmus.protocol.errors import (
    IsthmusError,
    NotFoundError,
    OverloadedError,
    ProtocolError,
    RejectedError,
    SequenceError,
)
from isthmus.protocol.events import (
    CancelRequested,
    CloseRequested,
    CloudEvent,
    ConnectionFailed,
    HelloAccepted,
    SessionFailed,
    SessionOpenRequested,
    StreamWindow,
)
from isthmus.protocol.frames import Frame, MsgType, json_frame, parse_json
from isthmus.protocol.handshake import ServerInfo, answer_hello
from isthmus.protocol.limits import Limits, TenantUsage
from isthmus.protocol.messages import (
    CanaryResult,
    Cancel,
    Close,
    Closed,
    Credit,
    ErrorBody,
    Finish,
    GoAway,
    Hello,
    Load,
    Open,
    Opened,
    Reject,
    Status,
    TopTokens,
    Welcome,
)
from isthmus.protocol.states import CloudInput, ConnectionInput, ConnectionState

__all__ = ["CanaryCache", "CloudConnection", "ServerInfo"]


class _Agreed(NamedTuple):
    """What HELLO and WELCOME settled."""

    terms: Welcome
    canaries: CloudCanaries


class CloudConnection(Connection[CloudEvent]):
    """The server's end. See the head of the file for the signatures."""

    def __init__(
        self,
        info: ServerInfo,
        limits: Limits,
        *,
        tenant: str,
        now: float,
        load: Load | None = None,
        usage: TenantUsage | None = None,
        canaries: CanaryCache | None = None,
        refusal: RejectedError | None = None,
    ) -> None:
        super().__init__(limits, ConnectionState.HANDSHAKE)
        self.info = info
        self.tenant = tenant
        self.hello: Hello | None = None
        self.sessions: dict[int, CloudSession] = {}
        self._started = self._last_heard = now
        self._load = load or Load()
        self._usage = usage if usage is not None else TenantUsage.from_limits(limits)
        self._cache = canaries if canaries is not None else {}
        self._refusal = refusal
        self._agreed: _Agreed | None = None
        self._highest_stream = 0
        self._newest_ping = 0

    @property
    def _agreement(self) -> _Agreed:
        assert self._agreed is not None  # the state table lets nothing else through before HELLO
        return self._agreed

    # ---- deadlines and ends

    def on_tick(self, now: float) -> list[CloudEvent]:
        """HELLO deadline, silent edge, edge that does not read."""
        if self._state is ConnectionState.HANDSHAKE:
            waited = now - self._started
            if waited >= self.limits.hello_timeout_s:
                return self._reject(
                    RejectedError(
                        f"no HELLO within {waited:.1f} s, allowed are {self.limits.hello_timeout_s} s",
                        code="hello_timeout",
                    )
                )
        if self._state is not ConnectionState.OPEN:
            return []
        silence = self._silence_s(now)
        if silence >= self.limits.idle_after_s:
            return self.fail_connection(
                ProtocolError(
                    f"the edge has been silent for {silence:.1f} s, allowed are {self.limits.idle_after_s} s",
                    code="edge_silent",
                )
            )
        if self._outbox.nbytes > self.limits.max_outbox_bytes:
            return self.fail_connection(
                OverloadedError(
                    f"{self._outbox.nbytes} bytes wait for an edge that does not read, allowed are "
                    f"{self.limits.max_outbox_bytes}",
                    code="edge_not_reading",
                )
            )
        return []

    def lost(self) -> list[CloudEvent]:
        """The socket is gone: every session ends."""
        return self._end(ProtocolError("the edge closed the connection", code="edge_gone"), CloudInput.LOST)

    def fail_connection(self, error: IsthmusError) -> list[CloudEvent]:
        events = self._end(error, CloudInput.ERROR)
        if events:
            self._send_error(0, 0, ErrorBody.from_error(error, fatal=True))
        return events

    def _end(self, error: IsthmusError, happened: CloudInput) -> list[CloudEvent]:
        if self.is_closed:
            return []
        self._move(ConnectionInput.FAIL)
        self._outbox.clear()
        events: list[CloudEvent] = []
        for stream in list(self.sessions):
            self._forget(stream).end(happened)
            events.append(SessionFailed(stream, error))
        return [*events, ConnectionFailed(error)]

    def _fail_stream(self, stream: int, error: IsthmusError) -> list[CloudEvent]:
        if stream in self.sessions:
            self.fail(stream, error)
            return [SessionFailed(stream, error)]
        self._send_error(stream, 0, ErrorBody.from_error(error))
        return []

    def _forget(self, stream: int) -> CloudSession:
        session = self.sessions.pop(stream)
        self._usage.release(session.kv_bytes)
        return session

    # ---- from the edge: the connection

    def _on_connection_frame(self, frame: Frame, now: float) -> list[CloudEvent]:
        match frame.type:
            case MsgType.HELLO:
                return self._on_hello(frame)
            case MsgType.PING:
                self._newest_ping = frame.seq
                self._send_latest(Frame(MsgType.PONG, seq=frame.seq))
                return []
            case MsgType.CANARY:
                return [self._agreement.canaries.received(frame, self.info.hidden)]
            case MsgType.ERROR:
                return self._end(parse_json(frame, ErrorBody).to_error(), CloudInput.ERROR)
            case _:
                raise unexpected(frame)

    def _on_hello(self, frame: Frame) -> list[CloudEvent]:
        if self._state is not ConnectionState.HANDSHAKE:
            raise SequenceError("HELLO came twice on one connection", code="hello_twice")
        hello = parse_json(frame, Hello)
        canaries = CloudCanaries(
            self._cache, hello.identity.weights_hash, hello.edge_precision, self.info.num_layers
        )
        try:
            if self._refusal is not None:
                raise self._refusal
            terms = answer_hello(hello, self.info, self.limits, self._load, canaries.passed())
        except RejectedError as error:
            return self._reject(error)
        self._move(ConnectionInput.WELCOME)
        self.hello = hello
        self._agreed = _Agreed(terms, canaries)
        self._send_urgent(MsgType.WELCOME, terms)
        return [HelloAccepted(hello, terms.match)]

    def _reject(self, error: RejectedError) -> list[CloudEvent]:
        self._move(ConnectionInput.REJECT)
        self._send_urgent(MsgType.REJECT, Reject.from_error(error))
        return [ConnectionFailed(error)]

    # ---- from the edge: the sessions

    def _on_session_frame(self, frame: Frame) -> list[CloudEvent]:
        if frame.type is MsgType.OPEN:
            return self._on_open(frame)
        if frame.type is MsgType.RESUME:
            raise NotFoundError("no such session is kept here", code="unknown_session")
        session = self.sessions.get(frame.stream)
        if session is None:
            if frame.stream <= self._highest_stream or frame.type is MsgType.ERROR:
                return []  # it crossed the session's end
            raise SequenceError(
                f"{frame.type.name} for stream {frame.stream}, which was never opened", code="unknown_stream"
            )
        if is_stale(frame, session.epoch):
            return []
        match frame.type:
            case MsgType.STEP | MsgType.VERIFY:
                step = session.step(frame)
                return [step] if step else []
            case MsgType.CREDIT:
                alive = session.acknowledge(parse_json(frame, Credit))
                return [StreamWindow(frame.stream, session.stream_room)] if alive else []
            case MsgType.CANCEL:
                parse_json(frame, Cancel)
                return [CancelRequested(frame.stream)] if session.cancel() else []
            case MsgType.CLOSE:
                close = parse_json(frame, Close)
                return [CloseRequested(frame.stream, close)] if session.close(close) else []
            case MsgType.ERROR:
                error = parse_json(frame, ErrorBody).to_error()
                self._forget(frame.stream).end(CloudInput.ERROR)
                return [SessionFailed(frame.stream, error)]
            case _:
                raise unexpected(frame)

    def _on_open(self, frame: Frame) -> list[CloudEvent]:
        if frame.stream <= self._highest_stream:
            raise SequenceError(
                f"OPEN on stream {frame.stream}, but ids up to {self._highest_stream} were used",
                code="stream_reused",
            )
        # From here on the id is used up, so that steps pipelined behind a refused OPEN are dropped.
        self._highest_stream = frame.stream
        if frame.epoch != FIRST_EPOCH:
            raise SequenceError(
                f"OPEN in epoch {frame.epoch}, sessions begin in {FIRST_EPOCH}", code="epoch_ahead"
            )
        request = parse_json(frame, Open)
        terms, canaries = self._agreement
        check_open(request, terms)
        if terms.match == "canary" and request.split > 0 and not canaries.is_ok(request.split):
            raise RejectedError(
                f"other weights on each side: split {request.split} needs an agreeing canary first",
                code="canary_required",
            )
        if len(self.sessions) >= terms.limits.max_sessions:
            raise OverloadedError(
                f"{len(self.sessions)} sessions are open on this connection, allowed are "
                f"{terms.limits.max_sessions}",
                code="too_many_sessions",
            )
        layers = self.info.num_layers - request.split
        kv_bytes = request.max_context * layers * self.info.kv_bytes_per_token_layer
        self._usage.admit(kv_bytes)
        self.sessions[frame.stream] = CloudSession(frame.stream, request, terms, kv_bytes, self._send)
        return [SessionOpenRequested(frame.stream, request)]

    # ---- from the engine; a stream that is gone is dropped quietly

    def opened(
        self,
        stream: int,
        *,
        session_id: str,
        cached_rows: int = 0,
        credits: int | None = None,
        chunk_rows: int | None = None,
        resume_token: str = "",
    ) -> None:
        """Answer SessionOpenRequested. `credits` (default, and at least, initial_credits_rows): rows in
        flight; `chunk_rows` (default max_rows_per_step): the step size the cloud likes."""
        if session := self.sessions.get(stream):
            session.opened(
                Opened(
                    session_id=session_id,
                    resume_token=resume_token,
                    cached_rows=cached_rows,
                    credits=self.limits.initial_credits_rows if credits is None else credits,
                    chunk_rows=self.limits.max_rows_per_step if chunk_rows is None else chunk_rows,
                )
            )

    def credit(self, stream: int, rows: int) -> None:
        """`rows` more rows of steps without output are computed. (A RESULT returns its step's credits.)"""
        if session := self.sessions.get(stream):
            session.credit(rows)

    def result_tokens(
        self,
        stream: int,
        tokens: Sequence[int],
        *,
        kv_len: int,
        logprobs: Sequence[float | None] | None = None,
        top: Sequence[TopTokens] | None = None,
        finish: Finish | None = None,
    ) -> None:
        """Prefix shape: the one token of the FINAL step, or those of VERIFY up to the first that is not its
        draft; `kv_len` rows are kept. In offload, without `finish`, `stream_tokens` goes on from here."""
        if session := self.sessions.get(stream):
            session.result_tokens(tokens, kv_len, logprobs, top, finish)

    def result_rows(self, stream: int, encoded: Encoded, n_tok: int, *, kv_len: int) -> None:
        """U-shape: final hidden rows (before the final norm) of the step, encoded in `open.result_format`."""
        if session := self.sessions.get(stream):
            session.result_rows(Encoded(*encoded), n_tok, kv_len)

    def stream_tokens(
        self,
        stream: int,
        tokens: Sequence[int],
        *,
        logprobs: Sequence[float | None] | None = None,
        top: Sequence[TopTokens] | None = None,
        finish: Finish | None = None,
    ) -> None:
        """Offload: the next tokens. What exceeds the edge's window waits here until it acknowledges; an
        engine that minds `stream_room` and StreamWindow generates no further ahead than that."""
        if session := self.sessions.get(stream):
            session.stream_tokens(tokens, logprobs, top, finish)

    def stream_room(self, stream: int) -> int:
        """Tokens that would go out at once; 0 for a stream that is gone."""
        session = self.sessions.get(stream)
        return session.stream_room if session else 0

    def closed(
        self, stream: int, *, pages_freed: int = 0, kv_len: int | None = None, cached: bool = False
    ) -> None:
        """Answer CancelRequested or CloseRequested once the pages are free (or kept). Ends the session."""
        if session := self.sessions.get(stream):
            held = session.kv_len if kv_len is None else kv_len
            session.closed(Closed(pages_freed=pages_freed, kv_len=held, cached=cached))
            self._forget(stream)

    def fail(self, stream: int, error: IsthmusError) -> None:
        """End one session with ERROR. The caller frees what it held; no event follows."""
        if session := self.sessions.get(stream):
            body = ErrorBody.from_error(error, expected=(session.last_seq + 1, session.kv_len))
            self._send_error(stream, session.epoch, body)
            self._forget(stream).end(CloudInput.ERROR)

    def canary_result(self, seq: int, split: int, *, ok: bool, error: float, tolerance: float) -> None:
        """Answer CanaryRequested; the result is cached for (edge weights, edge precision, split)."""
        if self._state is ConnectionState.OPEN:
            result = CanaryResult(split=split, ok=ok, error=error, tolerance=tolerance)
            self._send(self._agreement.canaries.answer(seq, result))

    def status(self, load: Load) -> None:
        """Push STATUS; a newer one replaces one that has not left."""
        if self._state is ConnectionState.OPEN:
            self._send_latest(json_frame(MsgType.STATUS, Status(load=load, echo=self._newest_ping)))

    def go_away(self, deadline_s: float, alternative: str = "") -> None:
        """Tell the edge to open nothing new. Its sessions go on; `fail` OPENs that crossed."""
        if self._state is ConnectionState.OPEN:
            self._send_urgent(MsgType.GOAWAY, GoAway(deadline_s=deadline_s, alternative=alternative))

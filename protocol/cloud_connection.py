"""The cloud's end of a connection, sans-IO: messages in → events and messages out.

Signatures (stable):

    ServerInfo(identity, cloud_precision, num_layers, …)         frozen dataclass, see handshake.py
    CloudConnection(info: ServerInfo, limits: Limits, *, tenant: str, now: float, load: Load = Load(),
                    usage: TenantUsage | None = None,            shared by the tenant's connections
                    canaries: CanaryCache | None = None,         shared by all connections (a plain dict)
                    refusal: RejectedError | None = None)        answers HELLO with this REJECT
    receive(data, now) -> list[CloudEvent]   data_to_send(max_bytes=None)   has_data   is_closed
    on_tick(now) -> list[CloudEvent]                             HELLO deadline, silent edge
    lost(clean=False) -> list[CloudEvent]                        per session SessionDetached (it has a resume
        token; not if the edge left on purpose: `clean`) or SessionFailed; then ConnectionFailed
    opened(stream, *, session_id: str, cached_rows=0, credits=None, chunk_rows=None, resume_token="")
    credit(stream, rows)                                         `rows` more non-output rows are computed
    result_tokens(stream, tokens, *, kv_len, logprobs=None, top=None, finish=None, cloud_us=0)  prefix shape
    result_rows(stream, encoded, n_tok, *, kv_len)               U-shape; encoded as RowCodec.encode gives
    stream_tokens(stream, tokens, *, logprobs=None, top=None, finish=None, cloud_us=0)  offload, after RESULT
    stream_room(stream) -> int                                   tokens that would go out at once now
    closed(stream, *, pages_freed=0, kv_len=None, cached=False)  answers CANCEL and CLOSE
    fail(stream, error: IsthmusError)                            ends one session with ERROR
    fail_connection(error) -> list[CloudEvent]                   a fatal ERROR, else as lost(), `clean` if the
        error's code is `key_revoked`
    resumed(stream, session: CloudSession, resume: Resume, *, resume_token, chunk_rows=None) -> bool
    refuse(stream, error)                                        ERROR instead; both answer ResumeRequested
    release(stream, error=None) -> CloudSession                  takes a session out, for another connection
    status(load)   canary_result(seq, split, *, ok, error, tolerance)   go_away(deadline_s, alternative="")
    sessions: dict[int, CloudSession] (live)   hello: Hello | None

Calls for a stream that is gone or closing (CANCEL raced the engine) are dropped quietly, so the server need
not look first. An engine that contradicts the session (kv_len differs, tokens without a step) raises
SequenceError: a bug of this side. After ConnectionFailed: flush, close the socket.
"""

from __future__ import annotations

from isthmus.protocol.admission import check_open
from isthmus.protocol.canaries import CanaryCache, CloudCanaries
from isthmus.protocol.cloud_answers import Agreed, CloudAnswers
from isthmus.protocol.cloud_session import CloudSession
from isthmus.protocol.connection import FIRST_EPOCH, is_stale, unexpected
from isthmus.protocol.errors import (
    IsthmusError,
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
    ResumeRequested,
    SessionDetached,
    SessionFailed,
    SessionOpenRequested,
    StreamWindow,
)
from isthmus.protocol.frames import Frame, MsgType, parse_json
from isthmus.protocol.handshake import ServerInfo, answer_hello
from isthmus.protocol.limits import Limits, TenantUsage, TokenBucket
from isthmus.protocol.messages import (
    Cancel,
    Close,
    Credit,
    ErrorBody,
    Hello,
    Load,
    Open,
    Reject,
    Resume,
)
from isthmus.protocol.probes import check_sizes, padded_frame
from isthmus.protocol.states import CloudInput, CloudState, ConnectionInput, ConnectionState

__all__ = ["CanaryCache", "CloudConnection", "ServerInfo"]


class CloudConnection(CloudAnswers):
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
        super().__init__(limits, usage if usage is not None else TenantUsage.from_limits(limits))
        self.info = info
        self.tenant = tenant
        self.hello: Hello | None = None
        self._started = self._last_heard = now
        self._load = load or Load()
        self._cache = canaries if canaries is not None else {}
        self._refusal = refusal
        self._highest_stream = 0
        self._replies = TokenBucket(limits.probe_reply_bytes_per_s, limits.probe_reply_burst_bytes)

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

    def lost(self, *, clean: bool = False) -> list[CloudEvent]:
        """The socket is gone. `clean`: the edge closed it on purpose, and every session ends."""
        error = ProtocolError("the edge closed the connection", code="edge_gone")
        return self._end(error, CloudInput.LOST, keep=not clean)

    def fail_connection(self, error: IsthmusError) -> list[CloudEvent]:
        events = self._end(error, CloudInput.ERROR, keep=error.code != "key_revoked")
        if events:
            self._send_error(0, 0, ErrorBody.from_error(error, fatal=True))
        return events

    def _end(self, error: IsthmusError, happened: CloudInput, *, keep: bool = True) -> list[CloudEvent]:
        if self.is_closed:
            return []
        self._move(ConnectionInput.FAIL)
        self._outbox.clear()
        self._resuming.clear()
        events: list[CloudEvent] = []
        for stream, session in list(self.sessions.items()):
            if keep and session.resumable and session.state is CloudState.ACTIVE:
                events.append(SessionDetached(stream, self.release(stream)))
            else:
                self._forget(stream).end(happened)
                events.append(SessionFailed(stream, error))
        return [*events, ConnectionFailed(error)]

    def _fail_stream(self, stream: int, error: IsthmusError) -> list[CloudEvent]:
        if stream in self.sessions:
            self.fail(stream, error)
            return [SessionFailed(stream, error)]
        self._send_error(stream, 0, ErrorBody.from_error(error))
        return []

    # ---- from the edge: the connection

    def _on_connection_frame(self, frame: Frame, now: float) -> list[CloudEvent]:
        match frame.type:
            case MsgType.HELLO:
                return self._on_hello(frame)
            case MsgType.PING:
                self._newest_ping = frame.seq
                self._send_latest(Frame(MsgType.PONG, seq=frame.seq))
                return []
            case MsgType.PROBE:
                self._on_probe(frame, now)
                return []
            case MsgType.CANARY:
                return [self._agreement.canaries.received(frame, self.info.hidden)]
            case MsgType.ERROR:
                return self._end(parse_json(frame, ErrorBody).to_error(), CloudInput.ERROR)
            case _:
                raise unexpected(frame)

    def _on_probe(self, frame: Frame, now: float) -> None:
        """Who asks for too much gets no padding, rather than an error: an edge that measures once too often
        shall not lose its requests for it."""
        most = self.limits.max_probe_bytes
        check_sizes(len(frame.body), frame.pos, most=most)
        if frame.pos and self._replies.take(now, frame.pos) == 0:
            self._send(padded_frame(MsgType.PROBE_REPLY, frame.seq, frame.pos, most=most))
        else:
            self._send_latest(padded_frame(MsgType.PROBE_REPLY, frame.seq, 0, most=most))

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
        self._agreed = Agreed(terms, canaries)
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
            return self._on_resume(frame)
        session = self.sessions.get(frame.stream)
        if session is None:
            if frame.type is MsgType.ERROR:
                self._resuming.discard(frame.stream)
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

    def _on_resume(self, frame: Frame) -> list[CloudEvent]:
        if frame.stream in self._resuming or frame.stream in self.sessions:
            return []  # repeated on its way
        self._use_stream(frame)
        resume = parse_json(frame, Resume)
        self._resuming.add(frame.stream)
        return [ResumeRequested(frame.stream, resume)]

    def _use_stream(self, frame: Frame) -> None:
        """From here on the id is used up, so that steps pipelined behind a refused OPEN are dropped."""
        if frame.stream <= self._highest_stream:
            raise SequenceError(
                f"{frame.type.name} on stream {frame.stream}, but ids up to {self._highest_stream} were used",
                code="stream_reused",
            )
        self._highest_stream = frame.stream

    def _on_open(self, frame: Frame) -> list[CloudEvent]:
        self._use_stream(frame)
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

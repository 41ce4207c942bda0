"""The edge's end of a connection, sans-IO: messages in → events and messages out.

Signatures (stable):

    EdgeConnection(hello: Hello, limits: Limits = Limits())
    start(now) -> None                         queues HELLO, starts the WELCOME deadline
    receive(data: bytes | str, now) -> list[EdgeEvent]          one whole websocket message
    data_to_send(max_bytes=None, now=None) -> list[bytes]       websocket messages, urgent ones first; with
                                               max_bytes at least one, then as many as fit; with `now` their
                                               arrival is measured (ChunkArrived)
    on_tick(now) -> list[EdgeEvent]            pings, WELCOME deadline, dead peer; call every ~0.1–0.25 s
    progress(now) -> None                      optional: the transport drained queued bytes (slow ≠ dead)
    lost(error=None) -> list[EdgeEvent]        the socket closed: per session SessionSuspended (it can be
                                               resumed elsewhere) or SessionFailed; then ConnectionFailed
    open(Open) -> EdgeSession                  raises before anything is sent (see the method)
    resume(EdgeSession) -> None                of another connection; SessionResumed or SessionFailed answers
    needs_canary(split) -> bool
    canary(split, rows: float32[n, hidden]) -> None             CanaryDone event answers
    ping(now) -> None                          an extra ping (on_tick pings by itself); RttMeasured answers
    probe(up_bytes, down_bytes, now) -> int    seq; ProbeDone answers; at most max_probe_bytes each way
    close() -> None                            nothing is sent; receive and on_tick become no-ops
    welcome: Welcome | None   is_closed: bool   draining: bool   has_data: bool
    is_link_free: bool        nothing larger than a row is under way
    sessions: dict[int, EdgeSession] (live ones)

After ConnectionFailed or Rejected: flush data_to_send(), close the socket.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.admission import check_open
from isthmus.protocol.canaries import EdgeCanaries
from isthmus.protocol.connection import Connection, is_stale, unexpected
from isthmus.protocol.edge_session import EdgeSession
from isthmus.protocol.errors import (
    CloudLostError,
    CloudTimeoutError,
    IsthmusError,
    OverloadedError,
    RejectedError,
    RequestError,
    SequenceError,
)
from isthmus.protocol.events import (
    ConnectionFailed,
    EdgeEvent,
    GoingAway,
    Rejected,
    SessionClosed,
    SessionFailed,
    SessionSuspended,
    StatusReceived,
    Welcomed,
)
from isthmus.protocol.frames import Frame, MsgType, parse_json
from isthmus.protocol.handshake import check_welcome
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import (
    ErrorBody,
    GoAway,
    Hello,
    Open,
    Reject,
    Status,
    Welcome,
)
from isthmus.protocol.pings import Pings
from isthmus.protocol.probes import check_sizes, padded_frame
from isthmus.protocol.states import ConnectionInput, ConnectionState, EdgeInput

_MAX_STREAM = 2**32 - 1


class EdgeConnection(Connection[EdgeEvent]):
    """The client's end. See the head of the file for the signatures."""

    def __init__(self, hello: Hello, limits: Limits | None = None) -> None:
        super().__init__(limits or Limits(), ConnectionState.IDLE)
        self.hello = hello
        self.welcome: Welcome | None = None
        self.draining = False
        self.sessions: dict[int, EdgeSession] = {}
        self._next_stream = 1
        self._started = 0.0
        self._pings = Pings()
        self._received_there = 0  # bytes, by the newest STATUS
        self._canaries = EdgeCanaries(())

    # ---- for the owner

    def start(self, now: float) -> None:
        """Queue HELLO; the cloud has `hello_timeout_s` to answer."""
        self._move(ConnectionInput.HELLO)
        self._started = self._last_heard = now
        self._send_urgent(MsgType.HELLO, self.hello)

    def open(self, request: Open) -> EdgeSession:
        """Start a session. With an empty offer its steps may follow at once, without waiting for OPENED.

        Nothing is sent where the terms forbid it: RequestError or CodecError (a field), OverloadedError (too
        many sessions, or the cloud drains), RejectedError (rule 8: the split needs a canary).
        """
        terms = self._terms()
        if self.draining:
            raise OverloadedError("the cloud is going away and opens nothing new", code="draining")
        if len(self.sessions) >= terms.limits.max_sessions:
            raise OverloadedError(
                f"{len(self.sessions)} sessions are open, the cloud allows {terms.limits.max_sessions}",
                code="too_many_sessions",
            )
        check_open(request, terms)
        if self.needs_canary(request.split):
            raise RejectedError(
                f"other weights on each side: split {request.split} needs a canary first",
                code="canary_required",
                hint="call canary(split, rows) and wait for CanaryDone",
            )
        size = len(request.model_dump_json())
        if size > terms.limits.max_control_bytes:
            raise RequestError(
                f"OPEN of {size} bytes, the cloud takes {terms.limits.max_control_bytes}",
                code="too_large",
                hint="shorten the prefix offer or the context ids",
            )
        stream = self._free_stream()
        session = EdgeSession(stream, request, terms, self._send_step, partial(self._outbox.drop, stream))
        self._add(session)
        return session

    def resume(self, session: EdgeSession) -> None:
        """Go on here with a session whose connection is gone. It gets a new stream id.

        Nothing is sent where it can't be: OverloadedError (the cloud drains, stream ids are used up) or
        SequenceError (not suspended, another model, digests that don't cover what was sent).
        """
        terms = self._terms()
        if self.draining:
            raise OverloadedError("the cloud is going away and resumes nothing", code="draining")
        stream = self._free_stream()
        session.resume(stream, terms, self._send_step, partial(self._outbox.drop, stream))
        self._add(session)

    def _free_stream(self) -> int:
        if self._next_stream > _MAX_STREAM:
            raise OverloadedError("all stream ids of this connection are used up", code="streams_used_up")
        return self._next_stream

    def _add(self, session: EdgeSession) -> None:
        self._next_stream += 1
        self.sessions[session.stream] = session

    def needs_canary(self, split: int) -> bool:
        """Whether rule 8 asks for an agreeing canary before a session at `split`."""
        terms = self._terms()
        return terms.match == "canary" and split > 0 and split not in self._canaries.passed

    def canary(self, split: int, rows: NDArray[np.float32]) -> None:
        """Send the boundary rows f32[n, hidden] of identity.canary_ids at `split`; CanaryDone answers."""
        terms = self._terms()
        self._send(self._canaries.send(split, rows, terms.hidden))

    def ping(self, now: float) -> None:
        """Measure the round trip. `on_tick` does so every `heartbeat_s` by itself."""
        self._send_latest(self._pings.ping(now))

    def probe(self, up_bytes: int, down_bytes: int, now: float) -> int:
        """Send `up_bytes` of padding and ask for `down_bytes`; the probe's seq, and ProbeDone answers.
        FrameError for more than both ends allow."""
        check_sizes(up_bytes, down_bytes, most=self.max_probe_bytes)
        seq = self._pings.probe(up_bytes, down_bytes, now)
        most = self.limits.max_probe_bytes
        self._send(padded_frame(MsgType.PROBE, seq, up_bytes, most=most, pos=down_bytes))
        return seq

    @property
    def max_probe_bytes(self) -> int:
        """Of padding, each way."""
        return min(self.limits.max_probe_bytes, self._terms().limits.max_probe_bytes)

    @property
    def is_link_free(self) -> bool:
        """Nothing larger than a row is on its way up, and no probe either way."""
        return self._pings.is_link_free

    def data_to_send(self, max_bytes: int | None = None, now: float | None = None) -> list[bytes]:
        """As Connection.data_to_send. With `now`, a PING follows each large message, so that its PONG tells
        when that message had arrived."""
        messages = super().data_to_send(max_bytes)
        if now is None or self._state is not ConnectionState.OPEN:
            return messages
        return self._pings.with_markers(messages, now)

    def on_tick(self, now: float) -> list[EdgeEvent]:
        """Deadlines and heartbeat: a dead cloud is found `dead_after_s` after the last byte from it."""
        if self._state is ConnectionState.HANDSHAKE:
            waited = now - self._started
            if waited >= self.limits.hello_timeout_s:
                return self.fail_connection(
                    CloudTimeoutError(
                        f"no WELCOME within {waited:.1f} s, allowed are {self.limits.hello_timeout_s} s",
                        code="welcome_timeout",
                    )
                )
        if self._state is not ConnectionState.OPEN:
            return []
        silence = self._silence_s(now)
        if self._pings.unanswered and silence >= self.limits.dead_after_s:
            return self.fail_connection(
                CloudLostError(
                    f"the cloud has been silent for {silence:.1f} s, allowed are "
                    f"{self.limits.dead_after_s} s",
                    code="cloud_silent",
                )
            )
        last = self._pings.last_sent
        if last is None or now - last >= self.limits.heartbeat_s:
            self.ping(now)
        return []

    def lost(self, error: IsthmusError | None = None) -> list[EdgeEvent]:
        """The socket is gone."""
        return self._end(error or CloudLostError("the connection to the cloud was closed"), EdgeInput.LOST)

    def close(self) -> None:
        """Forget everything without a word, sessions too; the owner closes the socket."""
        error = CloudLostError("closed on this side", code="link_closed")
        self._end(error, EdgeInput.LOST, keep=False)

    def fail_connection(self, error: IsthmusError) -> list[EdgeEvent]:
        events = self._end(error, EdgeInput.ERROR)
        if events:
            self._send_error(0, 0, ErrorBody.from_error(error, fatal=True))
        return events

    # ---- receiving

    def _on_connection_frame(self, frame: Frame, now: float) -> list[EdgeEvent]:
        match frame.type:
            case MsgType.WELCOME:
                return self._on_welcome(parse_json(frame, Welcome))
            case MsgType.REJECT:
                error = parse_json(frame, Reject).to_error()
                self._move(ConnectionInput.REJECT)
                return [Rejected(error)]
            case MsgType.PONG:
                measured = self._pings.answered(frame.seq, now)
                return [measured] if measured else []
            case MsgType.PROBE_REPLY:
                done = self._pings.replied(frame, now)
                return [done] if done else []
            case MsgType.STATUS:
                return [self._on_status(parse_json(frame, Status))]
            case MsgType.CANARY_RESULT:
                return [self._canaries.answered(frame)]
            case MsgType.GOAWAY:
                self.draining = True
                return [GoingAway(parse_json(frame, GoAway))]
            case MsgType.ERROR:
                return self._end(parse_json(frame, ErrorBody).to_error(), EdgeInput.ERROR)
            case _:
                raise unexpected(frame)

    def _on_welcome(self, welcome: Welcome) -> list[EdgeEvent]:
        self._move(ConnectionInput.WELCOME)
        check_welcome(welcome, self.hello)
        self.welcome = welcome
        self._canaries = EdgeCanaries(welcome.canary_passed)
        return [Welcomed(welcome)]

    def _on_status(self, status: Status) -> StatusReceived:
        """A cloud that talks and gets nothing of what we send is at the other end of a link that is half
        dead."""
        if status.received <= self._received_there:
            self._last_heard = self._heard_before
        self._received_there = status.received
        return StatusReceived(status)

    def _on_session_frame(self, frame: Frame) -> list[EdgeEvent]:
        session = self.sessions.get(frame.stream)
        if session is None:
            if frame.stream < self._next_stream:
                return []  # it crossed the session's end
            raise SequenceError(
                f"{frame.type.name} for stream {frame.stream}, which was never opened", code="unknown_stream"
            )
        if frame.type is not MsgType.RESUMED and is_stale(frame, session.epoch):
            return []
        if frame.type is MsgType.ERROR:
            error = parse_json(frame, ErrorBody).to_error()
            session.end(EdgeInput.ERROR)
            del self.sessions[frame.stream]
            return [SessionFailed(frame.stream, error)]
        event = session.receive(frame)
        if isinstance(event, SessionClosed):
            del self.sessions[frame.stream]
        return [event] if event else []

    # ---- ending

    def _fail_stream(self, stream: int, error: IsthmusError) -> list[EdgeEvent]:
        session = self.sessions.pop(stream, None)
        self._outbox.drop(stream)
        self._send_error(stream, session.epoch if session else 0, ErrorBody.from_error(error))
        if session is None:
            return []
        session.end(EdgeInput.ERROR)
        return [SessionFailed(stream, error)]

    def _end(self, error: IsthmusError, happened: EdgeInput, *, keep: bool = True) -> list[EdgeEvent]:
        if self.is_closed:
            return []
        self._move(ConnectionInput.FAIL)
        self._outbox.clear()
        events: list[EdgeEvent] = []
        for stream, session in self.sessions.items():
            if keep and session.suspend():
                events.append(SessionSuspended(stream, error))
            else:
                session.end(happened)
                events.append(SessionFailed(stream, error))
        self.sessions.clear()
        return [*events, ConnectionFailed(error)]

    def _send_step(self, frame: Frame, droppable: bool) -> None:
        self._send(frame, droppable=droppable)

    def _terms(self) -> Welcome:
        if self.welcome is None or self.is_closed:
            raise SequenceError(f"the connection is {self._state}, not open", code="not_open")
        return self.welcome

"""One established websocket to a cloud: the adapter around the sans-IO `EdgeConnection`, and its sessions.

Three tasks (read, write, tick); the wire ends once, for good. Sessions that the cloud may still hold are then
suspended and can go on over another wire, all others fail.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from isthmus.edge.deadline import StepDeadline
from isthmus.edge.link_estimate import LinkEstimator
from isthmus.edge.link_session import LinkSession, as_lost
from isthmus.edge.logs import log, plain_code
from isthmus.protocol.edge_connection import EdgeConnection
from isthmus.protocol.errors import CloudLostError, IsthmusError, ProtocolError
from isthmus.protocol.events import (
    CanaryDone,
    ChunkArrived,
    ConnectionFailed,
    EdgeEvent,
    GoingAway,
    ProbeDone,
    Rejected,
    RttMeasured,
    SessionClosed,
    SessionFailed,
    SessionSuspended,
    StatusReceived,
    Welcomed,
)
from isthmus.protocol.frames import HEADER_BYTES
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import CanaryResult, GoAway, Hello, Load, Open, Welcome

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


TICK_S: Final = 0.1
# Handed to the transport at once: between two such batches a PING or a CANCEL overtakes prefill chunks.
BATCH_BYTES: Final = 64 * 1024
FLUSH_TIMEOUT_S: Final = 1.0


class Wire:
    """One established websocket with its protocol state and its three tasks; ends once, for good."""

    def __init__(
        self,
        socket_: ClientConnection,
        hello: Hello,
        limits: Limits,
        first_timeout_s: float,
        deadline: StepDeadline,
        estimator: LinkEstimator,
        *,
        url: str,
    ) -> None:
        """`url`: of the cloud, for the log. `first_timeout_s`: how long a session may wait for its first
        output; `deadline`: for a step. `estimator` is told what this connection shows of the link."""
        self.core = EdgeConnection(hello, limits)
        self.sessions: dict[int, LinkSession] = {}
        self.bytes_up = 0
        self.bytes_down = 0
        self.error: IsthmusError | None = None
        loop = asyncio.get_running_loop()
        self.welcomed: asyncio.Future[Welcome] = loop.create_future()
        self._canaries: deque[asyncio.Future[CanaryResult]] = deque()
        self._socket = socket_
        self._log = log.bind(cloud=url)
        self._leaving = False
        self.deadline = deadline
        self.estimator = estimator
        self.load = Load()
        self.load_at = monotonic()  # when the cloud told it
        self._probes: dict[int, asyncio.Future[ProbeDone]] = {}
        self.goaway: GoAway | None = None
        self._limits = limits
        self._first_timeout_s = first_timeout_s
        self._to_send = asyncio.Event()
        self._flushing = asyncio.Lock()
        self._idle = asyncio.Event()
        self._idle.set()
        self._backlog = 0
        self.core.start(monotonic())
        self.wake()
        self._tasks = [
            loop.create_task(work, name=f"isthmus-link-{name}")
            for name, work in (("read", self._read()), ("write", self._write()), ("tick", self._tick()))
        ]

    @property
    def initial_credits(self) -> int:
        """Rows a session may send before OPENED tells more."""
        return self.welcomed.result().limits.initial_credits_rows

    def wake(self) -> None:
        """There may be something to send."""
        if self.core.has_data and self.error is None:
            self._idle.clear()
            self._to_send.set()

    async def drained(self) -> None:
        """Wait until everything queued was taken by the transport (or the connection ended)."""
        if not self._idle.is_set():
            await self._idle.wait()

    def open(self, message: Open) -> LinkSession:
        core = self.core.open(message)
        session = LinkSession(self, core)
        self.sessions[core.stream] = session
        self.wake()
        return session

    def resume(self, session: LinkSession) -> None:
        """Send RESUME for a suspended session; `session.resumed()` waits for the answer."""
        self.core.resume(session.core)
        session.attach(self)
        self.sessions[session.core.stream] = session
        self.wake()

    def canary(self, split: int, rows: NDArray[np.float32]) -> asyncio.Future[CanaryResult]:
        self.core.canary(split, rows)
        future: asyncio.Future[CanaryResult] = asyncio.get_running_loop().create_future()
        self._canaries.append(future)
        self.wake()
        return future

    async def probe(self, up_bytes: int, down_bytes: int) -> ProbeDone:
        """Send padding and have padding sent back. Raises what ended the connection, if it ends meanwhile."""
        if self.error is not None:
            raise self.error
        seq = self.core.probe(up_bytes, down_bytes, monotonic())
        self._probes[seq] = asyncio.get_running_loop().create_future()
        try:
            await self.send_now()
            return await self._probes[seq]
        finally:
            del self._probes[seq]

    async def aclose(self) -> None:
        """Leave on purpose: the cloud is told to let go of what still runs, and keeps nothing."""
        self._leaving = True
        for session in list(self.sessions.values()):
            session.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_TIMEOUT_S):
                if self.error is None:
                    await self._flush()
                    await self._socket.close()
        self._end(CloudLostError("the link to the cloud was closed on this side", code="link_closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(Exception):  # a broken socket has nothing left to close
            await self._socket.close()

    async def _read(self) -> None:
        try:
            while True:
                message = await self._socket.recv()
                size = len(message)
                self.bytes_down += size
                if isinstance(message, bytes) and size >= HEADER_BYTES:
                    session = self.sessions.get(_stream_of(message))
                    if session is not None:
                        session.bytes_down += size
                self._handle(self.core.receive(message, monotonic()))
                self.wake()
        except ConnectionClosed as closed:
            self._end(
                CloudLostError(f"the cloud closed the connection: {closed}", hint="is the cloud still up?")
            )
        except OSError as error:
            self._end(CloudLostError(f"the connection to the cloud broke: {error}"))

    async def _write(self) -> None:
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            await self._flush()
            if self.error is not None:
                self._socket.transport.abort()

    async def send_now(self) -> None:
        """As `wake`, but a caller that finds the writer idle does its work itself: waking that task for one
        row costs as much as the sending."""
        if self._flushing.locked():
            self.wake()
        else:
            await self._flush()

    async def _flush(self) -> None:
        """Hand all that is queued to the transport."""
        self._idle.clear()
        async with self._flushing:
            try:
                while batch := self.core.data_to_send(BATCH_BYTES, monotonic()):
                    for message in batch:
                        self.bytes_up += len(message)
                        session = self.sessions.get(_stream_of(message))
                        if session is not None:
                            session.bytes_up += len(message)
                        await self._socket.send(message)
            except (ConnectionClosed, OSError):
                pass  # the reader reports it
            self._idle.set()

    async def _tick(self) -> None:
        last = monotonic()
        while self.error is None:
            await asyncio.sleep(TICK_S)
            now = monotonic()
            self._note_progress(now)
            self._handle(self.core.on_tick(now))
            overslept = now - last - TICK_S
            step_timeout_s = self.deadline.seconds
            for session in list(self.sessions.values()):
                if overslept > TICK_S:  # suspended, or the loop was held up: results may wait unread
                    session.excuse(overslept)
                # Where nothing at all is heard the link is at fault, and the heartbeat will say so: the
                # session can then be resumed, while one that missed its deadline is given up.
                if now - self.core.last_heard < 1.5 * self._limits.heartbeat_s:
                    session.check_deadline(now, self._first_timeout_s, step_timeout_s)
            last = now
            self.wake()

    def _note_progress(self, now: float) -> None:
        """Bytes leaving a full buffer show a slow but living peer: the kernel takes more only as it
        is acknowledged."""
        backlog = self._socket.transport.get_write_buffer_size()
        if backlog < self._backlog:
            self.core.progress(now)
        self._backlog = backlog

    def _handle(self, events: list[EdgeEvent]) -> None:
        ended = any(isinstance(event, ConnectionFailed) for event in events)
        for event in events:
            if ended and isinstance(event, SessionFailed):  # not for a fault of its own
                event = SessionFailed(event.stream, as_lost(event.error))
            if isinstance(event, Welcomed):
                self._note_load(event.welcome.load)
                if not self.welcomed.done():
                    self.welcomed.set_result(event.welcome)
                    self._log.info("link_up", match=event.welcome.match)
            elif isinstance(event, StatusReceived):
                self._note_load(event.status.load)
            elif isinstance(event, RttMeasured):
                self.estimator.note_rtt(event.seconds, monotonic())
                if self.estimator.in_doubt and not self.sessions:
                    self.core.ping(monotonic())  # has the link changed, or was it a hiccup?
            elif isinstance(event, ChunkArrived):
                self.estimator.note_chunk(event, monotonic())
            elif isinstance(event, ProbeDone):
                if (probe := self._probes.get(event.seq)) is not None and not probe.done():
                    probe.set_result(event)
            elif isinstance(event, CanaryDone):
                if self._canaries and not (future := self._canaries.popleft()).done():
                    future.set_result(event.result)
            elif isinstance(event, GoingAway):
                self.goaway = event.goaway
                self._log.info("cloud_draining", deadline_s=event.goaway.deadline_s)
            elif isinstance(event, Rejected | ConnectionFailed):
                self._end(event.error)
            elif (stream := getattr(event, "stream", None)) is not None:
                session = self.sessions.get(stream)
                if session is not None:
                    session.receive(event)
                if isinstance(event, SessionFailed | SessionSuspended | SessionClosed):
                    self.sessions.pop(stream, None)

    def _note_load(self, load: Load) -> None:
        self.load, self.load_at = load, monotonic()

    def _end(self, error: IsthmusError) -> None:
        """The connection is over: tell everybody who waits, drop the socket without a handshake."""
        if self.error is not None:
            return
        self.error = error
        self._handle(self.core.lost(error))
        for stream, session in list(self.sessions.items()):
            session.receive(SessionFailed(stream, as_lost(error)))
        self.sessions.clear()
        if not self.welcomed.done():
            self.welcomed.set_exception(error)
            self.welcomed.exception()  # maybe nobody waits for it any more
        else:
            self._log.info("link_down", code="link_closed" if self._leaving else plain_code(error.code))
        unanswered: list[asyncio.Future[Any]] = [*self._canaries, *self._probes.values()]
        for waiting in unanswered:
            if not waiting.done():
                waiting.set_exception(error)
                waiting.exception()
        self._idle.set()
        if isinstance(error, ProtocolError) and self.core.has_data:
            self._to_send.set()  # the peer is alive: tell it what it did wrong, then hang up
        else:
            self._socket.transport.abort()


def _stream_of(message: bytes) -> int:
    """The stream id at its fixed place in the header, without parsing the rest."""
    return int.from_bytes(message[6:10], "little")

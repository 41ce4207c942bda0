"""One established websocket to a cloud: the adapter around the sans-IO `EdgeConnection`, and its sessions.

Three tasks (read, write, tick); the wire ends once, for good, and every live session then fails.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Final

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from isthmus.protocol.edge_connection import EdgeConnection
from isthmus.protocol.errors import CloudLostError, CloudTimeoutError, IsthmusError, ProtocolError
from isthmus.protocol.events import (
    CanaryDone,
    ConnectionFailed,
    EdgeEvent,
    Rejected,
    ResultRows,
    ResultTokens,
    SessionClosed,
    SessionFailed,
    SessionOpened,
    StreamTokens,
    Welcomed,
)
from isthmus.protocol.frames import HEADER_BYTES
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import CanaryResult, Hello, Open, Opened, Welcome
from isthmus.protocol.prefix import PrefixOffer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from isthmus.protocol.activations import Encoded
    from isthmus.protocol.edge_session import EdgeSession

TICK_S: Final = 0.1
# Handed to the transport at once: between two such batches a PING or a CANCEL overtakes prefill chunks.
BATCH_BYTES: Final = 64 * 1024

Output = ResultTokens | ResultRows | StreamTokens


class LinkSession:
    """One session on the link. Awaiting methods raise what ended the session."""

    def __init__(self, wire: Wire, core: EdgeSession) -> None:
        self._wire = wire
        self.core = core
        self.bytes_up = 0
        self.bytes_down = 0
        self._opened: Opened | None = None
        self._outputs: deque[Output] = deque()
        self._error: IsthmusError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._waiting_since = 0.0

    @property
    def rtt_s(self) -> float | None:
        """The link's smoothed round trip, in seconds."""
        return self._wire.core.rtt_s

    async def opened(self) -> Opened:
        """Wait for the cloud's answer to OPEN."""
        while self._opened is None:
            await self._wait()
        return self._opened

    async def room(self, n_tok: int, *, decode: bool = False) -> bool:
        """Wait until a step of `n_tok` rows may go out: the credits cover it and, for a prefill chunk, the
        transport has taken what was queued before (a decode row, and with `decode` a draft chain, overtakes
        other sessions' chunks in the queue). False at once where no step may ever be so large: OPENED may
        lower the limit."""
        while not self.core.can_send(n_tok):
            if n_tok > self.max_rows:
                return False
            await self._wait()
        if n_tok > 1 and not decode:
            await self._wire.drained()
        if self._error is not None:
            raise self._error
        return n_tok <= self.max_rows

    @property
    def max_rows(self) -> int:
        """Most rows one step may carry."""
        window = self.core.opened.credits if self.core.opened else self._wire.initial_credits
        return min(self.core.chunk_rows, window)

    async def send_rows(
        self, encoded: Encoded, pos: int, n_tok: int, *, final: bool, truncate: bool = False
    ) -> None:
        """Send one STEP of boundary rows; there must be `room`."""
        self.core.step_rows(encoded, pos, n_tok, final=final, truncate=truncate)
        await self._wire.send_now()

    async def verify_rows(self, ids: Sequence[int], encoded: Encoded, pos: int, *, truncate: bool) -> None:
        """Send one VERIFY; there must be `room`."""
        self.core.verify_rows(ids, encoded, pos, truncate=truncate)
        await self._wire.send_now()

    def send_ids(self, ids: Sequence[int], pos: int, *, final: bool) -> None:
        """Queue one STEP of token ids (K = 0); there must be `room`."""
        self.core.step_ids(ids, pos, final=final)
        self._wire.wake()

    async def next(self) -> Output:
        """The next output of the cloud: tokens or hidden rows."""
        while not self._outputs:
            await self._wait()
        return self._outputs.popleft()

    def cancel(self) -> None:
        """Stop; the cloud keeps nothing. Returns at once; harmless after the end."""
        if self._error is None:
            self.core.cancel()
            self._wire.wake()

    def close(self, offer: PrefixOffer) -> None:
        """Stop; the cloud may keep the KV under `offer`. Returns at once; harmless after the end."""
        if self._error is None:
            self.core.close(offer=offer)
            self._wire.wake()

    def receive(self, event: EdgeEvent) -> None:
        """Take in what the reader got for this stream."""
        if isinstance(event, ResultTokens | ResultRows | StreamTokens):
            self._outputs.append(event)
        elif isinstance(event, SessionOpened):
            self._opened = event.opened
        elif isinstance(event, SessionFailed) and self._error is None:
            self._error = event.error
        self._wake()

    def check_deadline(self, now: float, step_timeout_s: float) -> None:
        """Fail a wait in which the cloud, though alive, made no progress for too long."""
        if self._waiter is not None and now - self._waiting_since > step_timeout_s and self._error is None:
            self.cancel()
            waited = now - self._waiting_since
            self._error = CloudTimeoutError(
                f"no progress on the session for {waited:.0f} s, allowed are {step_timeout_s:.0f} s",
                hint="the cloud is alive but too busy; try again, or take another route",
            )
            self._wake()

    async def _wait(self) -> None:
        """Wait for any event of this stream."""
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        self._waiting_since = monotonic()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Wire:
    """One established websocket with its protocol state and its three tasks; ends once, for good."""

    def __init__(
        self, socket_: ClientConnection, hello: Hello, limits: Limits, step_timeout_s: float
    ) -> None:
        self.core = EdgeConnection(hello, limits)
        self.sessions: dict[int, LinkSession] = {}
        self.bytes_up = 0
        self.bytes_down = 0
        self.error: IsthmusError | None = None
        loop = asyncio.get_running_loop()
        self.welcomed: asyncio.Future[Welcome] = loop.create_future()
        self._canaries: deque[asyncio.Future[CanaryResult]] = deque()
        self._socket = socket_
        self._step_timeout_s = step_timeout_s
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

    def canary(self, split: int, rows: NDArray[np.float32]) -> asyncio.Future[CanaryResult]:
        self.core.canary(split, rows)
        future: asyncio.Future[CanaryResult] = asyncio.get_running_loop().create_future()
        self._canaries.append(future)
        self.wake()
        return future

    async def aclose(self) -> None:
        """End the connection; live sessions fail with CloudLostError."""
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
                while batch := self.core.data_to_send(BATCH_BYTES):
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
        while self.error is None:
            await asyncio.sleep(TICK_S)
            now = monotonic()
            self._note_progress(now)
            self._handle(self.core.on_tick(now))
            for session in list(self.sessions.values()):
                session.check_deadline(now, self._step_timeout_s)
            self.wake()

    def _note_progress(self, now: float) -> None:
        """Bytes leaving a full buffer show a slow but living peer: the kernel takes more only as it
        is acknowledged."""
        backlog = self._socket.transport.get_write_buffer_size()
        if backlog < self._backlog:
            self.core.progress(now)
        self._backlog = backlog

    def _handle(self, events: list[EdgeEvent]) -> None:
        for event in events:
            if isinstance(event, Welcomed):
                if not self.welcomed.done():
                    self.welcomed.set_result(event.welcome)
            elif isinstance(event, CanaryDone):
                if self._canaries and not (future := self._canaries.popleft()).done():
                    future.set_result(event.result)
            elif isinstance(event, Rejected | ConnectionFailed):
                self._end(event.error)
            elif (stream := getattr(event, "stream", None)) is not None:
                session = self.sessions.get(stream)
                if session is not None:
                    session.receive(event)
                if isinstance(event, SessionFailed | SessionClosed):
                    self.sessions.pop(stream, None)

    def _end(self, error: IsthmusError) -> None:
        """The connection is over: tell everybody who waits, drop the socket without a handshake."""
        if self.error is not None:
            return
        self.error = error
        for stream, session in list(self.sessions.items()):
            session.receive(SessionFailed(stream, error))
        self.sessions.clear()
        self.core.lost(error)
        if not self.welcomed.done():
            self.welcomed.set_exception(error)
            self.welcomed.exception()  # maybe nobody waits for it any more
        for canary in self._canaries:
            if not canary.done():
                canary.set_exception(error)
                canary.exception()
        self._idle.set()
        if isinstance(error, ProtocolError) and self.core.has_data:
            self._to_send.set()  # the peer is alive: tell it what it did wrong, then hang up
        else:
            self._socket.transport.abort()


def _stream_of(message: bytes) -> int:
    """The stream id at its fixed place in the header, without parsing the rest."""
    return int.from_bytes(message[6:10], "little")

"""The slow-link emulator: a TCP relay that adds delay, jitter and a bandwidth limit to each direction.

It emulates a link for trying and testing; it does not measure one. Bytes are delayed in order (a jittered
chunk never overtakes an earlier one), as TCP would deliver them.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from isthmus.protocol.errors import ConfigError

# One read's worth of bytes. Small enough that a 1 Mbit/s link is paced in steps of 0.13 s at most.
CHUNK_BYTES = 16 * 1024
# Bytes that may wait inside the relay per direction before the sender is held back by TCP. At least one
# bandwidth-delay product of any link worth emulating (100 Mbit/s × 150 ms = 1.9 MB).
BUFFER_BYTES = 4 * 1024 * 1024

TIMER_LATE_S = 0.0006


@dataclass(frozen=True)
class LinkShape:
    """How the emulated link behaves. Zero means "no limit" for bandwidth and "none" for delay."""

    rtt_ms: float = 0.0
    jitter_ms: float = 0.0
    up_mbps: float = 0.0
    down_mbps: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rtt_ms", "jitter_ms", "up_mbps", "down_mbps"):
            value = getattr(self, name)
            if not 0 <= value < 1e6:
                raise ConfigError(
                    f"{name} = {value} is not between 0 and 1e6", hint="give a finite, positive number"
                )


def parse_address(text: str, *, what: str) -> tuple[str, int]:
    """`host:port`, `:port`, `port`, or a ws:// URL, as (host, port)."""
    bare = text.removeprefix("ws://").removeprefix("tcp://").rstrip("/")
    host, _, port = bare.rpartition(":")
    if not port.isdigit() or not 0 <= int(port) < 65536:
        raise ConfigError(
            f"{what} {text!r} names no port", hint="write host:port, for example 127.0.0.1:8078"
        )
    return host.strip("[]") or "127.0.0.1", int(port)


class _Pipe:
    """One direction of one connection: reads, waits as the link would, writes."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        delay_s: float,
        jitter_s: float,
        mbps: float,
        rng: random.Random,
    ) -> None:
        self.reader, self.writer = reader, writer
        self.delay_s, self.jitter_s = delay_s, jitter_s
        self.bytes_per_s = mbps * 125_000
        self.rng = rng
        self.queue: deque[tuple[float, bytes]] = deque()
        self.queued_bytes = 0
        self.changed = asyncio.Event()
        self.drained = asyncio.Event()
        self.eof = False

    async def run(self) -> None:
        """Until the sender closes and all has been passed on; either end's failure ends it at once."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self._receive())
            both.create_task(self._send())

    async def _receive(self) -> None:
        loop = asyncio.get_running_loop()
        line_free_at = last_due = 0.0
        while data := await self.reader.read(CHUNK_BYTES):
            now = loop.time()
            # Serialisation: the line sends one chunk after another; propagation: then each travels `delay`.
            line_free_at = max(now, line_free_at) + (
                len(data) / self.bytes_per_s if self.bytes_per_s else 0.0
            )
            due = line_free_at + self.delay_s + (self.rng.uniform(0, self.jitter_s) if self.jitter_s else 0.0)
            last_due = max(last_due, due)
            if last_due <= now and self.queued_bytes == 0:  # no limit, no delay, nothing before it
                self.writer.write(data)
                await self.writer.drain()
                continue
            self.queue.append((last_due, data))
            self.queued_bytes += len(data)
            self.changed.set()
            while self.queued_bytes > BUFFER_BYTES:
                self.drained.clear()
                await self.drained.wait()
        self.eof = True
        self.changed.set()

    async def _send(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self.queue:
                if self.eof:
                    with suppress(OSError):
                        self.writer.write_eof()
                    return
                self.changed.clear()
                await self.changed.wait()
            due, data = self.queue.popleft()
            # Timers fire up to half a millisecond late; the last stretch is waited out turn by turn.
            if (wait := due - loop.time() - TIMER_LATE_S) > 0:
                await asyncio.sleep(wait)
            while loop.time() < due:  # noqa: ASYNC110 - a moment, not an event, is waited for
                await asyncio.sleep(0)
            self.writer.write(data)
            await self.writer.drain()
            self.queued_bytes -= len(data)
            self.drained.set()


class Relay:
    """Listens on one address and passes every connection on to `target` through a shaped link.

    `await start()` returns the bound (host, port); `await aclose()` cuts every connection.
    """

    def __init__(
        self, listen: tuple[str, int], target: tuple[str, int], shape: LinkShape, *, seed: int = 0
    ) -> None:
        self.listen, self.target, self.shape = listen, target, shape
        self.rng = random.Random(seed)
        self.server: asyncio.Server | None = None
        self.connections: set[asyncio.Task[None]] = set()

    async def start(self) -> tuple[str, int]:
        try:
            self.server = await asyncio.start_server(self._accept, *self.listen)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {self.listen[0]}:{self.listen[1]}: {error.strerror or error}",
                code="port_taken",
                hint="choose another port; 0 picks a free one",
            ) from error
        host, port = self.server.sockets[0].getsockname()[:2]
        return str(host), int(port)

    async def aclose(self) -> None:
        if self.server is not None:
            self.server.close()
        for task in list(self.connections):
            task.cancel()
        await asyncio.gather(*self.connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
        try:
            await self._relay(reader, writer)
        except* (OSError, asyncio.CancelledError):
            pass  # a cut or refused connection is what a relay is for; both ends see it as such
        finally:
            self.connections.discard(task)
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self.target)
        for end in (writer, far_writer):
            end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        half_s, jitter_s = self.shape.rtt_ms / 2000, self.shape.jitter_ms / 2000
        up = _Pipe(reader, far_writer, half_s, jitter_s, self.shape.up_mbps, self.rng)
        down = _Pipe(far_reader, writer, half_s, jitter_s, self.shape.down_mbps, self.rng)
        try:
            async with asyncio.TaskGroup() as pipes:
                pipes.create_task(up.run())
                pipes.create_task(down.run())
        finally:
            far_writer.transport.abort()

"""One direction of one connection: reads, waits as the link would, lets the faults have their way, writes.

Bytes are delayed in order (a jittered chunk never overtakes an earlier one), as TCP would deliver them.
"""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from isthmus.relay.faults import Direction, Faults, Line
from isthmus.relay.messages import MessageScanner
from isthmus.relay.shape import LinkShape
from isthmus.relay.trace import Pacer

# One read's worth of bytes. Small enough that a 1 Mbit/s link is paced in steps of 0.13 s at most.
CHUNK_BYTES: Final = 16 * 1024
# Bytes that may wait inside the relay per direction before the sender is held back by TCP. At least one
# bandwidth-delay product of any link worth emulating (100 Mbit/s × 150 ms = 1.9 MB).
BUFFER_BYTES: Final = 4 * 1024 * 1024


class Pipe:
    """Carries one direction of `line`. Delay and jitter of `shape`, as it is when bytes arrive, come on top
    of what `pacer` says; the last `timer_late_s` of a wait are not left to a timer."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        line: Line,
        direction: Direction,
        faults: Faults,
        pacer: Pacer,
        shape: Callable[[], LinkShape],
        timer_late_s: float,
        rng: random.Random,
    ) -> None:
        self.reader, self.writer = reader, writer
        self.line, self.direction, self.faults = line, direction, faults
        self.opposite: Direction = "down" if direction == "up" else "up"
        self.pacer, self.shape = pacer, shape
        self.timer_late_s = timer_late_s
        self.rng = rng
        self.scanner = MessageScanner()
        self.queue: deque[tuple[float, bytes]] = deque()
        self.queued_bytes = 0
        self.changed = asyncio.Event()
        self.drained = asyncio.Event()
        self.eof = False

    async def run(self) -> None:
        """Until the sender closes and all has been passed on; either end's failure ends it at once, unless
        the news of it is swallowed too."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self._receive())
            both.create_task(self._send())

    async def _receive(self) -> None:
        loop = asyncio.get_running_loop()
        last_due = 0.0
        while data := await self._read():
            now = loop.time()
            at = 0
            delay_s, jitter_s = self.shape().one_way_s
            for passed, size in self.pacer.pass_on(now, len(data)):
                piece, at = data[at : at + size], at + size
                jitter = self.rng.uniform(0, jitter_s) if jitter_s else 0.0
                last_due = max(last_due, passed + delay_s + jitter)
                if last_due <= now and self.queued_bytes == 0:  # no limit, no delay, nothing before it
                    await self._deliver(piece)
                    continue
                self.queue.append((last_due, piece))
                self.queued_bytes += len(piece)
                self.changed.set()
            while self.queued_bytes > BUFFER_BYTES:
                self.drained.clear()
                await self.drained.wait()
        self.eof = True
        self.changed.set()

    async def _read(self) -> bytes:
        try:
            return await self.reader.read(CHUNK_BYTES)
        except OSError:
            if self.direction in self.line.swallowed:
                return b""
            raise

    async def _send(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self.queue:
                if self.eof:
                    if self.direction not in self.line.swallowed:
                        with suppress(OSError):
                            self.writer.write_eof()
                    return
                self.changed.clear()
                await self.changed.wait()
            due, data = self.queue.popleft()
            if (wait := due - loop.time() - self.timer_late_s) > 0:
                await asyncio.sleep(wait)
            while loop.time() < due:  # noqa: ASYNC110 - a moment, not an event, is waited for
                await asyncio.sleep(0)
            await self._deliver(data)
            self.queued_bytes -= len(data)
            self.drained.set()

    async def _deliver(self, data: bytes) -> None:
        """Write `data`, stopping wherever a fault is armed."""
        line, direction, faults = self.line, self.direction, self.faults
        starts = self.scanner.feed(data)
        at = 0
        while at < len(data):
            begins = line.messages[direction] + 1 if at in starts else None
            faults.fire(line, direction, begins)
            if await faults.wait(line, direction):
                continue  # meanwhile something else may have become due
            self._check_cut()
            size = faults.room(line, direction, starts, at, len(data))
            begun = bisect_left(starts, at + size) - bisect_left(starts, at)
            faults.count(line, direction, size, begun)
            await self._write(data[at : at + size])
            at += size
            faults.fire(line, direction, None)
            self._check_cut()

    async def _write(self, data: bytes) -> None:
        if self.direction in self.line.swallowed:
            return
        size = self.faults.slice_bytes or len(data)
        try:
            for at in range(0, len(data), size):
                self.writer.write(data[at : at + size])
                await self.writer.drain()
                if size < len(data):
                    await asyncio.sleep(0)
        except OSError:
            # The receiver is gone. Its reset travels the other way, where it may be lost like all else.
            if self.opposite not in self.line.swallowed:
                raise
            self.line.swallowed.add(self.direction)

    def _check_cut(self) -> None:
        if self.line.is_cut:
            raise ConnectionAbortedError

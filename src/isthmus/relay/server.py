"""The relay itself: listens, connects on, and joins the two ends with a pipe in each direction."""

from __future__ import annotations

import asyncio
import random
import socket
import struct

from isthmus.protocol.errors import ConfigError
from isthmus.relay.faults import Direction, Faults, Line
from isthmus.relay.pipe import Pipe
from isthmus.relay.script import FaultScript
from isthmus.relay.shape import LinkShape
from isthmus.relay.trace import Pacer, RatePacer, Trace, TracePacer

# Timers fire up to half a millisecond late; the last stretch is waited out turn by turn. A trace has a packet
# every millisecond or so: there it would mean a busy loop, for a clock no finer than the lateness.
TIMER_LATE_S = 0.0006
# Close with RST instead of FIN: linger on, for 0 seconds.
_RESET = struct.pack("ii", 1, 0)
# How long the port may be in somebody else's hands when a refusal ends, and how often it is tried.
REOPEN_S = 10.0
RETRY_S = 0.05


class Relay:
    """Listens on one address and passes every connection on to `target` through an emulated link.

    `trace` takes the place of the shape's bandwidth (ConfigError where both are given); its clock starts with
    the relay. `script` is played from the start, `seed` decides all that is random. `faults` is for tests.
    `await start()` returns the bound (host, port); `await aclose()` cuts every connection.
    """

    def __init__(
        self,
        listen: tuple[str, int],
        target: tuple[str, int],
        shape: LinkShape,
        *,
        seed: int = 0,
        trace: Trace | None = None,
        script: FaultScript | None = None,
    ) -> None:
        self.listen, self.target, self.trace = listen, target, trace
        self.shape = shape
        self.seed, self.script = seed, script
        self.rng = random.Random(seed)
        self.faults = Faults(self._refuse)
        self.server: asyncio.Server | None = None
        self.connections: set[asyncio.Task[None]] = set()
        self._refused_until = 0.0
        self._reopening: asyncio.Task[None] | None = None
        self._playing: asyncio.Task[None] | None = None

    @property
    def shape(self) -> LinkShape:
        """How the link behaves now. A new one holds for what arrives from then on, also on connections that
        stand; what is on its way keeps its time."""
        return self._shape

    @shape.setter
    def shape(self, shape: LinkShape) -> None:
        if self.trace is not None and (shape.up_mbps or shape.down_mbps):
            raise ConfigError(
                f"a trace and a bandwidth ({shape.up_mbps} up, {shape.down_mbps} down) were given together",
                hint="the trace says how fast the link is: leave the bandwidths out, or 0",
            )
        self._shape = shape

    async def start(self) -> tuple[str, int]:
        """Listen, and let the script begin. ConfigError `port_taken` where the address cannot be had."""
        try:
            self.server = await asyncio.start_server(self._accept, *self.listen)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {self.listen[0]}:{self.listen[1]}: {error.strerror or error}",
                code="port_taken",
                hint="choose another port; 0 picks a free one",
            ) from error
        host, port = self.server.sockets[0].getsockname()[:2]
        self.listen = str(host), int(port)
        self.faults.origin_s = asyncio.get_running_loop().time()
        if self.script is not None:
            self._playing = asyncio.create_task(self.script.play(self.faults, self.seed))
        return self.listen

    async def aclose(self) -> None:
        """Stop listening and end every connection."""
        helpers = [task for task in (self._playing, self._reopening) if task is not None]
        if self.server is not None:
            self.server.close()
        for task in [*helpers, *self.connections]:
            task.cancel()
        await asyncio.gather(*helpers, *self.connections, return_exceptions=True)

    # ---- refusing --------------------------------------------------------------------------------

    def _refuse(self, seconds: float) -> None:
        self._refused_until = max(self._refused_until, asyncio.get_running_loop().time() + seconds)
        if self.server is not None:
            self.server.close()
        if self._reopening is None or self._reopening.done():
            self._reopening = asyncio.create_task(self._reopen())

    async def _reopen(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if (left := self._refused_until - loop.time()) > 0:
                await asyncio.sleep(left)
                continue
            try:
                self.server = await asyncio.start_server(self._accept, *self.listen)
            except OSError:
                if loop.time() > self._refused_until + REOPEN_S:
                    raise
                await asyncio.sleep(RETRY_S)
            else:
                return

    # ---- connections -----------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
        try:
            await self._relay(reader, writer, task)
        except* (OSError, asyncio.CancelledError):
            pass  # a cut or refused connection is what a relay is for; both ends see it as such
        finally:
            self.connections.discard(task)
            writer.transport.abort()

    async def _relay(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, task: asyncio.Task[None]
    ) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self.target)
        except OSError:
            _reset(writer)  # refused there, so the nearest thing to a refusal here
            raise

        def abort() -> None:
            for end in (writer, far_writer):
                _reset(end)
            task.cancel()

        for end in (writer, far_writer):
            end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.transport.set_write_buffer_limits(0)  # what counts as passed has left this process
        self.faults.num_lines += 1
        line = Line(self.faults.num_lines, abort)
        self.faults.lines[line.number] = line
        up = self._pipe(reader, far_writer, line, "up")
        down = self._pipe(far_reader, writer, line, "down")
        try:
            async with asyncio.TaskGroup() as pipes:
                pipes.create_task(up.run())
                pipes.create_task(down.run())
        finally:
            del self.faults.lines[line.number]
            far_writer.transport.abort()

    def _pipe(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: Line, direction: Direction
    ) -> Pipe:
        pacer: Pacer
        if self.trace is not None:
            times = self.trace.up if direction == "up" else self.trace.down
            pacer = TracePacer(times, self.faults.origin_s)
        else:
            pacer = RatePacer(lambda: self.shape.up_mbps if direction == "up" else self.shape.down_mbps)
        return Pipe(
            reader,
            writer,
            line=line,
            direction=direction,
            faults=self.faults,
            pacer=pacer,
            shape=lambda: self.shape,
            timer_late_s=TIMER_LATE_S if self.trace is None else 0.0,
            rng=self.rng,
        )


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close at once, with RST."""
    if not writer.transport.is_closing():
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()

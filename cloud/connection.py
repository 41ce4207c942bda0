"""One edge's websocket: the thin adapter between the sans-IO `CloudConnection` and the engine."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.cloud.engine_session import CanaryRows, EngineOutput, Failed
from isthmus.protocol.activations import RowCodec, RowFormat
from isthmus.protocol.cloud_connection import CloudConnection
from isthmus.protocol.errors import CloudError, IsthmusError, OverloadedError
from isthmus.protocol.events import (
    CanaryRequested,
    CancelRequested,
    CloseRequested,
    CloudEvent,
    ConnectionFailed,
    HelloAccepted,
    ResumeRequested,
    SessionDetached,
    SessionFailed,
    SessionOpenRequested,
    StepReceived,
    StreamWindow,
)
from isthmus.protocol.frames import Frame
from isthmus.protocol.identity import canary_error, canary_ids, canary_tolerance
from isthmus.protocol.messages import Load

if TYPE_CHECKING:
    from isthmus.cloud.hub import Hub
    from isthmus.cloud.sessions import LiveSession

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# Handed to the transport at once: between two such batches a PONG overtakes.
BATCH_BYTES: Final = 64 * 1024
FLUSH_TIMEOUT_S: Final = 1.0
NORMAL, LEFT, POLICY, BUSY = 1000, 1001, 1008, 1013
_CODE: Final = re.compile("[a-z][a-z0-9_]{0,63}")


class Peer:
    """One connected edge. Everything runs on the event loop but `_canary_from_engine`."""

    def __init__(self, hub: Hub, tenant: str, received: Callable[[], int]) -> None:
        """`received`: bytes that have come in on the connection so far."""
        self.tenant = tenant
        self.core = CloudConnection(
            hub.info,
            hub.limits,
            tenant=tenant,
            now=monotonic(),
            load=hub.load(),
            usage=hub.usage(tenant),
            canaries=hub.canaries,
            refusal=hub.drain.refusal(),
        )
        self._hub = hub
        self._loop = asyncio.get_running_loop()
        self._held: dict[int, LiveSession] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._canary_turn = asyncio.Lock()
        self._canaries: dict[int, tuple[int, int, NDArray[np.float32]]] = {}
        self._to_send = asyncio.Event()
        self._close_code = NORMAL
        self._received = received
        self._received_before = 0
        self._log = hub.log.bind(tenant=tenant)

    # ---- the socket

    async def run(self, receive: Receive, send: Send) -> None:
        """Serves an accepted websocket until one side ends it."""
        self._hub.peers.add(self)
        writer = self._loop.create_task(self._write(send), name="isthmus-cloud-write")
        reader = self._loop.create_task(self._read(receive), name="isthmus-cloud-read")
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            # The reader ended: its last words are still to be written. The writer ended: so has the socket.
            if not writer.done():
                with suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(writer), FLUSH_TIMEOUT_S)
        finally:
            tasks = [reader, writer, *self._tasks]
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            self._handle_all(self.core.lost())
            self._hub.peers.discard(self)
            for result in results:
                if isinstance(result, Exception) and not isinstance(result, OSError):
                    self._log.error("connection_bug", exc_info=result)
        with suppress(OSError, TimeoutError, RuntimeError):
            close = {"type": "websocket.close", "code": self._close_code}
            await asyncio.wait_for(send(close), FLUSH_TIMEOUT_S)

    async def _read(self, receive: Receive) -> None:
        while not self.core.is_closed:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                # An edge that says goodbye wants nothing kept; one that vanishes may come back.
                self._handle_all(self.core.lost(clean=message.get("code") in (NORMAL, LEFT)))
                break
            data = message.get("bytes")
            if data is None:
                data = message.get("text") or ""
            self._hub.telemetry.count_bytes("up", len(data))
            self._handle_all(self.core.receive(data, monotonic()))
            self.wake()
        self._to_send.set()  # the writer flushes and ends

    async def _write(self, send: Send) -> None:
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            while batch := self.core.data_to_send(BATCH_BYTES):
                for data in batch:
                    await send({"type": "websocket.send", "bytes": data})
                    self._hub.telemetry.count_bytes("down", len(data))
            if self.core.is_closed:
                return

    def wake(self) -> None:
        """Something may be there to be sent."""
        if self.core.has_data or self.core.is_closed:
            self._to_send.set()

    # ---- from the hub

    def tick(self, now: float, load: Load | None, *, idle_too: bool) -> None:
        """With `load`, the edge is told it where it has sessions here, and with `idle_too` in any case."""
        received, before = self._received(), self._received_before
        if received > before:
            self.core.progress(now)
            self._received_before = received
        self._handle_all(self.core.on_tick(now))
        if load is not None and (idle_too or self._held):
            self.core.status(load, received)
        self.wake()

    def go_away(self, deadline_s: float, alternative: str) -> None:
        self.core.go_away(deadline_s, alternative)
        self.wake()

    def fail(self, error: IsthmusError) -> None:
        """Ends the connection with a fatal ERROR."""
        self._handle_all(self.core.fail_connection(error))
        self.wake()

    # ---- the sessions it holds; called by the registry

    def hold(self, live: LiveSession) -> None:
        self._held[live.core.stream] = live

    def let_go(self, live: LiveSession) -> None:
        self._held.pop(live.core.stream, None)

    # ---- from the edge; nothing here waits, so that no session holds up another one or a PING

    def _handle_all(self, events: list[CloudEvent]) -> None:
        for event in events:
            self._handle(event)

    def _handle(self, event: CloudEvent) -> None:
        match event:
            case StepReceived(stream=stream):
                if live := self._held.get(stream):
                    live.feed.step(event)
            case SessionOpenRequested(stream=stream):
                self._open(stream)
            case CloseRequested(stream=stream, close=close):
                if live := self._held.get(stream):
                    # Behind its last steps: the offer may name their rows.
                    live.feed.after(partial(self._hub.engine.close, live.number, close.offer.entries))
            case CancelRequested(stream=stream):
                if live := self._held.get(stream):
                    live.feed.stop()
                    self._hub.engine.cancel(live.number)
            case StreamWindow(stream=stream, room=room):
                if live := self._held.get(stream):
                    live.meter.widen(room)
            case ResumeRequested(stream=stream, resume=resume):
                self._start(self._hub.resumes.answer(self, stream, resume))
            case CanaryRequested(split=split, seq=seq, frame=frame):
                self._start(self._canary(split, seq, frame))
            case HelloAccepted(hello=hello, match=match):
                self._log.info("edge_connected", client=hello.client, match=match)
                self._hub.greet(self)
            case SessionDetached(stream=stream):
                if live := self._held.get(stream):
                    self._hub.sessions.detach(live)
            case SessionFailed(stream=stream, error=error):
                if live := self._held.get(stream):
                    self._hub.sessions.drop(live, "lost" if self.core.is_closed else "failed")
            case ConnectionFailed(error=error):
                self._note_end(error)

    def _note_end(self, error: IsthmusError) -> None:
        if isinstance(error, OverloadedError):
            self._close_code = BUSY
        elif error.code != "edge_gone":
            self._close_code = POLICY
        # The edge chose the code of its own ERROR: what is no plain name does not get into the log.
        self._log.info("edge_gone", code=error.code if _CODE.fullmatch(error.code) else "other")

    def _open(self, stream: int) -> None:
        try:
            self._hub.sessions.open(self, self.core.sessions[stream])
        except IsthmusError as error:
            self.core.fail(stream, error)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """What has to wait for a thread does so beside the reader. Ends with the connection."""
        task = self._loop.create_task(work, name="isthmus-cloud-work")
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("connection_bug", exc_info=error)
            self.fail(CloudError("the cloud failed on a request", code="internal_error"))

    # ---- canaries

    async def _canary(self, split: int, seq: int, frame: Frame) -> None:
        codec = RowCodec(RowFormat.F32, self._hub.info.hidden)
        decode = partial(codec.decode_frame, frame, max_raw=self._hub.limits.max_message_bytes)
        async with self._canary_turn:  # answers go out in the order of the requests
            try:
                rows = await self._loop.run_in_executor(self._hub.decoders, decode)
            except IsthmusError as error:
                self.fail(error)
                return
            ids = canary_ids(self._hub.info.vocab_size, len(rows))
            number = self._hub.engine.canary(split, ids, self._canary_from_engine)
            self._canaries[number] = (seq, split, rows)

    def _canary_from_engine(self, outputs: list[EngineOutput]) -> None:
        """On the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._answer_canaries, outputs)

    def _answer_canaries(self, outputs: list[EngineOutput]) -> None:
        for output in outputs:
            seq, split, rows = self._canaries.pop(output.session_id)
            if isinstance(output, CanaryRows):
                error, tolerance = canary_error(rows, output.rows), canary_tolerance(split)
                self._log.info("canary", split=split, error=error, tolerance=tolerance)
                self.core.canary_result(seq, split, ok=error <= tolerance, error=error, tolerance=tolerance)
            elif isinstance(output, Failed):
                self.fail(output.error)
        self.wake()

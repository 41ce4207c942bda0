"""One edge's websocket: the thin adapter between the sans-IO `CloudConnection` and the engine."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.cloud import engine_session as out
from isthmus.protocol.activations import Encoded, RowCodec, RowFormat, decode_ids
from isthmus.protocol.admission import result_codec, row_codec
from isthmus.protocol.cloud_connection import CloudConnection
from isthmus.protocol.errors import IsthmusError, OverloadedError
from isthmus.protocol.events import (
    CanaryRequested,
    CancelRequested,
    CloseRequested,
    CloudEvent,
    ConnectionFailed,
    HelloAccepted,
    SessionFailed,
    SessionOpenRequested,
    StepReceived,
    StreamWindow,
)
from isthmus.protocol.frames import Frame
from isthmus.protocol.identity import canary_error, canary_ids, canary_tolerance
from isthmus.protocol.messages import Load, Open

if TYPE_CHECKING:
    from isthmus.cloud.hub import Hub

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# Bodies up to here are decoded on the loop (tens of µs); larger ones by a thread.
INLINE_BYTES: Final = 64 * 1024
# Handed to the transport at once: between two such batches a PONG overtakes.
BATCH_BYTES: Final = 64 * 1024
# A prefill chunk larger than this would hold up the loop with its checksum.
CHUNK_BYTES: Final = 1024 * 1024
FLUSH_TIMEOUT_S: Final = 1.0
NORMAL, POLICY, BUSY = 1000, 1008, 1013


@dataclass(slots=True)
class _Live:
    """A session between the protocol (stream) and the engine (number)."""

    stream: int
    number: int
    request: Open
    codec: RowCodec
    result_codec: RowCodec
    opened_s: float
    last_output_s: float | None = None
    num_streamed: int = 0


class Peer:
    """One connected edge. Everything runs on the event loop but `_from_engine`."""

    def __init__(self, hub: Hub, tenant: str) -> None:
        self.tenant = tenant
        self.core = CloudConnection(
            hub.info,
            hub.limits,
            tenant=tenant,
            now=monotonic(),
            load=hub.load(),
            usage=hub.usage(tenant),
            canaries=hub.canaries,
            refusal=hub.refusal(),
        )
        self._hub = hub
        self._loop = asyncio.get_running_loop()
        self._by_stream: dict[int, _Live] = {}
        self._by_number: dict[int, _Live] = {}
        self._canaries: dict[int, tuple[int, int, NDArray[np.float32]]] = {}
        self._to_send = asyncio.Event()
        self._close_code = NORMAL
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
            for task in (reader, writer):
                task.cancel()
            results = await asyncio.gather(reader, writer, return_exceptions=True)
            for event in self.core.lost():
                await self._handle(event)
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
                for event in self.core.lost():
                    await self._handle(event)
                break
            data = message.get("bytes")
            if data is None:
                data = message.get("text") or ""
            self._hub.telemetry.count_bytes("up", len(data))
            for event in self.core.receive(data, monotonic()):
                await self._handle(event)
            self._wake()
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

    def _wake(self) -> None:
        if self.core.has_data or self.core.is_closed:
            self._to_send.set()

    # ---- from the hub

    def tick(self, now: float, load: Load | None) -> None:
        for event in self.core.on_tick(now):
            self._ended(event)
        if load is not None:
            self.core.status(load)
        self._wake()

    def go_away(self, deadline_s: float) -> None:
        self.core.go_away(deadline_s)
        self._wake()

    def fail(self, error: IsthmusError) -> None:
        """Ends the connection with a fatal ERROR."""
        for event in self.core.fail_connection(error):
            self._ended(event)
        self._wake()

    # ---- from the edge

    async def _handle(self, event: CloudEvent) -> None:
        match event:
            case StepReceived():
                await self._step(event)
            case SessionOpenRequested(stream=stream, open=request):
                self._open(stream, request)
            case CloseRequested(stream=stream, close=close):
                if live := self._by_stream.get(stream):
                    self._hub.engine.close(live.number, close.offer.entries)
            case CancelRequested(stream=stream):
                if live := self._by_stream.get(stream):
                    self._hub.engine.cancel(live.number)
            case StreamWindow(stream=stream, room=room):
                if live := self._by_stream.get(stream):
                    self._hub.engine.set_stream_limit(live.number, live.num_streamed + room)
            case CanaryRequested(split=split, seq=seq, frame=frame):
                await self._canary(split, seq, frame)
            case HelloAccepted(hello=hello, match=match):
                self._log.info("edge_connected", client=hello.client, match=match)
            case SessionFailed() | ConnectionFailed():
                self._ended(event)

    def _ended(self, event: CloudEvent) -> None:
        """A session or the connection failed in the protocol: the engine lets go of what it held."""
        if isinstance(event, SessionFailed):
            self._drop(event.stream, event.error)
        elif isinstance(event, ConnectionFailed):
            if isinstance(event.error, OverloadedError):
                self._close_code = BUSY
            elif event.error.code != "edge_gone":
                self._close_code = POLICY
            self._log.info("edge_gone", code=event.error.code, error=event.error.message)

    def _open(self, stream: int, request: Open) -> None:
        try:
            self._hub.check_session()
        except IsthmusError as error:
            self.core.fail(stream, error)
            return
        number = self._hub.engine.open(
            out.EngineOpen(
                split=request.split,
                shape=request.shape,
                prompt_tokens=request.prompt_tokens,
                max_tokens=request.max_tokens,
                max_context=request.max_context,
                sampling=request.sampling,
                end_ids=frozenset(request.end_ids),
                context_ids=request.context_ids,
                offer=tuple(request.offer.entries),
                tenant=self.tenant,
                stream_window=self._hub.limits.stream_window_tokens,
                priority=request.priority,
            ),
            self._from_engine,
        )
        hidden = self._hub.info.hidden
        live = _Live(
            stream, number, request, row_codec(request, hidden), result_codec(request, hidden), monotonic()
        )
        self._by_stream[stream] = self._by_number[number] = live

    async def _step(self, step: StepReceived) -> None:
        live = self._by_stream.get(step.stream)
        if live is None:
            return
        try:
            if step.frame.raw_len <= INLINE_BYTES:
                rows = self._decode(live, step)
            else:
                rows = await self._loop.run_in_executor(self._hub.decoders, self._decode, live, step)
        except IsthmusError as error:
            self.core.fail(step.stream, error)
            self._drop(step.stream, error)
            return
        self._hub.engine.add_rows(
            live.number,
            rows,
            output="all" if step.all_rows else "last" if step.final else "none",
            truncate_to=step.pos if step.truncate else None,
            drafts=step.drafts or None,
        )

    def _decode(self, live: _Live, step: StepReceived) -> NDArray[np.float32] | list[int]:
        if live.request.split == 0:
            return decode_ids(step.frame.body, n_tok=step.n_tok, vocab_size=self._hub.info.vocab_size)
        return live.codec.decode_frame(step.frame, max_raw=self._hub.limits.max_message_bytes)

    async def _canary(self, split: int, seq: int, frame: Frame) -> None:
        codec = RowCodec(RowFormat.F32, self._hub.info.hidden)
        decode = partial(codec.decode_frame, frame, max_raw=self._hub.limits.max_message_bytes)
        try:
            rows = await self._loop.run_in_executor(self._hub.decoders, decode)
        except IsthmusError as error:
            self.fail(error)
            return
        ids = canary_ids(self._hub.info.vocab_size, len(rows))
        number = self._hub.engine.canary(split, ids, self._from_engine)
        self._canaries[number] = (seq, split, rows)

    # ---- from the engine

    def _from_engine(self, outputs: list[out.EngineOutput]) -> None:
        """On the engine's thread: encodes rows there, passes the rest on to the loop."""
        items: list[tuple[out.EngineOutput, Encoded | IsthmusError | None]] = []
        for output in outputs:
            encoded: Encoded | IsthmusError | None = None
            live = self._by_number.get(output.session_id)
            if isinstance(output, out.Hidden) and live is not None:
                try:
                    encoded = live.result_codec.encode(output.rows)
                except IsthmusError as error:
                    encoded = error
            items.append((output, encoded))
        with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._deliver, items)

    def _deliver(self, items: list[tuple[out.EngineOutput, Encoded | IsthmusError | None]]) -> None:
        now = monotonic()
        for output, encoded in items:
            live = self._by_number.get(output.session_id)
            try:
                if live is not None:
                    self._give(live, output, encoded, now)
                elif canary := self._canaries.pop(output.session_id, None):
                    self._answer_canary(*canary, output)
            except IsthmusError as error:
                # The engine and the protocol disagree, or rows could not be encoded: this session only.
                self._log.error("session_failed_here", code=error.code, error=error.message)
                if live is not None:
                    self.core.fail(live.stream, error)
                    self._drop(live.stream, error)
        self._wake()

    def _give(
        self, live: _Live, output: out.EngineOutput, encoded: Encoded | IsthmusError | None, now: float
    ) -> None:
        match output:
            case out.Tokens():
                self._give_tokens(live, output)
                self._observe(live, now, len(output.sampled))
            case out.Hidden(kv_len=kv_len, rows=rows):
                if isinstance(encoded, IsthmusError):
                    raise encoded
                if encoded is not None:
                    self.core.result_rows(live.stream, encoded, len(rows), kv_len=kv_len)
                self._observe(live, now)
            case out.Progress(num_rows=num_rows):
                self.core.credit(live.stream, num_rows)
            case out.Opened(cached_rows=cached_rows):
                self.core.opened(
                    live.stream,
                    session_id=secrets.token_hex(16),
                    cached_rows=cached_rows,
                    chunk_rows=max(1, min(self._hub.chunk_rows, CHUNK_BYTES // live.codec.row_bytes)),
                )
            case out.Closed():
                self.core.closed(
                    live.stream,
                    pages_freed=output.pages_freed,
                    kv_len=output.kv_len,
                    cached=output.cached_rows > 0,
                )
                self._forget(live, "closed")
            case out.Failed(error=error):
                self.core.fail(live.stream, error)
                self._forget(live, error.code)

    def _give_tokens(self, live: _Live, output: out.Tokens) -> None:
        sampled = output.sampled
        with_logprobs = live.request.sampling.logprobs >= 0
        tokens = [one.token for one in sampled]
        logprobs = [one.logprob for one in sampled] if with_logprobs else None
        top = [one.top for one in sampled] if with_logprobs else None
        if output.stream:
            live.num_streamed += len(tokens)
            self.core.stream_tokens(
                live.stream, tokens, logprobs=logprobs, top=top, finish=output.finish
            )  # fmt: skip
        else:
            self.core.result_tokens(
                live.stream, tokens, kv_len=output.kv_len, logprobs=logprobs, top=top, finish=output.finish
            )

    def _answer_canary(
        self, seq: int, split: int, rows: NDArray[np.float32], output: out.EngineOutput
    ) -> None:
        if isinstance(output, out.CanaryRows):
            error, tolerance = canary_error(rows, output.rows), canary_tolerance(split)
            self._log.info("canary", split=split, error=error, tolerance=tolerance)
            self.core.canary_result(seq, split, ok=error <= tolerance, error=error, tolerance=tolerance)
        elif isinstance(output, out.Failed):
            self.fail(output.error)

    # ---- endings and measures

    def _drop(self, stream: int, error: IsthmusError) -> None:
        """The protocol is done with this stream: the engine frees its pages, its answer goes nowhere."""
        live = self._by_stream.get(stream)
        if live is not None:
            self._hub.engine.cancel(live.number)
            self._forget(live, error.code)

    def _forget(self, live: _Live, outcome: str) -> None:
        self._by_stream.pop(live.stream, None)
        self._by_number.pop(live.number, None)
        self._hub.telemetry.request_s.observe(monotonic() - live.opened_s)
        self._hub.telemetry.sessions_ended.labels(outcome=outcome).inc()

    def _observe(self, live: _Live, now: float, num_tokens: int = 1) -> None:
        """`num_tokens` came at once: each took its share of the time."""
        if live.last_output_s is None:
            self._hub.telemetry.first_token_s.observe(now - live.opened_s)
        else:
            for _ in range(num_tokens):
                self._hub.telemetry.inter_token_s.observe((now - live.last_output_s) / num_tokens)
        live.last_output_s = now

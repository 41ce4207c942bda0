"""A cloud of a few lines over the real protocol: it echoes. With switches to misbehave on purpose.

Offload and prefix sessions get token `rows held % 100` for each step; U sessions get their rows back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from time import monotonic
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from isthmus.edge.link import SUBPROTOCOL
from isthmus.protocol.admission import row_codec
from isthmus.protocol.cloud_connection import CloudConnection, ServerInfo
from isthmus.protocol.errors import RejectedError
from isthmus.protocol.events import (
    CanaryRequested,
    CancelRequested,
    CloseRequested,
    CloudEvent,
    SessionOpenRequested,
    StepReceived,
)
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import Open

KEY = "toy-key"


@dataclass
class ToyCloud:
    """What it saw, and how it shall misbehave."""

    info: ServerInfo
    limits: Limits = field(default_factory=Limits)
    refusal: RejectedError | None = None
    canary_ok: bool = True
    mute: bool = False  # opens sessions and pongs, but never answers a step
    chunk_rows: int | None = None  # the step size it likes, told in OPENED
    late: bool = False  # answers OPEN only when the first step has come
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    stepped: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    opens: list[Open] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    canaries: int = 0
    connections: list[ServerConnection] = field(default_factory=list)
    frozen: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    async def handle(self, socket: ServerConnection) -> None:
        self.connections.append(socket)
        core = CloudConnection(self.info, self.limits, tenant="toy", now=monotonic(), refusal=self.refusal)
        try:
            async for message in socket:
                if self.frozen.is_set():
                    await self.over.wait()  # connected, and silent for good
                    return
                assert isinstance(message, bytes)
                self.received.append(message)
                for event in core.receive(message, monotonic()):
                    self.react(core, event)
                for out in core.data_to_send():
                    await socket.send(out)
        except ConnectionClosed:
            pass
        finally:
            core.lost()

    def react(self, core: CloudConnection, event: CloudEvent) -> None:
        if isinstance(event, SessionOpenRequested):
            self.opens.append(event.open)
            self.opened.set()
            if not self.late:
                self.answer_open(core, event.stream)
        elif isinstance(event, StepReceived):
            self.stepped.set()
            held = event.pos + event.n_tok
            if self.late and held == event.n_tok:
                self.answer_open(core, event.stream)
            if self.mute:
                return
            if not event.final:
                core.credit(event.stream, event.n_tok)
            elif core.sessions[event.stream].open.shape == "u":
                codec = row_codec(core.sessions[event.stream].open, self.info.hidden)
                rows = codec.decode_frame(event.frame, max_raw=1 << 24)
                core.result_rows(event.stream, codec.encode(rows[-1:]), 1, kv_len=held)
            else:
                core.result_tokens(event.stream, [held % 100], kv_len=held)
        elif isinstance(event, CancelRequested | CloseRequested):
            core.closed(event.stream)
            self.left.put_nowait(type(event).__name__)
        elif isinstance(event, CanaryRequested):
            self.canaries += 1
            core.canary_result(event.seq, event.split, ok=self.canary_ok, error=0.5, tolerance=0.1)

    def answer_open(self, core: CloudConnection, stream: int) -> None:
        core.opened(stream, session_id="0" * 32, chunk_rows=self.chunk_rows)

    def check_key(self, socket: ServerConnection, request: Any) -> Any:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return socket.respond(HTTPStatus.UNAUTHORIZED, "who?\n")
        return None


@asynccontextmanager
async def toy_cloud(info: ServerInfo, **options: Any) -> AsyncIterator[ToyCloud]:
    """A running toy; its port is free to choose."""
    cloud = ToyCloud(info, **options)
    server: Server
    async with serve(
        cloud.handle,
        "127.0.0.1",
        0,
        subprotocols=[SUBPROTOCOL],
        process_request=cloud.check_key,
        compression=None,
        close_timeout=0.1,
    ) as server:
        cloud.port = next(iter(server.sockets)).getsockname()[1]
        try:
            yield cloud
        finally:
            cloud.over.set()

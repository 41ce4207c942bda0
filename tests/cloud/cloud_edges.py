"""A real cloud on a thread and real edges over loopback websockets, for the server's tests."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from isthmus.cloud.drain import DrainPolicy
from isthmus.cloud.hub import Hub
from isthmus.cloud.serve import CloudOptions, Prepared, make_hub, prepare
from isthmus.cloud.server import SESSION_PATH, SUBPROTOCOL, CloudServer, bind
from isthmus.protocol.activations import RowCodec, RowFormat
from isthmus.protocol.edge_connection import EdgeConnection
from isthmus.protocol.edge_session import EdgeSession
from isthmus.protocol.events import EdgeEvent, RttMeasured, SessionClosed, SessionFailed
from isthmus.protocol.identity import ModelIdentity
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import Hello, Open
from isthmus.protocol.prefix import PrefixOffer
from isthmus.protocol.sampling import SamplingParams
from isthmus.splitter.checkpoint import open_checkpoint
from isthmus.splitter.pack import Pack
from isthmus.splitter.tokenizer import Tokenizer

EventT = TypeVar("EventT")
GREEDY = SamplingParams(temperature=0.0)


def prepare_cloud(path: Path, **options: Any) -> Prepared:
    """The loaded model of a folder made by `make_tiny`, in fp32."""
    with open_checkpoint(path) as checkpoint:
        tokenizer = Tokenizer.from_bytes((path / "tokenizer.json").read_bytes())
        return prepare(
            checkpoint, tokenizer, CloudOptions(**{"device": "cpu", "precision": "fp32", **options})
        )


@dataclass
class RunningCloud:
    """A cloud that serves on a thread of its own."""

    url: str
    hub: Hub
    server: CloudServer
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    @property
    def http(self) -> str:
        return self.url.replace("ws://", "http://")

    def stop(self, *, drain: bool = True) -> None:
        self.loop.call_soon_threadsafe(lambda: self.server.stop(drain=drain))
        self.thread.join(30)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running_cloud(
    prepared: Prepared,
    *,
    drain_s: float = 5.0,
    pack: Pack | None = None,
    ssl_context: ssl.SSLContext | None = None,
    **more: Any,
) -> Iterator[RunningCloud]:
    """Starts a cloud on a free port and stops it (without a drain) at the end. `pack`: what it offers.
    `more`: of DrainPolicy."""
    policy = DrainPolicy(deadline_s=drain_s, **more)
    started: list[RunningCloud] = []
    is_ready = threading.Event()

    async def serve() -> None:
        hub = make_hub(prepared)
        listener = bind("127.0.0.1", 0)
        server = CloudServer(
            hub, listener, ready=lambda _: is_ready.set(), policy=policy, ssl_context=ssl_context, pack=pack
        )
        started.append(
            RunningCloud(server.url, hub, server, asyncio.get_running_loop(), threading.current_thread())
        )
        await server.run_until_stopped()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="cloud-under-test")
    thread.start()
    try:
        assert is_ready.wait(30), "the cloud did not start"
        yield started[0]
    finally:
        if thread.is_alive() and started:
            with contextlib.suppress(RuntimeError):
                started[0].loop.call_soon_threadsafe(lambda: started[0].server.stop(drain=False))
        thread.join(30)


def hello_of(identity: ModelIdentity) -> Hello:
    return Hello(
        versions=(1,),
        identity=identity,
        edge_precision="fp32",
        row_formats=tuple(one.value for one in RowFormat),
        client="test",
    )


@dataclass
class Edge:
    """The client side of one websocket: `core` with a reader, and events to wait for."""

    socket: ClientConnection
    core: EdgeConnection
    events: list[EdgeEvent] = field(default_factory=list)
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)
    reader: asyncio.Task[None] | None = None

    async def flush(self) -> None:
        for data in self.core.data_to_send():
            await self.socket.send(data)

    async def read(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for data in self.socket:
                await self._take(self.core.receive(data, monotonic()))
                await self.flush()
        await self._take(self.core.lost())

    async def _take(self, events: Sequence[EdgeEvent]) -> None:
        async with self.arrived:
            self.events.extend(events)
            self.arrived.notify_all()

    async def wait(self, kind: type[EventT], stream: int | None = None, timeout_s: float = 60.0) -> EventT:
        """The next event of `kind` (on `stream`), removed. A failed session raises its error."""

        def find() -> EventT | None:
            for event in self.events:
                if stream is not None and getattr(event, "stream", None) != stream:
                    continue
                if isinstance(event, kind):
                    self.events.remove(event)
                    return event
                if isinstance(event, SessionFailed) and stream is not None:
                    raise event.error
            return None

        async with asyncio.timeout(timeout_s), self.arrived:
            while (event := find()) is None:
                await self.arrived.wait()
            return event

    async def rtt(self) -> float:
        """A ping's round trip in seconds."""
        self.core.ping(monotonic())
        await self.flush()
        return (await self.wait(RttMeasured, timeout_s=30)).seconds

    async def send_rows(
        self, session: EdgeSession, rows: Any, *, final: bool, codec: RowCodec | None = None, **more: Any
    ) -> None:
        codec = codec or RowCodec(RowFormat.F32, rows.shape[1])
        session.step_rows(codec.encode(rows), session.kv_len, len(rows), final=final, **more)
        await self.flush()

    async def send_ids(self, session: EdgeSession, ids: Sequence[int], *, final: bool) -> None:
        session.step_ids(list(ids), session.kv_len, final=final)
        await self.flush()

    async def close(self, session: EdgeSession, offer: PrefixOffer | None = None) -> SessionClosed:
        session.close(offer=offer or PrefixOffer())
        await self.flush()
        return await self.wait(SessionClosed, session.stream)


@contextlib.asynccontextmanager
async def connected(
    cloud: RunningCloud,
    *,
    identity: ModelIdentity | None = None,
    key: str | None = None,
    limits: Limits | None = None,
) -> AsyncIterator[Edge]:
    """An edge that has sent HELLO."""
    headers = {"Authorization": f"Bearer {key}"} if key else None
    async with connect(
        cloud.url + SESSION_PATH,
        subprotocols=[Subprotocol(SUBPROTOCOL)],
        additional_headers=headers,
        compression=None,
        max_size=16 * 1024 * 1024,
        close_timeout=2,
    ) as socket:
        edge = Edge(socket, EdgeConnection(hello_of(identity or cloud.hub.info.identity), limits or Limits()))
        edge.core.start(monotonic())
        await edge.flush()
        edge.reader = asyncio.create_task(edge.read())
        try:
            yield edge
        finally:
            await socket.close()
            await edge.reader


def open_of(prompt: Sequence[int], **more: Any) -> Open:
    """An OPEN with defaults for what a test doesn't care about."""
    fields: dict[str, Any] = {
        "split": 0,
        "shape": "prefix",
        "row_format": "f32",
        "max_tokens": 8,
        "prompt_tokens": len(prompt),
        "max_context": 200,
        "sampling": GREEDY,
    }
    return Open(**{**fields, **more})


async def get(cloud: RunningCloud, path: str, **headers: str) -> httpx.Response:
    return await asyncio.to_thread(httpx.get, cloud.http + path, headers=headers)


async def stats(cloud: RunningCloud, **headers: str) -> dict[str, Any]:
    answer: dict[str, Any] = (await get(cloud, "/v1/stats", **headers)).raise_for_status().json()
    return answer


async def settled(cloud: RunningCloud) -> dict[str, Any]:
    """The stats once no session is left: what follows a closed socket has no answer to wait for."""
    async with asyncio.timeout(30):
        while (now := await stats(cloud))["sessions"]:
            pass
    return now

"""The real cloud, engine and server, in a thread of this process; its counts are there to be asserted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from isthmus.cloud.engine import Engine, EngineStats
from isthmus.cloud.forward import MixedForward
from isthmus.cloud.hub import Hub
from isthmus.cloud.kv import PagePool
from isthmus.cloud.model import CloudModel
from isthmus.cloud.scheduler import Scheduler, SchedulerConfig
from isthmus.cloud.server import CloudServer, bind
from isthmus.cloud.telemetry import Telemetry
from isthmus.protocol.cloud_connection import ServerInfo
from isthmus.protocol.limits import Limits
from isthmus.protocol.profiles import DeviceProfile, Prices
from isthmus.splitter.checkpoint import open_checkpoint
from tests.edge.edge_world import TinyModel


@dataclass
class RealCloud:
    """A running cloud: its URL, its engine."""

    url: str
    engine: Engine
    server: CloudServer
    loop: asyncio.AbstractEventLoop

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats()

    async def pages_settle(self, used: int) -> EngineStats:
        """Wait (bounded) until no session holds more than `used` pages: the engine frees them on its own
        thread after CANCEL or CLOSE."""
        for _ in range(200):
            stats = self.stats
            if stats.sessions == 0 and stats.pages_used <= used:
                break
            await asyncio.sleep(0.02)
        return self.stats

    def drop_connections(self) -> None:
        """As if the process had died: every socket is cut."""

        def cut() -> None:
            for connection in list(self.server.server_state.connections):
                connection.transport.abort()

        self.loop.call_soon_threadsafe(cut)


@contextmanager
def real_cloud(
    model: TinyModel,
    *,
    pages: int = 4000,
    limits: Limits | None = None,
    profile: DeviceProfile | None = None,
    prices: Prices | None = None,
) -> Iterator[RealCloud]:
    """A cloud in fp32 for the checkpoint of `model`, on a free port, without keys (loopback). `profile` and
    `prices`: what it tells about itself."""
    with open_checkpoint(model.checkpoint) as checkpoint:
        torch_model = CloudModel.load(checkpoint)
    spec = torch_model.spec
    store = torch_model.new_store(pages)
    pool = PagePool(pages, on_alloc=store.zero_pages)
    engine = Engine(MixedForward(torch_model, store), Scheduler(pool, store.copy_pages, SchedulerConfig()))
    info = ServerInfo(
        identity=model.pack.identity,
        cloud_precision="fp32",
        num_layers=spec.num_layers,
        hidden=spec.hidden,
        vocab_size=spec.vocab_size,
        context_length=spec.context_length,
        row_formats=("f32", "bf16", "int8o"),
        kv_bytes_per_token_layer=spec.kv_bytes_per_token_layer(4),
        profile=profile,
        prices=prices,
    )
    started = threading.Event()
    made: list[RealCloud] = []

    async def serve() -> None:
        hub = Hub(engine, info, limits or Limits(), Telemetry())
        server = CloudServer(hub, bind("127.0.0.1", 0), ready=lambda _url: started.set())
        made.append(RealCloud(server.url, engine, server, asyncio.get_running_loop()))
        await server.run_until_stopped()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="cloud", daemon=True)
    thread.start()
    assert started.wait(30), "the cloud did not start"
    cloud = made[0]
    try:
        yield cloud
    finally:
        with suppress(RuntimeError):  # it was drained, and has ended by itself
            cloud.loop.call_soon_threadsafe(lambda: cloud.server.stop())
        thread.join(30)
        assert not thread.is_alive()

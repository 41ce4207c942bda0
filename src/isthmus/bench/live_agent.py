"""The two edges of `bench router --live`: one that chooses and learns, one that runs what was not chosen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isthmus.bench.throttle import ThrottledAgent
from isthmus.edge.requests import Decision, Finished, GenerateRequest, Started
from isthmus.protocol.errors import IsthmusError

if TYPE_CHECKING:
    from isthmus.splitter.runner import BlockRunner


@dataclass(frozen=True, slots=True)
class Resident:
    """What an agent has in memory: layers 0 … `layers` - 1, and whether norm and head."""

    layers: int
    head: bool


@dataclass(frozen=True, slots=True)
class Run:
    """A request that ran to its end: the decision that was taken, and its seconds."""

    decision: Decision
    total_s: float


class LiveAgent(ThrottledAgent):
    """An agent whose memory may be limited, and whose blocks may be set, between requests."""

    def limit_memory(self, memory_bytes: int | None) -> None:
        """From now on; None: no limit."""
        self._residency.memory_bytes = memory_bytes

    @asynccontextmanager
    async def asleep(self) -> AsyncIterator[None]:
        """Meanwhile it does not look how fast its device and its links are: they are another's."""
        await self._keeper.aclose()
        try:
            yield
        finally:
            self._keeper.start()

    @property
    def resident(self) -> Resident:
        """Blocks are loaded from layer 0 on, and let go from the last one on."""
        runner = self._started()
        return Resident(len(runner.loaded_layers), runner.head_loaded)

    async def settle(self, resident: Resident) -> None:
        """Have exactly that in memory, and used once: a block's first step is slower than all later ones."""
        await asyncio.get_running_loop().run_in_executor(self._worker, self._settle, resident)

    def _settle(self, resident: Resident) -> None:
        runner = self._started()
        if self.resident == resident:
            return
        num_layers = self.pack.spec.num_layers
        runner.unload(range(resident.layers, num_layers), embed=not resident.layers, head=not resident.head)
        runner.load(range(resident.layers), embed=resident.layers > 0, head=resident.head)
        if resident.layers:
            cache = runner.new_cache(range(resident.layers), capacity=1)
            rows = runner.forward(cache, runner.embed([0]), start_layer=0, stop_layer=resident.layers)
            if resident.head:
                runner.head(rows)
            cache.close()

    def _started(self) -> BlockRunner:
        assert self._runner is not None, "start() first"
        return self._runner

    async def run(self, request: GenerateRequest) -> Run:
        """Generate all of `max_tokens`. IsthmusError `moved` where it did not end as it began: then its time
        is no way's."""
        started: Started | None = None
        finished: Finished | None = None
        async with aclosing(self.generate(request)) as events:
            async for event in events:
                if isinstance(event, Started):
                    started = event
                elif isinstance(event, Finished):
                    finished = event
        assert started is not None
        assert finished is not None
        before = (started.route, started.split, started.shape)
        if finished.events or (finished.route, finished.split, finished.shape) != before:
            raise IsthmusError(f"a request moved in mid-run: {list(finished.events)}", code="moved")
        return Run(started.decision, finished.timings.total_s)

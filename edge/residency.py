"""Which blocks are in memory: room for what runs, and blocks loaded ahead for what would run better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from isthmus.edge.router import best
from isthmus.protocol.errors import RouteInfeasibleError
from isthmus.splitter.sides import side_of
from isthmus.splitter.situation import EdgeState

if TYPE_CHECKING:
    from isthmus.edge.constraints import RouterInputs
    from isthmus.edge.conversation import CachePool
    from isthmus.edge.running import Running
    from isthmus.protocol.profiles import DeviceProfile
    from isthmus.splitter.cache import KVCache
    from isthmus.splitter.pack import Pack
    from isthmus.splitter.runner import BlockRunner


class Residency:
    """Of one agent. `memory_bytes`: most that weights, KV and kept caches may take; None: no limit. `running`
    is the agent's list. What loads and unloads belongs into the agent's worker."""

    def __init__(
        self,
        pack: Pack,
        profile: DeviceProfile | None,
        pool: CachePool[KVCache],
        running: list[Running],
        runner: Callable[[], BlockRunner | None],
        *,
        kv_bytes: int,
        memory_bytes: int | None,
    ) -> None:
        self.memory_bytes = memory_bytes
        self._pack = pack
        self._profile = profile
        self._pool = pool
        self._running = running
        self._runner = runner
        self._kv_bytes = kv_bytes
        self._ahead: tuple[int, bool] | None = None

    def weight_bytes(self, split: int, *, head: bool) -> int:
        """What layers 0 … split - 1, and norm and head, take: as measured, else as the pack tells."""
        if self._profile is not None:
            return side_of(self._profile).weight_bytes(split, head=head)
        blocks = self._pack.bytes_per_block
        return blocks[0] + sum(blocks[1 : 1 + split]) + (blocks[-1] if head else 0)

    def kv_in_use(self, *, without: Running | None = None) -> int:
        """Bytes to which the KV of the running requests may grow."""
        return sum(self._kv_bytes * one.split * one.tokens for one in self._running if one is not without)

    def kv_bytes(self) -> int:
        """Bytes of the rows that the running requests have come to."""
        rows = ((one.split, len(one.request.prompt_ids) + one.num_out) for one in self._running)
        return sum(self._kv_bytes * split * num for split, num in rows)

    def state(self, *, without: Running | None = None) -> EdgeState:
        """What is loaded, and how many others compute here."""
        runner = self._runner()
        others = sum(one.split > 0 for one in self._running if one is not without)
        return EdgeState(self._loaded(runner), runner is not None and runner.head_loaded, others)

    def make_room(self) -> None:
        """Under a memory limit, where it is short: drop the blocks that no running request uses, then kept
        caches until what the running ones need fits."""
        runner, limit = self._runner(), self.memory_bytes
        if limit is None or runner is None:
            return
        uses = list(self._running)
        needed, needs_head = max((use.split for use in uses), default=0), any(use.head for use in uses)
        kept, keeps_head = max(needed, self._loaded(runner)), needs_head or runner.head_loaded
        in_use = self.kv_in_use()
        if self.weight_bytes(kept, head=keeps_head) + in_use > limit:
            kept, keeps_head = needed, needs_head
            layers = range(needed, self._pack.spec.num_layers)
            runner.unload(layers, embed=needed == 0, head=not needs_head)
        self._pool.evict(max(0, limit - self.weight_bytes(kept, head=keeps_head) - in_use))

    # ---- ahead of need ---------------------------------------------------------------------------

    def consider(self, inputs: RouterInputs) -> None:
        """A request was decided upon. If it would have gone deeper here but for the loading, the blocks it
        lacked are loaded when nothing runs: who always avoids the first load never finds out."""
        world = inputs.world
        if world is None or inputs.route != "auto":
            return
        loaded = self.state()
        if loaded.loaded_layers == inputs.num_layers and loaded.head_loaded:
            return  # nothing is missing, whatever would be best
        warm = replace(world, edge_state=replace(world.edge_state, loaded_layers=None, head_loaded=True))
        try:
            route, split, shape = best(replace(inputs, world=warm, pinned=None))
        except RouteInfeasibleError:
            return
        self._ahead = (split, route == "local" or shape == "u")

    def load_next(self) -> bool:
        """Load one block of what was considered. False where nothing is missing, or the memory is short."""
        runner, ahead = self._runner(), self._ahead
        if runner is None or ahead is None:
            return False
        split, head = ahead
        limit = self.memory_bytes
        short = limit is not None and self.weight_bytes(split, head=head) + self.kv_in_use() > limit
        layer = self._loaded(runner)
        done = layer >= split and (not head or runner.head_loaded)
        if short or done or split == 0:
            self._ahead = None
            return False
        missing = range(layer, layer + 1) if layer < split else range(0)
        runner.load(missing, embed=True, head=head and layer >= split)
        return True

    @staticmethod
    def _loaded(runner: BlockRunner | None) -> int:
        """Layers in memory from the first one on, without a gap."""
        layers = runner.loaded_layers if runner is not None else ()
        return next((i for i, layer in enumerate(layers) if layer != i), len(layers))

"""Makes the legs of one request: the first one, and those it goes on with elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from isthmus.edge.half import EdgeHalf
from isthmus.edge.leg import CHUNK_ROWS, Leg, Remote
from isthmus.edge.remote import CloudHalf, OfferContext
from isthmus.edge.requests import Decision, GenerateRequest, RowFormatName
from isthmus.protocol.activations import RowCodec

if TYPE_CHECKING:
    from isthmus.edge.canary import Canary
    from isthmus.edge.conversation import CachePool
    from isthmus.edge.grammar import Compiled
    from isthmus.edge.jobs import Jobs
    from isthmus.edge.link import CloudLink
    from isthmus.splitter.cache import KVCache
    from isthmus.splitter.runner import BlockRunner


@dataclass(frozen=True)
class Means:
    """What an agent lends its requests. `make_room` is called before blocks are loaded."""

    runner: BlockRunner
    pool: CachePool[KVCache]
    offers: OfferContext
    canary: Canary
    row_format: RowFormatName
    make_room: Callable[[], None]


class Legs:
    """For one request; `grammar` is its own, compiled. `on_use` hears of the depth, and whether the head is
    here, before anything is loaded; `events` takes down what is worth telling."""

    def __init__(
        self,
        means: Means,
        request: GenerateRequest,
        jobs: Jobs,
        *,
        grammar: Compiled | None,
        events: list[dict[str, Any]],
        alone: Callable[[], bool],
        on_use: Callable[[Decision], None],
    ) -> None:
        self._means = means
        self._request = request
        self._jobs = jobs
        self._grammar = grammar
        self._events = events
        self._alone = alone
        self._on_use = on_use

    async def first(self, decision: Decision, link: CloudLink | None) -> Leg:
        """From nothing."""
        self._on_use(decision)
        remote = await self._remote(decision, link)
        return self._leg(decision, self._edge(decision, remote), remote)

    async def elsewhere(self, leg: Leg, link: CloudLink) -> Leg:
        """The same cut, the rest at `link`: another cloud, or this one without what it held. The edge's half
        goes on as it is, the rows that were sent serve again."""
        assert leg.remote is not None
        old = leg.remote.half
        remote = await self._remote(leg.decision, link, before=old)
        old.cancel(keep_history=remote is not None and remote.half.history is old.history)
        return self._leg(leg.decision, leg.edge, remote)

    async def recut(self, leg: Leg, decision: Decision, link: CloudLink | None, ids: Sequence[int]) -> Leg:
        """Another cut, or another part in the rest. From a shallower cut the edge takes blocks over by
        running the rows it sent through them; from a deeper one, or none, it starts from the token ids."""
        self._on_use(decision)
        old = leg.remote.half if leg.remote else None
        remote = await self._remote(decision, link, before=old)
        edge = leg.edge
        if 0 < edge.split <= decision.split and edge.length:
            if edge.split < decision.split:
                assert old is not None
                await self._deepen(edge, decision.split, ids, old, remote.half if remote else None)
            draws = remote is None or decision.shape == "u"
            codec = remote.half.codec if remote else None
            await self._jobs.submit(partial(edge.retarget, draws=draws, codec=codec))
        else:
            edge = self._edge(decision, remote)
            edge.rows_computed = leg.edge.rows_computed
            await self._jobs.submit(partial(leg.edge.release, list(ids)))
        if old is not None:
            old.cancel(keep_history=remote is not None and remote.half.history is old.history)
        return self._leg(decision, edge, remote)

    async def _deepen(
        self, edge: EdgeHalf, split: int, ids: Sequence[int], old: CloudHalf, new: CloudHalf | None
    ) -> None:
        """Run the rows at the old boundary through the blocks up to `split`. The newest token's is left out:
        its row is computed by the step that makes its output."""
        stop = min(edge.length, len(ids) - 1)
        await self._jobs.submit(partial(edge.deepen, split))
        for start in range(0, stop, CHUNK_ROWS):
            end = min(start + CHUNK_ROWS, stop)
            kept = old.kept(start, end)

            def job(start: int = start, end: int = end, raw: Any = kept.raw if kept else None) -> Any:
                rows = (
                    old.codec.decode_raw(raw) if raw is not None else edge.rows_again(ids[start:end], start)
                )
                deep = edge.through(rows)
                return new.codec.encode_raw(deep) if new is not None else None

            encoded = await self._jobs.submit(job)
            if new is not None:
                new.history.put(start, encoded)
        await self._jobs.submit(edge.deepened)

    async def _remote(
        self, decision: Decision, link: CloudLink | None, *, before: CloudHalf | None = None
    ) -> Remote | None:
        """`before`: the half whose rows serve again, if the cut and the format are the same."""
        if link is None or decision.route == "local":
            return None
        welcome = await link.connect()
        if welcome.match == "canary":
            self._events.append(await self._means.canary.check(link, decision.split))
        row_format = self._request.row_format or self._means.row_format
        half = CloudHalf(link, welcome, self._request, decision, row_format, self._means.offers)
        if before is not None and (before.split, before.codec) == (half.split, half.codec):
            half.history = before.history
        return Remote(link, half)

    def _edge(self, decision: Decision, remote: Remote | None) -> EdgeHalf:
        codec: RowCodec | None = remote.half.codec if remote else None
        request = self._request
        return EdgeHalf(
            self._means.runner,
            self._means.pool,
            decision.split,
            prompt=request.prompt_ids,
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            draws=remote is None or decision.shape == "u",
            codec=codec,
            grammar=self._grammar,
            make_room=self._means.make_room,
        )

    def _leg(self, decision: Decision, edge: EdgeHalf, remote: Remote | None) -> Leg:
        return Leg(decision, edge, remote, self._jobs, self._alone)

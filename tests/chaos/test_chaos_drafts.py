"""A loss over a draft chain: the VERIFY that was under way is asked again, also after the cut that a wrong
draft brings; and a session that has truncated is resumed as it then was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import numpy as np
import pytest

from isthmus.edge.conversation import CachePool, CloudMemory
from isthmus.edge.half import Chunk, EdgeHalf
from isthmus.edge.history import HistoryBudget
from isthmus.edge.jobs import Jobs
from isthmus.edge.leg import Leg, Remote
from isthmus.edge.link import CloudLink
from isthmus.edge.remote import CloudHalf, OfferContext
from isthmus.edge.requests import Decision, Shape
from isthmus.protocol.errors import CloudError, RejectedError
from isthmus.protocol.events import ResultTokens, StreamTokens
from isthmus.protocol.frames import VERSION
from isthmus.protocol.messages import Hello
from isthmus.relay import Cut, Relay
from isthmus.splitter.cache import KVCache
from isthmus.splitter.runner import BlockRunner
from tests.chaos.world import TOKENS, World, ask, relay_to, sweep
from tests.oracle import Greedy

pytestmark = [pytest.mark.processes, pytest.mark.chaos]

SPLIT = 2
CHAIN = 4  # the newest token and three guesses
SHAPES: tuple[Shape, ...] = ("prefix", "u")


class Drafter:
    """Both halves of a request, and a loop that drafts three tokens at a time and survives losses."""

    def __init__(self, leg: Leg, reference: Greedy, again: Callable[[], Awaitable[CloudHalf]]) -> None:
        assert leg.remote is not None
        self._again = again
        self.leg, self.edge, self.cloud, self.reference = leg, leg.edge, leg.remote.half, reference
        self.link = leg.remote.link
        self.tokens: list[int] = []
        self.resumed: list[str] = []
        self.truncated = 0

    @property
    def ids(self) -> list[int]:
        return [*self.reference.prompt, *self.tokens]

    async def start(self) -> None:
        """Prefill and the first token."""
        prompt = self.reference.prompt
        await self.cloud.start()
        self.edge.prepare()
        await self.cloud.send_rows(self.edge.chunk(prompt), 0, final=True)
        first = await self.cloud.next()
        assert not isinstance(first, StreamTokens)
        if isinstance(first, ResultTokens):
            self.tokens += first.tokens
        else:
            self.tokens.append(self.edge.drawn(self.cloud.decode(first), 0).token)

    async def chain(self, right: int) -> None:
        """One draft of which the first `right` guesses are right."""
        left = TOKENS - len(self.tokens)
        after = self.reference.ids[len(self.tokens) :][: CHAIN - 1]
        guesses = [token if at < right else (token + 1) % 300 for at, token in enumerate(after)]
        ids = [self.tokens[-1], *guesses][:left]
        pos = len(self.ids) - 1
        self.edge.truncate(pos)
        chunk = self.edge.chunk(ids)
        truncate = pos < self.cloud.kv_len
        self.truncated += truncate
        try:
            await self.cloud.send_draft(ids, chunk, pos, truncate=truncate)
        except CloudError:
            await self._resume()
        self.take(ids, await self._verified())

    async def rebuild(self, ids: Sequence[int], chunk: Chunk, pos: int) -> None:
        """A new session at a cloud that knows nothing: all rows before the chain, then the chain."""
        self.cloud = await self._again()
        await self.cloud.start(self.ids)
        rows = self.cloud.kept(0, pos)
        assert rows is not None
        await self.cloud.send_rows(rows, 0, final=False)
        await self.cloud.send_draft(ids, chunk, pos)
        self.take(ids, await self.cloud.verified())

    async def _verified(self) -> ResultTokens | np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        while True:
            try:
                return await self.cloud.verified()
            except CloudError:
                await self._resume()

    async def _resume(self) -> None:
        while True:
            try:
                action, _ = await self.leg.resume(self.ids)
            except CloudError:
                await asyncio.sleep(0.02)
            else:
                self.resumed.append(action)
                return

    def take(
        self, ids: Sequence[int], result: ResultTokens | np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    ) -> None:
        if isinstance(result, ResultTokens):
            self.tokens += result.tokens
            return
        for at in range(len(ids)):
            self.tokens.append(self.edge.drawn(result[: at + 1], len(self.tokens)).token)
            if len(self.tokens) == TOKENS or ids[at + 1 : at + 2] != self.tokens[-1:]:
                return


@asynccontextmanager
async def drafting(world: World, shape: Shape) -> AsyncIterator[tuple[Drafter, Relay]]:
    """A request at K = 2 through a relay; nothing of it is left afterwards."""
    reference = world.references[20]
    hello = Hello(
        versions=(VERSION,), identity=world.pack.identity, edge_precision="f32", row_formats=("f32",)
    )
    request = ask(reference, {"route": "split", "split": SPLIT, "shape": shape})
    decision = Decision("split", SPLIT, shape, "asked")
    pool: CachePool[KVCache] = CachePool(0)
    async with relay_to(world.one) as (relay, url):
        link = CloudLink(url, hello)
        offers = OfferContext(b"s" * 32, world.pack, CloudMemory(), HistoryBudget(1 << 24))
        half = CloudHalf(link, await link.connect(), request, decision, "f32", offers)
        edge = EdgeHalf(
            BlockRunner(world.pack),
            pool,
            SPLIT,
            prompt=reference.prompt,
            max_tokens=TOKENS,
            sampling=request.sampling,
            draws=shape == "u",
            codec=half.codec,
        )
        with ThreadPoolExecutor(1) as worker:
            leg = Leg(decision, edge, Remote(link, half), Jobs(worker), lambda: True)

            async def again() -> CloudHalf:
                """Another half at the same cloud, with what this one remembers."""
                fresh = CloudHalf(link, await link.connect(), request, decision, "f32", offers)
                fresh.history = half.history
                return fresh

            drafter = Drafter(leg, reference, again)
            try:
                yield drafter, relay
            finally:
                drafter.cloud.cancel()
                await link.aclose()
                edge.truncate(0)
                edge.release(())
                pool.clear()
        assert offers.history.nbytes == 0


# Where the link is cut over chain 5: its VERIFY or its RESULT is lost; and what the guesses are worth.
PENDING = [
    (shape, lost, right) for shape in SHAPES for lost in ("verify", "result") for right in range(CHAIN)
]


@pytest.mark.parametrize(("shape", "lost", "right"), sweep(PENDING, 6, "verify"))
async def test_a_pending_verify_is_answered_after_the_resume(
    world: World, shape: Shape, lost: str, right: int
) -> None:
    async with drafting(world, shape) as (drafter, relay):
        await drafter.start()
        number = 0
        while len(drafter.tokens) < TOKENS:
            if number == 5:
                line = next(iter(relay.faults.lines.values()))
                direction = "up" if lost == "verify" else "down"
                relay.faults.at_message(line.messages[direction] + 1, direction, Cut())  # type: ignore[index, arg-type]
            await drafter.chain(right)
            number += 1
        assert tuple(drafter.tokens) == drafter.reference.ids
        assert len(drafter.resumed) == 1
        assert drafter.resumed == ["replay"] or lost == "result"
        if shape == "u" and right < CHAIN - 1:
            assert drafter.truncated > 3


@pytest.mark.parametrize("shape", SHAPES)
async def test_every_chain_is_cut_and_drafts_are_now_right_now_wrong(world: World, shape: Shape) -> None:
    """A session that truncates again and again, resumed after each chain."""
    async with drafting(world, shape) as (drafter, relay):
        await drafter.start()
        number = 0
        while len(drafter.tokens) < TOKENS:
            relay.faults.cut()
            await drafter.chain(number % CHAIN)
            number += 1
        assert tuple(drafter.tokens) == drafter.reference.ids
        assert len(drafter.resumed) == number
        assert shape == "prefix" or drafter.truncated > 3


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_verify_that_was_computed_is_not_computed_again(world: World, shape: Shape) -> None:
    """The answer is kept back, the link dies, the resume brings the answer: no row runs twice."""
    async with drafting(world, shape) as (drafter, relay):
        await drafter.start()
        await drafter.chain(1)
        before = world.one.stats()["rows_computed_total"]
        hold = relay.faults.hold("down")
        chain = asyncio.create_task(drafter.chain(2))
        await asyncio.wait_for(hold.reached.wait(), 10)
        await asyncio.to_thread(world.one.wait_for_rows, before + CHAIN)
        relay.faults.cut()
        await chain
        assert drafter.resumed == ["ok"]
        assert world.one.stats()["rows_computed_total"] == before + CHAIN
        while len(drafter.tokens) < TOKENS:
            await drafter.chain(3)
        assert tuple(drafter.tokens) == drafter.reference.ids


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_cloud_killed_over_a_verify(world: World, shape: Shape) -> None:
    """The restarted cloud has another secret: no old token is good. What was sent serves again."""
    async with drafting(world, shape) as (drafter, relay):
        await drafter.start()
        for right in (0, 2, 1):
            await drafter.chain(right)
        hold = relay.faults.hold("down")
        before = len(drafter.tokens)
        pos = len(drafter.ids) - 1
        ids = [drafter.tokens[-1], *drafter.reference.ids[before : before + 2]]
        drafter.edge.truncate(pos)
        chunk = drafter.edge.chunk(ids)
        await drafter.cloud.send_draft(ids, chunk, pos, truncate=pos < drafter.cloud.kv_len)
        await asyncio.wait_for(hold.reached.wait(), 10)
        world.one.kill()
        relay.faults.cut()
        with pytest.raises(CloudError):
            await drafter.cloud.verified()
        await asyncio.to_thread(world.one.be_up)
        with pytest.raises(RejectedError, match="resume token"):
            await drafter.leg.resume(drafter.ids)
        await drafter.rebuild(ids, chunk, pos)
        assert len(drafter.tokens) == before + 3
        while len(drafter.tokens) < TOKENS:
            await drafter.chain(len(drafter.tokens) % CHAIN)
        assert tuple(drafter.tokens) == drafter.reference.ids

"""The world of a soak: two real clouds behind faulty links, and one thing after another that goes wrong."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from time import monotonic
from typing import IO, Any

import httpx

from isthmus.bench.recovery_clouds import CloudProcess
from isthmus.relay import Cut, HalfOpen, LinkShape, Relay, Slice, Stall, parse_address

FAST = LinkShape()
SLOW = LinkShape(rtt_ms=80, up_mbps=0.5, down_mbps=0.5)
DRAIN_S = 4.0
# How long a killed or drained cloud may take until it is back, before that counts as an error.
BACK_S = 90.0


class Site:
    """One cloud and the link to it."""

    def __init__(self, name: str, cloud: CloudProcess, relay: Relay) -> None:
        self.name, self.cloud, self.relay = name, cloud, relay

    @property
    def url(self) -> str:
        """What the edge is told: the relay's address."""
        return "ws://{}:{}".format(*self.relay.listen)

    async def stats(self) -> dict[str, Any]:
        """The cloud's counts, asked past the relay."""
        async with httpx.AsyncClient() as client:
            answer: dict[str, Any] = (await client.get(f"{self.cloud.http}/v1/stats")).json()
        return answer


@asynccontextmanager
async def two_sites(
    arguments: Sequence[str], log: IO[str] | None, seed: int
) -> AsyncIterator[tuple[Site, Site]]:
    """Two clouds, each behind a relay of its own."""
    async with AsyncExitStack() as stack:
        sites = []
        for number, name in enumerate(("A", "B")):
            cloud = CloudProcess(*arguments, log=log)
            stack.push_async_callback(asyncio.to_thread, cloud.stop)
            await asyncio.to_thread(cloud.start)
            target = parse_address(cloud.url, what="the cloud")
            relay = Relay(("127.0.0.1", 0), target, FAST, seed=seed + number)
            await relay.start()
            stack.push_async_callback(relay.aclose)
            sites.append(Site(name, cloud, relay))
        yield sites[0], sites[1]


class Faults:
    """Things going wrong, drawn with `rng`. Links fail on both sites; processes end on A only, so that B's
    memory can be watched over the whole time."""

    def __init__(self, sites: tuple[Site, Site], rng: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self._sites = sites
        self._rng = rng
        self._ends: set[asyncio.Task[None]] = set()

    async def run(self, seconds: float, least_s: float, most_s: float) -> None:
        """One fault every `least_s` to `most_s` seconds, for so many seconds."""
        until = monotonic() + seconds
        links: list[tuple[str, Callable[[Site], None]]] = [
            ("cut", self._cut), ("cut at a byte", self._cut_at_byte), ("stall", self._stall),
            ("half-open", self._half_open), ("slow link", self._slow), ("slicing", self._slice),
        ]  # fmt: skip
        ends: list[tuple[str, Callable[[], Awaitable[None]]]] = [
            ("SIGKILL", self._kill),
            ("drain", self._drain),
        ]
        while True:
            await asyncio.sleep(self._rng.uniform(least_s, most_s))
            if monotonic() > until:
                return
            # A quarter of the faults end a process, unless it is still on its way back.
            if self._rng.random() < 0.25 and not self._sites[0].cloud.restarting:
                self._sites[0].cloud.restarted()
                name, end = self._rng.choice(ends)
                await end()
            else:
                name, spoil = self._rng.choice(links)
                spoil(self._rng.choice(self._sites))
            self.counts[name] += 1

    async def heal(self) -> None:
        """End what still lasts: full speed on both links, and A is back. What stands is cut once more."""
        for task in self._ends:
            task.cancel()
        await asyncio.gather(*self._ends, return_exceptions=True)
        for site in self._sites:
            site.relay.shape = FAST
            site.relay.faults.do(Slice(0))
            site.relay.faults.cut()
        await asyncio.wait_for(asyncio.to_thread(self._sites[0].cloud.restarted), BACK_S)

    def _cut(self, site: Site) -> None:
        site.relay.faults.cut()

    def _cut_at_byte(self, site: Site) -> None:
        faults = site.relay.faults
        faults.at_byte(faults.total_bytes + self._rng.randint(1, 20_000), "total", Cut())

    def _stall(self, site: Site) -> None:
        """From a hiccup to one that the heartbeat takes for death."""
        site.relay.faults.do(Stall(self._rng.uniform(0.3, 4.0), self._rng.choice(("up", "down", "both"))))

    def _half_open(self, site: Site) -> None:
        site.relay.faults.do(HalfOpen(self._rng.choice(("up", "down", "both"))))

    def _slow(self, site: Site) -> None:
        """A connection keeps the shape it was made with: a cut brings it over, there and back."""

        def shape(now: LinkShape) -> None:
            site.relay.shape = now
            site.relay.faults.cut()

        shape(SLOW)
        self._later(self._rng.uniform(2, 6), lambda: shape(FAST))

    def _slice(self, site: Site) -> None:
        site.relay.faults.do(Slice(self._rng.choice((1, 7, 100))))
        self._later(self._rng.uniform(1, 3), lambda: site.relay.faults.do(Slice(0)))

    async def _kill(self) -> None:
        cloud = self._sites[0].cloud
        cloud.restart_when_it_ends()
        cloud.kill()

    async def _drain(self) -> None:
        leaving, staying = self._sites
        leaving.cloud.restart_when_it_ends()
        body = {"deadline_s": DRAIN_S, "alternative": staying.url}
        async with httpx.AsyncClient() as client:
            reply = await client.post(f"{leaving.cloud.http}/admin/drain", json=body)
        assert reply.status_code == 202, reply.text

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        async def act() -> None:
            await asyncio.sleep(seconds)
            action()

        task = asyncio.create_task(act())
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

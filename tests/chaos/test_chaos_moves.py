"""Re-partition in mid-generation, and a kill on top: K to K', split to offload and back, local to split."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import aclosing
from typing import Any

import pytest

from isthmus.edge.agent import Agent
from isthmus.edge.requests import Decision, GenerateRequest
from isthmus.protocol.errors import NotFoundError
from isthmus.protocol.sampling import SamplingParams
from tests.chaos.world import TOKENS, World, agent_at, ask, run, sweep

pytestmark = [pytest.mark.processes, pytest.mark.chaos]

PLACES: dict[str, dict[str, Any]] = {
    "local": {"route": "local"},
    "offload": {"route": "offload"},
    "K1": {"route": "split", "split": 1, "shape": "prefix"},
    "K3": {"route": "split", "split": 3, "shape": "prefix"},
    "K1u": {"route": "split", "split": 1, "shape": "u"},
    "K2u": {"route": "split", "split": 2, "shape": "u"},
}
MOVES = [
    (one, other, at) for one, other in itertools.permutations(PLACES, 2) for at in (1, 2, 11, 30, TOKENS - 2)
]


async def be_connected(agent: Agent) -> None:
    """So that a move begins with the next token, not when a connection stands some tokens later."""
    request = GenerateRequest((5,), 1, SamplingParams(temperature=0.0), route="offload")
    async with aclosing(agent.generate(request)) as events:
        async for _ in events:
            pass


@pytest.mark.parametrize(("one", "other", "at"), sweep(MOVES, 8, "moves"))
async def test_another_cut_in_mid_generation(world: World, one: str, other: str, at: int) -> None:
    reference = world.references[20]
    moving: list[asyncio.Task[Decision]] = []
    async with agent_at(world.pack, world.one.url) as agent:
        await be_connected(agent)
        request = ask(reference, PLACES[one])

        async def move() -> None:
            moving.append(asyncio.create_task(agent.move(request.request_id, **PLACES[other])))
            await asyncio.sleep(0.01)  # the wish is noted before the next token is asked for

        done = await run(agent, request, reference, {at: move})
        results = await asyncio.gather(*moving, return_exceptions=True)
    if one == "offload" and isinstance(results[0], NotFoundError):
        return  # every token was here already
    assert isinstance(results[0], Decision), results
    assert done.finished.route == PLACES[other]["route"]
    assert done.only("moved")["reason"] == "asked"
    assert done.finished.shape == PLACES[other].get("shape", done.finished.shape)
    if "split" in PLACES[other]:
        assert done.finished.split == PLACES[other]["split"]


@pytest.mark.parametrize("then", ["second", "alone"])
async def test_there_and_back_and_a_kill_in_between(world: World, then: str) -> None:
    """Around all places, the cloud killed under way."""
    reference = world.references[300]
    moving: list[asyncio.Task[Decision]] = []
    clouds = world.clouds if then == "second" else world.clouds[:1]
    async with agent_at(world.pack, *(cloud.url for cloud in clouds)) as agent:
        await be_connected(agent)
        request = ask(reference, PLACES["local"], fallback="any" if then == "alone" else "cloud")

        def to(place: str) -> Any:
            async def move() -> None:
                moving.append(asyncio.create_task(agent.move(request.request_id, **PLACES[place])))
                await asyncio.sleep(0.01)

            return move

        tour = {3: to("K3"), 8: to("K1"), 13: to("K2u"), 18: world.one.kill}
        if then == "second":
            tour |= {23: to("K1u"), 28: to("local"), 33: to("K3")}
        done = await run(agent, request, reference, tour)
        await asyncio.gather(*moving)
    assert "link_lost" in done.events
    assert done.finished.route == ("local" if then == "alone" else "split")

"""The cloud's process is SIGKILLed, anywhere: the request goes on at the same cloud restarted, at a second
cloud, or on the edge alone, with the ids of the unbroken run."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from isthmus.relay import Refuse, Relay
from tests.chaos.nursery import NurseryCloud
from tests.chaos.world import SEED, TOKENS, WAYS, Run, World, agent_at, ask, relay_to, run, sweep

pytestmark = [pytest.mark.processes, pytest.mark.chaos]

THEN = ("restarted", "second", "alone")
EVERYWHERE = [(way, then, at) for way in WAYS for then in THEN for at in range(TOKENS)]
# Offload's prompt goes up in one message.
CHUNKED = [
    (way, then, message)
    for way in WAYS
    for then in THEN
    for message in ((1, 2, 3, 4) if way != "offload" else (1, 2))
]
# Offload's tokens come as a stream: what is behind the first few may all be here already.
LATE = [
    (way, then, at)
    for way in WAYS
    for then in THEN
    for at in ((0, 1, 2, 17, TOKENS - 1) if way != "offload" else (0, 1, 2))
]
TWICE = [(way, then, at) for way in WAYS for then in THEN for at in ((0, 1), (5, 6), (7, 30), (20, 20))]


def killing(cloud: NurseryCloud, then: str) -> Callable[[], None]:
    """SIGKILL; what comes then."""
    return cloud.kill_and_restart if then == "restarted" else cloud.kill


def urls(world: World, then: str) -> list[str]:
    return [cloud.url for cloud in (world.clouds if then == "second" else world.clouds[:1])]


def fallback(then: str) -> Any:
    return "any" if then == "alone" else "cloud"


def cut_off(relay: Relay, then: str) -> None:
    """The relay shows what the process shows: nobody listens any more."""
    if then == "alone":
        relay.faults.do(Refuse(3600))
    relay.faults.cut()


def check_end(world: World, done: Run, then: str, way: str) -> None:
    """The events say what happened, and the request ended where it could."""
    assert done.events[0] == "link_lost"
    moved = [event for event in done.finished.events if event["event"] == "moved"]
    assert moved, done.finished.events
    if then == "alone":
        assert done.finished.route == "local"
        assert moved[-1]["route"] == "local"
    else:
        assert done.finished.route == WAYS[way]["route"]
        assert done.finished.shape == done.started.shape
        assert moved[-1]["cloud"] == (world.one.url if then == "restarted" else world.other.url)


@pytest.mark.parametrize(("way", "then", "at"), sweep(EVERYWHERE, 12, "positions"))
async def test_killed_before_an_output_position(world: World, way: str, then: str, at: int) -> None:
    reference = world.references[20]
    async with agent_at(world.pack, *urls(world, then)) as agent:
        request = ask(reference, WAYS[way], fallback=fallback(then))
        done = await run(agent, request, reference, {at: killing(world.one, then)})
    streamed = way == "offload" and at > TOKENS / 2
    if not done.events and (streamed or at == TOKENS - 1):
        return  # every token was here: the stream, or the last result, was faster than the kill
    check_end(world, done, then, way)
    assert done.only("link_lost")["at_index"] >= at


@pytest.mark.parametrize(("way", "then", "message"), sweep(CHUNKED, 4, "chunks"))
async def test_killed_during_prefill(world: World, way: str, then: str, message: int) -> None:
    """A long prompt goes up in chunks: after HELLO (message 1) and OPEN, before each of them."""
    reference = world.references[300]
    others = urls(world, then)[1:]
    async with relay_to(world.one) as (relay, url), agent_at(world.pack, url, *others) as agent:
        hold = relay.faults.hold("up", message=1 + message)

        async def strike() -> None:
            await asyncio.wait_for(hold.reached.wait(), 30)
            killing(world.one, then)()
            cut_off(relay, then)

        watch = asyncio.create_task(strike())
        try:
            done = await run(agent, ask(reference, WAYS[way], fallback=fallback(then)), reference)
        finally:
            watch.cancel()
    assert done.only("link_lost")["at_index"] == 0
    assert done.finished.route == ("local" if then == "alone" else WAYS[way]["route"])


@pytest.mark.parametrize(("way", "then", "at"), sweep(LATE, 4, "late"))
async def test_killed_after_compute_and_before_the_reply(world: World, way: str, then: str, at: int) -> None:
    """The cloud has run the step, the relay keeps its answer, and it never leaves."""
    reference = world.references[20]
    before = world.one.stats()["rows_computed_total"]
    others = urls(world, then)[1:]
    async with relay_to(world.one) as (relay, url), agent_at(world.pack, url, *others) as agent:
        # WELCOME, OPENED, and from message 3 on the results (a heartbeat among them does no harm).
        hold = relay.faults.hold("down", message=3 + at)

        out: list[int] = [0]

        async def strike() -> None:
            await asyncio.wait_for(hold.reached.wait(), 30)
            rows = len(reference.prompt) + (out[-1] if way != "offload" else 0)
            await asyncio.to_thread(world.one.wait_for_rows, before + rows)
            killing(world.one, then)()
            cut_off(relay, then)

        watch = asyncio.create_task(strike())
        try:
            request = ask(reference, WAYS[way], fallback=fallback(then))
            count = {number: partial(out.append, number) for number in range(1, TOKENS)}
            done = await run(agent, request, reference, count)
            await watch
        finally:
            watch.cancel()
    lost = done.only("link_lost")["at_index"]
    assert lost <= at or way == "offload", "what was held never came"
    assert done.finished.route == ("local" if then == "alone" else WAYS[way]["route"])


@pytest.mark.parametrize(("way", "then", "at"), sweep(TWICE, 4, "twice"))
async def test_killed_twice_running(world: World, way: str, then: str, at: tuple[int, int]) -> None:
    """The second time wherever it runs then: the restarted one, the second cloud (and then back at the first,
    or alone)."""
    reference = world.references[20]
    first, second = at

    def again() -> None:
        if then == "restarted":
            world.one.be_up()
            world.one.kill_and_restart()
        elif then == "second":
            world.one.be_up()
            world.other.kill()
        else:
            world.other.kill()

    def once() -> None:
        killing(world.one, then)()
        if first == second:
            again()

    both = [cloud.url for cloud in world.clouds]
    async with agent_at(world.pack, *(both if then != "restarted" else both[:1])) as agent:
        request = ask(reference, WAYS[way], fallback=fallback(then))
        strikes = {first: once} if first == second else {first: once, second: again}
        done = await run(agent, request, reference, strikes)
    assert done.finished.route == ("local" if then == "alone" else WAYS[way]["route"])
    assert "link_lost" in done.events
    if first != second and then != "alone" and way != "offload":  # a stream may be over before the second
        assert done.events.count("link_lost") == 2, done.finished.events


@pytest.mark.parametrize("way", WAYS)
async def test_a_request_that_must_not_go_on_ends_with_the_loss(world: World, way: str) -> None:
    from isthmus.protocol.errors import CloudError

    at = random.Random(SEED).randrange(1, TOKENS)
    reference = world.references[20]
    async with agent_at(world.pack, world.one.url, world.other.url) as agent:
        request = ask(reference, WAYS[way], fallback="none")
        with pytest.raises(CloudError):
            await run(agent, request, reference, {at: world.one.kill})
        assert agent.stats()["running"] == 0

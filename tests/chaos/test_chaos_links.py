"""The link fails, the cloud lives: cut anywhere, stalled, half-open, slow, sliced. The session is resumed."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from isthmus.relay import Cut, Fault, HalfOpen, LinkShape, Slice, Stall
from isthmus.relay.faults import Direction, Side
from tests.chaos.world import SEED, TOKENS, WAYS, World, agent_at, ask, relay_to, run, sweep

pytestmark = [pytest.mark.processes, pytest.mark.chaos]

# HELLO, OPEN and the rows go up, WELCOME, OPENED and the results come down, now and then a heartbeat.
MESSAGES = TOKENS + 3
EVERY_MESSAGE: list[tuple[str, Direction, int]] = [
    (way, direction, number)
    for way in WAYS
    for direction in ("up", "down")
    for number in range(1, MESSAGES)
    if way != "offload" or number < 7  # its prompt is one message, and its tokens stream in few
]
EVERY_BYTE = [(list(WAYS)[draw % len(WAYS)], draw) for draw in range(200)]


@pytest.mark.parametrize(("way", "direction", "number"), sweep(EVERY_MESSAGE, 10, "messages"))
async def test_cut_at_a_message(world: World, way: str, direction: Direction, number: int) -> None:
    reference = world.references[20]
    async with relay_to(world.one) as (relay, url), agent_at(world.pack, url) as agent:
        relay.faults.at_message(number, direction, Cut())
        # Number 1 is HELLO or WELCOME: a connection cut in the handshake is made once more.
        done = await run(agent, ask(reference, WAYS[way]), reference)
        cuts = len(relay.faults.happened)
    if done.events:
        assert done.events[0] == "link_lost"
        assert done.events[-1] in ("resumed", "moved")
        assert done.finished.route == done.started.route
    else:
        assert cuts == 0 or number <= 2, "a cut in the middle is told"


@pytest.mark.parametrize(("way", "draw"), sweep(EVERY_BYTE, 6, "bytes"))
async def test_cut_at_a_random_byte(world: World, way: str, draw: int) -> None:
    reference = world.references[20]
    async with relay_to(world.one) as (relay, url), agent_at(world.pack, url) as agent:
        # Up to what such a run takes once it is connected; those beyond it hit nothing, which may be.
        at = random.Random(f"{SEED}/{way}/{draw}").randrange(4000 if way == "offload" else 20_000)

        def arm() -> None:
            relay.faults.at_byte(relay.faults.total_bytes + at, "total", Cut())

        done = await run(agent, ask(reference, WAYS[way]), reference, {0: arm})
    assert set(done.events) <= {"link_lost", "resumed", "resume_failed", "moved"}


@pytest.mark.parametrize("way", WAYS)
async def test_cut_after_every_token(world: World, way: str) -> None:
    """One session over dozens of connections."""
    reference = world.references[20]
    async with relay_to(world.one) as (relay, url), agent_at(world.pack, url) as agent:
        at = range(1, TOKENS, 1 if way != "offload" else 7)
        done = await run(agent, ask(reference, WAYS[way]), reference, dict.fromkeys(at, relay.faults.cut))
        connections = relay.faults.num_lines
    if way == "offload":  # the tokens may all be here before the second cut
        assert done.events.count("resumed") >= 1
    else:
        assert done.events.count("resumed") == len(at)
        assert connections == 1 + len(at)
        assert "moved" not in done.events


STALLS: list[tuple[str, Fault]] = [(way, Stall(1.5, side)) for way in WAYS for side in ("up", "down", "both")]


@pytest.mark.parametrize(("way", "fault"), sweep(STALLS, 2, "stalls"))
async def test_a_short_stall_is_waited_out(world: World, way: str, fault: Stall) -> None:
    reference = world.references[20]
    async with relay_to(world.one) as (relay, url), agent_at(world.pack, url) as agent:
        done = await run(agent, ask(reference, WAYS[way]), reference, {9: lambda: relay.faults.do(fault)})
        assert relay.faults.num_lines == 1
    assert done.events == []


DEAD: list[tuple[str, Fault]] = [
    *((way, Stall(4.0, side)) for way in WAYS for side in ("up", "down", "both")),
    *((way, HalfOpen(side)) for way in WAYS for side in ("up", "down", "both")),
]


@pytest.mark.parametrize(("way", "fault"), sweep(DEAD, 3, "dead"))
async def test_a_silent_link_is_noticed_within_3_s(world: World, way: str, fault: Any) -> None:
    """Nothing tells the edge but the silence. A link that stalls lets nobody through until it is over."""
    reference = world.references[20]
    struck: list[float] = []

    async with relay_to(world.one) as (relay, url), agent_at(world.pack, url, world.other.url) as agent:

        def strike() -> None:
            struck.append(time.monotonic())
            relay.faults.do(fault)

        done = await run(agent, ask(reference, WAYS[way]), reference, {9: strike})
    if way == "offload" and not done.events:
        return  # every token was here already
    lost, after = done.only("link_lost"), done.finished.events[-1]
    assert after["event"] in ("resumed", "moved")
    noticed_s = done.came_s[lost["at_index"]] - after["after_s"] - struck[0]
    assert 0 < noticed_s <= 3.2, f"noticed after {noticed_s:.2f} s"


async def test_a_slow_upload_is_no_dead_link(world: World) -> None:
    """3,900 rows of 256 bytes at 1 Mbit/s: 8 s in which the link is busy with one thing."""
    reference = world.references[3900]
    async with (
        relay_to(world.one, LinkShape(up_mbps=1.0)) as (relay, url),
        agent_at(world.pack, url) as agent,
    ):
        done = await run(agent, ask(reference, WAYS["prefix"]), reference)
        assert relay.faults.num_lines == 1
        assert relay.faults.total_bytes > 900_000
    assert done.events == []
    assert done.finished.timings.ttft_s > 6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 3])
async def test_writes_of_single_bytes(world: World, way: str, size: int) -> None:
    reference = world.references[20]
    async with relay_to(world.one) as (relay, url), agent_at(world.pack, url) as agent:
        relay.faults.do(Slice(size))
        done = await run(agent, ask(reference, WAYS[way]), reference, {5: relay.faults.cut})
    assert set(done.events) <= {"link_lost", "resumed"}


@pytest.mark.parametrize("side", ["up", "down"])
async def test_a_link_cut_over_the_resume_itself(world: World, side: Side) -> None:
    """The second connection breaks at each of its first messages: HELLO, RESUME; WELCOME, RESUMED."""
    reference = world.references[20]
    for number in (1, 2, 3):
        async with relay_to(world.one) as (relay, url), agent_at(world.pack, url) as agent:
            relay.faults.at_message(number, side, Cut(), connection=2)  # type: ignore[arg-type]
            strikes = {9: relay.faults.cut}
            done = await run(agent, ask(reference, WAYS["prefix"]), reference, strikes)
            assert relay.faults.num_lines >= 3
        assert done.events[-1] == "resumed", done.finished.events

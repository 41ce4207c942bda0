"""Losing the cloud in mid-generation, over real sockets: resume, failover, fallback, drain."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import ExitStack, aclosing
from time import monotonic
from typing import Any

import pytest

from isthmus.edge.agent import Agent
from isthmus.edge.recovery import RecoveryConfig
from isthmus.edge.requests import AgentEvent, Finished, GenerateRequest, Moved, Started, Token
from isthmus.protocol.edge_session import EdgeSession
from isthmus.protocol.errors import CloudError, IsthmusError
from isthmus.protocol.limits import Limits
from isthmus.relay import HalfOpen, LinkShape, Relay, parse_address
from isthmus.relay.faults import Side
from tests.edge.edge_world import TinyModel, ask, collect, prompt_of
from tests.edge.real_cloud import RealCloud, real_cloud
from tests.edge.test_edge_moves import agent_of

QUICK = RecoveryConfig(budget_s=2.0, refused_grace_s=0.2)
ROUTES: list[dict[str, Any]] = [
    {"route": "split", "split": 2, "shape": "prefix"},
    {"route": "split", "split": 2, "shape": "u"},
    {"route": "offload"},
]
routes = pytest.mark.parametrize("route", ROUTES, ids=["prefix", "u", "offload"])


async def run_with(
    agent: Agent, request: GenerateRequest, at: int, trouble: Callable[[], Any]
) -> tuple[list[int], Finished]:
    """Runs it, with `trouble` once `at` tokens are out."""
    tokens: list[int] = []
    finished: Finished | None = None
    async with aclosing(agent.generate(request)) as events:
        async for event in events:
            if isinstance(event, Token):
                assert event.index == len(tokens)
                tokens.append(event.id)
                if len(tokens) == at:
                    trouble()
                    await asyncio.sleep(0.05)
            elif isinstance(event, Finished):
                finished = event
    assert finished is not None
    return tokens, finished


def kinds(finished: Finished) -> list[str]:
    return [event["event"] for event in finished.events]


@routes
@pytest.mark.parametrize("at", [1, 5, 9])
async def test_a_cut_connection_is_resumed_with_the_kv(
    tiny: TinyModel, route: dict[str, Any], at: int
) -> None:
    prompt = prompt_of(40)
    with real_cloud(tiny, limits=Limits(stream_window_tokens=4)) as cloud:
        async with agent_of(tiny, cloud.url, recovery=QUICK) as agent:
            whole = await collect(agent, ask(prompt, 12, route="local"))
            before = cloud.stats.rows_computed_total
            tokens, finished = await run_with(agent, ask(prompt, 12, **route), at, cloud.drop_connections)
            assert tokens == whole.ids
            assert kinds(finished) == ["link_lost", "resumed"]
            assert finished.route == route["route"]
            # 40 of the prompt and 11 tokens: nothing was computed twice.
            assert cloud.stats.rows_computed_total - before == 51
            assert agent.stats()["resumes"] == 1
            assert agent.stats()["history_bytes"] == 0
        assert (await cloud.pages_settle(10**9)).sessions == 0


@routes
async def test_a_loss_is_told_before_it_is_made_good(tiny: TinyModel, route: dict[str, Any]) -> None:
    """Whoever watches learns that the cloud is lost while it is, and then how the request went on."""
    events: list[AgentEvent] = []
    with real_cloud(tiny, limits=Limits(stream_window_tokens=4)) as cloud:
        async with (
            agent_of(tiny, cloud.url, recovery=QUICK) as agent,
            aclosing(agent.generate(ask(prompt_of(40), 12, **route))) as source,
        ):
            async for event in source:
                events.append(event)
                if isinstance(event, Token) and event.index == 4:
                    cloud.drop_connections()
                    await asyncio.sleep(0.05)
                elif isinstance(event, Moved):
                    assert agent.stats()["resumes"] == (event.events[0]["event"] == "resumed")
    moved = [event for event in events if isinstance(event, Moved)]
    assert [[each["event"] for each in event.events] for event in moved] == [["link_lost"], ["resumed"]]
    assert isinstance(events[-1], Finished)
    assert events[-1].events == (*moved[0].events, *moved[1].events)
    assert events.index(moved[1]) == events.index(moved[0]) + 1


@routes
async def test_a_session_that_the_cloud_forgot_is_rebuilt(tiny: TinyModel, route: dict[str, Any]) -> None:
    prompt = prompt_of(40)
    with real_cloud(tiny, limits=Limits(detached_s=0.0, stream_window_tokens=4)) as cloud:
        async with agent_of(tiny, cloud.url, recovery=QUICK) as agent:
            whole = await collect(agent, ask(prompt, 12, route="local"))
            tokens, finished = await run_with(agent, ask(prompt, 12, **route), 5, cloud.drop_connections)
            assert tokens == whole.ids
            assert kinds(finished)[-1] == "moved"
            assert agent.stats()["failovers"] == 1
        assert (await cloud.pages_settle(10**9)).sessions == 0


def tamper_token(core: EdgeSession) -> None:
    core._resume_token = "no token of this cloud"


def tamper_digest(core: EdgeSession) -> None:
    core.digests._chain[-1] ^= 1


def forget_digests(core: EdgeSession) -> None:
    core.digests.truncate(0)


@routes
@pytest.mark.parametrize("tamper", [tamper_token, tamper_digest, forget_digests])
async def test_a_refused_resume_is_followed_by_a_new_session(
    tiny: TinyModel, route: dict[str, Any], tamper: Callable[[EdgeSession], None]
) -> None:
    prompt = prompt_of(40)
    with real_cloud(tiny, limits=Limits(stream_window_tokens=4)) as cloud:
        async with agent_of(tiny, cloud.url, recovery=QUICK) as agent:

            def trouble() -> None:
                placement = agent._running[0].placement
                assert placement is not None
                assert placement.leg is not None
                assert placement.leg.remote is not None
                session = placement.leg.remote.half._session
                assert session is not None
                tamper(session.core)
                cloud.drop_connections()

            whole = await collect(agent, ask(prompt, 12, route="local"))
            tokens, finished = await run_with(agent, ask(prompt, 12, **route), 5, trouble)
            assert tokens == whole.ids
            assert kinds(finished)[0] == "link_lost"
            assert kinds(finished)[-1] in ("moved", "resumed")
            if tamper is tamper_token:
                assert kinds(finished) == ["link_lost", "resume_failed", "moved"]
                assert finished.events[1]["code"] == "resume_refused"


@routes
async def test_another_cloud_goes_on(tiny: TinyModel, route: dict[str, Any]) -> None:
    prompt = prompt_of(40)
    with ExitStack() as first, real_cloud(tiny) as second:
        cloud = first.enter_context(real_cloud(tiny, limits=Limits(stream_window_tokens=4)))
        async with agent_of(tiny, cloud.url, second.url, recovery=QUICK) as agent:
            whole = await collect(agent, ask(prompt, 12, route="local"))
            tokens, finished = await run_with(agent, ask(prompt, 12, **route), 5, lambda: die(cloud))
            assert tokens == whole.ids
            assert kinds(finished)[-1] == "moved"
            assert finished.events[-1]["cloud"] == second.url
        assert (await second.pages_settle(10**9)).sessions == 0


@routes
async def test_without_a_cloud_the_edge_finishes_alone(tiny: TinyModel, route: dict[str, Any]) -> None:
    prompt = prompt_of(40)
    with real_cloud(tiny, limits=Limits(stream_window_tokens=4)) as cloud:
        async with agent_of(tiny, cloud.url, recovery=QUICK) as agent:
            whole = await collect(agent, ask(prompt, 12, route="local"))
            tokens, finished = await run_with(agent, ask(prompt, 12, **route), 5, lambda: die(cloud))
            assert tokens == whole.ids
            assert kinds(finished) == ["link_lost", "moved"]
            assert (finished.route, finished.split) == ("local", 4)
            assert agent.stats()["fallbacks"] == 1


@pytest.mark.parametrize("fallback", ["cloud", "none"])
async def test_a_request_may_forbid_to_finish_here(tiny: TinyModel, fallback: str) -> None:
    with real_cloud(tiny) as cloud:
        async with agent_of(tiny, cloud.url, recovery=QUICK) as agent:
            request = ask(prompt_of(20), 12, route="split", split=2, fallback=fallback)
            with pytest.raises(CloudError):
                await run_with(agent, request, 5, lambda: die(cloud))
            # The agent is none the worse for it.
            assert (await collect(agent, ask(prompt_of(20), 4, route="local"))).finished


async def test_an_edge_that_cannot_hold_the_rest_says_what_was_lost(tiny: TinyModel) -> None:
    with real_cloud(tiny) as cloud:
        async with agent_of(tiny, cloud.url, recovery=QUICK, memory_mb=0.2) as agent:
            with pytest.raises(IsthmusError) as caught:
                await run_with(agent, ask(prompt_of(20), 12, route="offload"), 5, lambda: die(cloud))
            assert isinstance(caught.value, CloudError)


@pytest.mark.parametrize("side", ["up", "down", "both"])
@pytest.mark.parametrize("route", ROUTES[:2], ids=["prefix", "u"])
async def test_a_link_that_is_half_dead_is_noticed_and_left(
    tiny: TinyModel, route: dict[str, Any], side: Side
) -> None:
    """Bytes are swallowed and no error comes; in one direction the cloud may even go on talking."""
    with real_cloud(tiny) as cloud:
        target = parse_address(cloud.url, what="cloud")
        relay = Relay(("127.0.0.1", 0), target, LinkShape())
        host, port = await relay.start()
        async with agent_of(tiny, f"ws://{host}:{port}", recovery=QUICK) as agent:
            whole = await collect(agent, ask(prompt_of(40), 12, route="local"))
            began = 0.0

            def trouble() -> None:
                nonlocal began
                began = monotonic()
                relay.faults.do(HalfOpen(side))

            tokens, finished = await run_with(agent, ask(prompt_of(40), 12, **route), 5, trouble)
            assert tokens == whole.ids
            assert kinds(finished) == ["link_lost", "resumed"]
            assert finished.events[0]["code"] == "cloud_silent"
            # Noticed within 3 s; the rest is the resume and six tokens.
            assert monotonic() - began < 3.0 + 2.0
        await relay.aclose()


async def test_a_loss_never_loosens_privacy(tiny: TinyModel) -> None:
    """activations-only goes on as the same split in the U-shape, or here; local-only has nothing to lose."""
    prompt = prompt_of(40)
    with ExitStack() as first, ExitStack() as second:
        clouds = [stack.enter_context(real_cloud(tiny)) for stack in (first, second)]
        async with agent_of(tiny, *(cloud.url for cloud in clouds), recovery=QUICK, min_depth=2) as agent:
            whole = await collect(agent, ask(prompt, 12, route="local"))
            request = ask(prompt, 12, privacy="activations-only", route="split", split=2)
            tokens, finished = await run_with(agent, request, 3, lambda: die(clouds[0]))
            assert tokens == whole.ids
            assert (finished.route, finished.split, finished.shape) == ("split", 2, "u")
            assert finished.events[-1]["cloud"] == clouds[1].url
            tokens, finished = await run_with(agent, request, 3, lambda: die(clouds[1]))
            assert tokens == whole.ids
            assert finished.route == "local"


async def test_a_draining_cloud_is_left_for_one_that_stands(tiny: TinyModel) -> None:
    prompt = prompt_of(40)
    with ExitStack() as first, real_cloud(tiny) as second:
        cloud = first.enter_context(real_cloud(tiny))
        async with agent_of(tiny, cloud.url, second.url, recovery=QUICK) as agent:
            whole = await collect(agent, ask(prompt, 12, route="local"))
            drain = lambda: cloud.loop.call_soon_threadsafe(cloud.server.stop)  # noqa: E731
            tokens, finished = await run_with(agent, ask(prompt, 12, **ROUTES[0]), 5, drain)
            assert tokens == whole.ids
            assert kinds(finished) == ["moved"]
            assert finished.events[0]["reason"] == "drain"
        assert (await cloud.pages_settle(10**9)).sessions == 0


def drain_unheard(cloud: RealCloud) -> None:
    """The drain has begun; this thread's event loop could not hear of it yet."""
    begun = threading.Event()

    def drain() -> None:
        cloud.server.stop()
        begun.set()

    cloud.loop.call_soon_threadsafe(drain)
    assert begun.wait(10)


@pytest.mark.parametrize("known", [False, True], ids=["not told yet", "told"])
async def test_a_cloud_that_drains_between_decision_and_beginning_is_left(
    tiny: TinyModel, known: bool
) -> None:
    """The route was asked for by name, and that cloud takes nothing new; but another one stands."""
    prompt = prompt_of(20)
    with ExitStack() as first, real_cloud(tiny) as second:
        cloud = first.enter_context(real_cloud(tiny))
        async with agent_of(tiny, cloud.url, second.url, recovery=QUICK) as agent:
            whole = await collect(agent, ask(prompt, 6, route="local"))
            await collect(agent, ask(prompt_of(8), 2, route="offload"))  # connects
            events = agent.generate(ask(prompt, 6, route="offload"))
            started = await anext(events)
            assert isinstance(started, Started)
            drain_unheard(cloud)
            for _ in range(2000 if known else 0):
                if agent.stats()["clouds"][0]["state"] != "up":
                    break
                await asyncio.sleep(0.005)
            tokens = [event.id async for event in events if isinstance(event, Token)]
            assert tokens == whole.ids


async def test_a_draining_cloud_without_another_is_used_to_the_end(tiny: TinyModel) -> None:
    with real_cloud(tiny) as cloud:
        async with agent_of(tiny, cloud.url, recovery=QUICK) as agent:
            drain = lambda: cloud.loop.call_soon_threadsafe(cloud.server.stop)  # noqa: E731
            _, finished = await run_with(agent, ask(prompt_of(40), 12, **ROUTES[0]), 5, drain)
            assert kinds(finished) == []
            assert finished.route == "split"


async def test_nobody_is_sent_to_a_stranger(tiny: TinyModel) -> None:
    """GOAWAY names a cloud that is not in the edge's own list: it is not asked."""
    with real_cloud(tiny) as cloud, real_cloud(tiny) as stranger:
        async with agent_of(tiny, cloud.url, recovery=QUICK) as agent:

            def drain() -> None:
                for peer in tuple(cloud.server._hub.peers):
                    peer.core.go_away(30.0, stranger.url)
                    peer.wake()

            _, finished = await run_with(
                agent,
                ask(prompt_of(40), 12, **ROUTES[0]),
                5,
                lambda: cloud.loop.call_soon_threadsafe(drain),
            )
            assert kinds(finished) == []
        assert stranger.stats.rows_computed_total == 0


def die(cloud: RealCloud) -> None:
    """As if the process had died: nothing listens, every socket is cut, what it held is gone."""
    closed = asyncio.run_coroutine_threadsafe(_die(cloud), cloud.loop)
    closed.result(10)


async def _die(cloud: RealCloud) -> None:
    for server in cloud.server.servers:
        server.close()
    cloud.drop_connections()

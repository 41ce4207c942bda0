"""Edge and cloud as real processes: many edges at once, a killed cloud, a client that leaves, turns."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from isthmus.edge.agent import Agent
from isthmus.edge.requests import AgentEvent, Fallback, Finished, GenerateRequest, Token
from isthmus.protocol.errors import CloudError
from isthmus.protocol.sampling import SamplingParams
from isthmus.splitter.pack import Pack
from tests.packs import pack_checkpoint
from tests.processes import Service, serve
from tests.tiny import make_tiny

pytestmark = pytest.mark.processes

LAYERS = 8


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    return make_tiny("llama", root / "source", seed=5, num_hidden_layers=LAYERS, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def pack(source: Path) -> Pack:
    return pack_checkpoint(source, source.parent / "pack")


@pytest.fixture(scope="module")
def cloud(source: Path) -> Iterator[Service]:
    with serve("cloud", "--model", str(source), "--port", "0", "--precision", "fp32") as service:
        yield service


@asynccontextmanager
async def edge(pack: Pack, url: str, **options: Any) -> AsyncIterator[Agent]:
    agent = Agent(pack, cloud_urls=(url,), **options)
    await agent.start()
    try:
        yield agent
    finally:
        await agent.aclose()


def ask(
    prompt: list[int], split: int, *, shape: str = "prefix", tokens: int = 24, seed: int | None = None
) -> GenerateRequest:
    route = {0: "offload", LAYERS: "local"}.get(split, "split")
    return GenerateRequest(
        prompt_ids=tuple(prompt),
        max_tokens=tokens,
        sampling=SamplingParams(temperature=0.0)
        if seed is None
        else SamplingParams(temperature=1.0, seed=seed),
        route=route,  # type: ignore[arg-type]  # one of the three names above
        split=split if route == "split" else None,
        shape=shape if route == "split" else None,  # type: ignore[arg-type]
        row_format="f32",
    )


async def finish(agent: Agent, request: GenerateRequest) -> Finished:
    async with aclosing(agent.generate(request)) as events:
        async for event in events:
            if isinstance(event, Finished):
                return event
    raise AssertionError("no last event")


async def drained(events: AsyncIterator[AgentEvent]) -> Finished:
    last = [event async for event in events][-1]
    assert isinstance(last, Finished)
    return last


def prompt_of(length: int, seed: int) -> list[int]:
    return [3 + (seed * 53 + i * i + 31 * i) % 240 for i in range(length)]


async def stats(cloud: Service) -> dict[str, Any]:
    async with httpx.AsyncClient() as client:
        reply: dict[str, Any] = (await client.get(f"{cloud.http}/v1/stats")).json()
    return reply


async def settled(cloud: Service) -> dict[str, Any]:
    """The cloud's counts once no session is open; fails after 5 s."""
    until = time.monotonic() + 5
    while (counts := await stats(cloud))["sessions"]:
        assert time.monotonic() < until, counts
        await asyncio.sleep(0.02)
    return counts


async def test_eight_edges_at_once_get_what_they_get_alone(pack: Pack, cloud: Service) -> None:
    requests = [
        ask(prompt_of(20 + 9 * i, i), split, shape=shape, seed=None if i % 2 else i)
        for i, (split, shape) in enumerate(
            [
                (0, "prefix"),
                (1, "prefix"),
                (2, "u"),
                (3, "prefix"),
                (5, "u"),
                (6, "prefix"),
                (7, "u"),
                (0, "prefix"),
            ]
        )
    ]
    alone = []
    for request in requests:
        async with edge(pack, cloud.url) as agent:
            alone.append((await finish(agent, request)).token_ids)
    agents = [Agent(pack, cloud_urls=(cloud.url,)) for _ in requests]
    for agent in agents:
        await agent.start()
    try:
        pairs = zip(agents, requests, strict=True)
        together = await asyncio.gather(*(finish(agent, request) for agent, request in pairs))
    finally:
        for agent in agents:
            await agent.aclose()
    assert [one.token_ids for one in together] == alone
    assert (await settled(cloud))["sessions"] == 0


@pytest.mark.parametrize("fallback", ["any", "none"])
async def test_a_killed_cloud_costs_no_token_or_is_a_typed_error(
    source: Path, pack: Pack, fallback: Fallback
) -> None:
    with serve("cloud", "--model", str(source), "--port", "0", "--precision", "fp32") as doomed:
        async with edge(pack, doomed.url) as agent:
            request = ask(prompt_of(30, 1), 4, tokens=300)
            whole = await finish(agent, ask(prompt_of(30, 1), LAYERS, tokens=300))
            events = agent.generate(replace(request, fallback=fallback))
            seen = [await anext(events) for _ in range(6)]
            assert sum(isinstance(event, Token) for event in seen) == 5
            doomed.kill()
            killed_at = time.monotonic()
            if fallback == "none":
                with pytest.raises(CloudError):
                    await drained(events)
            else:
                finished = await drained(events)
                assert finished.token_ids == whole.token_ids
                assert finished.route == "local"
            assert time.monotonic() - killed_at < 10
            assert len((await finish(agent, ask(prompt_of(10, 2), LAYERS))).token_ids) == 24
            assert agent.stats()["running"] == 0


@pytest.mark.parametrize("split", [0, 4])
async def test_a_cancelled_request_frees_the_clouds_pages(pack: Pack, cloud: Service, split: int) -> None:
    before = await settled(cloud)
    async with edge(pack, cloud.url) as agent:
        async with aclosing(agent.generate(ask(prompt_of(100, 3 + split), split, tokens=1000))) as events:
            async for event in events:
                if isinstance(event, Token) and event.index == 3:
                    running = await stats(cloud)
                    break
        after = await settled(cloud)
    held = 7 * (LAYERS - split)  # 104 rows and more: 7 pages of 16 in each of the cloud's layers
    assert running["pages_used"] - before["pages_used"] >= held
    assert after["pages_used"] == 0


@pytest.mark.parametrize(("split", "shape"), [(0, "prefix"), (4, "prefix"), (4, "u"), (LAYERS, "prefix")])
async def test_a_second_turn_computes_only_its_new_tokens(
    pack: Pack, cloud: Service, split: int, shape: str
) -> None:
    async with edge(pack, cloud.url) as agent:
        first = prompt_of(50, 20 + split)
        answer = await finish(agent, ask(first, split, shape=shape, tokens=13))
        before = await settled(cloud)
        turn = [*first, *answer.token_ids, *prompt_of(21, 90 + split)]
        second = await finish(agent, ask(turn, split, shape=shape, tokens=9))
        after = await settled(cloud)
        # The last token of the first answer was drawn but never run: it is new to both sides.
        new = len(turn) - (len(first) + 13 - 1)
        ran = new + 9 - 1
        assert second.counts["edge_rows_computed"] == (ran if split else 0)
        assert after["rows_computed_total"] - before["rows_computed_total"] == (ran if split < LAYERS else 0)
    async with edge(pack, cloud.url) as fresh:
        assert (await finish(fresh, ask(turn, split, shape=shape, tokens=9))).token_ids == second.token_ids

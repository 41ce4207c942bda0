"""What /v1/stats tells, once and as a stream, and that a stream costs nothing once nobody listens."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
import pytest

from isthmus.edge.agent import Agent
from isthmus.edge.api import ServedModel
from isthmus.edge.chat import ChatTemplate
from isthmus.edge.openapi_replies import Stats
from isthmus.edge.requests import Token
from isthmus.edge.server import DRAIN_S, serve_edge
from tests.edge.edge_world import TinyModel, ask, prompt_of
from tests.edge.live_edge import NAME, LiveEdge, live_edge
from tests.edge.real_cloud import real_cloud


@pytest.fixture(scope="module")
def edge(tiny: TinyModel) -> Iterator[LiveEdge]:
    """With a cloud."""
    with real_cloud(tiny) as cloud, live_edge(tiny.pack, cloud_urls=(cloud.url,)) as edge:
        yield edge


def test_the_snapshot_names_model_and_process(edge: LiveEdge, tiny: TinyModel) -> None:
    stats = edge.stats()
    Stats.model_validate(stats)
    assert stats["model"]["id"] == NAME
    assert stats["model"]["num_layers"] == 4
    assert stats["model"]["bytes_per_block"] == tiny.pack.bytes_per_block
    assert stats["pid"] == os.getpid()
    assert stats["rss_bytes"] > 1 << 20
    assert 0 < stats["uptime_s"] < edge.stats()["uptime_s"]
    assert stats["conversations"] is False


def test_loaded_blocks_and_taken_routes_are_counted(edge: LiveEdge, tiny: TinyModel) -> None:
    blocks = tiny.pack.bytes_per_block
    before = edge.stats()
    assert (before["loaded_layers"], before["weights_bytes"]) == ([], 0)
    ways: list[dict[str, Any]] = [
        {"route": "split", "split": 2, "shape": "prefix"},
        {"route": "offload"},
        {"route": "local"},
    ]
    for way in ways:
        body = {"prompt": "hello", "max_tokens": 2, "isthmus": way}
        assert edge.http.post("/v1/completions", json=body).status_code == 200
        if way["route"] == "split":
            assert edge.stats()["weights_bytes"] == sum(blocks[:3])
    after = edge.stats()
    assert after["loaded_layers"] == [0, 1, 2, 3]
    assert after["weights_bytes"] == sum(blocks)
    assert after["routes"] == {"split": 1, "offload": 1, "local": 1}


def test_a_cloud_is_told_of_as_far_as_it_is_known(edge: LiveEdge, tiny: TinyModel) -> None:
    body = {"prompt": "hello", "max_tokens": 2, "isthmus": {"route": "offload"}}
    assert edge.http.post("/v1/completions", json=body).status_code == 200
    (cloud,) = edge.stats()["clouds"]
    assert (cloud["state"], cloud["circuit"], cloud["precision"]) == ("up", "closed", "fp32")
    assert cloud["rtt_s"] is None or cloud["rtt_age_s"] >= 0
    with live_edge(tiny.pack, cloud_urls=("ws://127.0.0.1:1",)) as other:
        (unknown,) = other.stats()["clouds"]
    assert {unknown[name] for name in ("rtt_s", "rtt_age_s", "up_bytes_per_s", "precision", "device")} == {
        None
    }


async def test_what_runs_is_listed_while_it_runs(tiny: TinyModel) -> None:
    agent = Agent(tiny.pack)
    await agent.start()
    request = ask(prompt_of(10), 20)
    async with aclosing(agent.generate(request)) as events:
        while not isinstance(await anext(events), Token):
            pass
        stats = agent.stats()  # its next token is not computed before it is asked for
        way = {"route": "local", "split": 4, "shape": None}
        rows = {"prompt_tokens": 10, "tokens": 1}
        assert stats["active"] == [{"request_id": request.request_id, **way, **rows}]
        assert stats["kv_bytes"] == 11 * 4 * tiny.pack.spec.kv_bytes_per_token_layer(4)
    stats = agent.stats()
    assert (stats["active"], stats["kv_bytes"]) == ([], 0)
    await agent.aclose()


# ---- as a stream -------------------------------------------------------------------------------------


@asynccontextmanager
async def served_here(tiny: TinyModel) -> AsyncIterator[tuple[str, asyncio.Event, asyncio.Task[bool]]]:
    """An edge on this test's own loop: its URL, what ends it, its life."""
    agent = Agent(tiny.pack)
    model = ServedModel(NAME, agent, ChatTemplate.from_pack(tiny.pack), {})
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    life = asyncio.create_task(serve_edge(model, host="127.0.0.1", port=0, ready=ready.set_result, stop=stop))
    try:
        yield await ready, stop, life
    finally:
        stop.set()
        await life


async def test_the_stream_is_one_snapshot_after_another(tiny: TinyModel) -> None:
    async with served_here(tiny) as (url, _, _), httpx.AsyncClient(base_url=url) as http:
        async with http.stream("GET", "/v1/stats/stream") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            seen = []
            async for line in answer.aiter_lines():
                if line:
                    seen.append(json.loads(line.removeprefix("data: ")))
                if len(seen) == 2:
                    break
        assert seen[0].keys() == (await http.get("/v1/stats")).json().keys()
        Stats.model_validate(seen[0])
        assert 0.5 < seen[1]["uptime_s"] - seen[0]["uptime_s"] < 30


async def test_whoever_leaves_leaves_nothing_behind(tiny: TinyModel) -> None:
    async with served_here(tiny) as (url, _, _), httpx.AsyncClient(base_url=url) as http:
        before = asyncio.all_tasks()
        assert (await http.head("/v1/stats/stream")).headers["content-type"].startswith("text/event-stream")
        for _ in range(50):
            async with http.stream("GET", "/v1/stats/stream") as answer:
                await anext(answer.aiter_lines())
                streaming = asyncio.all_tasks() - before
                assert streaming
        _, left = await asyncio.wait(streaming | (asyncio.all_tasks() - before), timeout=10)
        assert left == set()


async def test_a_listener_does_not_hold_up_the_end(tiny: TinyModel) -> None:
    async with (
        served_here(tiny) as (url, stop, life),
        httpx.AsyncClient(base_url=url) as http,
        http.stream("GET", "/v1/stats/stream") as answer,
    ):
        lines = answer.aiter_lines()
        await anext(lines)
        began = time.monotonic()
        stop.set()
        rest = [line async for line in lines]  # to its end, which is a clean one
        assert await life is True
    assert time.monotonic() - began < DRAIN_S / 3
    assert len(rest) < 6

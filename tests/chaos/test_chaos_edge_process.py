"""The same with real processes on both sides: `isthmus serve edge`, streaming over HTTP, while its clouds are
killed and its links cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from isthmus.relay import HalfOpen
from tests.chaos.world import TOKENS, WAYS, World, relay_to, sweep
from tests.cli.conftest import clean_env
from tests.processes import Service, serve

pytestmark = [pytest.mark.processes, pytest.mark.chaos]


@contextmanager
def edge_at(world: World, home: Path, *urls: str) -> Iterator[Service]:
    """`isthmus serve edge` in fp32, with these clouds."""
    arguments = ["edge", "--model", str(world.checkpoint), "--bits", "32", "--codec", "f32", "--port", "0"]
    for url in urls:
        arguments += ["--cloud", url]
    with serve(*arguments, "--reconnect-s", "60", env=clean_env(home)) as edge:
        yield edge


async def stream(
    edge: Service, world: World, way: dict[str, Any], strikes: dict[int, Callable[[], None]], **isthmus: Any
) -> tuple[list[str], dict[str, Any]]:
    """The text pieces of one streamed completion, one for each token and an empty one at either end, and the
    extension at its end; `strikes[i]` is done when i pieces are here."""
    body = {
        "prompt": list(world.references[20].prompt),
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "isthmus": {**way, **isthmus},
    }
    pieces: list[str] = []
    extension: dict[str, Any] = {}
    async with (
        httpx.AsyncClient(timeout=120) as client,
        client.stream("POST", f"{edge.http}/v1/completions", json=body) as reply,
    ):
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            extension = event.get("isthmus", extension)
            if set(event.get("isthmus", {})) == {"events"}:  # tells what happened in between, and has no text
                continue
            pieces.append(event["choices"][0]["text"])
            if len(pieces) in strikes:
                strikes[len(pieces)]()
    return pieces, extension


@pytest.mark.parametrize("way", sweep(list(WAYS), 1, "edge process"))
async def test_an_edge_process_whose_clouds_are_killed(world: World, way: str, tmp_path: Path) -> None:
    with edge_at(world, tmp_path, world.one.url, world.other.url) as edge:
        unbroken, _ = await stream(edge, world, {"route": "local"}, {})
        second, told = await stream(edge, world, WAYS[way], {9: world.one.kill}, fallback="cloud")
        assert "".join(second) == "".join(unbroken)
        assert len(second) == len(unbroken)
        assert [event["event"] for event in told["events"]] == ["link_lost", "moved"]
        alone, told = await stream(edge, world, WAYS[way], {20: world.other.kill})
        assert "".join(alone) == "".join(unbroken)
        assert told["route"] == "local"
        world.one.be_up()
        back, told = await stream(edge, world, WAYS[way], {5: world.one.kill_and_restart}, fallback="cloud")
        assert "".join(back) == "".join(unbroken)
        assert told["route"] == WAYS[way]["route"]
        assert edge.process.poll() is None


async def test_an_edge_process_whose_link_is_cut_or_falls_silent(world: World, tmp_path: Path) -> None:
    async with relay_to(world.one) as (relay, url):
        with edge_at(world, tmp_path, url) as edge:
            unbroken, _ = await stream(edge, world, {"route": "local"}, {})
            got, told = await stream(edge, world, WAYS["prefix"], {11: relay.faults.cut}, fallback="cloud")
            assert "".join(got) == "".join(unbroken)
            assert [event["event"] for event in told["events"]] == ["link_lost", "resumed"], told["events"]
            silence = {11: lambda: relay.faults.do(HalfOpen())}
            got, told = await stream(edge, world, WAYS["prefix"], silence, fallback="cloud")
            assert "".join(got) == "".join(unbroken)
            # A step's deadline may pass before the heartbeat's: then the cloud is asked for a new session.
            assert told["events"][0]["event"] == "link_lost"
            assert told["events"][-1]["event"] in ("resumed", "moved"), told["events"]
            assert told["route"] == "split"

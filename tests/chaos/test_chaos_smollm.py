"""SmolLM2-135M: the cloud is killed at eight positions, with each of the three ways on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.splitter.pack import Pack
from isthmus.splitter.provide import ensure_pack
from tests.chaos.test_chaos_kills import THEN, check_end, fallback, killing, urls
from tests.chaos.world import TOKENS, World, agent_at, ask, new_world, run, sweep

pytestmark = [pytest.mark.model, pytest.mark.processes, pytest.mark.chaos]

POSITIONS = (0, 1, 2, 7, 16, 24, 35, TOKENS - 1)
WAYS: dict[str, dict[str, Any]] = {
    "prefix": {"route": "split", "split": 15, "shape": "prefix"},
    "u": {"route": "split", "split": 15, "shape": "u"},
    "offload": {"route": "offload"},
}
CASES = [(way, then, at) for then in THEN for at in POSITIONS for way in WAYS]


@pytest.fixture(scope="module")
def smollm_world(tmp_path_factory: pytest.TempPathFactory, smollm_dir: Path) -> Iterator[World]:
    def make(_: Path) -> tuple[Path, Pack]:
        return smollm_dir, ensure_pack("smollm2-135m", 32)

    with new_world(tmp_path_factory.mktemp("smollm"), make, {24: TOKENS}) as world:
        yield world


@pytest.mark.parametrize(("way", "then", "at"), sweep(CASES, 2, "smollm"))
async def test_killed_before_an_output_position(smollm_world: World, way: str, then: str, at: int) -> None:
    world = smollm_world
    for cloud in world.clouds if then == "second" else world.clouds[:1]:
        cloud.be_up()
    reference = world.references[24]
    async with agent_at(world.pack, *urls(world, then)) as agent:
        request = ask(reference, WAYS[way], fallback=fallback(then))
        done = await run(agent, request, reference, {at: killing(world.one, then)})
    if way == "offload" and at > TOKENS / 2 and not done.events:
        return  # the stream was faster: every token was here
    check_end(world, done, then, way)
    world.one.be_up()
    world.settled()

"""An edge that has a part of its model: ways that need the rest are refused, in mid-request too."""

from __future__ import annotations

import shutil
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.edge.agent import Agent
from isthmus.edge.constraints import RouterInputs
from isthmus.edge.recovery import RecoveryConfig
from isthmus.edge.requests import GenerateRequest, Token
from isthmus.edge.router import decide
from isthmus.protocol.errors import CloudError, RouteInfeasibleError
from isthmus.splitter.pack import Pack
from isthmus.splitter.pack_parts import Fetched, write_fetched
from tests.edge.edge_world import TinyModel, ask, collect, make_model, prompt_of
from tests.edge.real_cloud import RealCloud, real_cloud

INPUTS = RouterInputs(
    num_layers=30,
    layer_bytes=(1,) * 30,
    embed_bytes=1,
    head_bytes=1,
    kv_bytes=1,
    tokens=10,
    cloud_state="up",
    layers_here=8,
    head_here=False,
)


def why_not(inputs: RouterInputs, split: int) -> tuple[str | None, str]:
    (found,) = (c for c in decide(inputs).candidates if c.split == split)
    return found.violated, found.detail


def test_ways_beyond_the_layers_here_are_not_taken() -> None:
    assert why_not(INPUTS, 30) == ("blocks", "needs layers 8..29, this device has 0..7")
    assert why_not(INPUTS, 9) == ("blocks", "needs layers 8..8, this device has 0..7")
    assert why_not(INPUTS, 8) == why_not(INPUTS, 0) == (None, "")
    nothing = replace(INPUTS, layers_here=0)
    assert why_not(nothing, 1) == ("blocks", "needs layers 0..0, this device has none")
    with pytest.raises(RouteInfeasibleError) as caught:
        decide(replace(INPUTS, route="local"))
    assert "--pull-from-cloud" in caught.value.hint


def test_who_samples_needs_the_head() -> None:
    u_shape = replace(INPUTS, shape="u")
    assert why_not(u_shape, 4) == ("blocks", "needs the head, which is not on this device")
    assert why_not(replace(u_shape, head_here=True), 4) == (None, "")
    assert why_not(replace(u_shape, head_here=True), 30)[0] == "blocks"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("part"))


@pytest.fixture
def part(model: TinyModel, tmp_path: Path) -> Pack:
    """The pack with two of its four layers, as a pull would leave it."""
    root = Path(shutil.copytree(model.pack.path, tmp_path / "pack"))
    here = {name: model.pack.block(name).length for name in ("embed", "layer.0", "layer.1")}
    write_fetched(root, Fetched(manifest_sha256="0" * 64, source="ws://cloud", blocks=here))
    for file in (root / "blocks").iterdir():
        if file.stem not in here:
            file.unlink()
    return Pack.open(root)


async def lose_it(agent: Agent, request: GenerateRequest, cloud: RealCloud) -> None:
    """Run `request`, and have the cloud die on the way."""
    async with aclosing(agent.generate(replace(request, request_id="lost"))) as events:
        async for event in events:
            if isinstance(event, Token) and event.index == 3:
                cloud.loop.call_soon_threadsafe(cloud.server.stop)
                cloud.drop_connections()


async def test_a_lost_cloud_is_an_error_where_the_rest_is_not_here(model: TinyModel, part: Pack) -> None:
    quick = RecoveryConfig(budget_s=0.2, refused_grace_s=0.1)
    with real_cloud(model) as cloud:
        whole = Agent(model.pack, row_format="f32")
        agent = Agent(part, cloud_urls=(cloud.url,), recovery=quick, row_format="f32")
        await whole.start()
        await agent.start()
        try:
            request = ask(prompt_of(12), 40, route="split", split=2)
            expected = await collect(whole, ask(prompt_of(12), 40, route="local"))
            assert (await collect(agent, request)).ids == expected.ids
            with pytest.raises(CloudError):
                await lose_it(agent, request, cloud)
            with pytest.raises(RouteInfeasibleError):
                await collect(agent, ask(prompt_of(12), 4, route="local"))
        finally:
            await agent.aclose()
            await whole.aclose()

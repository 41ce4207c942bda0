"""The agent's router over a real cloud: what a decision rests on, what requests teach, what they cost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isthmus.edge.agent import Agent
from isthmus.edge.decision_log import DecisionLog, read_log
from isthmus.edge.policy import Policy
from isthmus.edge.requests import Slo
from isthmus.edge.router import decide
from isthmus.edge.routing import RoutingOptions
from isthmus.protocol.errors import RouteInfeasibleError
from isthmus.protocol.profiles import DeviceProfile, Prices
from tests.edge.edge_world import TinyModel, ask, collect, make_model, prompt_of
from tests.edge.real_cloud import RealCloud, real_cloud
from tests.splitter.worlds import cloud_profile, edge_profile

NUM_LAYERS = 4
PRICES = Prices(input_usd_per_mtok=1.0, output_usd_per_mtok=2.0)
LINK_IS_ALL = {
    "decode": ((0.0, 1e-6),),
    "prefill": ((32.0, 1e-6),),
    "step_s": 0.0,
    "head_s": 0.0,
    "load_s": 0.0,
}
ONLY_TIME = Policy(usd_per_nat=0.0, hysteresis=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("routing"), num_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def cloud(model: TinyModel) -> Iterator[RealCloud]:
    """Claims to compute in no time, so that only the link and the edge decide."""
    spec = model.pack.spec
    profile = cloud_profile(hidden=spec.hidden, **LINK_IS_ALL)
    with real_cloud(model, profile=profile, prices=PRICES) as running:
        yield running


@asynccontextmanager
async def agent_for(
    model: TinyModel, *urls: str, edge: DeviceProfile | None = None, **options: Any
) -> AsyncIterator[Agent]:
    memory_mb = options.pop("memory_mb", None)
    routing = RoutingOptions(**{"profile": edge or edge_profile(), "policy": ONLY_TIME, **options})
    agent = Agent(model.pack, cloud_urls=urls, routing=routing, memory_mb=memory_mb)
    await agent.start()
    try:
        yield agent
    finally:
        await agent.aclose()


async def test_a_decision_rests_on_what_the_cloud_told_and_the_link_showed(
    model: TinyModel, cloud: RealCloud
) -> None:
    async with agent_for(model, cloud.url) as agent:
        await agent.warm(10.0)
        decision = agent.decide(ask(prompt_of(20)))
        link = decision.basis["link"]
        assert link["rtt_s"]["num_samples"] >= 1
        assert 0 < link["rtt_s"]["value"] < 0.5
        assert link["up_bytes_per_s"]["source"] == link["down_bytes_per_s"]["source"] == "probe"
        assert decision.basis["cloud"]["device"] == "fast"
        # The edge says of itself that it takes 80 ms for this prompt, and 19 ms a token.
        assert decision.route == "offload"
        assert len(decision.candidates) == NUM_LAYERS + 1
        assert all(c.total_s is not None for c in decision.candidates)
        outcome = await collect(agent, ask(prompt_of(20)))
        assert outcome.finished.route == "offload"
        assert agent.stats()["requests"] == 1, "deciding is not running"


async def test_a_fast_edge_keeps_what_a_slow_one_offloads(model: TinyModel, cloud: RealCloud) -> None:
    async with agent_for(model, cloud.url, edge=edge_profile(**LINK_IS_ALL)) as agent:
        await agent.warm(10.0)
        assert agent.decide(ask(prompt_of(20))).route == "local"
        # Rows take memory, too: one layer and the embedding, but not four.
        small = replace(ask(prompt_of(20)), route="auto")
    async with agent_for(model, cloud.url, edge=edge_profile(**LINK_IS_ALL), memory_mb=20) as agent:
        await agent.warm(10.0)
        decision = agent.decide(small)
        assert decision.route in ("split", "offload")
        local = next(c for c in decision.candidates if c.route == "local")
        assert local.violated == "memory"
        assert "needs 47.0 MB, the limit is 20.0 MB" in local.detail


async def test_requests_correct_the_predictions(model: TinyModel, cloud: RealCloud) -> None:
    """The edge believes to be slow, and it is not."""
    slow = edge_profile(decode=((0.0, 0.05),), head_s=0.05)
    async with agent_for(model, edge=slow) as agent:
        for number in range(4):
            outcome = await collect(agent, ask(prompt_of(12, start=number)))
            assert outcome.finished.observed is not None
            assert outcome.finished.observed.steps == 7
        factors = agent.routing.calibrator.factors()
        assert factors.local_decode < 0.2
        chosen = agent.decide(ask(prompt_of(12, start=9))).chosen
        assert chosen is not None
        assert chosen.total_s is not None
        assert chosen.total_s < 0.2 < 8 * 0.25
        agent.routing.learning = False
        await collect(agent, ask(prompt_of(12, start=10)))
        assert agent.routing.calibrator.factors() == factors
    async with agent_for(model, cloud.url) as agent:
        outcome = await collect(agent, ask(prompt_of(12), route="split", split=2))
        observed = outcome.finished.observed
        assert observed is not None
        assert observed.edge_s is not None
        assert observed.cloud_s is not None
        assert observed.link_s is not None
        assert observed.decode_s == pytest.approx(observed.edge_s + observed.cloud_s + observed.link_s)
        hidden = await collect(agent, ask(prompt_of(12), route="split", split=2, shape="u"))
        assert hidden.finished.observed is not None
        assert hidden.finished.observed.cloud_s is None
        assert agent.routing.calibrator.factors().split_edge != 1.0


async def test_money_is_set_aside_spent_and_runs_out(model: TinyModel, cloud: RealCloud) -> None:
    most = (20 * 1.0 + 8 * 2.0) / 1e6
    async with agent_for(model, cloud.url, budget_usd=1.2 * most) as agent:
        await agent.warm(10.0)
        first = agent.generate(ask(prompt_of(20), route="offload"))
        await anext(first)
        with pytest.raises(RouteInfeasibleError, match="may cost"):
            agent.decide(ask(prompt_of(20, start=3), route="offload"))
        async for _ in first:
            pass
        assert agent.routing.spent_usd == pytest.approx(most)
        decision = agent.decide(ask(prompt_of(20, start=3)))
        assert decision.route == "local"
        assert next(c for c in decision.candidates if c.route == "offload").violated == "budget"
        outcome = await collect(agent, ask(prompt_of(20, start=3)))
        assert outcome.finished.route == "local"
        assert agent.routing.spent_usd == pytest.approx(most)
        with pytest.raises(RouteInfeasibleError, match=r"\$0 is allowed"):
            agent.decide(ask(prompt_of(20), route="offload", max_cost_usd=0.0))


async def test_a_conversation_stays_where_its_cache_is(model: TinyModel, cloud: RealCloud) -> None:
    async with agent_for(
        model, cloud.url, policy=replace(ONLY_TIME, usd_per_s=10.0, hysteresis=1e6)
    ) as agent:
        await agent.warm(10.0)
        outcome = await collect(agent, ask(prompt_of(32), route="local"))
        longer = (*prompt_of(32), *outcome.ids, 5, 6, 7)
        decision = agent.decide(ask(longer))
        assert decision.route == "local"
        assert "was taken last" in decision.reason
        assert agent.decide(ask(prompt_of(32, start=50))).route == "offload", "that one is another"
        await collect(agent, ask(longer, route="offload"))
        assert agent.decide(ask((*longer, 8, 9))).route == "local", "its end is not in the newer prompt"


async def test_the_log_reproduces_what_was_decided(
    model: TinyModel, cloud: RealCloud, tmp_path: Path
) -> None:
    path = tmp_path / "decisions.jsonl"
    async with agent_for(model, cloud.url, decision_log=DecisionLog(path)) as agent:
        await agent.warm(10.0)
        secret = prompt_of(20)
        await collect(agent, ask(secret, slo=Slo(ttft_s=1.0)))
        await collect(agent, ask(prompt_of(9), route="local", max_cost_usd=0.5))
    entries = list(read_log(path))
    assert len(entries) == 2
    for entry in entries:
        again = json.loads(json.dumps(decide(entry.inputs).to_dict()))
        assert again == entry.decision
    assert ", ".join(map(str, secret[:5])) not in path.read_text()


async def test_the_cloud_is_found_again_without_a_request(model: TinyModel) -> None:
    with real_cloud(model, profile=cloud_profile(hidden=model.pack.spec.hidden)) as there:
        async with agent_for(model, there.url) as agent:
            for _ in range(100):
                if agent.decide(ask(prompt_of(5))).basis.get("cloud"):
                    break
                await asyncio.sleep(0.05)
            assert agent.decide(ask(prompt_of(5))).basis["cloud"]["device"] == "fast"
            there.drop_connections()
            for _ in range(200):
                (link,) = agent.stats()["clouds"]
                if link["connects"] == 2:
                    break
                await asyncio.sleep(0.05)
            assert link["connects"] == 2


async def test_an_idle_device_notices_that_it_is_faster_than_it_believed(
    model: TinyModel, cloud: RealCloud
) -> None:
    slow = edge_profile(decode=((0.0, 0.05),), step_s=0.0)
    async with agent_for(model, cloud.url, edge=slow) as agent:
        agent.routing.learning = False
        await collect(agent, ask(prompt_of(12), route="local"))  # loads the layers, teaches nothing
        assert agent.routing.calibrator.factors().local_decode == 1.0
        agent.routing.learning = True
        for _ in range(400):
            if agent.routing.calibrator.factors().split_edge < 0.2:
                break
            await asyncio.sleep(0.02)
        assert agent.routing.calibrator.factors().split_edge < 0.2
        assert agent.stats()["requests"] == 1


async def test_blocks_whose_loading_was_avoided_are_loaded_when_nothing_runs(
    model: TinyModel, cloud: RealCloud
) -> None:
    """Local would be the way but for the loading; without this it would never be tried."""
    quick = edge_profile(**{**LINK_IS_ALL, "load_s": 5.0})
    async with agent_for(model, cloud.url, edge=quick) as agent:
        await agent.warm(10.0)
        assert (await collect(agent, ask(prompt_of(20)))).finished.route == "offload"

        def load_s() -> float:
            decision = agent.decide(ask(prompt_of(20)))
            local = next(one for one in decision.candidates if one.route == "local")
            assert local.terms is not None
            return local.terms["load_s"]

        for _ in range(400):
            if load_s() == 0:  # the head, too, which comes behind the layers
                break
            await asyncio.sleep(0.02)
        assert load_s() == 0
        assert agent.stats()["loaded_layers"] == list(range(NUM_LAYERS))
    async with agent_for(model, cloud.url, edge=quick, memory_mb=20) as agent:
        await agent.warm(10.0)
        await collect(agent, ask(prompt_of(20)))
        await asyncio.sleep(1.5)
        assert len(agent.stats()["loaded_layers"]) <= 1, "more would not fit the memory"

"""Moving a running request: K → K', split ↔ offload, local ↔ split; the tokens stay those of an unmoved
run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from isthmus.edge.agent import Agent
from isthmus.edge.requests import Finished, GenerateRequest, Token
from isthmus.protocol.errors import NotFoundError, RouteInfeasibleError
from isthmus.protocol.sampling import SamplingParams
from tests.edge.edge_world import TinyModel, ask, collect, prompt_of
from tests.edge.real_cloud import RealCloud, real_cloud

WAYS: list[dict[str, Any]] = [
    {"route": "local"},
    {"route": "split", "split": 1},
    {"route": "split", "split": 3},
    {"route": "split", "split": 2, "shape": "u"},
    {"route": "split", "split": 2, "shape": "prefix"},
    {"route": "offload"},
]


def name(way: dict[str, Any]) -> str:
    return "-".join(str(value) for value in way.values())


@pytest.fixture(scope="module")
def cloud(tiny: TinyModel) -> Iterator[RealCloud]:
    with real_cloud(tiny) as running:
        yield running


@asynccontextmanager
async def agent_of(tiny: TinyModel, *urls: str, **options: Any) -> AsyncIterator[Agent]:
    agent = Agent(tiny.pack, cloud_urls=urls, **options)
    await agent.start()
    try:
        yield agent
    finally:
        await agent.aclose()


async def moved(
    agent: Agent, request: GenerateRequest, moves: dict[int, dict[str, Any]]
) -> tuple[list[int], Finished]:
    """Run it, moving before the outputs that `moves` names; its tokens, each index once."""
    tokens: list[int] = []
    finished: Finished | None = None
    waiting = []
    async with aclosing(agent.generate(request)) as events:
        async for event in events:
            if isinstance(event, Token):
                assert event.index == len(tokens)
                tokens.append(event.id)
                if way := moves.get(len(tokens)):
                    placement = agent._running[0].placement
                    assert placement is not None
                    _, decision, link = await agent._route(
                        GenerateRequest(request.prompt_ids, request.max_tokens, **way), agent._running[0]
                    )
                    waiting.append(placement.move(decision, link))
            elif isinstance(event, Finished):
                finished = event
    assert finished is not None
    for done in waiting:
        await done
    return tokens, finished


@pytest.mark.parametrize("before", WAYS, ids=name)
@pytest.mark.parametrize("after", WAYS, ids=name)
async def test_a_request_goes_on_from_any_cut_at_any_other(
    tiny: TinyModel, cloud: RealCloud, before: dict[str, Any], after: dict[str, Any]
) -> None:
    prompt = prompt_of(40)
    async with agent_of(tiny, cloud.url) as agent:
        whole = await collect(agent, ask(prompt, 10, route="local"))
        for at in (1, 6):
            tokens, finished = await moved(agent, ask(prompt, 10, **before), {at: after})
            assert tokens == whole.ids
            assert finished.route == after["route"]
            assert finished.split == after.get("split", 4 if after["route"] == "local" else 0)
            assert [e["event"] for e in finished.events] == ["moved"]
            assert finished.events[0]["at_index"] == at
        assert agent.stats()["moves"] == 2
        assert agent.stats()["history_bytes"] == 0
    stats = await cloud.pages_settle(10**9)
    assert stats.sessions == 0


@pytest.mark.parametrize("history_mb", [0.0, 0.02, 64.0])
async def test_moves_need_no_kept_rows(tiny: TinyModel, cloud: RealCloud, history_mb: float) -> None:
    """Rows that the budget dropped are computed again from the ids."""
    prompt = prompt_of(150)
    path: dict[int, dict[str, Any]] = {
        2: {"route": "split", "split": 2},
        5: {"route": "split", "split": 3},
        8: {"route": "local"},
    }
    async with agent_of(tiny, cloud.url, history_mb=history_mb) as agent:
        whole = await collect(agent, ask(prompt, 10, route="local"))
        tokens, finished = await moved(agent, ask(prompt, 10, route="split", split=1), path)
        assert tokens == whole.ids
        assert [event["split"] for event in finished.events] == [2, 3, 4]
        assert agent.stats()["history_bytes"] == 0


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.9, seed=7),
        SamplingParams(temperature=0.0, repetition_penalty=1.4, frequency_penalty=0.7, presence_penalty=0.3),
        SamplingParams(temperature=0.8, seed=3, presence_penalty=1.1),
    ],
    ids=["seeded", "penalties", "both"],
)
async def test_a_moved_request_draws_what_it_would_have_drawn(
    tiny: TinyModel, cloud: RealCloud, sampling: SamplingParams
) -> None:
    """Draws are keyed by position, penalties count what was emitted before the move, too."""
    prompt = prompt_of(30)
    async with agent_of(tiny, cloud.url) as agent:
        whole = await collect(agent, ask(prompt, 12, route="local", sampling=sampling))
        for path in (
            {3: WAYS[1], 6: WAYS[5], 9: WAYS[0]},
            {2: WAYS[5], 5: WAYS[3], 8: WAYS[2]},
            {4: WAYS[4], 7: WAYS[3], 10: WAYS[4]},
        ):
            tokens, _ = await moved(agent, ask(prompt, 12, route="local", sampling=sampling), path)
            assert tokens == whole.ids


async def test_moving_deeper_runs_only_the_blocks_that_are_new(tiny: TinyModel, cloud: RealCloud) -> None:
    """K = 1 → 3: the prompt's rows go through two more layers; the first one does not run again."""
    prompt = prompt_of(64)
    async with agent_of(tiny, cloud.url) as agent:
        _, finished = await moved(
            agent, ask(prompt, 6, route="split", split=1), {3: {"route": "split", "split": 3}}
        )
        # At the first cut the prompt and three tokens; through the new layers all but the newest of them,
        # which with the next two goes through all three.
        assert finished.counts["edge_rows_computed"] == 67 + 66 + 3


async def test_what_cannot_be_moved_says_so_and_goes_on(tiny: TinyModel, cloud: RealCloud) -> None:
    async with agent_of(tiny, cloud.url) as agent:
        request = ask(prompt_of(20), 8, route="split", split=2, shape="u", privacy="activations-only")
        whole = await collect(agent, request)
        seen = 0
        async with aclosing(agent.generate(request)) as events:
            async for event in events:
                if isinstance(event, Token):
                    seen += 1
                    if seen == 3:
                        with pytest.raises(RouteInfeasibleError, match="activations-only"):
                            await agent.move(request.request_id, route="offload")
                        with pytest.raises(RouteInfeasibleError, match="split is 9"):
                            await agent.move(request.request_id, route="split", split=9)
                elif isinstance(event, Finished):
                    assert event.token_ids == tuple(whole.ids)
                    assert (event.route, event.split, event.shape) == ("split", 2, "u")
        with pytest.raises(NotFoundError, match="no request"):
            await agent.move(request.request_id, route="local")

"""One mechanism, three routes, both shapes, on the real cloud: equal tokens, counted rows, freed pages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from isthmus.edge.agent import Agent
from isthmus.edge.requests import Token
from isthmus.protocol.errors import CloudLostError
from isthmus.protocol.limits import Limits
from isthmus.protocol.sampling import SamplingParams
from tests.edge.edge_world import TinyModel, ask, collect, prompt_of
from tests.edge.real_cloud import RealCloud, real_cloud

WAYS: list[dict[str, Any]] = [
    {"route": "offload"},
    *({"route": "split", "split": k, "shape": shape} for k in (1, 2, 3) for shape in ("prefix", "u")),
]
IDS = ["-".join(str(v) for v in way.values()) for way in WAYS]


@pytest.fixture(scope="module")
def cloud(tiny: TinyModel) -> Iterator[RealCloud]:
    with real_cloud(
        tiny, limits=Limits(detached_s=0.0)
    ) as running:  # so that each test can count its sessions
        yield running


@asynccontextmanager
async def agent_at(model: TinyModel, cloud: RealCloud, **options: Any) -> AsyncIterator[Agent]:
    agent = Agent(model.pack, cloud_urls=(cloud.url,), **options)
    await agent.start()
    try:
        yield agent
    finally:
        await agent.aclose()


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("length", [1, 40, 300])
async def test_every_route_draws_the_tokens_of_local(
    tiny: TinyModel, cloud: RealCloud, way: dict[str, Any], length: int
) -> None:
    prompt = prompt_of(length)
    async with agent_at(tiny, cloud) as agent:
        local = await collect(agent, ask(prompt, 20))
        outcome = await collect(agent, ask(prompt, 20, **way))
        split = outcome.started.split
        assert outcome.ids == local.ids
        assert outcome.finished.text == local.finished.text
        counts = outcome.finished.counts
        # The last token is drawn, never fed. Offload sends the prompt only.
        assert counts["edge_rows_computed"] == (length + 19 if split else 0)
        assert counts["rows_sent"] == (length + 19 if split else length)
        assert outcome.finished.link.bytes_up > 0
        assert outcome.finished.link.bytes_down > 0
        assert agent.stats()["loaded_layers"] == [0, 1, 2, 3]


@pytest.mark.parametrize("way", WAYS, ids=IDS)
async def test_an_edge_holds_only_the_layers_it_runs(
    tiny: TinyModel, cloud: RealCloud, way: dict[str, Any]
) -> None:
    async with agent_at(tiny, cloud) as agent:
        outcome = await collect(agent, ask(prompt_of(10), 3, **way))
        assert agent.stats()["loaded_layers"] == list(range(outcome.started.split))


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.2, top_k=40, top_p=0.95, seed=7),
        SamplingParams(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.5, seed=3, logprobs=2),
    ],
)
async def test_edge_and_cloud_draw_alike(
    tiny: TinyModel, cloud: RealCloud, way: dict[str, Any], params: SamplingParams
) -> None:
    prompt = prompt_of(30)
    async with agent_at(tiny, cloud) as agent:
        local = await collect(agent, ask(prompt, 24, sampling=params))
        outcome = await collect(agent, ask(prompt, 24, sampling=params, **way))
    assert outcome.ids == local.ids
    if params.logprobs >= 0:
        for one, other in zip(local.tokens, outcome.tokens, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert [i for i, _ in one.top] == [i for i, _ in other.top]


@pytest.mark.parametrize("way", WAYS, ids=IDS)
async def test_a_second_turn_computes_only_its_new_tokens_on_both_sides(
    tiny: TinyModel, cloud: RealCloud, way: dict[str, Any]
) -> None:
    first_prompt = prompt_of(53, start=11 * WAYS.index(way))
    async with agent_at(tiny, cloud) as agent:
        first = await collect(agent, ask(first_prompt, 6, **way))
        split = first.started.split
        held = 53 + 5  # rows on both sides: all but that of the last token
        second_prompt = (*first_prompt, *first.ids, *prompt_of(9, start=100))
        await cloud.pages_settle(10**6)
        before = cloud.stats.rows_computed_total
        second = await collect(agent, ask(second_prompt, 6, **way))
        computed = cloud.stats.rows_computed_total - before
        new = len(second_prompt) - held
        counts = second.finished.counts
        assert counts["cloud_cached_rows"] == held
        assert counts["rows_sent"] == (new + 5 if split else new)
        assert computed == new + 5
        if split:
            assert counts["edge_cached_rows"] == held
            assert counts["edge_rows_computed"] == new + 5
        fresh = await collect(agent, ask(second_prompt, 6))
        assert second.ids == fresh.ids


@pytest.mark.parametrize(("other_length", "kept"), [(90, 32), (120, 0)])
async def test_a_cloud_that_forgot_gets_its_rows_again(tiny: TinyModel, other_length: int, kept: int) -> None:
    """The edge still has its cache, but the cloud needs rows it dropped: both compute from there on."""
    prompt = prompt_of(60, start=77)
    way: dict[str, Any] = {"route": "split", "split": 2}
    with real_cloud(tiny, pages=16) as small:  # two layers: room for 128 tokens
        async with agent_at(tiny, small) as agent:
            first = await collect(agent, ask(prompt, 4, **way))
            await collect(agent, ask(prompt_of(other_length, start=3), 4, **way))
            turn = (*prompt, *first.ids, 9, 8, 7)
            second = await collect(agent, ask(turn, 4, **way))
            counts = second.finished.counts
            assert counts["cloud_cached_rows"] == kept
            assert counts["edge_cached_rows"] == kept
            assert counts["rows_sent"] == len(turn) - kept + 3
            assert second.ids == (await collect(agent, ask(turn, 4))).ids


async def test_an_edge_that_forgot_sends_only_what_the_cloud_lacks(tiny: TinyModel, cloud: RealCloud) -> None:
    prompt = prompt_of(300, start=33)
    way: dict[str, Any] = {"route": "split", "split": 2}
    async with agent_at(tiny, cloud, cache_mb=0) as agent:
        first = await collect(agent, ask(prompt, 4, **way))
        turn = (*prompt, *first.ids, 9, 8, 7)
        second = await collect(agent, ask(turn, 4, **way))
        counts = second.finished.counts
        assert counts["edge_cached_rows"] == 0
        assert counts["cloud_cached_rows"] == 303
        assert counts["edge_rows_computed"] == len(turn) + 3
        assert counts["rows_sent"] == len(turn) - 303 + 3
        assert second.ids == (await collect(agent, ask(turn, 4))).ids


async def test_a_changed_last_turn_reuses_the_whole_pages_before_it(
    tiny: TinyModel, cloud: RealCloud
) -> None:
    prompt = prompt_of(60, start=44)
    way: dict[str, Any] = {"route": "split", "split": 1, "shape": "u"}
    async with agent_at(tiny, cloud) as agent:
        await collect(agent, ask(prompt, 4, **way))
        edited = (*prompt[:50], 200, 201, 202)
        second = await collect(agent, ask(edited, 4, **way))
        assert second.finished.counts["cloud_cached_rows"] == 48
        assert second.finished.counts["edge_cached_rows"] == 48
        assert second.ids == (await collect(agent, ask(edited, 4))).ids


@pytest.mark.parametrize("way", WAYS, ids=IDS)
async def test_closing_the_iterator_frees_the_clouds_pages(
    tiny: TinyModel, cloud: RealCloud, way: dict[str, Any]
) -> None:
    async with agent_at(tiny, cloud) as agent:
        before = (await cloud.pages_settle(10**6)).pages_free
        events = agent.generate(ask(prompt_of(40, start=5 + WAYS.index(way)), 400, **way))
        seen = 0
        async for event in events:
            seen += isinstance(event, Token)
            if seen == 5:
                break
        assert cloud.stats.sessions == 1
        assert cloud.stats.pages_free < before
        await events.aclose()
        stats = await cloud.pages_settle(0)
        assert stats.sessions == 0
        assert stats.pages_free == before
        assert len((await collect(agent, ask(prompt_of(5), 3, **way))).ids) == 3


@pytest.mark.parametrize("way", WAYS, ids=IDS)
async def test_a_lost_cloud_is_a_typed_error_and_the_agent_stays_up(
    tiny: TinyModel, cloud: RealCloud, way: dict[str, Any]
) -> None:
    async with agent_at(tiny, cloud) as agent:
        events = agent.generate(ask(prompt_of(40), 450, fallback="none", **way))
        for _ in range(4):  # Started and three tokens
            await anext(events)
        cloud.drop_connections()
        async with asyncio.timeout(3):
            with pytest.raises(CloudLostError):
                [event async for event in events]
        stats = agent.stats()
        assert (stats["running"], stats["failed"]) == (0, 1)
        assert len((await collect(agent, ask(prompt_of(40), 3, **way))).ids) == 3
        assert agent.stats()["clouds"][0]["connects"] == 2


async def test_stop_strings_end_an_offload_in_mid_stream(tiny: TinyModel, cloud: RealCloud) -> None:
    async with agent_at(tiny, cloud) as agent:
        free = await collect(agent, ask(prompt_of(33), 300, route="offload"))
        stop = free.finished.text[3:6]
        stopped = await collect(agent, ask(prompt_of(33), 300, route="offload", stop=(stop,)))
        assert stopped.finished.finish_reason == "stop"
        assert stopped.finished.text == free.finished.text[: free.finished.text.index(stop)]
        assert (await cloud.pages_settle(10**6)).sessions == 0
        # What the cloud computed beyond the stop is not part of the conversation.
        turn = (*prompt_of(33), *stopped.ids, 9, 8)
        second = await collect(agent, ask(turn, 4, route="offload"))
        assert second.finished.counts["cloud_cached_rows"] == 33 + len(stopped.ids) - 1
        assert second.ids == (await collect(agent, ask(turn, 4))).ids


@pytest.mark.parametrize("way", WAYS, ids=IDS)
async def test_end_ids_end_every_route_alike(tiny: TinyModel, cloud: RealCloud, way: dict[str, Any]) -> None:
    async with agent_at(tiny, cloud) as agent:
        free = await collect(agent, ask(prompt_of(20), 8))
        at = next(i for i in range(2, 8) if free.ids[i] not in free.ids[:i])
        ended = await collect(agent, ask(prompt_of(20), 8, end_ids=(free.ids[at],), **way))
        assert ended.ids == free.ids[: at + 1]
        assert ended.finished.finish_reason == "stop"


async def test_many_requests_of_all_kinds_at_once_get_the_tokens_they_get_alone(
    tiny: TinyModel, cloud: RealCloud
) -> None:
    asks = [
        ask(prompt_of(15 + 9 * i, start=i), 16, **way) for i, way in enumerate([*WAYS, {"route": "local"}])
    ]
    async with agent_at(tiny, cloud, parallel=8) as agent:
        alone = [(await collect(agent, ask(r.prompt_ids, 16))).ids for r in asks]
        together = await asyncio.gather(*(collect(agent, r) for r in asks))
    assert [outcome.ids for outcome in together] == alone


@pytest.mark.parametrize("row_format", ["bf16", "int8o"])
async def test_coded_rows_keep_the_conversation_going(
    tiny: TinyModel, cloud: RealCloud, row_format: Any
) -> None:
    async with agent_at(tiny, cloud) as agent:
        raw = await collect(agent, ask(prompt_of(200), 12, route="split", split=2))
        coded = await collect(
            agent, ask(prompt_of(200, start=8), 12, route="split", split=2, row_format=row_format)
        )
        assert len(coded.ids) == 12
        assert coded.finished.link.bytes_up < 0.6 * raw.finished.link.bytes_up


async def test_auto_offloads_what_does_not_fit(tiny: TinyModel, cloud: RealCloud) -> None:
    async with agent_at(tiny, cloud, memory_mb=0.3) as agent:
        outcome = await collect(agent, ask(prompt_of(20), 4))
        assert outcome.started.route == "offload"
        assert "the limit is 0.3 MB" in outcome.started.decision.reason
        assert agent.stats()["loaded_layers"] == []

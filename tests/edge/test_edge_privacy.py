"""What crosses the wire: privacy kept by every route, canaries for mixed weights, credits, no waiting."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from isthmus.edge.agent import Agent
from isthmus.protocol.cloud_connection import ServerInfo
from isthmus.protocol.errors import CloudLostError, IsthmusError, RejectedError, RouteInfeasibleError
from isthmus.protocol.frames import Dtype, Frame, MsgType, decode_frame
from isthmus.protocol.limits import Limits
from isthmus.protocol.sampling import SamplingParams
from tests.edge.edge_world import TinyModel, ask, collect, prompt_of
from tests.edge.toy_cloud import KEY, ToyCloud, toy_cloud

PROMPT = prompt_of(150)
TINY_MEMORY_MB = 0.55  # embedding, some layers and the head fit, the whole model does not


def info_of(model: TinyModel, *, weights_hash: str | None = None) -> ServerInfo:
    spec = model.pack.spec
    identity = model.pack.identity
    if weights_hash is not None:
        identity = identity.model_copy(update={"weights_hash": weights_hash})
    return ServerInfo(
        identity=identity,
        cloud_precision="fp32",
        num_layers=spec.num_layers,
        hidden=spec.hidden,
        vocab_size=spec.vocab_size,
        context_length=spec.context_length,
        row_formats=("f32", "bf16", "int8o"),
        kv_bytes_per_token_layer=spec.kv_bytes_per_token_layer(4),
    )


async def agent_at(model: TinyModel, cloud: ToyCloud, **options: Any) -> Agent:
    agent = Agent(model.pack, cloud_urls=(cloud.url,), api_key=KEY, **options)
    await agent.start()
    return agent


def frames_of(cloud: ToyCloud) -> list[Frame]:
    return [decode_frame(message, max_body=1 << 24) for message in cloud.received]


def assert_no_token_ids(cloud: ToyCloud) -> None:
    """No frame carries token ids, and OPEN holds nothing of the prompt but its length."""
    for frame in frames_of(cloud):
        assert frame.dtype is not Dtype.TOKEN_IDS
        if frame.type is MsgType.OPEN:
            body = json.loads(frame.body)
            assert body.get("context_ids") is None
            assert body.get("end_ids", []) == []
            assert body["shape"] == "u"
            assert body["split"] >= 2
            assert list(PROMPT[:3]) not in [v[:3] for v in body.values() if isinstance(v, list)]


async def test_activations_only_sends_rows_only_and_draws_on_the_edge(tiny: TinyModel) -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=1.5, seed=99)
    async with toy_cloud(info_of(tiny)) as cloud:
        agent = await agent_at(tiny, cloud, min_depth=2)
        fields: dict[str, Any] = {"privacy": "activations-only", "sampling": params, "end_ids": (2,)}
        first = await collect(agent, ask(PROMPT, 4, route="split", split=2, **fields))
        again = (*PROMPT, *first.ids, 5, 6)
        await collect(agent, ask(again, 4, route="split", split=2, **fields))  # with an offer, too
        assert first.started.shape == "u"
        assert cloud.opens[1].offer.entries
        assert cloud.opens[0].sampling == SamplingParams(temperature=0.0)
        assert_no_token_ids(cloud)
        await agent.aclose()


@pytest.mark.parametrize(
    "fields",
    [
        {"route": "offload"},
        {"route": "split", "split": 1},
        {"route": "split", "split": 3, "shape": "prefix"},
        {"route": "auto", "split": 0},
        {"route": "auto", "split": 1},
    ],
)
async def test_activations_only_refuses_what_would_show_tokens(
    tiny: TinyModel, fields: dict[str, Any]
) -> None:
    async with toy_cloud(info_of(tiny)) as cloud:
        agent = await agent_at(tiny, cloud, min_depth=2)
        with pytest.raises(RouteInfeasibleError):
            await collect(agent, ask(PROMPT, 2, privacy="activations-only", **fields))
        assert cloud.received == []
        await agent.aclose()


@pytest.mark.parametrize("way", [{"route": "offload"}, {"route": "split", "split": 2, "shape": "u"}])
async def test_the_cloud_is_told_the_priority(tiny: TinyModel, way: dict[str, Any]) -> None:
    async with toy_cloud(info_of(tiny)) as cloud:
        agent = await agent_at(tiny, cloud)
        for priority in (0, 4):
            await collect(agent, ask(PROMPT, 1, priority=priority, **way))
        assert [request.priority for request in cloud.opens] == [0, 4]
        await agent.aclose()


async def test_activations_only_under_memory_pressure_still_splits_in_the_u_shape(tiny: TinyModel) -> None:
    async with toy_cloud(info_of(tiny)) as cloud:
        agent = await agent_at(tiny, cloud, min_depth=2, memory_mb=TINY_MEMORY_MB)
        outcome = await collect(agent, ask(PROMPT, 2, privacy="activations-only"))
        assert (outcome.started.route, outcome.started.shape) == ("split", "u")
        assert outcome.started.split >= 2
        assert_no_token_ids(cloud)
        await agent.aclose()


@pytest.mark.parametrize("route", ["auto", "local", "split", "offload"])
@pytest.mark.parametrize("memory_mb", [None, TINY_MEMORY_MB])
async def test_local_only_never_touches_the_network(
    tiny: TinyModel, route: str, memory_mb: float | None
) -> None:
    async with toy_cloud(info_of(tiny)) as cloud:
        agent = await agent_at(tiny, cloud, memory_mb=memory_mb)
        request = ask(PROMPT, 2, privacy="local-only", route=route)
        if memory_mb is None and route in ("auto", "local"):
            assert (await collect(agent, request)).started.route == "local"
        else:
            with pytest.raises(RouteInfeasibleError):
                await collect(agent, request)
        assert cloud.connections == []
        await agent.aclose()


async def test_a_failing_cloud_does_not_loosen_activations_only(tiny: TinyModel) -> None:
    async with toy_cloud(info_of(tiny), mute=True) as cloud:
        agent = await agent_at(tiny, cloud, min_depth=2)
        request = ask(PROMPT, 4, privacy="activations-only", route="split", split=2, fallback="none")
        events = agent.generate(request)
        await anext(events)
        failing = anext(events)

        async def hang_up() -> None:
            await cloud.stepped.wait()
            cloud.connections[0].transport.abort()

        outcome, _ = await asyncio.gather(failing, hang_up(), return_exceptions=True)
        assert isinstance(outcome, CloudLostError)
        assert_no_token_ids(cloud)
        await agent.aclose()


async def test_penalties_in_the_prefix_shape_send_the_context(tiny: TinyModel) -> None:
    """Rule 10, where privacy allows it: otherwise the cloud could not penalise."""
    params = SamplingParams(temperature=0.0, presence_penalty=1.0)
    async with toy_cloud(info_of(tiny)) as cloud:
        agent = await agent_at(tiny, cloud)
        await collect(agent, ask(PROMPT, 2, route="split", split=2, shape="prefix", sampling=params))
        await collect(agent, ask(PROMPT, 2, route="split", split=2, shape="prefix"))
        assert cloud.opens[0].context_ids == PROMPT
        assert cloud.opens[1].context_ids is None
        await agent.aclose()


# ---- canaries (rule 8)


async def test_other_weights_need_an_agreeing_canary_once_per_split(tiny: TinyModel) -> None:
    async with toy_cloud(info_of(tiny, weights_hash="0" * 64)) as cloud:
        agent = await agent_at(tiny, cloud)
        first = await collect(agent, ask(PROMPT, 2, route="split", split=2))
        assert first.finished.events[0]["event"] == "other_weights"
        assert first.finished.events[0]["canary_error"] == 0.5
        await collect(agent, ask(PROMPT, 2, route="split", split=2, shape="u"))
        assert cloud.canaries == 1
        await collect(agent, ask(PROMPT, 2, route="split", split=3))
        assert cloud.canaries == 2
        await agent.aclose()


async def test_a_disagreeing_canary_refuses_the_split(tiny: TinyModel) -> None:
    async with toy_cloud(info_of(tiny, weights_hash="0" * 64), canary_ok=False) as cloud:
        agent = await agent_at(tiny, cloud)
        with pytest.raises(RejectedError, match=r"K = 2 the canary's rows differ by 0\.5") as refused:
            await collect(agent, ask(PROMPT, 2, route="split", split=2))
        assert refused.value.code == "canary_failed"
        assert cloud.opens == []
        await agent.aclose()


async def test_equal_weights_need_none(tiny: TinyModel) -> None:
    async with toy_cloud(info_of(tiny)) as cloud:
        agent = await agent_at(tiny, cloud)
        outcome = await collect(agent, ask(PROMPT, 2, route="split", split=2))
        assert (cloud.canaries, outcome.finished.events) == (0, ())
        await agent.aclose()


async def test_a_row_format_the_cloud_lacks_is_refused_by_name(tiny: TinyModel) -> None:
    from dataclasses import replace

    async with toy_cloud(replace(info_of(tiny), row_formats=("f32",))) as cloud:
        agent = await agent_at(tiny, cloud)
        with pytest.raises(IsthmusError, match="row format int8o is not among the cloud's: f32"):
            await collect(agent, ask(PROMPT, 2, route="split", split=2, row_format="int8o"))
        assert len((await collect(agent, ask(PROMPT, 2, route="split", split=2))).ids) == 2
        await agent.aclose()


# ---- flow


@pytest.mark.parametrize(
    "way",
    [{"route": "offload"}, {"route": "split", "split": 2}, {"route": "split", "split": 2, "shape": "u"}],
)
async def test_steps_follow_open_without_waiting_where_nothing_is_offered(
    tiny: TinyModel, way: dict[str, Any]
) -> None:
    """This cloud answers OPEN only after a step came: waiting for OPENED would wait for ever."""
    async with toy_cloud(info_of(tiny), late=True) as cloud:
        agent = await agent_at(tiny, cloud)
        async with asyncio.timeout(20):
            assert len((await collect(agent, ask(PROMPT, 1, **way))).ids) == 1
        await agent.aclose()


@pytest.mark.parametrize("shape", ["prefix", "u"])
async def test_a_prompt_longer_than_the_credits_flows_in_chunks(tiny: TinyModel, shape: Any) -> None:
    limits = Limits(initial_credits_rows=48, max_rows_per_step=32)
    async with toy_cloud(info_of(tiny), limits=limits) as cloud:
        agent = await agent_at(tiny, cloud)
        await collect(agent, ask(PROMPT, 2, route="split", split=1, shape=shape))
        steps = [frame.n_tok for frame in frames_of(cloud) if frame.type is MsgType.STEP]
        assert steps == [32, 32, 32, 32, 22, 1]
        await agent.aclose()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "way",
    [{"route": "offload"}, {"route": "split", "split": 2}, {"route": "split", "split": 2, "shape": "u"}],
)
async def test_a_cloud_that_likes_small_steps_gets_them(
    tiny: TinyModel, way: dict[str, Any], late: bool
) -> None:
    """OPENED may lower the step size while larger chunks are computed or waiting already."""
    limits = Limits(initial_credits_rows=160)
    async with toy_cloud(info_of(tiny), limits=limits, chunk_rows=20, late=late) as cloud:
        agent = await agent_at(tiny, cloud)
        async with asyncio.timeout(30):
            first = await collect(agent, ask(prompt_of(400), 1, **way))
            turn = (*prompt_of(400), *first.ids, *prompt_of(100))
            if not late:  # with an offer the cloud must answer first
                await collect(agent, ask(turn, 1, **way))
        steps = [frame.n_tok for frame in frames_of(cloud) if frame.type is MsgType.STEP]
        assert max(steps[2:]) <= 20
        if first.started.split:
            assert first.finished.counts["rows_sent"] == 400
        await agent.aclose()

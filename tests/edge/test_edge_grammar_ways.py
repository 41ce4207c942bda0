"""Requests held to a grammar, on each way where this device samples, and from one to another."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from isthmus.edge.agent import Agent
from isthmus.edge.decision_log import DecisionLog, read_log
from isthmus.edge.legs import Legs
from isthmus.edge.requests import Fallback, GenerateRequest, Grammar, Token
from isthmus.edge.router import decide
from isthmus.edge.routing import RoutingOptions
from isthmus.protocol.errors import CloudLostError, RequestError, RouteInfeasibleError
from isthmus.protocol.sampling import SamplingParams
from tests.edge.edge_world import GREEDY, Outcome, TinyModel, ask, collect, prompt_of
from tests.edge.real_cloud import RealCloud, real_cloud
from tests.edge.test_edge_recovery import QUICK, die, run_with

VOCAB, END = 320, 2
U: dict[str, Any] = {"route": "split", "split": 2, "shape": "u"}
LOCAL: dict[str, Any] = {"route": "local"}
WARM = SamplingParams(temperature=1.3, seed=5)

SCHEMAS: dict[str, dict[str, Any]] = {
    "enum": {"enum": ["red", "green", 3, None]},
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
            "ok": {"type": "boolean"},
        },
        "required": ["name", "age", "ok"],
        "additionalProperties": False,
    },
    "nested arrays": {
        "type": "array",
        "items": {"type": "array", "items": {"enum": [0, 1]}, "maxItems": 2},
        "minItems": 2,
        "maxItems": 3,
    },
    "ref and null": {
        "$defs": {"leaf": {"anyOf": [{"type": "string", "pattern": "^[ab]{1,3}$"}, {"type": "null"}]}},
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/leaf"}, "b": {"$ref": "#/$defs/leaf"}},
        "required": ["a"],
        "additionalProperties": False,
    },
}


def schema(value: dict[str, Any]) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def held(grammar: Grammar, max_tokens: int = 120, **fields: Any) -> GenerateRequest:
    return ask(prompt_of(20), max_tokens, grammar=grammar, end_ids=(END,), **fields)


def assert_valid(outcome: Outcome, value: dict[str, Any]) -> None:
    jsonschema_rs.validate(value, json.loads(outcome.finished.text))
    assert outcome.finished.finish_reason == "stop"
    assert outcome.ids[-1] == END


@pytest.fixture(scope="module")
def cloud(tiny: TinyModel) -> Iterator[RealCloud]:
    with real_cloud(tiny) as running:
        yield running


@asynccontextmanager
async def agent_of(tiny: TinyModel, *urls: str, **options: Any) -> AsyncIterator[Agent]:
    agent = Agent(tiny.pack, cloud_urls=urls, recovery=QUICK, **options)
    await agent.start()
    try:
        yield agent
    finally:
        await agent.aclose()


# ---- generations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", SCHEMAS)
async def test_an_answer_fits_its_schema_here_and_in_the_u_shape_alike(
    tiny: TinyModel, cloud: RealCloud, name: str, sampling: SamplingParams
) -> None:
    request = held(schema(SCHEMAS[name]), sampling=sampling, row_format="f32")
    async with agent_of(tiny, cloud.url) as agent:
        local = await collect(agent, replace(request, **LOCAL, request_id="a"))
        split = await collect(agent, replace(request, **U, request_id="b"))
    assert_valid(local, SCHEMAS[name])
    assert (split.finished.route, split.finished.shape) == ("split", "u")
    assert split.ids == local.ids


async def test_choices_side_by_side_keep_to_themselves(tiny: TinyModel) -> None:
    def choice(number: int) -> Any:
        sampling = SamplingParams(temperature=1.5, seed=3, choice=number)
        return held(schema(SCHEMAS["object"]), sampling=sampling)

    async with agent_of(tiny, parallel=3) as agent:
        together = await asyncio.gather(*(collect(agent, choice(number)) for number in range(3)))
        alone = [await collect(agent, choice(number)) for number in range(3)]
    for outcome in together:
        assert_valid(outcome, SCHEMAS["object"])
    assert [one.ids for one in together] == [one.ids for one in alone]
    assert len({tuple(one.ids) for one in together}) == 3


async def test_what_max_tokens_cuts_off_is_told(tiny: TinyModel) -> None:
    async with agent_of(tiny) as agent:
        outcome = await collect(agent, held(schema(SCHEMAS["object"]), 6))
    assert (outcome.finished.finish_reason, len(outcome.ids)) == ("length", 6)
    assert outcome.finished.text == '{"name'


async def test_logprobs_stay_the_models_own(tiny: TinyModel) -> None:
    sampling = SamplingParams(temperature=0.0, logprobs=5)
    async with agent_of(tiny) as agent:
        outcome = await collect(agent, held(schema(SCHEMAS["enum"]), sampling=sampling))
        for token in outcome.tokens:
            before = (*prompt_of(20), *outcome.ids[: token.index])
            free = (await collect(agent, ask(before, 1, sampling=sampling))).tokens[0]
            assert [i for i, _ in token.top] == [i for i, _ in free.top]
            assert [p for _, p in token.top] == pytest.approx([p for _, p in free.top], abs=1e-4)
    assert any(token.id not in dict(token.top) for token in outcome.tokens)


async def test_penalties_and_a_grammar_go_together(tiny: TinyModel) -> None:
    sampling = SamplingParams(temperature=0.0, presence_penalty=2.0, repetition_penalty=2.0)
    async with agent_of(tiny) as agent:
        assert_valid(
            await collect(agent, held(schema(SCHEMAS["nested arrays"]), sampling=sampling)),
            SCHEMAS["nested arrays"],
        )


# ---- ways --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [{"route": "offload"}, {"route": "split", "shape": "prefix"}], ids=str)
async def test_where_the_cloud_samples_it_is_not_possible(
    tiny: TinyModel, cloud: RealCloud, way: dict[str, Any]
) -> None:
    async with agent_of(tiny, cloud.url) as agent:
        with pytest.raises(RouteInfeasibleError, match="held to a grammar") as caught:
            await collect(agent, held(Grammar("json_object"), **way))
        assert "U-shape" in caught.value.hint
        assert (await agent.route(held(Grammar("json_object"), route="split"))).shape == "u"


async def test_a_device_too_small_splits_in_the_u_shape(tiny: TinyModel, cloud: RealCloud) -> None:
    """Without a grammar it would offload."""
    request = held(schema(SCHEMAS["enum"]), 20)
    async with agent_of(tiny, cloud.url, memory_mb=0.45) as agent:
        assert (await agent.route(replace(request, grammar=None))).route == "offload"
        outcome = await collect(agent, request)
        assert_valid(outcome, SCHEMAS["enum"])
        decision = outcome.started.decision
        assert (decision.route, decision.shape) == ("split", "u")
        assert [c.violated for c in decision.candidates if c.route == "offload"] == ["grammar"]


async def test_a_logged_decision_is_taken_again_from_what_was_logged(tiny: TinyModel, tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log")
    async with agent_of(tiny, routing=RoutingOptions(decision_log=log)) as agent:
        await collect(agent, held(schema({"const": "secret"})))
    log.close()
    (entry,) = read_log(log.path)
    assert entry.inputs.grammar
    assert json.loads(json.dumps(decide(entry.inputs).to_dict())) == entry.decision
    assert b"secret" not in log.path.read_bytes()
    # Logs of versions that knew no grammars are still read.
    line = json.loads(log.path.read_text())
    del line["inputs"]["grammar"]
    log.path.write_text(json.dumps(line))
    (entry,) = read_log(log.path)
    assert decide(entry.inputs).candidates[1].violated == "cloud"


@pytest.mark.parametrize("at", [1, 7])
async def test_a_lost_cloud_is_left_and_the_answer_still_fits(tiny: TinyModel, at: int) -> None:
    request = held(schema(SCHEMAS["object"]), sampling=WARM, row_format="f32")
    with real_cloud(tiny) as first, real_cloud(tiny) as second:
        async with agent_of(tiny, first.url, second.url) as agent:
            whole = await collect(agent, replace(request, **LOCAL, request_id="whole"))
            ways: list[tuple[Fallback, RealCloud]] = [("cloud", first), ("any", second)]
            for fallback, cloud in ways:
                asked = replace(request, **U, fallback=fallback, request_id=fallback)
                tokens, finished = await run_with(agent, asked, at, partial(die, cloud))
                assert tokens == whole.ids
                assert finished.events[0]["event"] == "link_lost"
                assert finished.route == ("split" if fallback == "cloud" else "local")
            assert (agent.stats()["failovers"], agent.stats()["fallbacks"]) == (1, 1)


async def test_it_moves_to_places_where_it_is_kept(tiny: TinyModel, cloud: RealCloud) -> None:
    request = held(schema(SCHEMAS["object"]), sampling=WARM, row_format="f32", route="local")
    async with agent_of(tiny, cloud.url) as agent:
        whole = await collect(agent, request)
        tokens: list[int] = []
        moves: list[asyncio.Task[Any]] = []
        ways: list[dict[str, Any]] = [U, LOCAL, {**U, "split": 3}]
        async with aclosing(agent.generate(request)) as events:
            async for event in events:
                if isinstance(event, Token):
                    tokens.append(event.id)
                    if ways and len(tokens) >= 3 and all(move.done() for move in moves):
                        moves.append(asyncio.create_task(agent.move(request.request_id, **ways.pop(0))))
                    await asyncio.sleep(0)
                    if len(tokens) == 4:
                        with pytest.raises(RouteInfeasibleError, match="held to a grammar"):
                            await agent.move(request.request_id, route="offload")
        await asyncio.gather(*moves)
        assert agent.stats()["moves"] == 3
    assert tokens == whole.ids


@pytest.mark.parametrize("sampling", [WARM, WARM.model_copy(update={"presence_penalty": 1.5})])
async def test_a_token_drawn_in_vain_does_not_count(
    tiny: TinyModel, cloud: RealCloud, sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A move that fails drops the step under way, which has drawn already, and repeats it."""
    request = held(schema(SCHEMAS["object"]), sampling=sampling, route="local")

    async def lost(*_: Any) -> Any:
        raise CloudLostError("gone")

    async with agent_of(tiny, cloud.url) as agent:
        whole = await collect(agent, request)
        monkeypatch.setattr(Legs, "recut", lost)
        tokens: list[int] = []
        moves: list[asyncio.Task[Any]] = []
        async with aclosing(agent.generate(request)) as events:
            async for event in events:
                if isinstance(event, Token):
                    tokens.append(event.id)
                    if len(tokens) in (3, 8):
                        moves.append(asyncio.create_task(agent.move(request.request_id, **U)))
                        await asyncio.sleep(0.05)  # asked, and the next token is drawn
        ends = await asyncio.gather(*moves, return_exceptions=True)
        assert [type(end) for end in ends] == [CloudLostError, CloudLostError]
    assert tokens == whole.ids


# ---- refused -----------------------------------------------------------------------------------------


async def test_a_bad_grammar_is_refused_before_it_waits_for_a_slot(tiny: TinyModel) -> None:
    async with agent_of(tiny, parallel=1, queue=0) as agent, aclosing(agent.generate(ask([5], 9))) as first:
        await anext(first)
        for call in (collect, Agent.route):
            with pytest.raises(RequestError, match='"not"') as caught:
                await call(agent, held(schema({"not": {}})))
            assert caught.value.code == "bad_grammar"
        assert agent.stats()["requests"] == 1


@pytest.mark.parametrize(("end_ids", "code"), [((), "bad_grammar"), ((VOCAB,), "bad_token_id")])
async def test_it_needs_end_ids_that_the_model_has(
    tiny: TinyModel, end_ids: tuple[int, ...], code: str
) -> None:
    async with agent_of(tiny) as agent:
        with pytest.raises(RequestError) as caught:
            await collect(agent, ask([5], 9, grammar=Grammar("json_object"), end_ids=end_ids))
    assert caught.value.code == code

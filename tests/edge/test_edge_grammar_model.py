"""The real model held to grammars, on this device: what it says fits, and still makes sense."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import jsonschema_rs
import pytest
import pytest_asyncio

from isthmus.edge.agent import Agent
from isthmus.edge.chat import ChatTemplate
from isthmus.edge.requests import GenerateRequest, Grammar
from isthmus.protocol.sampling import SamplingParams
from isthmus.splitter.pack import Pack
from isthmus.splitter.provide import ensure_pack
from tests.edge.edge_world import GREEDY, collect

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "languages": {"type": "array", "items": {"enum": ["English", "French", "German"]}, "maxItems": 3},
    },
    "required": ["name", "age", "languages"],
    "additionalProperties": False,
}
TABLE = {
    "type": "array",
    "items": {"type": "array", "items": {"type": "integer", "maximum": 999}, "minItems": 2, "maxItems": 2},
    "minItems": 2,
    "maxItems": 3,
}


@pytest.fixture(scope="module")
def pack() -> Pack:
    return ensure_pack("smollm2-135m")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def agent(pack: Pack) -> AsyncIterator[Agent]:
    agent = Agent(pack, parallel=2)
    await agent.start()
    yield agent
    await agent.aclose()


def asked(pack: Pack, text: str, grammar: Grammar, sampling: SamplingParams = GREEDY) -> GenerateRequest:
    template = pack.chat_template()
    assert template is not None
    ids = ChatTemplate(template, pack.tokenizer()).encode([{"role": "user", "content": text}])
    return GenerateRequest(tuple(ids), 96, sampling, pack.spec.eos_ids, grammar=grammar)


@pytest.mark.parametrize(
    "sampling", [GREEDY, SamplingParams(temperature=0.9, seed=11)], ids=["greedy", "sampled"]
)
async def test_json_by_a_schema(agent: Agent, pack: Pack, sampling: SamplingParams) -> None:
    text = "Describe Anna, who is 34 years old and speaks French and German, as JSON."
    outcome = await collect(agent, asked(pack, text, Grammar("json_schema", json.dumps(PERSON)), sampling))
    assert outcome.finished.finish_reason == "stop"
    found: dict[str, Any] = json.loads(outcome.finished.text)
    jsonschema_rs.validate(PERSON, found)
    if sampling == GREEDY:
        assert (found["name"], found["age"]) == ("Anna", 34)


async def test_any_json_object(agent: Agent, pack: Pack) -> None:
    text = 'Answer in JSON, with the keys "city" and "country" only: where is the Eiffel tower?'
    outcome = await collect(agent, asked(pack, text, Grammar("json_object")))
    assert outcome.finished.finish_reason == "stop"
    assert "Paris" in json.loads(outcome.finished.text).values()


async def test_arrays_in_arrays(agent: Agent, pack: Pack) -> None:
    grammar = Grammar("json_schema", json.dumps(TABLE))
    outcome = await collect(agent, asked(pack, "Write a table of numbers and their squares.", grammar))
    jsonschema_rs.validate(TABLE, json.loads(outcome.finished.text))


async def test_one_of_a_few_answers(agent: Agent, pack: Pack) -> None:
    grammar = Grammar("json_schema", json.dumps({"enum": ["Berlin", "Paris", "Rome"]}))
    text = "Is the capital of France Berlin, Paris or Rome? Answer with the name of the city in quotes."
    outcome = await collect(agent, asked(pack, text, grammar))
    assert json.loads(outcome.finished.text) == "Paris"

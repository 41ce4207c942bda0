"""The real model through OpenAI's client: forms kept, tools called with arguments that fit the question."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from isthmus.splitter.provide import ensure_pack
from tests.edge.live_edge import NAME, live_edge

pytestmark = pytest.mark.model

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 40}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ASKED: Any = [{"role": "user", "content": "What is the weather like in Paris?"}]
GREEDY: Any = {"model": NAME, "temperature": 0, "max_tokens": 80}


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    with (
        live_edge(ensure_pack("smollm2-135m")) as edge,
        OpenAI(base_url=f"{edge.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_a_tool_is_called_and_its_answer_told(client: OpenAI) -> None:
    # As small a model does not know when to stop asking.
    tools: Any = {"tools": [WEATHER], "parallel_tool_calls": False}
    first = client.chat.completions.create(messages=ASKED, tool_choice="required", **tools, **GREEDY)
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls is not None
    assert message.tool_calls[0].type == "function"
    assert "Paris" in json.loads(message.tool_calls[0].function.arguments)["city"]
    answers: Any = [
        {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 degrees"}
        for call in message.tool_calls
    ]
    second = client.chat.completions.create(messages=[*ASKED, message, *answers], **tools, **GREEDY)
    assert "sunny" in (second.choices[0].message.content or "").lower()


def test_json_is_json(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Name and age of a person, as JSON."}]
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "maximum": 120},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    reply = client.chat.completions.create(messages=messages, response_format=form, **GREEDY)
    assert json.loads(reply.choices[0].message.content or "").keys() == {"name", "age"}
    assert reply.choices[0].finish_reason == "stop"

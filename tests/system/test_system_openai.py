"""OpenAI's own Python client against a live agent with a live cloud: the same suite on every route."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal, cast

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from tests.edge.edge_world import TinyModel, make_model
from tests.edge.live_edge import NAME, LiveEdge, live_edge
from tests.edge.real_cloud import RealCloud, real_cloud

WAYS: dict[str, dict[str, Any]] = {
    "local": {"route": "local"},
    "prefix": {"route": "split", "split": 2, "shape": "prefix"},
    "u": {"route": "split", "split": 2, "shape": "u"},
    "offload": {"route": "offload"},
}
HELD = ("local", "u")  # where the edge samples, and so can hold an answer to a grammar
HELLO: Any = [{"role": "user", "content": "hello the"}]
COLOURS = ["red", "green", "blue"]
PAINT: Any = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paints a wall.",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": COLOURS}, "coats": {"type": "integer", "enum": [1, 2]}},
            "required": ["colour", "coats"],
            "additionalProperties": False,
        },
    },
}
REST: Any = {"type": "function", "function": {"name": "rest", "strict": True}}


class Wall(BaseModel):
    """An answer's form; bounded, since a model of random weights would not come to an end by itself."""

    colour: Literal["red", "green", "blue"]
    dry: bool


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("openai"), max_position_embeddings=8192)


@pytest.fixture(scope="module")
def cloud(model: TinyModel) -> Iterator[RealCloud]:
    with real_cloud(model) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def edge(model: TinyModel, cloud: RealCloud) -> Iterator[LiveEdge]:
    with live_edge(model.pack, cloud_urls=(cloud.url,), parallel=2) as edge:
        yield edge


@pytest.fixture(scope="module")
def client(edge: LiveEdge) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{edge.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=HELD)
def held(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def fields(way: str, **more: Any) -> Any:
    """A greedy request of 24 tokens by `way`, unless said otherwise."""
    extra = {"isthmus": WAYS[way], **more.pop("extra_body", {})}
    asked = {"model": NAME, "messages": HELLO, "temperature": 0, "max_tokens": 24, "extra_body": extra}
    return {**asked, **more}


def chat(client: OpenAI, way: str, **more: Any) -> ChatCompletion:
    """A whole reply; it came by the way asked for."""
    reply = client.chat.completions.create(**fields(way, **more))
    assert isinstance(reply, ChatCompletion)
    how = cast(Any, reply).isthmus
    assert {name: how[name] for name in WAYS[way]} == WAYS[way]
    assert reply._request_id == how["request_id"]
    return reply


def said(reply: ChatCompletion, index: int = 0) -> str:
    content = reply.choices[index].message.content
    assert content is not None
    return content


def joined(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


# ---- plain and streamed ------------------------------------------------------------------------------


def test_a_stream_says_what_the_whole_reply_says(client: OpenAI, way: str) -> None:
    whole = chat(client, way)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    assert whole.choices[0].finish_reason == "length"
    asked = fields(way, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(client.chat.completions.create(**asked))
    assert joined(chunks) == said(whole)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [*[None] * (len(chunks) - 1), "length"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (last.choices, last.usage.completion_tokens) == ([], 24)
    first, final = chunks[0].isthmus, chunks[-1].isthmus
    assert first["route"] == final["route"] == WAYS[way]["route"]
    assert first["request_id"] == final["request_id"]
    assert first["reason"] == final["decision"]["reason"]


async def test_the_asynchronous_client_gets_the_same(edge: LiveEdge, client: OpenAI, way: str) -> None:
    expected = said(chat(client, way))
    async with AsyncOpenAI(base_url=f"{edge.url}/v1", api_key="none", max_retries=0) as other:
        replies = await asyncio.gather(*(other.chat.completions.create(**fields(way)) for _ in range(3)))
        assert [said(reply) for reply in replies] == [expected] * 3
        stream: AsyncIterator[Any] = await other.chat.completions.create(**fields(way, stream=True))
        assert joined([chunk async for chunk in stream]) == expected


def test_completions(client: OpenAI, way: str) -> None:
    asked = {**fields(way, logprobs=2), "prompt": "hello 2"}
    del asked["messages"]
    whole = client.completions.create(**asked)
    choice = whole.choices[0]
    assert choice.logprobs is not None
    assert len(choice.logprobs.tokens or []) == 24
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason == "length"


# ---- sampling ----------------------------------------------------------------------------------------


def test_a_seed_makes_answers_repeatable(client: OpenAI, way: str) -> None:
    one, same, other = (said(chat(client, way, temperature=1, seed=seed)) for seed in (7, 7, 8))
    assert one == same != other


def test_several_choices(client: OpenAI, way: str) -> None:
    reply = chat(client, way, n=2, temperature=1, seed=3, extra_headers={"x-request-id": f"two.{way}"})
    texts = [said(reply, index) for index in range(2)]
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert texts[0] != texts[1]
    assert reply.id == f"chatcmpl-two.{way}"
    chunks = list(client.chat.completions.create(**fields(way, n=2, temperature=1, seed=3, stream=True)))
    assert [joined(chunks, index) for index in range(2)] == texts


def test_a_stop_string_across_tokens(client: OpenAI, way: str) -> None:
    whole = said(chat(client, way))
    stop = whole[5:8]
    reply = chat(client, way, stop=["never said", stop])
    assert said(reply) == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"
    assert joined(list(client.chat.completions.create(**fields(way, stop=stop, stream=True)))) == said(reply)


def test_penalties_break_repetition(client: OpenAI, way: str) -> None:
    def most(**more: Any) -> int:
        asked = {"messages": [{"role": "user", "content": "hello 2"}], "max_tokens": 60, "logprobs": True}
        logprobs = chat(client, way, **asked, **more).choices[0].logprobs
        assert logprobs is not None
        tokens = [bytes(entry.bytes or b"") for entry in logprobs.content or []]
        return Counter(tokens).most_common(1)[0][1]

    usual = most()
    assert most(frequency_penalty=2.0) < usual
    assert most(presence_penalty=2.0) < usual


def test_logprobs(client: OpenAI, way: str) -> None:
    logprobs = chat(client, way, logprobs=True, top_logprobs=3).choices[0].logprobs
    assert logprobs is not None
    entries = logprobs.content or []
    assert len(entries) == 24
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob < 0  # greedy
    chunks = client.chat.completions.create(**fields(way, logprobs=True, top_logprobs=3, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    streamed = [entry for part in parts if part for entry in part.content or []]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    # Rows from a cache were computed in chunks of another length.
    assert [entry.logprob for entry in streamed] == pytest.approx(
        [entry.logprob for entry in entries], rel=1e-4
    )


# ---- answers held to a form --------------------------------------------------------------------------


def test_an_answer_follows_its_schema(client: OpenAI, held: str) -> None:
    schema = {"name": "wall", "schema": {**Wall.model_json_schema(), "additionalProperties": False}}
    for seed in range(3):
        reply = chat(
            client, held, temperature=1, seed=seed, max_tokens=80,
            response_format={"type": "json_schema", "json_schema": schema},
        )  # fmt: skip
        Wall.model_validate_json(said(reply))
        assert reply.choices[0].finish_reason == "stop"


def test_the_client_parses_what_it_asked_for(client: OpenAI, held: str) -> None:
    parsed = client.chat.completions.parse(
        **fields(held, response_format=Wall, n=2, temperature=1, max_tokens=80)
    )
    assert all(isinstance(choice.message.parsed, Wall) for choice in parsed.choices)
    with client.chat.completions.stream(**fields(held, response_format=Wall, max_tokens=80)) as stream:
        stream.until_done()
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Wall)


def test_a_tool_that_must_be_called_is_called(client: OpenAI, held: str) -> None:
    named: Any = {"type": "function", "function": {"name": "paint"}}
    for choice, names in (("required", {"paint", "rest"}), (named, {"paint"})):
        asked = {"tools": [PAINT, REST], "tool_choice": choice, "parallel_tool_calls": False}
        reply = chat(client, held, temperature=1, max_tokens=200, seed=5, **asked)
        message = reply.choices[0].message
        assert (message.content, reply.choices[0].finish_reason) == (None, "tool_calls")
        assert message.tool_calls is not None
        (call,) = message.tool_calls
        assert call.type == "function"
        assert call.function.name in names
        if call.function.name == "paint":
            arguments = json.loads(call.function.arguments)
            assert arguments.keys() == {"colour", "coats"}
            assert arguments["colour"] in COLOURS
        with client.chat.completions.stream(
            **fields(held, temperature=1, max_tokens=200, seed=5, **asked)
        ) as stream:
            events = list(stream)
            streamed = stream.get_final_completion().choices[0]
        assert streamed.finish_reason == "tool_calls"
        assert streamed.message.content is None
        (same,) = streamed.message.tool_calls or []
        assert (same.function.name, same.function.arguments) == (call.function.name, call.function.arguments)
        pieces = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
        assert "".join(piece.arguments_delta for piece in pieces) == call.function.arguments
        answer = {"role": "tool", "tool_call_id": call.id, "content": "done"}
        again = chat(client, held, messages=[*HELLO, message, answer], tools=[PAINT, REST])
        assert again.choices[0].finish_reason == "length"


def test_a_tool_that_may_be_called_leaves_the_text_whole(client: OpenAI, held: str) -> None:
    whole = chat(client, held, tools=[PAINT], temperature=1, seed=1)
    chunks = list(
        client.chat.completions.create(**fields(held, tools=[PAINT], temperature=1, seed=1, stream=True))
    )
    assert joined(chunks) == said(whole)
    assert whole.choices[0].message.tool_calls is None


def test_a_call_cut_short_is_told_as_far_as_it_came(client: OpenAI, held: str) -> None:
    reply = chat(client, held, tools=[PAINT], tool_choice="required", max_tokens=50)
    assert reply.choices[0].finish_reason == "length"
    (call,) = reply.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, call.function.arguments[:1]) == ("paint", "{")
    with pytest.raises(json.JSONDecodeError):
        json.loads(call.function.arguments)


@pytest.mark.parametrize("free", sorted(WAYS.keys() - set(HELD)))
def test_where_the_cloud_samples_no_form_can_be_kept(client: OpenAI, free: str) -> None:
    for asked in ({"response_format": {"type": "json_object"}}, {"tools": [PAINT]}):
        with pytest.raises(openai.BadRequestError, match="grammar") as caught:
            chat(client, free, **asked)
        assert caught.value.code == "route_infeasible"
    assert said(chat(client, free, tools=[PAINT], tool_choice="none")) == said(chat(client, free))


def test_a_schema_that_cannot_be_kept_is_refused(client: OpenAI) -> None:
    schema = {"name": "x", "schema": {"type": "objekt"}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(
                client, "local", stream=stream, response_format={"type": "json_schema", "json_schema": schema}
            )
        assert caught.value.code == "bad_grammar"


# ---- what goes wrong ---------------------------------------------------------------------------------


def test_errors_are_the_clients_own(client: OpenAI, way: str) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4o' is not served here") as missing:
        chat(client, way, model="gpt-4o", extra_headers={"x-request-id": "mine-1"})
    assert (missing.value.code, missing.value.request_id) == ("model_not_found", "mine-1")
    with pytest.raises(openai.BadRequestError, match="logit_bias") as unknown:
        chat(client, way, logit_bias={"1": 2})
    assert (unknown.value.code, unknown.value.param) == ("unknown_field", "logit_bias")
    with pytest.raises(openai.BadRequestError, match=r"8190 max_tokens = .*8192") as overflow:
        chat(client, way, max_tokens=8190)
    assert overflow.value.code == "context_overflow"


def settled(edge: LiveEdge, cloud: RealCloud) -> bool:
    stats = asyncio.run(cloud.pages_settle(0))
    return (stats.sessions, stats.pages_used, edge.stats()["running"]) == (0, 0, 0)


def test_more_than_fit_are_told_to_wait_and_who_leaves_is_gone(
    model: TinyModel, cloud: RealCloud, way: str
) -> None:
    with (
        live_edge(model.pack, cloud_urls=(cloud.url,), parallel=1, queue=0) as edge,
        OpenAI(base_url=f"{edge.url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(**fields(way, max_tokens=8000, stream=True))
        next(stream)
        with pytest.raises(openai.RateLimitError, match="at most 1") as full:
            chat(client, way)
        assert full.value.code == "overloaded"
        assert int(full.value.response.headers["retry-after"]) >= 1
        stream.close()
        for _ in range(500):
            if settled(edge, cloud):
                break
        assert settled(edge, cloud)
        assert edge.stats()["cancelled"] == 1
        assert said(chat(client, way))

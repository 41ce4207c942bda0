"""Replies made of events: a failure in mid-stream, several choices, tokens that are parts of characters."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from isthmus.edge.dialects import chat_dialect, completion_dialect
from isthmus.edge.merge import Numbered
from isthmus.edge.replies import Reply
from isthmus.edge.requests import (
    AgentEvent,
    Decision,
    Finished,
    GenerateRequest,
    LinkUse,
    Moved,
    Started,
    Timings,
    Token,
)
from isthmus.edge.tools import HERMES
from isthmus.protocol.errors import CloudLostError
from isthmus.protocol.sampling import SamplingParams
from isthmus.splitter.tokenizer import Tokenizer
from tests.edge.test_edge_chat import with_tokens
from tests.tiny import tiny_tokenizer_json

DECISION = Decision("split", 2, "u", "asked")
STARTED = Started("req-1", DECISION, "split", 2, "u")


def finished(*ids: int, tail: str = "") -> Finished:
    counts = {"edge_cached_rows": 3}
    timings, link = Timings(0.1, 10.0, 0.2), LinkUse(0.02, 5, 6)
    return Finished("stop", ids, "", tail, timings, link, counts, "local", 4, None)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer_json(), bos_id=0, eos_ids=(2,))


def make_reply(tokenizer: Tokenizer, *, n: int = 1, logprobs: int = -1, chat: bool = True) -> Reply:
    requests = [
        GenerateRequest((1, 2, 3, 4), 8, SamplingParams(choice=i, logprobs=logprobs)) for i in range(n)
    ]
    return Reply(chat_dialect if chat else completion_dialect, "tiny", tokenizer, requests)


class Events:
    """Events as `merge` yields them, after which it may fail; knows whether it was closed."""

    def __init__(self, *events: Numbered, failure: Exception | None = None) -> None:
        self.events, self.failure, self.closed = events, failure, False

    async def play(self) -> AsyncGenerator[Numbered, None]:
        try:
            for event in self.events:
                yield event
            if self.failure is not None:
                raise self.failure
        finally:
            self.closed = True


async def chunks(reply: Reply, events: Events, *, include_usage: bool = False) -> list[dict[str, Any]]:
    """The stream's chunks; checks its end."""
    source = events.play()
    first = await anext(source)
    lines = [line async for line in reply.server_sent_events(first, source, include_usage=include_usage)]
    assert lines[-1] == "data: [DONE]\n\n"
    assert events.closed
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def test_a_failure_in_mid_stream_is_the_last_event(tokenizer: Tokenizer) -> None:
    lost = CloudLostError("the cloud is gone", hint="ask again")
    events = Events((0, STARTED), (0, Token(0, 70, "a")), failure=lost)
    _, said, error = await chunks(make_reply(tokenizer), events, include_usage=True)
    assert said["choices"][0]["delta"]["content"] == "a"
    assert error == {
        "error": {
            "message": "the cloud is gone (ask again)",
            "type": "server_error",
            "param": None,
            "code": "cloud_lost",
        }
    }


async def test_a_reader_who_stops_closes_the_source(tokenizer: Tokenizer) -> None:
    events = Events((0, STARTED), (0, Token(0, 70, "a")), (0, Token(1, 71, "b")), (0, finished(70, 71)))
    source = events.play()
    stream = make_reply(tokenizer).server_sent_events(await anext(source), source, include_usage=False)
    await anext(stream)
    await anext(stream)
    assert not events.closed
    await stream.aclose()
    assert events.closed


async def test_the_first_chunk_tells_the_way_and_the_last_how_it_went(tokenizer: Tokenizer) -> None:
    events = Events(
        (0, STARTED),
        (0, Token(0, 70, "a")),
        (1, STARTED),
        (1, Token(0, 71, "b")),
        (1, finished(71, tail="!")),
        (0, finished(70)),
    )
    got = await chunks(make_reply(tokenizer, n=2), events)
    assert ["isthmus" in chunk for chunk in got] == [True, *[False] * 5, True]
    assert got[0]["isthmus"] == {
        "route": "split", "split": 2, "shape": "u", "request_id": "req-1", "reason": "asked"
    }  # fmt: skip
    assert [chunk["choices"][0] for chunk in got[4:6]] == [
        {"index": 1, "delta": {"content": "!"}, "logprobs": None, "finish_reason": None},
        {"index": 1, "delta": {}, "logprobs": None, "finish_reason": "stop"},
    ]
    how = got[6]["isthmus"]
    # Where it ended; the decision says how it began.
    assert (how["route"], how["split"], how["shape"], how["link"]["bytes_up"]) == ("local", 4, None, 5)
    assert how["decision"]["route"] == "split"


async def test_usage_counts_every_choice(tokenizer: Tokenizer) -> None:
    events = Events((0, STARTED), (0, finished(70, 2)), (1, STARTED), (1, finished(70, 71, 2)))
    *_, last = await chunks(make_reply(tokenizer, n=2), events, include_usage=True)
    assert last["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 5,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_a_token_without_text_is_silent_unless_its_logprob_was_asked(tokenizer: Tokenizer) -> None:
    half, other = tokenizer.encode("é")[0], 70
    if tokenizer.token_bytes(half) == "é".encode():  # a merge of the two: take a single byte
        half = next(i for i in range(320) if tokenizer.token_bytes(i) == b"\xc3")

    def events() -> Events:
        top = ((half, -0.5), (other, -1.5))
        return Events((0, STARTED), (0, Token(0, half, "", -0.5, top)), (0, finished(half, tail="\ufffd")))

    assert len(await chunks(make_reply(tokenizer), events())) == 3  # the role, the tail, the end
    _, said, *_ = await chunks(make_reply(tokenizer, logprobs=2), events())
    (entry,) = said["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["bytes"], entry["logprob"]) == ("\ufffd", [0xC3], -0.5)
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.5]
    _, said, *_ = await chunks(make_reply(tokenizer, logprobs=0, chat=False), events())
    assert said["choices"][0]["logprobs"]["tokens"] == ["\ufffd"]


async def test_tags_that_detokenising_leaves_out_are_read_all_the_same() -> None:
    tagged = with_tokens({"<tool_call>": True, "</tool_call>": True})
    text = '<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>'
    ids, stream = tagged.encode(text), tagged.stream()
    tokens = [Token(index, token, stream.push(token)) for index, token in enumerate(ids)]
    assert "tool_call" not in "".join(token.text for token in tokens)
    said: list[AgentEvent] = [STARTED, *tokens, finished(*ids)]
    numbered = [(0, event) for event in said]
    reply = Reply(chat_dialect, "tiny", tagged, [GenerateRequest((1,), 8)], calls=HERMES)
    (choice,) = (await reply.whole(Events(*numbered).play()))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"x": "é"}'}


async def test_what_happens_to_a_request_is_told_as_it_happens(tokenizer: Tokenizer) -> None:
    lost, moved = {"event": "link_lost", "at_index": 1}, {"event": "moved", "at_index": 1}
    events = Events(
        (0, STARTED),
        (0, Token(0, 70, "a")),
        (0, Moved((lost,))),
        (0, Moved((moved,))),
        (0, finished(70)),
    )
    for chat, nothing in ((True, {"delta": {}}), (False, {"text": ""})):
        got = await chunks(make_reply(tokenizer, chat=chat), events)
        assert [chunk.get("isthmus", {}).get("events") for chunk in got[1:4]] == [None, [lost], [moved]]
        for chunk in got[2:4]:
            assert chunk["choices"] == [{"index": 0, **nothing, "logprobs": None, "finish_reason": None}]

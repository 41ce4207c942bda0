"""BAD_INPUTS.md "HTTP": each gets its own error in OpenAI's shape, and harms no other request."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from isthmus.edge.api_body import MAX_BODY_BYTES
from isthmus.edge.server import bind
from isthmus.protocol.errors import ConfigError
from tests.edge.edge_world import TinyModel, make_model
from tests.edge.live_edge import LiveEdge, live_edge

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
LONG = 60_000  # tokens: more than any test waits for


@pytest.fixture(scope="module")
def edge(tiny: TinyModel) -> Iterator[LiveEdge]:
    with live_edge(tiny.pack) as edge:
        yield edge


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A model that talks for as long as one lets it: a long context, and no end of text in reach."""
    return make_model(tmp_path_factory.mktemp("endless"), max_position_embeddings=65536, seed=0)


@pytest.fixture
def busy(endless: TinyModel) -> Iterator[LiveEdge]:
    """One slot, one place in the queue."""
    with live_edge(endless.pack, parallel=1, queue=1) as edge:
        yield edge


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Checks the error's form; returns it."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    return error


def until(edge: LiveEdge, condition: Callable[[dict[str, Any]], bool]) -> None:
    """Ask for the agent's counts until they meet the condition."""
    deadline = time.monotonic() + 30
    while not condition(stats := edge.stats()):
        assert time.monotonic() < deadline, stats


# ---- bodies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"temprature": 1}, "temprature", "unknown field 'temprature'"),
        ({"isthmus": {"rout": "local"}}, "isthmus.rout", "unknown field 'isthmus.rout'"),
        ({"messages": [{"role": "user", "content": "x", "nam": "y"}]}, "messages.0.nam", "unknown field"),
        ({"logit_bias": {}}, "logit_bias", "unknown field 'logit_bias'"),
    ],
)
def test_an_unknown_field_is_named(edge: LiveEdge, body: dict[str, Any], param: str, said: str) -> None:
    error = refused(edge.http.post(CHAT, json={"messages": HELLO, **body}), 400, "unknown_field")
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"messages": None}, "messages", "array"),
        ({"messages": []}, "messages", "at least 1"),
        (
            {"messages": [{"role": "king", "content": "x"}]},
            "messages.0.role",
            "'system', 'developer', 'user', 'assistant', 'tool'",
        ),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content",
            "string or: Input should be a valid array",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
            "messages.0.content.0.type",
            "'text'",
        ),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "", "max_tokens and max_completion_tokens"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"n": True}, "n", "integer"),
        ({"stop": 5}, "stop", "string or: Input should be a valid array"),
        ({"stop": ["a", 5]}, "stop.1", "string"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "", "stream=true"),
        ({"top_logprobs": 3}, "", "logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"seed": 2**64}, "seed", ""),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
        ({"isthmus": {"route": "fast"}}, "isthmus.route", "'local'"),
        ({"isthmus": {"privacy": "none"}}, "isthmus.privacy", "'any'"),
        ({"isthmus": {"fallback": "local"}}, "isthmus.fallback", "'cloud'"),
        ({"isthmus": {"priority": 11}}, "isthmus.priority", "less than or equal to 10"),
        ({"isthmus": {"priority": "high"}}, "isthmus.priority", "integer"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named(edge: LiveEdge, body: dict[str, Any], param: str, said: str) -> None:
    error = refused(edge.http.post(CHAT, json={"messages": HELLO, **body}), 400, "bad_request")
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "bad_request"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', "bad_request"),
        (b"[]", "bad_request"),
        (b"null", "bad_request"),
    ],
)
def test_a_body_that_is_none(edge: LiveEdge, body: bytes, code: str) -> None:
    refused(edge.http.post(CHAT, content=body), 400, code)


def test_a_prompt_longer_than_the_context_names_both_numbers(edge: LiveEdge) -> None:
    messages = [{"role": "user", "content": "x" * 600}]
    body = {"messages": messages, "max_tokens": 10}
    prompt = len(edge.template.encode(messages))
    message = refused(edge.http.post(CHAT, json=body), 400, "context_overflow")["message"]
    assert f"{prompt} prompt tokens + 10" in message
    assert "512" in message


def test_more_output_than_the_context_names_both_numbers(edge: LiveEdge) -> None:
    body = {"prompt": "hello", "max_tokens": 512}
    message = refused(edge.http.post(COMPLETIONS, json=body), 400, "context_overflow")["message"]
    assert "1 prompt tokens + 512" in message


def test_too_many_stop_strings(edge: LiveEdge) -> None:
    body = {"messages": HELLO, "stop": [str(i) for i in range(100)]}
    assert (
        "100 stop strings, at most 16"
        in refused(edge.http.post(CHAT, json=body), 400, "too_many_stops")["message"]
    )


@pytest.mark.parametrize(("stop", "code"), [("", "bad_stop"), ("x" * 1000, "bad_stop")])
def test_stop_strings_of_a_strange_length(edge: LiveEdge, stop: str, code: str) -> None:
    refused(edge.http.post(CHAT, json={"messages": HELLO, "stop": stop}), 400, code)


@pytest.mark.parametrize(
    ("prompt", "code"),
    [("", "empty_prompt"), ([], "empty_prompt"), ([1, 320], "bad_token_id"), ([-1], "bad_token_id")],
)
def test_prompts_that_are_none(edge: LiveEdge, prompt: object, code: str) -> None:
    refused(edge.http.post(COMPLETIONS, json={"prompt": prompt}), 400, code)


@pytest.mark.parametrize(
    ("extension", "code"),
    [
        ({"route": "offload"}, "route_infeasible"),
        ({"route": "split", "split": 99}, "bad_split"),
        ({"route": "local", "split": 2}, "bad_split"),
    ],
)
def test_routes_that_cannot_be_taken(edge: LiveEdge, extension: dict[str, Any], code: str) -> None:
    error = refused(edge.http.post(CHAT, json={"messages": HELLO, "isthmus": extension}), 400, code)
    assert error["type"] == "invalid_request_error"


def test_another_model_is_not_served(edge: LiveEdge) -> None:
    for answer in (
        edge.http.post(CHAT, json={"messages": HELLO, "model": "gpt-4o"}),
        edge.http.get("/v1/models/gpt-4o"),
    ):
        assert "'gpt-4o' is not served here" in refused(answer, 404, "model_not_found")["message"]


def test_paths_and_methods_that_do_not_exist(edge: LiveEdge) -> None:
    refused(edge.http.get("/v2/anything"), 404, "unknown_path")
    refused(edge.http.get(CHAT), 405, "method_not_allowed")


# ---- large bodies ----------------------------------------------------------------------------------


def raw_answer(link: socket.socket) -> httpx.Response:
    """Everything the server says until it closes the connection."""
    data = b""
    while part := link.recv(65536):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return httpx.Response(int(head.split()[1]), content=body)


def connect(edge: LiveEdge) -> socket.socket:
    url = httpx.URL(edge.url)
    return socket.create_connection((url.host, url.port or 80), timeout=30)


HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def test_a_body_announced_as_too_large_is_not_read(edge: LiveEdge) -> None:
    with connect(edge) as link:
        link.sendall(f"{HEAD}Content-Length: 100000000\r\n\r\n".encode())
        error = refused(raw_answer(link), 413, "body_too_large")
    assert "100000000" in error["message"]
    assert str(MAX_BODY_BYTES) in error["message"]


def test_a_body_that_turns_out_too_large_is_not_read_to_its_end(edge: LiveEdge) -> None:
    chunk, sent = b"10000\r\n" + b"x" * 65536 + b"\r\n", 0
    with connect(edge) as link:
        link.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        try:
            while sent < 100_000_000:
                link.sendall(chunk)
                sent += len(chunk)
        except ConnectionError:
            pass
        refused(raw_answer(link), 413, "body_too_large")
    assert sent < 50_000_000  # what it read, and what the sockets' buffers hold


def test_a_body_as_large_as_allowed_is_read(edge: LiveEdge) -> None:
    rest = len(json.dumps({"prompt": ""}))
    body = json.dumps({"prompt": "x" * (MAX_BODY_BYTES - rest)})
    assert len(body) == MAX_BODY_BYTES
    refused(edge.http.post(COMPLETIONS, content=body), 400, "context_overflow")


# ---- clients that leave, queues that are full --------------------------------------------------------


@contextmanager
def chatter(edge: LiveEdge, **fields: Any) -> Iterator[None]:
    """A stream that would go on for long, after its first chunk. Its client leaves at the end."""
    body = {"prompt": "hello 2", "temperature": 0, "max_tokens": LONG, "stream": True, **fields}
    with edge.http.stream("POST", COMPLETIONS, json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        yield


def short(edge: LiveEdge) -> httpx.Response:
    return httpx.post(edge.url + COMPLETIONS, json={"prompt": "hello", "max_tokens": 2}, timeout=60)


def test_a_client_gone_in_mid_stream_frees_its_slot(busy: LiveEdge) -> None:
    with chatter(busy):
        assert busy.stats()["running"] == 1
    assert short(busy).status_code == 200  # there is one slot: it got it
    stats = busy.stats()
    assert (stats["cancelled"], stats["finished"], stats["running"]) == (1, 1, 0)


def test_a_client_gone_before_its_reply_frees_its_slot(busy: LiveEdge) -> None:
    body = json.dumps({"prompt": "hello 2", "temperature": 0, "max_tokens": LONG}).encode()
    with connect(busy) as link:
        link.sendall(f"{HEAD.replace(CHAT, COMPLETIONS)}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(busy, lambda stats: stats["running"] == 1)
    assert short(busy).status_code == 200
    stats = busy.stats()
    assert (stats["cancelled"], stats["finished"]) == (1, 1)


def test_a_client_gone_from_the_queue_leaves_it(busy: LiveEdge) -> None:
    with chatter(busy):
        body = json.dumps({"prompt": "hello", "max_tokens": 2}).encode()
        with connect(busy) as link:
            link.sendall(
                f"{HEAD.replace(CHAT, COMPLETIONS)}Content-Length: {len(body)}\r\n\r\n".encode() + body
            )
            until(busy, lambda stats: stats["waiting"] == 1)
        until(busy, lambda stats: stats["waiting"] == 0)
        assert busy.stats()["running"] == 1


def test_beyond_the_queue_is_429_and_when_to_try_again(busy: LiveEdge) -> None:
    waited: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: waited.append(short(busy)))
    with chatter(busy):
        waiting.start()
        until(busy, lambda stats: stats["waiting"] == 1)
        full = short(busy)
        error = refused(full, 429, "overloaded")
        assert error["type"] == "rate_limit_error"
        assert "at most 1" in error["message"]
        assert int(full.headers["retry-after"]) >= 1
    waiting.join()
    assert waited[0].status_code == 200  # the one in the queue was served


def test_more_choices_than_the_queue_holds_leave_nothing_behind(busy: LiveEdge) -> None:
    body = {"prompt": "hello", "n": 4, "max_tokens": LONG}
    refused(busy.http.post(COMPLETIONS, json=body), 429, "overloaded")
    until(busy, lambda stats: stats["running"] == stats["waiting"] == 0)
    assert short(busy).status_code == 200


def test_a_client_gone_ends_every_choice(busy: LiveEdge) -> None:
    with chatter(busy, n=2):
        assert busy.stats()["running"] == 1
    until(busy, lambda stats: stats["running"] == stats["waiting"] == 0)
    assert busy.stats()["cancelled"] == 2


# ---- strangers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "[::", "10.0.0.1"])
def test_a_rebound_name_is_refused(edge: LiveEdge, host: str) -> None:
    refused(edge.http.get("/v1/models", headers={"host": host}), 403, "foreign_host")


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
def test_a_page_of_another_origin_is_refused(edge: LiveEdge, origin: str) -> None:
    answer = edge.http.post(CHAT, json={"messages": HELLO}, headers={"origin": origin})
    refused(answer, 403, "foreign_origin")


def test_our_own_page_is_served(edge: LiveEdge) -> None:
    assert edge.http.get("/v1/models", headers={"origin": edge.url}).status_code == 200


def test_a_taken_port_is_named() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}") as caught:
            bind("127.0.0.1", port)
    assert caught.value.code == "port_taken"


def test_an_address_of_no_interface_is_named() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1") as caught:
        bind("192.0.2.1", 0)
    assert caught.value.code == "cannot_listen"

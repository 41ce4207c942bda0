"""No prompt, token id, activation or key is logged by the edge, at any level, whatever goes wrong."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.edge.chat import ChatTemplate
from isthmus.edge.link import CloudLink
from isthmus.edge.logs import log_stray_faults, trace_of
from isthmus.protocol.activations import RowCodec, RowFormat
from isthmus.protocol.keys import add_key, make_key
from tests.edge.edge_world import TinyModel
from tests.edge.live_edge import LiveEdge, live_edge
from tests.edge.real_cloud import real_cloud
from tests.edge.test_edge_link import INFO, hello, opening
from tests.edge.toy_cloud import KEY, toy_cloud

# The test's own clients and servers, which live in this process too.
NOT_OURS = ("httpx", "httpcore", "websockets.server")
PROMPT = "xylophone quagmire"
IDS = [71, 72, 73, 74, 75, 76]
SERVE_KEY = make_key()


@contextmanager
def everything_logged() -> Iterator[list[str]]:
    """All that any logger of this process has to say, at any level, with its tracebacks."""
    said: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not record.name.startswith(NOT_OURS):
                said.append(f"{record.name}: {self.format(record)}")

    keeper = Keeper(0)
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    before = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.setLevel(1)
        logger.addHandler(keeper)
    try:
        yield said
    finally:
        for logger, level in before:
            logger.setLevel(level)
            logger.removeHandler(keeper)


def assert_silent(text: str) -> None:
    """Nothing of the requests, nor of the keys, is in it."""
    for secret in ("xylophone", "quagmire", SERVE_KEY, KEY, "stranger-key", "s3cretfield", "71, 72"):
        assert secret not in text, text
    assert not re.search(r"\b71\b.{1,3}\b72\b", text), text


@pytest.fixture
def edge(tiny: TinyModel, tmp_path: Path) -> Iterator[LiveEdge]:
    add_key(tmp_path / "keys", "alice", SERVE_KEY)
    with live_edge(tiny.pack, served={"key_file": tmp_path / "keys"}) as edge:
        edge.http.headers["authorization"] = f"Bearer {SERVE_KEY}"
        yield edge


def good_and_bad(edge: LiveEdge) -> None:
    """Requests that are answered, and one for each way to be refused."""
    chat, text = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3}, {"prompt": PROMPT}
    bodies: list[tuple[str, dict[str, Any], int]] = [
        ("chat/completions", chat, 200),
        ("chat/completions", {**chat, "stream": True}, 200),
        ("completions", {"prompt": IDS, "max_tokens": 3}, 200),
        ("chat/completions", {**chat, "s3cretfield": PROMPT}, 400),
        ("chat/completions", {**chat, "stop": [PROMPT] * 99}, 400),
        ("chat/completions", {**chat, "model": PROMPT}, 404),
        ("completions", {**text, "max_tokens": 100_000}, 400),
        ("completions", {"prompt": [*IDS, 10**9]}, 400),
        ("completions", {"prompt": PROMPT, "temperature": PROMPT}, 400),
        ("completions", {**text, "isthmus": {"route": "offload"}}, 400),
    ]
    for path, body, status in bodies:
        assert edge.http.post(f"/v1/{path}", json=body).status_code == status, body
    broken = json.dumps(chat).encode()[:-1]
    assert edge.http.post("/v1/completions", content=broken).status_code == 400
    stranger = {"authorization": "Bearer stranger-key"}
    assert edge.http.post("/v1/completions", json=text, headers=stranger).status_code == 401
    assert (
        edge.http.post("/v1/completions", json=text, headers={"origin": f"x://{PROMPT}"}).status_code == 403
    )


def test_requests_good_and_bad_leave_no_trace(edge: LiveEdge) -> None:
    with everything_logged() as said:
        good_and_bad(edge)
    assert any(line.startswith("uvicorn") for line in said), "nothing was captured"
    assert_silent("\n".join(said))


def test_a_fault_of_ours_is_logged_without_what_it_stumbled_over(
    edge: LiveEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(self: ChatTemplate, text: str) -> list[int]:
        raise ValueError(f"cannot make sense of {text!r}")

    monkeypatch.setattr(ChatTemplate, "encode_raw", stumble)
    with everything_logged() as said:
        answer = edge.http.post("/v1/completions", json={"prompt": PROMPT})
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        edge.http.get("/livez")  # the log is written after the answer
    log = "\n".join(said)
    assert_silent(log + answer.text)
    assert "\nValueError" in log
    assert "in stumble" in log, "the place is not told"


@pytest.mark.parametrize("way", [{"route": "offload"}, {"route": "split", "split": 2, "shape": "u"}], ids=str)
def test_a_lost_cloud_leaves_no_trace(tiny: TinyModel, way: dict[str, Any]) -> None:
    body = {"prompt": IDS, "max_tokens": 400, "temperature": 0, "stream": True, "isthmus": way}
    with (
        real_cloud(tiny) as cloud,
        live_edge(tiny.pack, cloud_urls=(cloud.url,)) as edge,
        everything_logged() as said,
        edge.http.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        cloud.drop_connections()
        rest = list(lines)
    assert any("link_lost" in line for line in rest), "nothing was lost"
    assert rest[-2] == "data: [DONE]"
    assert_silent("\n".join(said))


async def test_the_link_logs_neither_key_nor_rows() -> None:
    async with toy_cloud(INFO) as cloud:
        with everything_logged() as said:
            link = CloudLink(cloud.url, hello(), api_key=KEY)
            session = await link.open(opening(split=2))
            rows = np.full((4, INFO.hidden), 1.5, np.float32)
            await session.send_rows(RowCodec(RowFormat.F32, INFO.hidden).encode(rows), 0, 4, final=True)
            await session.next()
            await link.aclose()
    text = "\n".join(said)
    assert_silent(text)
    assert "00 00 c0 3f" not in text  # 1.5, as websockets writes bytes
    assert "websockets" not in text


async def test_what_nobody_awaited_is_logged_without_its_message() -> None:
    async def stumble() -> None:
        raise ValueError(PROMPT)

    loop = asyncio.get_running_loop()
    log_stray_faults(loop)
    try:
        task = asyncio.create_task(stumble())
        await asyncio.wait([task])
        with everything_logged() as said:
            loop.call_exception_handler(
                {"message": "Task exception was never retrieved", "exception": task.exception()}
            )
            loop.call_exception_handler({"message": "something else"})
    finally:
        loop.set_exception_handler(None)
    assert_silent("\n".join(said))
    assert "never retrieved" in said[0]
    assert "in stumble" in said[0]
    assert "something else" in said[-1]


def test_a_trace_names_all_kinds_and_places_once() -> None:
    def inner() -> None:
        raise KeyError(PROMPT)

    try:
        try:
            inner()
        except KeyError as error:
            raise ExceptionGroup(PROMPT, [ValueError(PROMPT), error]) from error
    except ExceptionGroup as group:
        text = trace_of(group)
    assert "xylophone" not in text
    assert [text.count(kind) for kind in ("\nKeyError", "\nValueError", "\nExceptionGroup", "in inner")] == [
        1
    ] * 4

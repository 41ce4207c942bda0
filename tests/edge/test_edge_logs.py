"""What a serving edge logs: one line a request, joined with the cloud's by its id; never content."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest

from isthmus.cloud.telemetry import get_log
from isthmus.edge.agent import Agent
from isthmus.edge.link import CloudLink, hello_of
from isthmus.edge.logs import log, plain_code
from isthmus.edge.requests import Finished, Token
from isthmus.protocol.errors import CloudUnreachableError, IsthmusError
from isthmus.protocol.keys import add_key, make_key
from tests.edge.edge_world import TinyModel, ask, collect, prompt_of
from tests.edge.live_edge import LiveEdge, live_edge
from tests.edge.real_cloud import RealCloud, real_cloud
from tests.logged import process_log

CANARIES = ("xylophone", "quagmire", "zeppelin", "b4ndersnatch", "f1eldname", "h3ader")
SERVE_KEY = make_key()


@pytest.fixture(scope="module")
def cloud(tiny: TinyModel) -> Iterator[RealCloud]:
    with real_cloud(tiny) as running:
        yield running


# ---- how lines look ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format_", "terminal", "is_json"),
    [("auto", False, True), ("auto", True, False), ("json", True, True), ("tty", False, False)],
)
def test_json_unless_a_terminal_reads_it(format_: str, terminal: bool, is_json: bool) -> None:
    with process_log(format_, terminal=terminal) as stderr:
        log.info("request", request_id="req-1", ttft_s=0.25)
        get_log().info("session_open", request_id="req-1")
    for line, logger in zip(stderr.getvalue().splitlines(), ("edge", "cloud"), strict=True):
        assert line.startswith("{") is is_json
        assert "req-1" in line
        assert f"isthmus.{logger}" in line
    if is_json:
        first = stderr.events()[0]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", first.pop("timestamp"))
        assert first == {
            "event": "request",
            "level": "info",
            "logger": "isthmus.edge",
            "request_id": "req-1",
            "ttft_s": 0.25,
        }


def test_levels() -> None:
    """Ours from the level asked for on; a library's only from warning on, since its debug lines quote."""
    library = logging.getLogger("some.library")
    for level, expected in (("debug", "diwe"), ("info", "iwe"), ("warning", "we"), ("error", "e")):
        with process_log(level=level) as stderr:
            log.debug("d")
            log.info("i")
            log.warning("w")
            log.error("e")
            library.info("what a header said")
            library.warning("library")
        assert [line["event"] for line in stderr.events()] == [*expected, "library"]


def test_a_second_configuration_replaces_the_first() -> None:
    with process_log() as first, process_log() as second:
        log.warning("once")
    assert first.getvalue() == ""
    assert len(second.events("once")) == 1


def test_a_faults_message_stays_out_and_its_place_is_told() -> None:
    def stumble() -> None:
        raise ValueError(CANARIES[0])

    with process_log() as stderr:
        try:
            stumble()
        except ValueError as error:
            log.error("ours", exc_info=error)
            get_log().error("the cloud's", exc_info=error)
            logging.getLogger("uvicorn.error").exception("a library's")
    for line in stderr.events():
        assert line["exception"].endswith("\nValueError")
        assert "in stumble" in line["exception"]
    assert len(stderr.events()) == 3
    assert CANARIES[0] not in stderr.getvalue()


def test_nothing_controls_the_terminal() -> None:
    with process_log("tty", terminal=False) as stderr:
        log.info("request", request_id="\x1b[2J\r\nfake line")
    assert "\x1b" not in stderr.getvalue()
    assert len(stderr.getvalue().splitlines()) == 1


def test_a_code_that_a_cloud_made_up_is_not_logged() -> None:
    assert plain_code("cloud_full") == "cloud_full"
    assert plain_code("xylophone quagmire") == plain_code("\x1b[2J") == plain_code("") == "other"


# ---- what is said ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "cloud_way"),
    [
        ({"route": "local"}, None),
        ({"route": "offload"}, (0, "prefix")),
        ({"route": "split", "split": 2, "shape": "prefix"}, (2, "prefix")),
        ({"route": "split", "split": 3, "shape": "u"}, (3, "u")),
    ],
    ids=str,
)
async def test_both_machines_logs_are_joined_by_the_request_id(
    tiny: TinyModel, cloud: RealCloud, way: dict[str, Any], cloud_way: tuple[int, str] | None
) -> None:
    agent = Agent(tiny.pack, cloud_urls=(cloud.url,))
    await agent.start()
    with process_log(level="info") as stderr:
        outcome = await collect(agent, ask(prompt_of(11), 5, request_id="req-7", **way))
        await agent.aclose()
        for _ in range(500):  # the cloud hears of the end a little later
            if cloud_way is None or stderr.events("session_end"):
                break
            await asyncio.sleep(0.01)
    (line,) = stderr.events("request")
    assert line == line | {
        "request_id": "req-7",
        "route": way["route"],
        "split": outcome.finished.split,
        "shape": outcome.finished.shape,
        "reason": "asked",
        "outcome": "finished",
        "code": None,
        "prompt_tokens": 11,
        "tokens": 5,
        "num_events": 0,
    }
    assert 0 <= line["queue_s"] < line["ttft_s"] < line["total_s"] < 60
    assert line["ttft_s"] == pytest.approx(outcome.finished.timings.ttft_s, abs=0.05)
    there = stderr.events("session_open") + stderr.events("session_end")
    if cloud_way is None:
        assert there == []
        return
    opened, ended = there
    for one in there:
        assert (one["request_id"], one["split"], one["shape"]) == ("req-7", *cloud_way)
    assert opened["prompt_tokens"] == 11
    assert ended["tokens"] == 5
    assert ended["outcome"] in ("closed", "lost")
    assert [one["cloud"] for one in stderr.events("link_up") + stderr.events("link_down")] == [cloud.url] * 2
    assert stderr.events("link_down")[0]["code"] == "link_closed"


async def test_requests_that_fail_or_are_left(tiny: TinyModel) -> None:
    agent = Agent(tiny.pack)
    await agent.start()
    with process_log() as stderr:
        with pytest.raises(IsthmusError):
            await collect(agent, ask(prompt_of(4), 5, route="offload", request_id="one"))
        async with aclosing(agent.generate(ask(prompt_of(4), 50, request_id="two"))) as events:
            while not isinstance(await anext(events), Token):
                pass
    await agent.aclose()
    failed, left = stderr.events("request")
    assert (failed["request_id"], failed["outcome"], failed["code"]) == ("one", "failed", "route_infeasible")
    assert failed["route"] is None
    assert failed["ttft_s"] is None
    assert (left["request_id"], left["outcome"], left["tokens"]) == ("two", "cancelled", 1)


async def test_what_moves_a_request_is_told_with_its_id(tiny: TinyModel) -> None:
    with real_cloud(tiny) as doomed, process_log(level="info") as stderr:
        agent = Agent(tiny.pack, cloud_urls=(doomed.url,))
        await agent.start()
        request = ask(prompt_of(9), 120, route="split", split=2, request_id="req-9")
        async with aclosing(agent.generate(request)) as events:
            async for event in events:
                if isinstance(event, Token) and event.index == 3:
                    doomed.drop_connections()
                if isinstance(event, Finished):
                    finished = event
        await agent.aclose()
    kinds = [event["event"] for event in finished.events]
    assert kinds[0] == "link_lost"
    for kind in set(kinds):
        told = stderr.events(kind)
        assert [line["request_id"] for line in told] == ["req-9"] * kinds.count(kind)
    (line,) = stderr.events("request")
    assert line["num_events"] == len(kinds)
    (down, *_) = stderr.events("link_down")
    assert (down["cloud"], down["code"]) == (doomed.url, "cloud_lost")


async def test_a_cloud_that_is_not_there_is_told_of_once_and_one_that_drains_too(tiny: TinyModel) -> None:
    dead = CloudLink("ws://127.0.0.1:1", hello_of(tiny.pack, "test"))
    with real_cloud(tiny) as cloud, process_log() as stderr:
        for _ in range(3):
            with pytest.raises(CloudUnreachableError):
                await dead.connect()
        link = CloudLink(cloud.url, hello_of(tiny.pack, "test"))
        await link.connect()
        cloud.loop.call_soon_threadsafe(cloud.server.stop)
        for _ in range(500):
            if stderr.events("link_down"):
                break
            await asyncio.sleep(0.01)
        await link.aclose()
    (failed,) = stderr.events("link_failed")
    assert (failed["cloud"], failed["code"]) == (dead.url, "cloud_unreachable")
    told = [line["event"] for line in stderr.events() if line.get("cloud") == cloud.url]
    assert told == ["link_up", "cloud_draining", "link_down"]


# ---- what is not -------------------------------------------------------------------------------------


@pytest.fixture
def edge(tiny: TinyModel, cloud: RealCloud, tmp_path: Path) -> Iterator[LiveEdge]:
    add_key(tmp_path / "keys", "alice", SERVE_KEY)
    with live_edge(tiny.pack, served={"key_file": tmp_path / "keys"}, cloud_urls=(cloud.url,)) as edge:
        edge.http.headers["authorization"] = f"Bearer {SERVE_KEY}"
        yield edge


def requests_full_of_canaries(http: httpx.Client) -> list[str]:
    """Answered and refused ones; their answers' texts."""
    tool = {
        "type": "function",
        "function": {"name": "zeppelin", "description": "quagmire", "parameters": {"type": "object"}},
    }
    messages = [{"role": "system", "content": "quagmire"}, {"role": "user", "content": "xylophone"}]
    chat = {"messages": messages, "max_tokens": 12, "temperature": 0}
    header = {"x-h3ader": "h3ader"}
    texts: list[str] = []
    for way in ({"route": "local"}, {"route": "offload"}, {"route": "split", "split": 2}):
        reply = http.post("/v1/chat/completions", json={**chat, "isthmus": way}, headers=header)
        assert reply.status_code == 200, reply.text
        texts.append(reply.json()["choices"][0]["message"]["content"])
        http.post("/v1/completions", json={"prompt": "xylophone", "stream": True, "max_tokens": 3})
    said = [*messages, {"role": "tool", "tool_call_id": "zeppelin", "content": "quagmire"}]
    for body in (
        {**chat, "tools": [tool], "tool_choice": "auto"},
        {**chat, "tools": [tool], "tool_choice": "required", "stream": True},
        {**chat, "messages": said},
        {**chat, "f1eldname": "xylophone"},
        {**chat, "stop": ["b4ndersnatch"] * 99},
        {**chat, "model": "b4ndersnatch"},
    ):
        http.post("/v1/chat/completions", json=body, headers=header)
    http.post("/v1/completions", content=b'{"prompt": "xylophone', headers=header)
    http.get("/b4ndersnatch?quagmire=xylophone", headers=header)
    http.get("/v1/models", headers={"authorization": "Bearer b4ndersnatch"})
    return texts


def test_no_canary_is_in_either_machines_log(edge: LiveEdge) -> None:
    with process_log() as stderr:
        answers = requests_full_of_canaries(edge.http)
    text = stderr.getvalue()
    assert len(stderr.events("request")) >= 6
    assert len(stderr.events("session_open")) >= 2
    for secret in (*CANARIES, SERVE_KEY, *(answer for answer in answers if len(answer) > 3)):
        assert secret not in text

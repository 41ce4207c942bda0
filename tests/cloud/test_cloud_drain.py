"""The ways a cloud drains: by HTTP, by a machine's preemption notice; and who may ask for it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from isthmus.cloud.admin import DrainRequest, parse_drain
from isthmus.cloud.drain import Drain, check_alternative
from isthmus.cloud.notice import parse_notice, wait_for_notice
from isthmus.cloud.serve import Prepared
from isthmus.protocol.errors import ConfigError, IsthmusError, RequestError
from isthmus.protocol.events import GoingAway, Rejected, SessionOpened, Welcomed
from isthmus.protocol.keys import KeyFile
from tests.cloud.cloud_clients import greedy_reference, prompt_of
from tests.cloud.cloud_edges import RunningCloud, connected, get, open_of, running_cloud
from tests.cloud.cloud_traveller import Traveller, detached, until


async def post(cloud: RunningCloud, content: bytes = b"", **headers: str) -> httpx.Response:
    return await asyncio.to_thread(httpx.post, cloud.http + "/admin/drain", content=content, headers=headers)


def code_of(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


async def test_a_drain_by_http_lets_sessions_finish_and_ends_the_server(prepared: Prepared) -> None:
    with running_cloud(prepared) as cloud:
        prompt = prompt_of(12)
        edge = Traveller(prepared, open_of(prompt, split=2), prompt)
        lost = Traveller(prepared, open_of(prompt, split=2), prompt)
        async with connected(cloud) as other:
            await lost.open(other)
            await lost.abort()
        await detached(cloud)
        async with connected(cloud) as first, connected(cloud) as late:
            await late.wait(Welcomed)
            await edge.open(first)
            await edge.send_prompt()
            body = b'{"deadline_s": 60, "alternative": "wss://other.example.org:8078"}'
            answer = await post(cloud, body)
            assert answer.status_code == 202
            told = answer.json()
            assert told["draining"] is True
            assert told["sessions"] == 1  # the detached one is gone
            assert 59 < told["deadline_s"] <= 60
            going = (await first.wait(GoingAway)).goaway
            assert going.alternative == "wss://other.example.org:8078"
            assert 59 < going.deadline_s <= 60
            assert (await get(cloud, "/readyz")).status_code == 503
            async with connected(cloud) as new:
                assert (await new.wait(Rejected)).error.code == "draining"
            late.core.draining = False
            session = late.core.open(open_of(prompt))
            await late.flush()
            with pytest.raises(IsthmusError) as caught:
                await late.wait(SessionOpened, session.stream)
            assert caught.value.code == "draining"
            again = await post(cloud, b'{"deadline_s": 100}')
            assert again.json()["deadline_s"] <= 60
            nearer = await post(cloud, b'{"deadline_s": 30}')
            assert 29 < nearer.json()["deadline_s"] <= 30
            assert (await first.wait(GoingAway)).goaway.deadline_s <= 30
            assert await edge.finish() == greedy_reference(prepared.model, prompt, 8)
            await asyncio.to_thread(cloud.thread.join, 30)
        assert not cloud.thread.is_alive()


async def test_a_drain_ends_at_its_deadline_with_sessions_left(prepared: Prepared) -> None:
    with running_cloud(prepared, alternative="ws://elsewhere:1") as cloud:
        prompt = prompt_of(12)
        edge = Traveller(prepared, open_of(prompt, split=2), prompt)
        async with connected(cloud) as first:
            await edge.open(first)
            await post(cloud, b'{"deadline_s": 0.1}')
            assert (await first.wait(GoingAway)).goaway.alternative == "ws://elsewhere:1"
            await asyncio.to_thread(cloud.thread.join, 30)
        assert not cloud.thread.is_alive()
        assert len(cloud.hub.sessions) == 0


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"[]", "the body"),
        (b"{", "the body"),
        (b"\xff", "the body"),
        (b'{"deadline_s": NaN}', "deadline_s"),
        (b'{"deadline_s": 1e999}', "deadline_s"),
        (b'{"deadline_s": -1}', "deadline_s"),
        (b'{"deadline_s": "5"}', "deadline_s"),
        (b'{"deadline": 5}', "deadline"),
        (b'{"alternative": "http://x"}', "alternative"),
        (b'{"alternative": "ws://user:pw@x"}', "alternative"),
        (b'{"alternative": 7}', "alternative"),
        (b" " * 5000, "4096 bytes"),
    ],
)
async def test_a_bad_body_is_refused_and_nothing_drains(cloud: RunningCloud, body: bytes, named: str) -> None:
    answer = await post(cloud, body)
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]
    assert not cloud.hub.drain.begun


def test_a_body_may_be_empty() -> None:
    assert parse_drain(b"") == DrainRequest()
    with pytest.raises(RequestError):
        parse_drain(b"null")


async def test_without_keys_only_this_machine_and_no_web_page(cloud: RunningCloud) -> None:
    assert (await post(cloud, Host="evil.example")).status_code == 403
    assert code_of(await post(cloud, Origin="http://localhost:3000")) == "foreign_origin"
    assert (await asyncio.to_thread(httpx.get, cloud.http + "/admin/drain")).status_code == 405
    assert not cloud.hub.drain.begun


@pytest.mark.parametrize("admin", ["admin", "admin-ops", None])
async def test_who_may_drain(prepared: Prepared, tmp_path: Path, admin: str | None) -> None:
    path = tmp_path / "keys"
    path.write_text("alice:" + "a" * 20 + "\n" + (f"{admin}:{'x' * 20}\n" if admin else ""))
    options = replace(prepared.options, keys=KeyFile(path))
    with running_cloud(replace(prepared, options=options)) as cloud:
        assert (await post(cloud)).status_code == 401
        assert (await post(cloud, Authorization="Bearer wrong")).status_code == 401
        if admin:
            refused = await post(cloud, Authorization="Bearer " + "a" * 20)
            assert (refused.status_code, code_of(refused)) == (403, "not_admin")
        assert not cloud.hub.drain.begun
        key = "x" if admin else "a"
        assert (await post(cloud, Authorization="Bearer " + key * 20)).status_code == 202
        await asyncio.to_thread(cloud.thread.join, 30)
        assert not cloud.thread.is_alive()


def test_alternatives_are_plain_websocket_urls() -> None:
    for good in ("", "ws://a", "wss://a.example.org:8078", "wss://[::1]:5/path"):
        assert check_alternative(good) == good
    for bad in (
        "http://a", "a:1", "ws://", "ws://:5", "ws://a:x", "ws://a:0", "ws://a:99999", "ws://u@a", "ws://u:p@a",
        "ws://a?key=1", "ws://a#f", "ws://a b", "ws://a\n", "ws://é", "ws://" + "a" * 300,
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            check_alternative(bad)
        assert caught.value.code == "bad_alternative"


async def test_the_nearer_deadline_wins_and_a_drain_ends_once() -> None:
    drain = Drain()
    assert not drain.begun
    assert drain.refusal() is None
    drain.note(0, 0.0)  # nothing has begun
    assert drain.begin(10, "", now=100.0)
    assert not drain.begin(20, "", now=100.0)
    assert drain.begin(20, "ws://b", now=100.0)
    assert drain.left_s(104.0) == 6
    assert drain.begin(1, "", now=104.0)
    assert (drain.left_s(104.0), drain.alternative) == (1, "ws://b")
    drain.note(3, 104.5)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(drain.wait(), 0.01)
    drain.note(3, 105.0)
    await asyncio.wait_for(drain.wait(), 5)


# ---- preemption notices


@contextmanager
def metadata(answer: dict[str, Any]) -> Iterator[str]:
    """A metadata server that answers as `answer` says at that time."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer["headers"] = dict(self.headers)
            answer["path"] = self.path
            if answer["status"] is None:
                answer["gone"].wait(30)
                return
            self.send_response(answer["status"])
            if answer["status"] == 302:
                self.send_header("Location", "/yes")
            self.end_headers()
            self.wfile.write(answer.get("body", b""))

        def log_message(self, *_: Any) -> None:
            pass

    answer["gone"] = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/instance/preempted?alt=text"
        finally:
            answer["gone"].set()
            server.shutdown()
            thread.join(10)


ANSWERS = [
    (200, b"TRUE", True),
    (200, b'{"action": "stop"}', True),
    (200, b"FALSE\n", False),
    (200, b"false", False),
    (404, b"TRUE", False),
    (503, b"TRUE", False),
    (302, b"", False),
    (None, b"", False),
]


def test_what_a_metadata_server_may_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # never asked
    answer: dict[str, Any] = {}
    with metadata(answer) as url:
        there = parse_notice(url)
        for status, body, expected in ANSWERS:
            monkeypatch.setattr("isthmus.cloud.notice._TIMEOUT_S", 30 if status else 0.1)
            answer.update(status=status, body=body)
            assert there() is expected, (status, body)
        assert answer["headers"]["Metadata-Flavor"] == "Google"
        assert answer["path"] == "/instance/preempted?alt=text"
    assert there() is False  # nobody listens any more


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://u:p@x/", "http://x:99999/", "ws://x"])
def test_a_notice_is_a_file_or_a_plain_http_url(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_notice(url)
    assert caught.value.code == "bad_preemption_notice"
    assert "p@x" not in caught.value.message


async def test_a_notice_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "notice"
    waiting = asyncio.create_task(wait_for_notice(parse_notice(str(path)), poll_s=0.01))
    done, _ = await asyncio.wait({waiting}, timeout=0.1)
    assert not done
    path.touch()
    await asyncio.wait_for(waiting, 10)


async def test_a_notice_drains_the_cloud(prepared: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "preempted"
    policy: dict[str, Any] = {
        "notice": parse_notice(str(path)),
        "notice_deadline_s": 20.0,
        "alternative": "ws://b:1",
    }
    with running_cloud(prepared, **policy) as cloud:
        async with connected(cloud) as edge:
            await edge.wait(Welcomed)
            session = edge.core.open(open_of([1, 2, 3]))
            await edge.flush()
            await edge.wait(SessionOpened, session.stream)
            path.write_text("")
            going = (await edge.wait(GoingAway)).goaway
            assert 15 < going.deadline_s <= 20
            assert going.alternative == "ws://b:1"
            await edge.close(session)
        await until(lambda: not cloud.thread.is_alive())


def test_the_answer_is_json_for_scripts(prepared: Prepared) -> None:
    with running_cloud(prepared) as cloud:
        answer = httpx.post(cloud.http + "/admin/drain", content=b'{"deadline_s": 5}')
        assert json.loads(answer.content) == {"draining": True, "sessions": 0, "deadline_s": 5.0}

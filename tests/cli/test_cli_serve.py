"""`isthmus serve edge` and `relay` as processes: the ready line, a taken port, signals."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.processes import run, serve

pytestmark = pytest.mark.processes

LONG = {"prompt": "hello the", "temperature": 0, "max_tokens": 4000, "stream": True}


@pytest.fixture
def edge_arguments(model: str, env: dict[str, str]) -> list[str]:
    """Of `isthmus serve` over a pack that is built."""
    assert run("build", model, "--bits", "8", env=env).returncode == 0
    return ["edge", "--model", model, "--bits", "8", "--port", "0"]


@contextmanager
def talking(url: str) -> Iterator[Iterator[str]]:
    """The lines of a long reply, of which the first has come."""
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


def test_it_serves_its_model_under_a_short_name(edge_arguments: list[str], env: dict[str, str]) -> None:
    with serve(*edge_arguments, env=env) as edge:
        models = httpx.get(f"{edge.http}/v1/models").json()["data"]
        assert [card["id"] for card in models] == ["tiny"]
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
        reply = httpx.post(f"{edge.http}/v1/chat/completions", json=body, timeout=60).json()
        assert reply["usage"]["completion_tokens"] == 3


def test_the_ready_line_for_people(edge_arguments: list[str], env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "isthmus", "serve", *edge_arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready edge http://127.0.0.1:")
        assert httpx.get(f"{line.split()[2]}/livez").status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == ""
        assert process.wait(30) == 0


def test_sigterm_drains(edge_arguments: list[str], env: dict[str, str]) -> None:
    with serve(*edge_arguments, env=env) as edge, talking(edge.http) as lines:
        edge.process.send_signal(signal.SIGTERM)
        *_, last = (line for line in lines if line)
        assert last == "data: [DONE]"
        assert edge.process.wait(30) == 0


def test_a_second_sigint_stops_at_once(edge_arguments: list[str], env: dict[str, str]) -> None:
    with serve(*edge_arguments, env=env) as edge, talking(edge.http) as lines:
        edge.process.send_signal(signal.SIGINT)
        while _listens(edge.http):
            next(lines)
        edge.process.send_signal(signal.SIGINT)
        rest: list[str] = []
        with suppress(httpx.HTTPError):  # where even the error event found no time
            rest.extend(lines)
        assert not any('finish_reason":"' in line for line in rest), "it was not cut short"
        assert edge.process.wait(30) == 130


def _listens(url: str) -> bool:
    address = httpx.URL(url)
    try:
        socket.create_connection((address.host, address.port or 80), timeout=5).close()
    except OSError:
        return False
    return True


def test_a_taken_port_is_told(edge_arguments: list[str], env: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", *edge_arguments[:-1], str(port), "--json", env=env)
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "port_taken"
    assert f"127.0.0.1:{port}" in error["message"]


def test_a_provider_that_is_not_there_is_told(edge_arguments: list[str], env: dict[str, str]) -> None:
    done = run("serve", *edge_arguments, "--provider", "abacus", "--json", env=env)
    assert done.returncode in (1, 2)
    assert "abacus" in json.loads(done.stdout)["error"]["message"]
    assert "Traceback" not in done.stderr


def test_a_missing_model_is_told(env: dict[str, str], tmp_path: Path) -> None:
    done = run("serve", "edge", "--model", str(tmp_path / "none"), "--port", "0", "--json", env=env)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "not_found"


def _ready(line: str, as_json: bool) -> tuple[str, str]:
    """(kind, URL) of a ready line."""
    if as_json:
        said = json.loads(line)
        return said["ready"], said["url"]
    word, kind, url = line.split()
    assert word == "ready"
    return kind, url


@pytest.mark.parametrize("as_json", [False, True])
def test_serve_all_is_edge_and_cloud(model: str, env: dict[str, str], as_json: bool) -> None:
    command = [
        sys.executable, "-m", "isthmus", "serve", "all", "--model", model, "--port", "0", "--cloud-port", "0",
        *["--json"] * as_json,
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    ) as process:
        try:
            _used_and_stopped(process, model, env, as_json=as_json)
        finally:
            process.terminate()  # on a failure the `with` would wait for ever


def _used_and_stopped(
    process: subprocess.Popen[str], model: str, env: dict[str, str], *, as_json: bool
) -> None:
    """Both are ready, answer, and end by SIGTERM."""
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    (_, cloud), (_, url) = ready = [_ready(line, as_json) for line in lines]
    assert [kind for kind, _ in ready] == ["cloud", "edge"]
    body = {"prompt": "hello", "max_tokens": 3, "isthmus": {"route": "offload"}}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert reply.json()["isthmus"]["route"] == "offload", reply.text
    # Both sides have measured themselves, and the link is known: every way has its figures.
    if as_json:
        decision = httpx.post(f"{url}/v1/route", json={"prompt": "hello"}, timeout=60).json()["decision"]
        assert all(one["total_s"] > 0 for one in decision["candidates"])
        assert decision["basis"]["link"]["rtt_s"]["value"] > 0
    else:
        _explained(model, cloud, env)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.read() == ""
    assert process.wait(30) == 0


def _explained(model: str, cloud: str, env: dict[str, str]) -> None:
    """`run --explain` knows both devices and the link, on a terminal of 80 columns."""
    arguments = ("run", "hello", "--model", model, "--cloud", cloud, "--max-tokens", "3", "--explain")
    said = run(*arguments, env={**env, "COLUMNS": "80"}).stderr
    table = said[said.index("  way ") :]
    for way in ("local", "offload", "split"):
        assert re.search(rf"^[▸ ] {way} .*[1-9].*\d *$", table, re.MULTILINE), said
    assert "link: round trip" in table
    assert max(map(len, table[: table.index("edge:")].splitlines())) <= 80


def test_relay(env: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as target:
        address = f"127.0.0.1:{target.getsockname()[1]}"
        command = [
            sys.executable,
            "-m",
            "isthmus",
            "relay",
            "127.0.0.1:0",
            address,
            "--rtt-ms",
            "1",
            "--json",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            assert ready["ready"] == "relay"
            url = httpx.URL(ready["url"])
            with socket.create_connection((url.host, url.port or 0), timeout=30) as near:
                far, _ = target.accept()
                with far:
                    near.sendall(b"over")
                    assert far.recv(4) == b"over"
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0

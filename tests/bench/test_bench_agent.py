"""`bench agent` on a tiny model: what it counts is what happened; no matter how fast."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from isthmus.bench.agent_clients import ask
from isthmus.cli import app
from isthmus.protocol.errors import IsthmusError
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("llama", tmp_path_factory.mktemp("agent") / "tiny"))


@pytest.mark.processes
def test_bench_agent(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    flags = ["--starts", "1", "--idle-s", "0", "--clients", "6", "--seconds", "1", "--crowd", "12"]
    flags += ["--parallel", "2", "--queue", "4", "--max-tokens", "8"]
    done = CliRunner().invoke(app, ["bench", "agent", "--model", model, *flags, "--json"])
    result: dict[str, Any] = json.loads(done.stdout)
    figures = result["figures"]
    assert result["bench"] == "agent"
    assert figures["ready_s"] > 0
    assert figures["own"] == figures["completed"] == figures["requests"] >= 6
    assert figures["crowd_completed"] + figures["crowd_refused"] == 12
    assert figures["crowd_refused"] == figures["crowd_refused_with_retry_after"] > 0
    assert figures["crowd_other"] == 0


def serving(answer: bytes) -> Any:
    """A server that reads a request's head and gives `answer`."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    return asyncio.start_server(handle, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("answer", "status", "error"),
    [
        (b'HTTP/1.1 429 Busy\r\nretry-after: 7\r\n\r\n{"error": {"code": "overloaded"}}', 429, "overloaded"),
        (b"HTTP/1.1 500 Oh\r\n\r\nno JSON", 500, "unreadable"),
        (
            b"HTTP/1.1 200 OK\r\n\r\n22\r\n"
            b'data: {"error": {"code": "lost"}}\n\r\n11\r\n\ndata: [DONE]\n\n \r\n0\r\n\r\n',
            200,
            "lost",
        ),
    ],
)
async def test_what_failed_is_told(answer: bytes, status: int, error: str) -> None:
    async with await serving(answer) as server:
        port = server.sockets[0].getsockname()[1]
        reply = await ask(f"http://127.0.0.1:{port}", {})
    assert (reply.status, reply.error) == (status, error)
    assert reply.retry_after_s == (7 if status == 429 else None)


@pytest.mark.parametrize("answer", [b"SSH-2.0\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n0\r\n\r\n"])
async def test_what_is_no_answer_is_an_error(answer: bytes) -> None:
    async with await serving(answer) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(IsthmusError):
            await ask(f"http://127.0.0.1:{port}", {})

"""A cloud's life and death: liveness, drain, signals, ports."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from isthmus.cloud import hub as hub_module
from isthmus.cloud.serve import Prepared, run_cloud
from isthmus.cloud.server import SESSION_PATH, SUBPROTOCOL, bind
from isthmus.protocol.errors import ConfigError, IsthmusError
from isthmus.protocol.events import (
    ConnectionFailed,
    GoingAway,
    Rejected,
    ResultTokens,
    SessionOpened,
    StatusReceived,
    Welcomed,
)
from tests.cloud.cloud_clients import EdgeHalf, greedy_reference, prompt_of
from tests.cloud.cloud_edges import connected, get, open_of, running_cloud


async def test_compute_never_delays_a_ping_and_a_stuck_engine_is_not_ready(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "STUCK_AFTER_S", 0.2)
    release = threading.Event()
    with running_cloud(prepared) as cloud:
        forward = cloud.hub.engine.core.forward
        run = forward.run

        def blocked(*arguments: Any) -> Any:
            assert release.wait(60)
            return run(*arguments)

        monkeypatch.setattr(forward, "run", blocked)
        async with connected(cloud) as edge:
            await edge.wait(Welcomed)
            session = edge.core.open(open_of([5, 6, 7], max_tokens=1))
            await edge.send_ids(session, [5, 6, 7], final=True)
            assert await edge.rtt() < 5
            async with asyncio.timeout(30):
                while (ready := await get(cloud, "/readyz")).status_code == 200:
                    pass
            assert "no progress" in ready.json()["reason"]
            await edge.wait(StatusReceived)
            release.set()
            await edge.wait(ResultTokens, session.stream)
            assert (await get(cloud, "/readyz")).status_code == 200


async def test_a_drain_lets_running_sessions_finish(prepared: Prepared) -> None:
    with running_cloud(prepared, drain_s=60) as cloud:
        async with connected(cloud) as edge:
            await edge.wait(Welcomed)
            prompt = prompt_of(12)
            half = EdgeHalf(prepared.model, 2)
            session = edge.core.open(open_of(prompt, split=2, max_tokens=3))
            await edge.send_rows(session, half.rows(prompt), final=True)
            tokens = list((await edge.wait(ResultTokens, session.stream)).tokens)
            cloud.loop.call_soon_threadsafe(cloud.server.stop)
            await edge.wait(GoingAway)
            assert (await get(cloud, "/readyz")).json()["reason"] == "draining"
            with pytest.raises(IsthmusError):
                edge.core.open(open_of(prompt))
            async with connected(cloud) as late:
                assert (await late.wait(Rejected)).error.code == "draining"
            while len(tokens) < 3:
                await edge.send_rows(session, half.rows(tokens[-1:]), final=True)
                tokens += (await edge.wait(ResultTokens, session.stream)).tokens
            assert tokens == greedy_reference(prepared.model, prompt, 3)
            await edge.close(session)
            await asyncio.to_thread(cloud.thread.join, 30)
        assert not cloud.thread.is_alive()


async def test_a_drain_ends_at_its_deadline(prepared: Prepared) -> None:
    with running_cloud(prepared, drain_s=0.2) as cloud:
        async with connected(cloud) as edge:
            await edge.wait(Welcomed)
            session = edge.core.open(open_of([1, 2, 3]))
            await edge.flush()
            await edge.wait(SessionOpened, session.stream)
            cloud.stop()
            await edge.wait(ConnectionFailed)


def test_a_port_in_use_is_a_typed_error() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)) as caught:
            bind("127.0.0.1", port)
        assert caught.value.code == "port_unavailable"


def test_listening_beyond_loopback_needs_keys_and_tls() -> None:
    with pytest.raises(ConfigError) as caught:
        run_cloud("anything", host="0.0.0.0", port=0)
    assert caught.value.code == "insecure_bind"
    with pytest.raises(ConfigError, match="go together"):
        run_cloud("anything", port=0, tls_cert="cert.pem")


def start_process(model: Path, cache: Path) -> subprocess.Popen[str]:
    code = (
        "import sys; from isthmus.cloud.serve import run_cloud; "
        "from isthmus.logs import configure_log; configure_log(); "
        "run_cloud(sys.argv[1], port=0, precision='fp32', threads=1, kv_mb=8)"
    )
    environment = {**os.environ, "ISTHMUS_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.processes
@pytest.mark.parametrize("how", ["signal", "http"])
def test_a_drained_process_exits_0(tiny_path: Path, tmp_path: Path, how: str) -> None:
    with start_process(tiny_path, tmp_path) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready cloud ws://127.0.0.1:")
        url = line.split()[-1].replace("ws://", "http://")
        assert httpx.get(f"{url}/readyz").status_code == 200
        if how == "signal":
            process.send_signal(signal.SIGTERM)
        else:
            assert httpx.post(f"{url}/admin/drain").status_code == 202
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert out == ""


@pytest.mark.processes
async def test_a_second_sigint_stops_at_once(tiny_path: Path, tmp_path: Path) -> None:
    with start_process(tiny_path, tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        url = (await asyncio.to_thread(process.stdout.readline)).split()[-1]
        async with connect(url + SESSION_PATH, subprotocols=[Subprotocol(SUBPROTOCOL)]):
            process.send_signal(signal.SIGINT)
            while "draining" not in await asyncio.to_thread(process.stderr.readline):
                pass
            process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(process.wait, 30) in (0, 130)
        process.stderr.close()
        process.stdout.close()

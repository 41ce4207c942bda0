"""The cloud as edges meet it: a real server over loopback, driven by the protocol's edge half."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from isthmus.cloud import hub as hub_module
from isthmus.cloud.serve import Prepared, run_cloud
from isthmus.cloud.server import SESSION_PATH, SUBPROTOCOL, bind
from isthmus.cloud.websocket import MAX_FRAGMENTS, MAX_PINGS
from isthmus.protocol.activations import Encoded, RowCodec, RowFormat, choose_outliers
from isthmus.protocol.errors import ConfigError, IsthmusError, RejectedError
from isthmus.protocol.events import (
    CanaryDone,
    ConnectionFailed,
    GoingAway,
    Rejected,
    ResultRows,
    ResultTokens,
    SessionClosed,
    SessionOpened,
    StatusReceived,
    StreamTokens,
    Welcomed,
)
from isthmus.protocol.frames import Codec, Dtype
from isthmus.protocol.identity import canary_ids
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import Open
from isthmus.protocol.prefix import PrefixOffer
from tests.cloud.cloud_clients import EdgeHalf, greedy_reference, offer_of, prompt_of
from tests.cloud.cloud_edges import Edge, RunningCloud, connected, open_of, prepare_cloud, running_cloud
from tests.tiny import make_tiny

LAYERS = 4


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def prepared(tiny_path: Path) -> Prepared:
    return prepare_cloud(tiny_path, threads=1, kv_mb=64)


@pytest.fixture(scope="module")
def cloud(prepared: Prepared) -> Iterator[RunningCloud]:
    with running_cloud(prepared) as running:
        yield running


async def get(cloud: RunningCloud, path: str, **headers: str) -> httpx.Response:
    return await asyncio.to_thread(httpx.get, cloud.http + path, headers=headers)


async def stats(cloud: RunningCloud, **headers: str) -> dict[str, Any]:
    answer: dict[str, Any] = (await get(cloud, "/v1/stats", **headers)).raise_for_status().json()
    return answer


async def settled(cloud: RunningCloud) -> dict[str, Any]:
    """The stats once no session is left: what follows a closed socket has no answer to wait for."""
    async with asyncio.timeout(30):
        while (now := await stats(cloud))["sessions"]:
            pass
    return now


async def generate(
    edge: Edge, prepared: Prepared, request: Open, prompt: Sequence[int], *, chunk: int = 16
) -> list[int]:
    """One request by whatever route `request` says; tokens as the edge would show them."""
    half = EdgeHalf(prepared.model, request.split)
    codec = RowCodec(RowFormat(request.row_format), half.model.spec.hidden, request.outliers)
    session = edge.core.open(request)
    await edge.flush()
    start = 0
    if request.offer.entries:
        start = (await edge.wait(SessionOpened, session.stream)).opened.cached_rows
        if request.split and start:
            half.rows(prompt[:start])

    async def send(ids: Sequence[int], *, final: bool) -> None:
        if request.split == 0:
            await edge.send_ids(session, ids, final=final)
        else:
            await edge.send_rows(session, half.rows(ids), final=final, codec=codec)

    for first in range(start, len(prompt), chunk):
        await send(prompt[first : first + chunk], final=first + chunk >= len(prompt))
    tokens: list[int] = []
    while len(tokens) < request.max_tokens:
        if request.streams and tokens:
            more = await edge.wait(StreamTokens, session.stream)
            tokens += more.tokens
        elif request.shape == "prefix":
            result = await edge.wait(ResultTokens, session.stream)
            tokens += result.tokens
        else:
            rows_result = await edge.wait(ResultRows, session.stream)
            result_codec = RowCodec(RowFormat(request.result_format), half.model.spec.hidden)
            rows = result_codec.decode_frame(rows_result.frame, max_raw=1 << 20)
            tokens.append(int(prepared.model.head(torch.from_numpy(rows))[-1].argmax()))
        if not request.streams and len(tokens) < request.max_tokens:
            await send(tokens[-1:], final=True)
    held = [*prompt, *tokens][: len(prompt) + len(tokens) - 1]
    closed = await edge.close(session, PrefixOffer(entries=list(offer_of(held, len(held)))))
    assert closed.closed.kv_len == len(held)
    assert closed.closed.cached
    return tokens


MIXES = [(0, "prefix"), (1, "prefix"), (2, "prefix"), (3, "prefix"), (0, "u"), (1, "u"), (2, "u"), (3, "u")]


@pytest.mark.parametrize(("split", "shape"), MIXES)
async def test_each_route_gives_the_models_tokens(
    cloud: RunningCloud, prepared: Prepared, split: int, shape: str
) -> None:
    prompt = prompt_of(37, split)
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        tokens = await generate(edge, prepared, open_of(prompt, split=split, shape=shape), prompt)
    assert tokens == greedy_reference(prepared.model, prompt, 8)
    assert (await settled(cloud))["pages_used"] == 0


async def test_eight_edges_at_once_get_the_tokens_they_get_alone(
    cloud: RunningCloud, prepared: Prepared
) -> None:
    async def one(number: int) -> tuple[list[int], list[int]]:
        split, shape = MIXES[number]
        prompt = prompt_of(10 + 11 * number, 40 + number)
        async with connected(cloud) as edge:
            await edge.wait(Welcomed)
            request = open_of(prompt, split=split, shape=shape, max_tokens=12)
            return prompt, await generate(edge, prepared, request, prompt, chunk=7 + number)

    for prompt, tokens in await asyncio.gather(*(one(number) for number in range(8))):
        assert tokens == greedy_reference(prepared.model, prompt, 12)


async def test_sessions_of_one_connection_do_not_mix(cloud: RunningCloud, prepared: Prepared) -> None:
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)

        async def one(number: int) -> None:
            split, shape = MIXES[number]
            prompt = prompt_of(20, number)
            tokens = await generate(edge, prepared, open_of(prompt, split=split, shape=shape), prompt)
            assert tokens == greedy_reference(prepared.model, prompt, 8)

        await asyncio.gather(*(one(number) for number in range(8)))


async def test_a_stream_longer_than_its_window_arrives_whole(prepared: Prepared) -> None:
    limits = replace(Limits(), stream_window_tokens=4)
    options = replace(prepared.options, limits=limits)
    with running_cloud(replace(prepared, options=options)) as cloud:
        async with connected(cloud, limits=limits) as edge:
            await edge.wait(Welcomed)
            prompt = prompt_of(9)
            tokens = await generate(edge, prepared, open_of(prompt, max_tokens=30), prompt)
    assert tokens == greedy_reference(prepared.model, prompt, 30)


async def test_the_next_turn_uploads_and_computes_only_its_new_rows(
    cloud: RunningCloud, prepared: Prepared
) -> None:
    prompt = prompt_of(37, 77)
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        tokens = await generate(edge, prepared, open_of(prompt, split=2), prompt)
        before = (await stats(cloud))["rows_computed_total"]
        turn = [*prompt, *tokens, *prompt_of(5, 78)]
        offer = PrefixOffer(entries=list(offer_of(turn, 37 + 7)))
        request = open_of(turn, split=2, max_tokens=3, offer=offer)
        again = await generate(edge, prepared, request, turn)
    assert again == greedy_reference(prepared.model, turn, 3)
    assert (await stats(cloud))["rows_computed_total"] - before == len(turn) - (37 + 7) + 2


async def test_int8_rows_in_large_chunks(cloud: RunningCloud, prepared: Prepared) -> None:
    """A body beyond the inline limit is decoded off the loop, in order."""
    prompt = prompt_of(190, 5)
    rows = EdgeHalf(prepared.model, 2).rows(prompt)
    codec = RowCodec(RowFormat.INT8, 64, choose_outliers(rows), zstd=False)
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        session = edge.core.open(
            open_of(prompt, split=2, shape="u", row_format="int8o", outliers=codec.outliers, max_tokens=1)
        )
        await edge.send_rows(session, rows[:150], final=False, codec=codec)
        await edge.send_rows(session, rows[150:], final=True, codec=codec)
        result = await edge.wait(ResultRows, session.stream)
    assert result.kv_len == 190
    assert result.frame.dtype is Dtype.BF16


async def test_large_bodies_are_decoded_in_order_by_a_thread(
    cloud: RunningCloud, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.cloud.connection.INLINE_BYTES", 1000)
    prompt = prompt_of(60, 6)
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        tokens = await generate(edge, prepared, open_of(prompt, split=2), prompt, chunk=20)
    assert tokens == greedy_reference(prepared.model, prompt, 8)


async def test_cancel_frees_the_pages_and_says_how_many(cloud: RunningCloud, prepared: Prepared) -> None:
    prompt = prompt_of(40, 8)
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        session = edge.core.open(open_of(prompt, split=1, max_tokens=50))
        await edge.send_rows(session, EdgeHalf(prepared.model, 1).rows(prompt), final=True)
        await edge.wait(ResultTokens, session.stream)
        assert (await stats(cloud))["pages_used"] == 9
        session.cancel()
        await edge.flush()
        closed = await edge.wait(SessionClosed, session.stream)
        assert closed.closed.pages_freed == 9
        now = await stats(cloud)
        assert now["pages_used"] == now["sessions"] == 0


async def test_a_lost_connection_frees_its_sessions(cloud: RunningCloud, prepared: Prepared) -> None:
    prompt = prompt_of(20, 9)
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        session = edge.core.open(open_of(prompt, split=1, max_tokens=50))
        await edge.send_rows(session, EdgeHalf(prepared.model, 1).rows(prompt), final=True)
        await edge.wait(ResultTokens, session.stream)
        edge.socket.transport.abort()
        assert (await settled(cloud))["pages_used"] == 0


# ---- who is let in


async def test_a_wrong_key_is_refused_before_the_upgrade(prepared: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alice:one\nbob:two\n")
    with running_cloud(replace(prepared, options=replace(prepared.options, keys=path))) as cloud:
        for key in ("three", None):
            with pytest.raises(InvalidStatus) as caught:
                async with connected(cloud, key=key):
                    pass
            response = caught.value.response
            assert response.status_code == 401
            assert b'"code":"unauthorized"' in response.body
        assert (await get(cloud, "/v1/stats")).status_code == 401
        assert (await get(cloud, "/livez")).status_code == 200
        async with connected(cloud, key="two") as edge:
            await edge.wait(Welcomed)
            assert (await stats(cloud, Authorization="Bearer two"))["connections"] == 1
            (peer,) = cloud.hub.peers
            assert peer.tenant == "bob"


async def test_a_revoked_key_ends_its_connections_only(prepared: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alice:one\nbob:two\n")
    with running_cloud(replace(prepared, options=replace(prepared.options, keys=path))) as cloud:
        async with connected(cloud, key="one") as alice, connected(cloud, key="two") as bob:
            await alice.wait(Welcomed)
            await bob.wait(Welcomed)
            path.write_text("bob:two\n")
            os.utime(path, ns=(1, 1))
            failed = await alice.wait(ConnectionFailed)
            assert failed.error.code == "key_revoked"
            prompt = prompt_of(5)
            assert len(await generate(bob, prepared, open_of(prompt), prompt)) == 8


async def denied(cloud: RunningCloud, **options: Any) -> int:
    with pytest.raises(InvalidStatus) as caught:
        async with connect(cloud.url + SESSION_PATH, **options):
            pass
    return int(caught.value.response.status_code)


async def test_browsers_and_other_subprotocols_are_refused(cloud: RunningCloud) -> None:
    ours = [Subprotocol(SUBPROTOCOL)]
    assert await denied(cloud, subprotocols=ours, origin="http://evil.example") == 403
    assert await denied(cloud) == 400
    assert await denied(cloud, subprotocols=[Subprotocol("isthmus.v9")]) == 400


def test_health_metrics_and_foreign_hosts(cloud: RunningCloud) -> None:
    assert httpx.get(f"{cloud.http}/livez").text == "ok"
    assert httpx.get(f"{cloud.http}/readyz").json() == {"ready": True}
    text = httpx.get(f"{cloud.http}/metrics").text
    for name in (
        "isthmus_time_to_first_token_seconds", "isthmus_inter_token_latency_seconds",
        "isthmus_e2e_request_latency_seconds", "isthmus_num_requests_running", "isthmus_num_requests_waiting",
        "isthmus_kv_cache_usage_perc", "isthmus_link_bytes_total", "isthmus_step_seconds",
        "isthmus_step_rows",
        "isthmus_kv_pages_used", "isthmus_kv_pages_cached", "isthmus_kv_pages_free",
        "isthmus_preemptions_total", "isthmus_prefix_hits_total", "isthmus_batch_wait_seconds_total",
    ):  # fmt: skip
        assert name in text
    rebound = httpx.get(f"{cloud.http}/v1/stats", headers={"Host": "evil.example"})
    assert rebound.status_code == 403
    assert rebound.json()["error"]["code"] == "foreign_host"


async def test_another_model_is_rejected(cloud: RunningCloud) -> None:
    other = cloud.hub.info.identity.model_copy(update={"tokenizer_hash": "other"})
    async with connected(cloud, identity=other) as edge:
        rejected = await edge.wait(Rejected)
        assert isinstance(rejected.error, RejectedError)
        assert rejected.error.code == "model_mismatch"


async def test_other_weights_need_a_canary_that_agrees(prepared: Prepared) -> None:
    ids = canary_ids(320)
    with running_cloud(prepared) as cloud:
        other = cloud.hub.info.identity.model_copy(update={"weights_hash": "requantised"})
        async with connected(cloud, identity=other) as edge:
            assert (await edge.wait(Welcomed)).welcome.match == "canary"
            rows = EdgeHalf(prepared.model, 2).rows(ids)
            edge.core.canary(2, rows * 1.001)
            await edge.flush()
            agreed = (await edge.wait(CanaryDone)).result
            assert agreed.ok
            assert 0 < agreed.error < agreed.tolerance
            edge.core.canary(3, EdgeHalf(prepared.model, 3).rows(ids) * 2)
            await edge.flush()
            assert not (await edge.wait(CanaryDone)).result.ok
            prompt = prompt_of(9)
            tokens = await generate(edge, prepared, open_of(prompt, split=2), prompt)
            assert tokens == greedy_reference(prepared.model, prompt, 8)
        async with connected(cloud, identity=other) as again:
            assert (await again.wait(Welcomed)).welcome.canary_passed == (2,)


# ---- what edges do wrong


@pytest.mark.parametrize("data", ["text", b"", b"IS", b"garbage" * 20])
async def test_a_broken_frame_ends_that_connection_only(
    cloud: RunningCloud, prepared: Prepared, data: Any
) -> None:
    async with connected(cloud) as good, connected(cloud) as bad:
        await good.wait(Welcomed)
        await bad.wait(Welcomed)
        await bad.socket.send(data)
        failed = await bad.wait(ConnectionFailed)
        assert isinstance(failed.error, IsthmusError)
        await bad.socket.wait_closed()
        assert bad.socket.close_code == 1008
        prompt = prompt_of(6)
        assert len(await generate(good, prepared, open_of(prompt), prompt)) == 8


async def test_silence_instead_of_hello_is_cut_off(prepared: Prepared) -> None:
    options = replace(prepared.options, limits=replace(Limits(), hello_timeout_s=0.2))
    with running_cloud(replace(prepared, options=options)) as cloud:
        async with connect(cloud.url + SESSION_PATH, subprotocols=[Subprotocol(SUBPROTOCOL)]) as socket:
            reject = await asyncio.wait_for(socket.recv(), 10)
            assert b"hello_timeout" in reject
            await asyncio.wait_for(socket.wait_closed(), 10)
            assert socket.close_code == 1008


async def test_a_damaged_row_fails_its_session_only(cloud: RunningCloud, prepared: Prepared) -> None:
    rows = np.ones((3, 64), dtype=np.float32)
    rows[1, 5] = np.inf
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        session = edge.core.open(open_of([1, 2, 3], split=2))
        body = rows.tobytes()
        session.step_rows(Encoded(body, Dtype.F32, Codec.NONE, len(body)), 0, 3, final=True)
        await edge.flush()
        with pytest.raises(IsthmusError, match="inf") as caught:
            await edge.wait(ResultTokens, session.stream)
        assert caught.value.code == "bad_values"
        prompt = prompt_of(6)
        assert len(await generate(edge, prepared, open_of(prompt), prompt)) == 8
    assert (await settled(cloud))["pages_used"] == 0


async def test_a_session_too_large_for_the_cloud_is_refused_with_both_numbers(prepared: Prepared) -> None:
    with running_cloud(replace(prepared, num_pages=20)) as cloud:
        async with connected(cloud) as edge:
            await edge.wait(Welcomed)
            session = edge.core.open(open_of(prompt_of(5), max_context=100))
            await edge.flush()
            with pytest.raises(IsthmusError, match=r"28 KV pages.*20"):
                await edge.wait(SessionOpened, session.stream)


async def test_more_sessions_than_the_cloud_takes(prepared: Prepared) -> None:
    options = replace(prepared.options, limits=replace(Limits(), max_sessions=1))
    with running_cloud(replace(prepared, options=options)) as cloud:
        async with connected(cloud) as first, connected(cloud) as second:
            await first.wait(Welcomed)
            await second.wait(Welcomed)
            one = first.core.open(open_of([1, 2]))
            await first.flush()
            await first.wait(SessionOpened, one.stream)
            two = second.core.open(open_of([1, 2]))
            await second.flush()
            with pytest.raises(IsthmusError) as caught:
                await second.wait(SessionOpened, two.stream)
            assert caught.value.code == "cloud_full"


async def test_a_message_beyond_the_limit_closes_with_1009(prepared: Prepared) -> None:
    options = replace(prepared.options, limits=replace(Limits(), max_message_bytes=300_000))
    with running_cloud(replace(prepared, options=options)) as cloud:
        async with connected(cloud) as edge:
            await edge.wait(Welcomed)
            await edge.socket.send(b"x" * 300_001)
            await edge.socket.wait_closed()
            assert edge.socket.close_code == 1009


async def pings(edge: Edge) -> None:
    for _ in range(50 * MAX_PINGS):
        await edge.socket.ping()
        await asyncio.sleep(0)


async def test_floods_of_pings_and_fragments_are_cut_off(cloud: RunningCloud) -> None:
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        with pytest.raises(ConnectionClosed):
            await pings(edge)
        # The close frame may be lost behind the reset that the unread rest causes.
        assert edge.socket.close_code in (1006, 1008)

    async def crumbs() -> Any:
        for _ in range(50 * MAX_FRAGMENTS):
            yield b""
            await asyncio.sleep(0)

    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        with pytest.raises(ConnectionClosed):
            await edge.socket.send(crumbs())
        assert edge.socket.close_code in (1006, 1008)


async def test_a_header_that_never_ends_is_cut_off(
    cloud: RunningCloud, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.cloud.websocket.HEADER_TIMEOUT_S", 0.3)
    host, port = cloud.url.removeprefix("ws://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    async with connected(cloud) as edge:  # an upgraded connection outlives the deadline
        await edge.wait(Welcomed)
        await edge.wait(StatusReceived)
        prompt = prompt_of(5)
        assert len(await generate(edge, prepared, open_of(prompt), prompt)) == 8


# ---- life and death


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
def test_sigterm_drains_and_exits_0(tiny_path: Path, tmp_path: Path) -> None:
    with start_process(tiny_path, tmp_path) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready cloud ws://127.0.0.1:")
        url = line.split()[-1].replace("ws://", "http://")
        assert httpx.get(f"{url}/readyz").status_code == 200
        process.send_signal(signal.SIGTERM)
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

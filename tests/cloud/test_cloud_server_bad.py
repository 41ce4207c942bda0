"""What edges do wrong, and that only they feel it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from isthmus.cloud.serve import Prepared
from isthmus.cloud.server import SESSION_PATH, SUBPROTOCOL
from isthmus.cloud.websocket import MAX_FRAGMENTS, MAX_PINGS
from isthmus.protocol.activations import Encoded
from isthmus.protocol.errors import CloudError, IsthmusError
from isthmus.protocol.events import (
    ConnectionFailed,
    ResultTokens,
    SessionOpened,
    StatusReceived,
    Welcomed,
)
from isthmus.protocol.frames import Codec, Dtype
from isthmus.protocol.limits import Limits
from tests.cloud.cloud_clients import prompt_of
from tests.cloud.cloud_edges import Edge, RunningCloud, connected, open_of, running_cloud, settled
from tests.cloud.cloud_routes import generate


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


@pytest.mark.parametrize("inline", [0, 1 << 20])
async def test_a_bug_in_decoding_fails_its_session_only(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, inline: int
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("planted")

    with running_cloud(prepared) as cloud:
        async with connected(cloud) as edge:
            await edge.wait(Welcomed)
            session = edge.core.open(open_of([1, 2, 3], split=2))
            with monkeypatch.context() as patch:
                patch.setattr("isthmus.cloud.feed.INLINE_BYTES", inline)
                patch.setattr("isthmus.protocol.activations.RowCodec.decode_raw", broken)
                await edge.send_rows(session, np.ones((3, 64), np.float32), final=True)
                with pytest.raises(CloudError) as caught:
                    await edge.wait(ResultTokens, session.stream)
            assert caught.value.code == "decoder_failed"
            prompt = prompt_of(6)
            assert len(await generate(edge, prepared, open_of(prompt), prompt)) == 8
        assert (await settled(cloud))["pages_used"] == 0

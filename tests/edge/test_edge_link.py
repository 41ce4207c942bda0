"""The link over real sockets: handshake and its refusals, warm reuse, multiplexing, death, deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import pytest

from isthmus.edge.link import CloudLink
from isthmus.protocol.activations import RowCodec, RowFormat
from isthmus.protocol.cloud_connection import ServerInfo
from isthmus.protocol.errors import (
    CloudLostError,
    CloudTimeoutError,
    CloudUnreachableError,
    RejectedError,
)
from isthmus.protocol.events import ResultRows, ResultTokens
from isthmus.protocol.frames import VERSION
from isthmus.protocol.identity import ModelIdentity
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import Hello, Open
from isthmus.protocol.prefix import PrefixOffer
from isthmus.protocol.sampling import SamplingParams
from tests.edge.toy_cloud import KEY, ToyCloud, toy_cloud

IDENTITY = ModelIdentity(
    architecture={"num_layers": 4}, tokenizer_hash="t", base_name="toy", weights_hash="w"
)
INFO = ServerInfo(
    identity=IDENTITY,
    cloud_precision="fp32",
    num_layers=4,
    hidden=8,
    vocab_size=100,
    context_length=512,
    row_formats=("f32", "bf16", "int8o"),
    kv_bytes_per_token_layer=64,
)
FAST = Limits(heartbeat_s=0.2, dead_after_s=0.6)


def hello(identity: ModelIdentity = IDENTITY) -> Hello:
    return Hello(
        versions=(VERSION,), identity=identity, edge_precision="f32", row_formats=("f32", "bf16", "int8o")
    )


def opening(**fields: Any) -> Open:
    values: dict[str, Any] = {
        "split": 0,
        "shape": "u",
        "row_format": "f32",
        "max_tokens": 8,
        "prompt_tokens": 4,
        "max_context": 12,
        "sampling": SamplingParams(temperature=0.0),
    }
    return Open(**{**values, **fields})


@asynccontextmanager
async def link_to(cloud: ToyCloud, key: str | None = KEY, **options: Any) -> AsyncIterator[CloudLink]:
    link = CloudLink(cloud.url, hello(), api_key=key, **options)
    try:
        yield link
    finally:
        await link.aclose()


async def test_one_warm_connection_serves_many_sessions_at_once() -> None:
    import numpy as np

    codec = RowCodec(RowFormat.F32, 8, zstd=False)
    rows = np.arange(32, dtype=np.float32).reshape(4, 8)
    async with toy_cloud(INFO) as cloud, link_to(cloud) as link:
        assert link.state == "unknown"
        sessions = [await link.open(opening(split=2)) for _ in range(8)]
        for number, session in enumerate(sessions):
            await session.send_rows(codec.encode(rows + number), 0, 4, final=True)
        for number, session in reversed(list(enumerate(sessions))):
            output = await session.next()
            assert isinstance(output, ResultRows)
            assert output.kv_len == 4
            got = codec.decode_frame(output.frame, max_raw=1000)
            assert got.tolist() == (rows + number)[-1:].tolist()
            session.close(PrefixOffer())
        for _ in sessions:
            assert await cloud.left.get() == "CloseRequested"
        assert link.state == "up"
        assert link.num_connects == 1
        assert len(cloud.connections) == 1
        # Both ends count the same bytes; each session its own share.
        assert link.bytes_up == sum(map(len, cloud.received))
        assert 0 < sessions[0].bytes_up < link.bytes_up / 7
        assert len({session.bytes_up for session in sessions}) == 1


async def test_prefix_results_are_tokens() -> None:
    async with toy_cloud(INFO) as cloud, link_to(cloud) as link:
        session = await link.open(opening(shape="prefix", split=1))
        codec = RowCodec(RowFormat.F32, 8)
        import numpy as np

        await session.send_rows(codec.encode(np.ones((4, 8), np.float32)), 0, 4, final=True)
        output = await session.next()
        assert isinstance(output, ResultTokens)
        assert (output.first_index, output.tokens) == (0, (4,))
        assert (await session.opened()).cached_rows == 0


async def test_the_wrong_key_is_refused_before_the_upgrade() -> None:
    async with toy_cloud(INFO) as cloud:
        for key in (None, "wrong"):
            async with link_to(cloud, key=key) as link:
                with pytest.raises(RejectedError, match="refused the API key") as refused:
                    await link.connect()
                assert refused.value.code == "unauthorized"
                assert link.state == "refused"
        assert cloud.received == []


async def test_another_model_is_refused_by_name() -> None:
    other = IDENTITY.model_copy(update={"base_name": "other", "tokenizer_hash": "x"})
    async with toy_cloud(INFO) as cloud:
        link = CloudLink(cloud.url, hello(other), api_key=KEY)
        with pytest.raises(RejectedError, match="tokenizer_hash"):
            await link.connect()
        assert link.state == "refused"
        assert "tokenizer_hash" in link.detail
        await link.aclose()


async def test_a_cloud_at_capacity_says_when_to_come_back() -> None:
    full = RejectedError("all taken", code="capacity", retry_after_s=7.0)
    async with toy_cloud(INFO, refusal=full) as cloud, link_to(cloud) as link:
        with pytest.raises(RejectedError, match="all taken") as refused:
            await link.connect()
        assert (refused.value.code, refused.value.retry_after_s) == ("capacity", 7.0)


async def test_nobody_there_is_unreachable_and_the_next_request_tries_again() -> None:
    async with toy_cloud(INFO) as cloud:
        port = cloud.port
    link = CloudLink(f"ws://127.0.0.1:{port}", hello(), api_key=KEY)
    with pytest.raises(CloudUnreachableError, match=rf"127\.0\.0\.1:{port} is not reachable"):
        await link.connect()
    assert link.state == "down"
    async with toy_cloud(INFO) as cloud:
        link = CloudLink(cloud.url, hello(), api_key=KEY)
        await link.connect()
        assert link.state == "up"
        await link.aclose()
        assert link.state == "unknown"
        await link.connect()
        assert link.num_connects == 2
        await link.aclose()


async def test_something_else_on_the_port_is_unreachable_not_a_crash() -> None:
    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(other, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        link = CloudLink(f"ws://127.0.0.1:{port}", hello())
        with pytest.raises(CloudUnreachableError, match="HTTP 404"):
            await link.connect()


async def test_no_welcome_is_unreachable() -> None:
    async with toy_cloud(INFO) as cloud:
        cloud.frozen.set()
        async with link_to(cloud, limits=Limits(hello_timeout_s=0.2)) as link:
            with pytest.raises(CloudUnreachableError, match="WELCOME"):
                await link.connect()
            assert link.state == "down"


async def test_a_closed_socket_fails_all_sessions_at_once_and_the_next_request_reconnects() -> None:
    async with toy_cloud(INFO, mute=True) as cloud, link_to(cloud) as link:
        sessions = [await link.open(opening(split=2)) for _ in range(3)]
        await asyncio.gather(*(session.opened() for session in sessions))
        waiting = [asyncio.create_task(session.next()) for session in sessions]
        since = monotonic()
        cloud.connections[0].transport.abort()
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, CloudLostError)
        assert monotonic() - since < 1
        assert link.state == "unknown"
        again = await link.open(opening(split=2))
        await again.opened()
        assert link.num_connects == 2
        for session in sessions:  # harmless after the end
            session.cancel()
            session.close(PrefixOffer())
            with pytest.raises(CloudLostError):
                await session.room(1)


@pytest.mark.parametrize(("limits", "within_s"), [(FAST, 1.1), (Limits(), 3.0)])
async def test_a_silent_peer_is_found_dead_in_time(limits: Limits, within_s: float) -> None:
    async with toy_cloud(INFO) as cloud, link_to(cloud, limits=limits) as link:
        session = await link.open(opening(split=2))
        await session.opened()
        cloud.frozen.set()
        since = monotonic()
        with pytest.raises(CloudLostError):
            await session.next()
        assert monotonic() - since <= within_s


async def test_an_alive_cloud_that_makes_no_progress_runs_into_the_deadline() -> None:
    async with toy_cloud(INFO, mute=True) as cloud, link_to(cloud, first_timeout_s=0.3) as link:
        session = await link.open(opening(split=2))
        other = await link.open(opening(split=2))
        with pytest.raises(CloudTimeoutError):
            await session.next()
        assert await cloud.left.get() == "CancelRequested"
        assert link.state == "up"
        await other.opened()


async def test_cancel_reaches_the_cloud() -> None:
    async with toy_cloud(INFO, mute=True) as cloud, link_to(cloud) as link:
        session = await link.open(opening(split=2))
        await session.opened()
        session.cancel()
        session.cancel()
        assert await cloud.left.get() == "CancelRequested"
        session.close(PrefixOffer())
        session = await link.open(opening(split=2))
        await session.opened()
        assert cloud.left.empty()


async def test_rtt_is_measured_while_a_session_runs() -> None:
    async with toy_cloud(INFO, mute=True) as cloud, link_to(cloud, limits=FAST, first_timeout_s=0.9) as link:
        session = await link.open(opening(split=2))
        with pytest.raises(CloudTimeoutError):  # until then there were some pings
            await session.next()
        assert session.rtt_s is not None
        assert 0 < session.rtt_s < 0.5
        assert link.rtt_s == session.rtt_s

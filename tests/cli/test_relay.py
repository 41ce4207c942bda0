"""The relay delays, limits and keeps order; a cut target cuts the client."""

from __future__ import annotations

import asyncio
import time

import pytest

from isthmus.protocol.errors import ConfigError
from isthmus.relay import LinkShape, Relay, parse_address
from tests.cli.relaying import relayed


async def test_bytes_come_back_in_order_under_jitter() -> None:
    payload = bytes(range(256)) * 1024
    async with relayed(LinkShape(rtt_ms=4, jitter_ms=6)) as relay:
        reader, writer = await asyncio.open_connection(*relay.listen)
        writer.write(payload)
        assert await reader.readexactly(len(payload)) == payload
        writer.close()
        await writer.wait_closed()


async def test_a_round_trip_takes_at_least_the_rtt() -> None:
    async with relayed(LinkShape(rtt_ms=60)) as relay:
        reader, writer = await asyncio.open_connection(*relay.listen)
        started = time.perf_counter()
        writer.write(b"x")
        await reader.readexactly(1)
        assert time.perf_counter() - started >= 0.060
        writer.close()
        await writer.wait_closed()


async def test_bandwidth_bounds_a_transfer_from_below() -> None:
    size = 250_000  # 2 Mbit at 20 Mbit/s: never under 0.1 s
    async with relayed(LinkShape(up_mbps=20)) as relay:
        reader, writer = await asyncio.open_connection(*relay.listen)
        started = time.perf_counter()
        writer.write(b"y" * size)
        await reader.readexactly(size)
        assert time.perf_counter() - started >= 0.095
        writer.close()
        await writer.wait_closed()


async def test_a_target_that_hangs_up_is_seen_by_the_client() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    async with relayed(LinkShape(), hang_up) as relay:
        reader, writer = await asyncio.open_connection(*relay.listen)
        writer.write(b"z")
        assert await reader.read() == b""
        writer.close()


async def test_a_dead_target_closes_the_connection() -> None:
    relay = Relay(("127.0.0.1", 0), ("127.0.0.1", 1), LinkShape())
    address = await relay.start()
    reader, writer = await asyncio.open_connection(*address)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    writer.close()
    await relay.aclose()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        (":0", ("127.0.0.1", 0)),
        ("9000", ("127.0.0.1", 9000)),
        ("ws://h:1/", ("h", 1)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text, what="target") == address


@pytest.mark.parametrize("text", ["", "host", "host:", "host:x", "host:70000"])
def test_bad_addresses_name_themselves(text: str) -> None:
    with pytest.raises(ConfigError, match="names no port"):
        parse_address(text, what="target")


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_impossible_shapes_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="rtt_ms"):
        LinkShape(rtt_ms=value)

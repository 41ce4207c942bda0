"""Faults of the relay: stall, half-open, cut at a byte or message, slicing, refusing, holding."""

from __future__ import annotations

import asyncio
import time

import pytest
import websockets
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve

from isthmus.protocol.errors import ConfigError
from isthmus.relay import Cut, HalfOpen, LinkShape, Refuse, Relay, Slice, Stall
from isthmus.relay.faults import Scope, Side
from isthmus.relay.messages import MessageScanner
from tests.cli.relaying import client, echoed, read_to_end, relayed

PAYLOAD = bytes(range(256)) * 8


async def test_a_cut_resets_both_ends() -> None:
    seen = asyncio.Queue[type[BaseException] | bytes]()

    async def watch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        try:
            seen.put_nowait(await reader.read(1))
        except OSError as error:
            seen.put_nowait(type(error))
        writer.transport.abort()

    async with relayed(handler=watch) as relay, client(relay) as (reader, writer):
        writer.write(b"x")
        await asyncio.sleep(0.05)
        relay.faults.cut()
        assert await read_to_end(reader) == (b"", True)
        assert await asyncio.wait_for(seen.get(), 2) is ConnectionResetError
        assert relay.faults.lines == {}


@pytest.mark.parametrize("number", [0, 1, 255, 1000, len(PAYLOAD) - 1])
@pytest.mark.parametrize("scope", ["up", "down"])
async def test_a_cut_at_a_byte_lets_exactly_so_many_pass(scope: Scope, number: int) -> None:
    arrived = bytearray()

    async def keep_and_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                arrived.extend(data)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.transport.abort()

    async with relayed(handler=keep_and_echo) as relay, client(relay) as (reader, writer):
        relay.faults.at_byte(number, scope, Cut())
        writer.write(PAYLOAD)
        got, reset = await read_to_end(reader)
        assert reset
        if scope == "down":
            assert got == PAYLOAD[:number]
        else:
            await asyncio.sleep(0.05)
            assert bytes(arrived) == PAYLOAD[:number]
    assert [one.fault for one in relay.faults.happened] == [Cut()]


async def test_bytes_of_both_directions_and_of_all_connections_are_counted_exactly() -> None:
    async with relayed() as relay:
        relay.faults.at_byte(15, "both", Cut())
        async with client(relay) as streams:
            await echoed(streams, b"12345")
            streams[1].write(b"67890")  # 10 + 5: the echo of the second five is the first that may not pass
            assert await read_to_end(streams[0]) == (b"", True)
        relay.faults.at_byte(relay.faults.total_bytes + 7, "total", Cut())
        async with client(relay) as one, client(relay) as other:
            await echoed(one, b"abc")
            other[1].write(b"de")
            assert (await read_to_end(other[0]))[0] == b""
            assert relay.faults.total_bytes == 15 + 7
            assert await echoed(one, b"f") == b"f"  # only the connection that got there is cut


async def test_an_armed_fault_can_wait_for_a_certain_connection() -> None:
    async with relayed() as relay:
        relay.faults.at_byte(3, "up", Cut(), connection=2)
        async with client(relay) as first:
            await echoed(first, b"12345")
            async with client(relay) as second:
                second[1].write(b"12345")
                got, reset = await read_to_end(second[0])
                assert reset
                assert b"123".startswith(got)
            assert await echoed(first, b"6") == b"6"
    assert [one.connection for one in relay.faults.happened] == [2]


async def test_a_stall_delays_and_loses_nothing() -> None:
    async with relayed() as relay, client(relay) as streams:
        await echoed(streams, b"before")
        relay.faults.do(Stall(0.3, "down"))
        started = time.perf_counter()
        assert await echoed(streams, PAYLOAD) == PAYLOAD
        assert 0.25 <= time.perf_counter() - started < 2
        async with client(relay) as late:
            relay.faults.do(Stall(0.2))
            started = time.perf_counter()
            assert await echoed(late, b"a new connection waits, too")
            assert time.perf_counter() - started >= 0.15


@pytest.mark.parametrize("side", ["up", "down", "both"])
async def test_half_open_swallows_and_tcp_stays_up(side: Side) -> None:
    arrived = bytearray()
    ended = asyncio.Event()

    async def watch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                arrived.extend(data)
                writer.write(data)
        except OSError:
            pass
        ended.set()
        writer.transport.abort()

    async with relayed(handler=watch) as relay:
        async with client(relay) as (reader, writer):
            await echoed((reader, writer), b"ab")
            relay.faults.do(HalfOpen(side))
            writer.write(b"cd")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.2)
            assert bytes(arrived) == (b"abcd" if side == "down" else b"ab")
            assert not writer.transport.is_closing()
        async with client(relay) as fresh:
            assert await echoed(fresh, b"another connection is whole") == b"another connection is whole"
        if side == "down":  # the client's end still travels up
            await asyncio.wait_for(ended.wait(), 2)
        else:
            await asyncio.sleep(0.1)
            assert len(relay.faults.lines) >= 1, "the far end has not been told"


async def test_slices_of_one_byte_arrive_one_by_one() -> None:
    sizes: list[int] = []

    async def measure(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            sizes.append(len(data))
            writer.write(data)
        writer.close()

    async with relayed(handler=measure) as relay, client(relay) as streams:
        relay.faults.do(Slice(1))
        assert await echoed(streams, PAYLOAD[:500]) == PAYLOAD[:500]
        assert sum(sizes) == 500
        assert max(sizes) < 100, "TCP may join a few, the relay none"
        relay.faults.do(Slice(0))
        assert await echoed(streams, PAYLOAD) == PAYLOAD


async def test_new_connections_are_refused_for_a_time() -> None:
    async with relayed() as relay, client(relay) as streams:
        await echoed(streams, b"x")
        relay.faults.do(Refuse(0.3))
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*relay.listen)
        assert await echoed(streams, b"those that stand stay") == b"those that stand stay"
        await asyncio.sleep(0.4)
        async with client(relay) as late:
            assert await echoed(late, b"y") == b"y"


# ---- messages ------------------------------------------------------------------------------------


async def _repeat(websocket: ServerConnection) -> None:
    async for message in websocket:
        await websocket.send(message)


async def _relay_to(port: int) -> Relay:
    relay = Relay(("127.0.0.1", 0), ("127.0.0.1", port), LinkShape())
    await relay.start()
    return relay


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("sliced", [0, 1])
async def test_a_cut_at_a_message_lets_all_before_it_pass(direction: str, number: int, sliced: int) -> None:
    """Of all frame sizes, with pings between them, whatever the slices."""
    async with serve(_repeat, "127.0.0.1", 0, ping_interval=None) as server:
        relay = await _relay_to(server.sockets[0].getsockname()[1])
        relay.faults.do(Slice(sliced))
        relay.faults.at_message(number, direction, Cut())  # type: ignore[arg-type]
        got = 0

        async def talk(websocket: ClientConnection) -> None:
            nonlocal got
            for size in (0, 125, 126, 2000, 70_000):
                await (await websocket.ping())
                await websocket.send(bytes(size))
                assert len(await websocket.recv()) == size
                got += 1

        async with connect("ws://{}:{}".format(*relay.listen), ping_interval=None) as websocket:
            with pytest.raises(websockets.ConnectionClosedError):
                await talk(websocket)
        assert got == number - 1
        await relay.aclose()


async def test_a_reply_can_be_held_and_released_or_never_leave() -> None:
    async with serve(_repeat, "127.0.0.1", 0, ping_interval=None) as server:
        relay = await _relay_to(server.sockets[0].getsockname()[1])
        url = "ws://{}:{}".format(*relay.listen)
        async with connect(url, ping_interval=None) as websocket:
            hold = relay.faults.hold("down", message=2)
            await websocket.send("one")
            assert await websocket.recv() == "one"
            assert not hold.reached.is_set()
            await websocket.send("two")
            await asyncio.wait_for(hold.reached.wait(), 2)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(websocket.recv(), 0.1)
            hold.release()
            assert await websocket.recv() == "two"
            hold = relay.faults.hold("down")
            await websocket.send("three")
            await asyncio.wait_for(hold.reached.wait(), 2)
            assert relay.faults.lines[1].messages == {"up": 3, "down": 2}
            relay.faults.cut()
            with pytest.raises(websockets.ConnectionClosedError):
                await websocket.recv()
        await relay.aclose()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_messages_are_found_in_any_slicing(size: int) -> None:
    head = b"GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n"
    frames = [
        b"\x82\x83mask\x01\x02\x03",  # masked, 3 bytes
        b"\x02\x7e\x01\x00" + b"\x82" * 256,  # unmasked, first of a fragmented message
        b"\x89\x00",  # a ping between its fragments
        b"\x80\x01\x81",  # its continuation
        b"\x81\x7f" + (65536).to_bytes(8, "big") + b"\x82" * 65536,
        b"\x82\x00",
    ]
    data = head + b"".join(frames)
    ends = [len(head)]
    for frame in frames:
        ends.append(ends[-1] + len(frame))
    scanner = MessageScanner()
    found = [at + start for at in range(0, len(data), size) for start in scanner.feed(data[at : at + size])]
    assert found == [ends[0], ends[1], ends[4], ends[5]]


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n\x82\x00\x82\x00", b"\x16\x03\x01" * 50_000 + b"\r\n\r\n\x82\x00"],
)
def test_what_is_no_websocket_has_no_messages(data: bytes) -> None:
    scanner = MessageScanner()
    assert [scanner.feed(data[at : at + 1000]) for at in range(0, len(data), 1000)] == [[]] * -(
        -len(data) // 1000
    )


async def test_a_trace_and_a_bandwidth_exclude_each_other() -> None:
    from isthmus.relay import Trace

    with pytest.raises(ConfigError, match="together"):
        Relay(("127.0.0.1", 0), ("127.0.0.1", 1), LinkShape(up_mbps=1), trace=Trace((1,), (1,)))

"""A running relay is told to become another link."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time

import pytest

from isthmus.bench.live_link import LiveLink
from isthmus.protocol.errors import ConfigError, IsthmusError
from isthmus.relay import LinkShape, Trace
from isthmus.relay.control import MAX_LINE_BYTES, Lines, obey
from tests.cli.relaying import client, echo, echoed, relayed


async def took_s(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], size: int) -> float:
    started = time.perf_counter()
    assert await echoed(streams, b"d" * size) == b"d" * size
    return time.perf_counter() - started


async def test_delay_and_bandwidth_change_under_a_standing_connection() -> None:
    async with relayed(LinkShape(rtt_ms=1)) as relay, client(relay) as streams:
        await echoed(streams, b"warm")
        relay.shape = LinkShape(rtt_ms=80)
        assert await took_s(streams, 1) >= 0.080
        relay.shape = LinkShape(up_mbps=4)
        assert await took_s(streams, 100_000) >= 0.195  # 0.8 Mbit at 4 Mbit/s
        relay.shape = LinkShape(down_mbps=8)
        assert await took_s(streams, 100_000) >= 0.095
        relay.shape = LinkShape()
        assert min([await took_s(streams, 1) for _ in range(5)]) < 0.040


async def test_what_is_on_its_way_is_not_overtaken() -> None:
    async with relayed(LinkShape(rtt_ms=100)) as relay, client(relay) as (reader, writer):
        writer.write(b"first")
        await asyncio.sleep(0.02)  # it waits in the relay
        relay.shape = LinkShape()
        writer.write(b"second")
        assert await asyncio.wait_for(reader.readexactly(11), 5) == b"firstsecond"


async def test_a_command_changes_all_but_the_jitter() -> None:
    async with relayed(LinkShape(rtt_ms=1, jitter_ms=2)) as relay:
        expected = LinkShape(rtt_ms=40, jitter_ms=2, up_mbps=1.5, down_mbps=0)
        assert obey("shape 40 1.5 0", relay) == relay.shape == expected


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("shape 1 2", "bad_relay_command", "shape 1 2"),
        ("shape 1 2 3 4", "bad_relay_command", "no command"),
        ("cut 1 2 3", "bad_relay_command", "cut"),
        ("shape soon 2 3", "bad_relay_command", "no number"),
        ("shape -1 2 3", "bad_setting", "rtt_ms = -1"),
        ("shape 1 nan 3", "bad_setting", "up_mbps = nan"),
    ],
)
async def test_what_cannot_be_obeyed_changes_nothing(line: str, code: str, said: str) -> None:
    before = LinkShape(rtt_ms=3, up_mbps=5)
    async with relayed(before) as relay:
        with pytest.raises(ConfigError) as caught:
            obey(line, relay)
        assert relay.shape == before
    assert caught.value.code == code
    assert said in caught.value.message
    assert caught.value.hint


async def test_a_trace_keeps_its_bandwidth() -> None:
    async with relayed(trace=Trace((1,), (1,))) as relay:
        with pytest.raises(ConfigError, match="given together"):
            obey("shape 10 5 5", relay)
        assert obey("shape 10 0 0", relay) == LinkShape(rtt_ms=10)


def test_lines_come_out_of_pieces() -> None:
    lines = Lines()
    assert lines.feed(b"shape 1") == []
    assert lines.feed(b" 2 3\n\n  \nsh") == ["shape 1 2 3"]
    assert lines.feed(b"ape\n\xff\n") == ["shape", "�"]
    assert lines.feed(b"x" * (MAX_LINE_BYTES + 1)) == ["x" * (MAX_LINE_BYTES + 1)]
    assert lines.feed(b"last") == []
    assert lines.feed(b"") == ["last"]


@pytest.mark.processes
async def test_a_relay_process_obeys_its_standard_input() -> None:
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await echo(reader, writer)
        await writer.wait_closed()
        ended.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        with LiveLink(target, LinkShape(rtt_ms=1, jitter_ms=1)) as link:
            host, _, port = link.url.removeprefix("ws://").rpartition(":")
            streams = await asyncio.open_connection(host, int(port))
            await echoed(streams, b"warm")
            await asyncio.to_thread(link.reshape, LinkShape(rtt_ms=90, up_mbps=50, down_mbps=60))
            assert link.shape == LinkShape(rtt_ms=90, jitter_ms=1, up_mbps=50, down_mbps=60)
            assert await took_s(streams, 1) >= 0.090
            streams[1].close()
            await streams[1].wait_closed()
            await asyncio.wait_for(ended.wait(), 5)


@pytest.mark.processes
def test_a_relay_that_can_not_start_says_why() -> None:
    with pytest.raises(IsthmusError, match="names no port") as caught, LiveLink("nowhere", LinkShape()):
        pass
    assert caught.value.code == "bad_setting"


@pytest.mark.processes
def test_a_relay_process_answers_what_it_can_not_do() -> None:
    command = [sys.executable, "-m", "isthmus", "relay", "127.0.0.1:0", "127.0.0.1:1", "--control", "--json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert "ready" in json.loads(process.stdout.readline())
        process.stdin.write("shape -5 1 1\nshape 5 1 1\n")
        process.stdin.close()  # it goes on without anyone to tell it anything
        told = [json.loads(process.stdout.readline()) for _ in range(2)]
        assert told[0]["error"]["code"] == "bad_setting"
        assert told[1]["shape"]["rtt_ms"] == 5
        assert process.poll() is None
        process.terminate()
        assert process.wait(20) == 0

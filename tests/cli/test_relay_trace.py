"""Recorded links in Mahimahi's format: read strictly, paced in real time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from isthmus.protocol.errors import ConfigError
from isthmus.relay import Trace
from isthmus.relay.trace import TracePacer
from tests.cli.relaying import client, echoed, relayed


def write(tmp_path: Path, up: str, down: str) -> Path:
    (tmp_path / "road.up").write_text(up)
    (tmp_path / "road.down").write_text(down)
    return tmp_path / "road"


def test_a_trace_is_two_files(tmp_path: Path) -> None:
    assert Trace.load(write(tmp_path, "0\n5\n5\n20\n", "7\n\n9")) == Trace((0, 5, 5, 20), (7, 9))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no ms"),
        ("0\n0\n", "0 ms"),
        ("5\n4\n", "line 2: 4 ms comes after 5 ms"),
        ("5\nx\n", "line 2: b'x' is not a time"),
        ("-5\n", "line 1"),
        ("1.5\n", "line 1"),
        ("5\n99999999999999999999\n", "line 2"),
        ("5\n86400001\n", "line 2"),
    ],
)
def test_what_is_no_trace_names_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        Trace.load(write(tmp_path, "1\n", text))
    assert raised.value.code == "bad_trace"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"road\.up"):
        Trace.load(tmp_path / "road")


def passed(line: TracePacer, now: float, size: int) -> list[tuple[int, int]]:
    """What passes, with times in whole ms."""
    return [(round(due * 1000), part) for due, part in line.pass_on(now, size)]


def test_packets_pass_at_their_times_and_the_trace_repeats() -> None:
    line = TracePacer((10, 10, 30, 100), origin=5.0)
    # Two packets at 10 ms, one at 30, one at 100; the next round begins there.
    assert passed(line, 5.0, 4500) == [(5010, 3000), (5030, 1500)]
    assert passed(line, 5.0, 1600) == [(5100, 1500), (5110, 100)]
    assert passed(line, 5.105, 1500) == [(5110, 1500)], "1400 left there, and the second packet"
    assert passed(line, 5.950, 100) == [(6000, 100)], "what found nothing to carry is lost"


def test_the_trace_s_own_rate_is_kept_over_many_rounds() -> None:
    line = TracePacer((2, 4, 6, 8, 10), origin=0.0)
    entries = [entry for step in range(100) for entry in line.pass_on(step * 0.001, 3000)]
    assert sum(size for _, size in entries) == 300_000
    assert entries[-1][0] == pytest.approx(200 * 0.002, abs=0.003)
    assert entries == sorted(entries)


async def test_bytes_are_paced_in_real_time(tmp_path: Path) -> None:
    # 1,500 bytes every 10 ms up (1.2 Mbit/s), plenty down.
    trace = Trace.load(write(tmp_path, "10\n20\n30\n40\n", "1\n" * 100))
    async with relayed(trace=trace) as relay, client(relay) as streams:
        started = time.perf_counter()
        data = bytes(range(250)) * 240  # 60,000 bytes: 40 packets, 0.4 s
        assert await echoed(streams, data) == data
        assert 0.37 <= time.perf_counter() - started < 3

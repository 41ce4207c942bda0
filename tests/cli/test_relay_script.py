"""Fault scripts: what they may say, that they play as written, and alike for the same seed."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import isthmus.relay.script
from isthmus.protocol.errors import ConfigError, IsthmusError
from isthmus.relay import Cut, Fault, FaultScript, HalfOpen, Refuse, Slice, Stall
from isthmus.relay.faults import Faults
from tests.cli.relaying import client, echoed, read_to_end, relayed
from tests.processes import run


def test_the_examples_of_the_documentation_are_understood() -> None:
    text = isthmus.relay.script.__doc__ or ""
    lines = [line.strip() for line in text.split("\n") if line[:4].isspace() and line[4:5].isalpha()]
    rules = [FaultScript.parse(line.partition("   ")[0]).rules for line in lines]
    assert len(rules) == 6
    assert all(len(one) == 1 for one in rules)


@pytest.mark.parametrize(
    "line",
    [
        "cut",
        "after 2",
        "after -1: cut",
        "after 1e9: cut",
        "after 99999999: cut",
        "after nan: cut",
        "soon: cut",
        "every 0: cut",
        "every 8..3: cut",
        "every 0..3: cut",
        "at byte up: cut",
        "at byte 5 sideways: cut",
        "at byte 5.5 up: cut",
        "at message 0 down: cut",
        "at message 3 both: cut",
        "at message 3: cut",
        "at byte 3 up of connection x: cut",
        "after 1: explode",
        "after 1: stall",
        "after 1: stall 99999999",
        "after 1: half-open left",
        "after 1: slice -1",
        "after 1: refuse",
        "after 1: one of cut, explode",
        "after 1: one of",
        "after 1: cut, stall 2",
    ],
)
def test_a_bad_line_is_named_by_its_number(line: str) -> None:
    with pytest.raises(ConfigError, match=r"^faults\.txt line 3: ") as raised:
        FaultScript.parse(f"after 1: cut\n\n{line}  # comment\n", name="faults.txt")
    assert raised.value.code == "bad_faults"
    assert raised.value.hint


def test_a_bad_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.txt"):
        FaultScript.load(tmp_path / "none.txt")
    binary = tmp_path / "binary"
    binary.write_bytes(b"after 1: \xff")
    with pytest.raises(ConfigError, match="binary"):
        FaultScript.load(binary)
    long = tmp_path / "long"
    long.write_text("# x\n" * 300_000)
    with pytest.raises(ConfigError, match="longer"):
        FaultScript.load(long)


@given(st.text(max_size=80))
def test_any_text_is_a_script_or_a_typed_error(text: str) -> None:
    code = "bad_faults"
    try:
        FaultScript.parse(text)
    except IsthmusError as error:
        code = error.code
    assert code == "bad_faults"


async def _played(text: str, seed: int, seconds: float) -> list[Fault]:
    faults = Faults(lambda _seconds: None)
    task = asyncio.create_task(FaultScript.parse(text).play(faults, seed))
    await asyncio.sleep(seconds)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return [one.fault for one in faults.happened]


async def test_the_same_seed_draws_the_same_faults() -> None:
    text = "every 0.01..0.03: one of cut, stall 1..2 up, half-open down, slice 1..9, refuse 0.5\n"
    first = await _played(text, 7, 0.6)
    again = await _played(text, 7, 0.3)
    other = await _played(text, 8, 0.3)
    assert len(first) > len(again) / 2 > 2
    shared = min(len(first), len(again))
    assert first[:shared] == again[:shared]
    assert other[:shared] != again[: len(other)][:shared]
    assert {type(one) for one in first} == {Cut, Stall, HalfOpen, Slice, Refuse}
    # A second rule changes nothing about what the first one draws.
    more = await _played(text + "every 10: cut", 7, 0.3)
    shared = min(len(first), len(more))
    assert more[:shared] == first[:shared]


async def test_a_script_plays_on_a_relay() -> None:
    script = FaultScript.parse(
        "after 0: slice 3\nat byte 5 up: stall 0.2\nat byte 8..8 up: cut\nat byte 2 up of connection 2: cut\n"
    )
    async with relayed(script=script) as relay:
        await asyncio.sleep(0.05)
        async with client(relay) as (reader, writer):
            writer.write(b"0123456789")
            got, reset = await read_to_end(reader)
            assert reset
            assert b"01234567".startswith(got)
        async with client(relay) as (reader, writer):
            writer.write(b"ab")
            assert (await read_to_end(reader))[1]
        async with client(relay) as streams:
            assert await echoed(streams, b"0123456789") == b"0123456789"
        assert [one.fault for one in relay.faults.happened] == [Slice(3), Stall(0.2), Cut(), Cut()]
        assert relay.faults.happened[2].at_s - relay.faults.happened[1].at_s >= 0.15
        assert [one.connection for one in relay.faults.happened] == [None, 1, 1, 2]


@pytest.mark.processes
def test_the_command_plays_a_script_on_a_recorded_link(tmp_path: Path) -> None:
    (tmp_path / "faults").write_text("at byte 5 up: cut\n")
    for direction in ("up", "down"):
        (tmp_path / f"road.{direction}").write_text("1\n2\n")
    with socket.create_server(("127.0.0.1", 0)) as target:
        address = f"127.0.0.1:{target.getsockname()[1]}"
        command = [sys.executable, "-m", "isthmus", "relay", "127.0.0.1:0", address, "--json"]
        command += ["--faults", str(tmp_path / "faults"), "--trace", str(tmp_path / "road"), "--seed", "3"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            port = int(json.loads(process.stdout.readline())["url"].rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port), timeout=30) as near:
                far, _ = target.accept()
                with far:
                    near.sendall(b"0123456789")
                    far.settimeout(10)
                    assert far.recv(5, socket.MSG_WAITALL) == b"01234"
                    with pytest.raises(ConnectionResetError):
                        far.recv(1)
            process.send_signal(signal.SIGTERM)
            _, told = process.communicate(timeout=30)
            assert "Cut() connection 1" in told
            assert process.returncode == 0


@pytest.mark.parametrize("flag", ["--faults", "--trace"])
def test_the_command_refuses_a_bad_file(tmp_path: Path, flag: str) -> None:
    done = run("relay", "127.0.0.1:0", "127.0.0.1:1", flag, str(tmp_path / "none"), "--json")
    assert done.returncode == 2
    assert "none" in json.loads(done.stdout)["error"]["message"]

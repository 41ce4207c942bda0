"""The record of decisions: exact, bounded, without content, and never in a request's way."""

from __future__ import annotations

import json
import logging
import math
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.edge.calibration import Residuals
from isthmus.edge.constraints import RouterInputs
from isthmus.edge.decision_log import DecisionLog, Entry, profile_sha, read_log
from isthmus.edge.policy import DeviceState, Policy
from isthmus.edge.requests import Decision, Slo
from isthmus.edge.router import decide
from isthmus.protocol.errors import ConfigError
from isthmus.splitter.situation import Work, World
from tests.splitter.worlds import CLOUD, EDGE, NUM_LAYERS, make_world, worlds


def make_inputs(**changes: Any) -> RouterInputs:
    fields: dict[str, Any] = {
        "num_layers": NUM_LAYERS, "layer_bytes": (1000,) * NUM_LAYERS, "embed_bytes": 500, "head_bytes": 500,
        "kv_bytes": 10, "tokens": 60, "cloud_state": "up", "cloud_context": 4096, "world": make_world(),
        "work": Work(40, 12.25, 20, {2: 7}, {0: 3}), "slo": Slo(0.1, 20.0), "pinned": ("split", 2, "prefix"),
        "residuals": Residuals(ttft=(("local", (-0.1, 0.3)),)), "policy": Policy(usd_per_s=1 / 3),
        "device": DeviceState(0.1 + 0.2, plugged=False), "budget_left_usd": math.inf,
    }  # fmt: skip
    return RouterInputs(**{**fields, **changes})


def logged(path: Path, *several: RouterInputs) -> list[Entry]:
    log = DecisionLog(path)
    for i, inputs in enumerate(several):
        log.append(f"req-{i}", inputs, decide(inputs), 1.7e9 + i / 3)
    log.close()
    return list(read_log(path))


def test_inputs_and_decisions_read_back_exactly(tmp_path: Path) -> None:
    several = (make_inputs(), make_inputs(world=None, work=None), make_inputs(world=make_world(cloud=None)))
    entries = logged(tmp_path / "log", *several)
    assert [entry.inputs for entry in entries] == list(several)
    assert [entry.request_id for entry in entries] == ["req-0", "req-1", "req-2"]
    assert [entry.when for entry in entries] == [1.7e9, 1.7e9 + 1 / 3, 1.7e9 + 2 / 3]
    for entry, inputs in zip(entries, several, strict=True):
        assert entry.decision == json.loads(json.dumps(decide(inputs).to_dict()))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(worlds, st.floats(1, 1000), st.floats(0, 1) | st.just(math.nan))
def test_any_world_reads_back(tmp_path: Path, world: World, tokens: float, battery: float) -> None:
    path = tmp_path / "log"
    path.unlink(missing_ok=True)
    inputs = make_inputs(world=world, work=Work(40, tokens, 1000), device=DeviceState(battery))
    (entry,) = logged(path, inputs)
    assert repr(entry.inputs) == repr(inputs)  # NaN is not equal to itself


def test_a_profile_is_written_once_per_file(tmp_path: Path) -> None:
    logged(tmp_path / "log", make_inputs(), make_inputs(tokens=61))
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["sha"] for line in lines if "profile" in line] == [profile_sha(EDGE), profile_sha(CLOUD)]
    assert len(lines) == 4
    logged(tmp_path / "log", make_inputs())  # another process goes on with the file
    assert len(list(read_log(tmp_path / "log"))) == 3


def test_many_connections_bring_many_profiles(tmp_path: Path) -> None:
    clouds = [CLOUD.model_copy(update={"device": f"cloud {i}"}) for i in range(20)]
    entries = logged(tmp_path / "log", *(make_inputs(world=make_world(cloud=cloud)) for cloud in clouds))
    assert [entry.inputs.world.cloud for entry in entries if entry.inputs.world] == clouds


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    logged(tmp_path / "log", make_inputs())
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600


def test_rotates_and_keeps_one_older_file(tmp_path: Path) -> None:
    path, inputs = tmp_path / "log", make_inputs()
    log = DecisionLog(path, max_bytes=40_000)
    for i in range(40):
        log.append(f"req-{i}", inputs, decide(inputs), float(i))
    log.close()
    old, new = list(read_log(tmp_path / "log.1")), list(read_log(path))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log", "log.1"]
    assert max(path.stat().st_size, (tmp_path / "log.1").stat().st_size) <= 40_000
    assert [e.when for e in old + new] == [float(i) for i in range(40 - len(old + new), 40)]
    assert all(entry.inputs == inputs for entry in old + new)


@pytest.mark.parametrize("path", ["/dev/full", "."])
def test_a_log_that_cannot_be_written_is_told_of_once(path: str, caplog: pytest.LogCaptureFixture) -> None:
    if path == "/dev/full" and not Path(path).exists():
        pytest.skip("this system has no /dev/full")
    log, inputs = DecisionLog(Path(path)), make_inputs()
    with caplog.at_level(logging.ERROR, logger="isthmus.edge"):
        log.append("req-0", inputs, decide(inputs), 0.0)
        log.append("req-1", inputs, decide(inputs), 1.0)
    assert len(caplog.records) == 1
    assert "off from now on" in caplog.text


def good_lines(tmp_path: Path) -> list[str]:
    logged(tmp_path / "good", make_inputs())
    return (tmp_path / "good").read_text().splitlines()


def changed(line: str, **changes: Any) -> str:
    return json.dumps({**json.loads(line), **changes})


@pytest.mark.parametrize(
    ("at", "broken"),
    [
        (1, lambda lines: [lines[0][:-5], *lines[1:]]),
        (1, lambda lines: ["[]", *lines[1:]]),
        (1, lambda lines: [changed(lines[0], sha="0" * 64), *lines[1:]]),
        (1, lambda lines: [changed(lines[0], profile={}), *lines[1:]]),
        (2, lambda lines: [lines[0], lines[2]]),
        (3, lambda lines: [*lines[:2], lines[2][:200]]),
        (3, lambda lines: [*lines[:2], changed(lines[2], inputs={"world": None})]),
        (3, lambda lines: [*lines[:2], changed(lines[2], inputs={"world": 3})]),
        (3, lambda lines: [*lines[:2], changed(lines[2], when="today")]),
        (3, lambda lines: [*lines[:2], changed(lines[2], decision=3)]),
        (3, lambda lines: [*lines[:2], lines[2].replace('"usd_per_s":0.3', '"usd_per_s":-0.3')]),
        (3, lambda lines: [*lines[:2], "[" * 100_000]),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, at: int, broken: Any) -> None:
    (tmp_path / "bad").write_text("\n".join(broken(good_lines(tmp_path))) + "\n")
    with pytest.raises(ConfigError, match=f"bad line {at} is no logged decision") as caught:
        list(read_log(tmp_path / "bad"))
    assert caught.value.code == "bad_log"


def test_no_log_at_all(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\n")
    for name in ("none", "bytes"):
        with pytest.raises(ConfigError, match="cannot read the decision log") as caught:
            list(read_log(tmp_path / name))
        assert caught.value.code == "bad_log"


def test_the_decision_is_the_callers(tmp_path: Path) -> None:
    """What is compared later is what was taken, not what the log would have taken."""
    log, inputs = DecisionLog(tmp_path / "log"), make_inputs()
    taken = replace(decide(inputs), reason="because")
    log.append("req-0", inputs, taken, 0.0)
    (entry,) = read_log(tmp_path / "log")
    log.close()
    assert entry.decision["reason"] == "because"
    assert isinstance(taken, Decision)

"""A log of decisions, decided again; and the command that does it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from isthmus.bench.router_overhead import bench_router_overhead
from isthmus.bench.router_replay import bench_router_replay
from isthmus.cli import app
from isthmus.edge.decision_log import DecisionLog
from isthmus.edge.policy import DeviceState
from isthmus.edge.requests import Decision
from isthmus.edge.router import decide
from isthmus.protocol.errors import ConfigError
from isthmus.splitter.situation import Work, World
from tests.edge.test_edge_decision_log import make_inputs
from tests.splitter.worlds import make_world, worlds


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.lists(worlds, min_size=1, max_size=4), st.floats(1, 500), st.floats(0, 1) | st.just(math.nan))
def test_what_was_decided_is_decided_again(
    tmp_path: Path, seen: list[World], tokens: float, battery: float
) -> None:
    path = tmp_path / "log"
    path.unlink(missing_ok=True)
    log = DecisionLog(path)
    for world in seen:
        inputs = make_inputs(world=world, work=Work(40, tokens, 500), device=DeviceState(battery))
        log.append("req", inputs, decide(inputs), 0.0)
    log.close()
    report = bench_router_replay(path)
    assert report.figures == {"decisions": len(seen), "identical": len(seen), "different": 0}
    assert report.rows == []


def test_a_decision_that_comes_out_otherwise_is_told_with_both_values(tmp_path: Path) -> None:
    log, inputs = DecisionLog(tmp_path / "log"), make_inputs()
    decision = decide(inputs)
    first = replace(decision.candidates[0], total_s=math.nan)
    others: list[Decision] = [
        decision,
        replace(decision, split=decision.split + 1),
        replace(decision, candidates=(first, *decision.candidates[1:])),
        replace(decision, candidates=decision.candidates[1:]),
        replace(decision, basis={**decision.basis, "weather": "fair"}),
    ]
    for i, other in enumerate(others):
        log.append(f"req-{i}", inputs, other, float(i))
    impossible = make_inputs(route="offload", cloud_state="down")
    log.append("req-5", impossible, decision, 5.0)
    log.close()
    report = bench_router_replay(tmp_path / "log")
    assert report.figures == {"decisions": 6, "identical": 1, "different": 5}
    told = [row["differs"] for row in report.rows]
    assert told[0] == f"decision.split: {decision.split + 1} in the log, {decision.split} now"
    assert told[1].startswith("decision.candidates[0].total_s: nan in the log, ")
    assert told[2] == "decision.candidates: 4 in the log, 5 now"
    assert told[3] == "decision.basis.weather: only in the log"
    assert told[4].startswith("no route now: ")
    assert (report.rows[0]["request_id"], report.rows[0]["when"]) == (
        "req-1",
        "1970-01-01T00:00:01.000+00:00",
    )


def test_the_world_counts(tmp_path: Path) -> None:
    """Inputs that were not those of the decision come out otherwise: the log is no copy of itself."""
    log = DecisionLog(tmp_path / "log")
    log.append("req", make_inputs(kv_bytes=11, world=make_world(kv_bytes=2000)), decide(make_inputs()), 0.0)
    log.close()
    assert bench_router_replay(tmp_path / "log").figures["different"] == 1


# ---- the command -----------------------------------------------------------------------------------


def test_the_command_fails_where_a_decision_differs(tmp_path: Path) -> None:
    path, inputs = tmp_path / "log", make_inputs()
    decision = decide(inputs)
    log = DecisionLog(path)
    log.append("req-0", inputs, decision, 0.0)
    same = CliRunner().invoke(app, ["bench", "router", "--replay", str(path), "--json"])
    log.append("req-1", inputs, replace(decision, reason="because"), 1.0)
    other = CliRunner().invoke(app, ["bench", "router", "--replay", str(path), "--json"])
    log.close()
    assert (same.exit_code, other.exit_code) == (0, 1)
    assert json.loads(same.stdout)["figures"] == {"decisions": 1, "identical": 1, "different": 0}
    assert json.loads(other.stdout)["rows"][0]["request_id"] == "req-1"


def test_overhead_times_both_on_requests_that_go_everywhere() -> None:
    report = bench_router_overhead(num_decisions=60)
    figures = report.figures
    assert 0 < figures["argmin_us"] < figures["decision_us"] <= figures["decision_p99_us"]
    assert sum(row["decisions"] for row in report.rows) == 60
    assert all(row["decisions"] for row in report.rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to measure was named"),
        (["--requests", "a.csv"], "nothing to measure was named"),
        (["--live", "--overhead"], "--live and --overhead do not go together"),
        (["--overhead", "--replay", "log"], "--overhead and --replay do not go together"),
        (["--overhead", "--network", "lte"], "--network: no meaning with --overhead"),
        (["--replay", "log", "--seed", "1"], "--seed: no meaning with --replay"),
        (["--live", "--scenario", "x", "--record"], "--record, --scenario: no meaning with --live"),
        (["--requests", "a.csv", "--network", "lte", "--threads", "2"], "--threads: no meaning in a sim"),
    ],
)
def test_flags_that_mean_nothing_are_refused(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["bench", "router", *options])
    assert isinstance(done.exception, ConfigError)
    assert message in done.exception.message

"""`bench router --requests --network`: policies judged, figures, and odd input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tests.bench.router_recorded as made
from isthmus.bench.router_baselines import Constant, Oracle, Run, best_threshold, play
from isthmus.bench.router_learner import ABLATIONS, Learner
from isthmus.bench.router_requests import draw_requests
from isthmus.bench.router_scenarios import SCENARIOS
from isthmus.bench.router_sim import SimOptions, bench_router_sim, interval
from isthmus.bench.router_world import Costs, SimWorld, State
from isthmus.bench.workload import TraceRequest
from isthmus.protocol.errors import ConfigError, IsthmusError, RouteInfeasibleError
from tests.bench.router_recorded import BY_NAME, LINK, MAX_TOKENS, RECORDINGS, world_of


@pytest.fixture
def options(tmp_path: Path) -> SimOptions:
    """All that a run reads, in files."""
    (tmp_path / "requests.csv").write_text(made.csv_of(made.requests(120)))
    for name, times in (("up", LINK.up), ("down", LINK.down)):
        (tmp_path / f"link.{name}").write_text("\n".join(map(str, times)) + "\n")
    RECORDINGS.save(tmp_path / "recordings.json")
    return SimOptions(
        tmp_path / "requests.csv", tmp_path / "link", "small",
        num_requests=40, max_tokens=MAX_TOKENS, recordings=tmp_path / "recordings.json",
    )  # fmt: skip


def test_the_router_beats_chance_and_stays_near_the_oracle() -> None:
    world = world_of(num=250)
    runs = {
        "causal": play(world, Oracle(world, hindsight=False), connected=True),
        "hindsight": play(world, Oracle(world, hindsight=True), connected=True),
        "router": play(world, Learner(world), connected=True),
        "local": play(world, Constant(world, world.num_layers)),
        "offload": play(world, Constant(world, 0)),
    }
    cost = {name: run.total_cost for name, run in runs.items()}
    assert cost["hindsight"] <= min(cost["causal"], cost["router"])
    assert cost["router"] < 1.08 * cost["causal"]
    assert cost["router"] < min(cost["local"], cost["offload"])
    assert not runs["router"].infeasible.any()
    assert len(set(runs["router"].cut.tolist())) > 1


@pytest.mark.parametrize("scenario", [scenario.name for scenario in SCENARIOS])
def test_no_scenario_makes_the_router_do_what_it_must_not(scenario: str) -> None:
    world = world_of(scenario)
    for chooser in (Learner(world), *(Learner(world, ablation) for ablation in ABLATIONS)):
        run = play(world, chooser, connected=True)
        assert not run.infeasible.any()
        assert np.all(np.isfinite(run.cost))


def test_the_router_is_deterministic_and_ablations_differ_from_it() -> None:
    world = world_of("jetson_lte", num=150)
    router = play(world, Learner(world), connected=True)
    assert np.array_equal(router.cost, play(world, Learner(world), connected=True).cost)
    for name in ("no_calibration", "stale_link"):
        ablation = next(a for a in ABLATIONS if a.name == name)
        assert not np.array_equal(router.cost, play(world, Learner(world, ablation), connected=True).cost)


class Reckless:
    """Offloads whatever it is told."""

    probed = (1000.0, 0.0)

    def choose(self, i: int, state: State) -> int:
        return 0

    def served(self, i: int, cut: int, costs: Costs) -> None:
        assert costs.total_s[cut] > 0


def test_what_breaks_a_constraint_is_counted_and_probes_are_charged() -> None:
    world = world_of("jetson_lte")
    run = play(world, Reckless())
    private = np.array([request.privacy != "any" for request in world.requests])
    assert np.array_equal(run.infeasible, private)
    offload = play(world, Constant(world, 0))
    served_by_both = ~private
    more = (run.usd - offload.usd)[served_by_both]
    assert more == pytest.approx(np.full(len(more), 1000 * world.scenario.radio.usd_per_byte))


def test_a_constant_that_cannot_be_falls_back_and_says_so() -> None:
    world = world_of("edge_too_small")
    run = play(world, Constant(world, world.num_layers))
    served = np.array([world.servable(i) for i in range(len(world.requests))])
    assert served.any()
    assert np.array_equal(run.fell_back, served)
    assert not run.infeasible.any()
    private = np.array([request.privacy != "any" for request in world.requests])
    assert np.array_equal(run.cut == 0, ~private)
    assert np.array_equal(run.cut < 0, ~served)
    assert not run.cost[~served].any()


def test_what_nothing_may_serve_the_router_refuses() -> None:
    world = world_of(replace(BY_NAME["edge_too_small"], local_only=1.0), num=3)
    with pytest.raises(RouteInfeasibleError, match="memory"):
        Learner(world).choose(0, State(connected=True))


def test_a_threshold_is_no_worse_than_the_worse_constant() -> None:
    world = world_of()
    name, run = best_threshold(world, world.num_layers)
    constants = [play(world, Constant(world, cut)).total_cost for cut in (0, world.num_layers)]
    assert run.total_cost <= max(constants)
    assert name.endswith("tokens")


def test_an_interval_holds_the_regret() -> None:
    world = world_of(num=150)
    oracle = play(world, Oracle(world, hindsight=True), connected=True)
    run: Run = play(world, Constant(world, 0))
    low, high = interval(run, oracle)
    assert low < run.total_cost / oracle.total_cost - 1 < high
    assert interval(oracle, oracle) == (0.0, 0.0)


def test_a_report_has_every_policy_in_every_scenario(options: SimOptions) -> None:
    told: list[str] = []
    report = bench_router_sim(options, lambda what, share: told.append(what))
    names = {scenario.name for scenario in SCENARIOS}
    assert {row["scenario"] for row in report.rows} == names
    rows = [row for row in report.rows if "policy" in row]
    assert len(rows) == 11 * len(names)
    for name in names:
        assert report.figures[f"regret_hindsight_{name}"] >= -0.05
    assert report.figures["infeasible_picks"] == 0
    assert report.figures["regret_causal_worst"] == max(
        report.figures[f"regret_causal_{name}"] for name in names
    )
    router = next(r for r in rows if r["policy"] == "router")
    assert router["local"] + router["split"] + router["offload"] == pytest.approx(1.0)
    assert router["regret_causal_low"] <= router["regret_causal"] <= router["regret_causal_high"]
    assert "serving tight_slo" in told
    again = bench_router_sim(options)
    assert again.to_dict() == report.to_dict()


def test_one_scenario_and_an_unknown_one(options: SimOptions) -> None:
    report = bench_router_sim(replace(options, scenarios=("tight_slo",)))
    assert {row["scenario"] for row in report.rows} == {"tight_slo"}
    with pytest.raises(ConfigError, match="no scenario 'mars'") as error:
        bench_router_sim(replace(options, scenarios=("mars",)))
    assert error.value.code == "unknown_scenario"


@pytest.mark.parametrize("num_lines", [1, 2])
def test_a_trace_of_a_line_or_two_is_served(options: SimOptions, num_lines: int) -> None:
    options.requests.write_text(made.csv_of(made.requests(num_lines)))
    report = bench_router_sim(replace(options, scenarios=("jetson_lte",)))
    assert report.rows[0]["num_requests"] == num_lines


def test_all_requests_at_one_instant_are_spread_out() -> None:
    trace = [TraceRequest(0.0, 50, 5)] * 4
    scenario = BY_NAME["laptop_plugged"]
    requests, _ = draw_requests(trace, trace, scenario, max_context=512, max_tokens=64, seed=0)
    assert [r.start_s for r in requests] == [i * scenario.gap_s for i in range(4)]
    world = SimWorld(scenario, RECORDINGS, requests, LINK, max_tokens=64, seed=0)
    assert play(world, Learner(world), connected=True).total_cost > 0


def test_an_empty_trace_is_refused(options: SimOptions) -> None:
    options.requests.write_text(made.csv_of([]))
    with pytest.raises(ConfigError, match="holds no request") as error:
        bench_router_sim(options)
    assert error.value.code == "bad_trace"
    Path(f"{options.network}.up").write_text("")
    options.requests.write_text(made.csv_of(made.requests(3)))
    with pytest.raises(IsthmusError) as broken:
        bench_router_sim(options)
    assert broken.value.code == "bad_trace"

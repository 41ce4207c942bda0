"""`bench router --live`: what it asks, how it scores, and one small run of it all; how fast is no matter."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest

from isthmus.bench.live_agent import LiveAgent, Resident
from isthmus.bench.live_plan import (
    KINDS,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    draw_lengths,
    draw_phases,
    trace_lengths,
)
from isthmus.bench.live_score import Outcome, Ran, figures, policy_shares, rows
from isthmus.bench.router_live import LiveOptions, bench_router_live
from isthmus.bench.workload import TraceRequest
from isthmus.protocol.errors import RouteInfeasibleError
from isthmus.splitter.profiling import measure_edge
from tests.edge.edge_world import TinyModel, ask, make_model, prompt_of


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("live"))


# ---- what is asked -----------------------------------------------------------------------------------


def test_phases_are_drawn_from_the_seed_and_hold_every_request_once() -> None:
    lengths = draw_lengths(150, context=8192, seed=3)
    phases = draw_phases(lengths, 10, seed=3)
    assert [one for phase in phases for one in phase.requests] == lengths
    assert phases == draw_phases(lengths, 10, seed=3)
    assert phases != draw_phases(lengths, 10, seed=4)
    assert len(phases) == 15
    counts = Counter(phase.condition.kind for phase in phases)
    assert set(counts) == set(KINDS)
    assert min(counts.values()) >= 3
    rtts = [phase.condition.link.rtt_ms for phase in phases]
    assert 5 <= min(rtts) < 9 < 40 < max(rtts) <= 150
    for phase in phases:
        kind, link = KINDS[phase.condition.kind], phase.condition.link
        assert kind.mbps.low <= link.up_mbps <= kind.mbps.high
        assert kind.mbps.low <= link.down_mbps <= kind.mbps.high
        assert (phase.condition.throttle, phase.condition.capped) == (kind.throttle, kind.capped)


@pytest.mark.parametrize("count", [1, 3, 4, 9, 20])
def test_short_runs_have_every_kind_of_condition(count: int) -> None:
    phases = draw_phases(draw_lengths(count, context=512, seed=0), 10, seed=0)
    assert sum(len(phase.requests) for phase in phases) == count
    assert len({phase.condition.kind for phase in phases}) == min(count, len(KINDS))


@pytest.mark.parametrize("context", [128, 512, 8192])
def test_lengths_fit_the_context(context: int) -> None:
    for one in draw_lengths(300, context=context, seed=1):
        assert PROMPT_TOKENS[0] <= one.prompt_tokens <= PROMPT_TOKENS[1]
        assert OUTPUT_TOKENS[0] <= one.output_tokens <= OUTPUT_TOKENS[1]
        assert one.prompt_tokens + one.output_tokens <= context


def test_a_trace_s_lengths_are_scaled_and_cut() -> None:
    trace = [TraceRequest(0.0, 2 * n, n) for n in range(1, 101)]  # 95th percentiles: 190 and 95
    drawn = trace_lengths(trace, 400, context=8192, seed=1)
    assert drawn == trace_lengths(trace, 400, context=8192, seed=1)
    assert max(one.prompt_tokens for one in drawn) == 512
    assert min(one.output_tokens for one in drawn) == 8
    # The trace's own relation: prompt = 2 × output before scaling by 512/190 and 96/95.
    middle = [one for one in drawn if 20 < one.output_tokens < 90]
    assert all(math.isclose(one.prompt_tokens, 5.33 * one.output_tokens, rel_tol=0.08) for one in middle)


# ---- how it is scored --------------------------------------------------------------------------------


def outcome(chosen: Ran, *others: Ran, kind: str = "idle_edge") -> Outcome:
    return Outcome(0, kind, kind == "idle_edge", 10, 10, chosen, others)


LOCAL, OFFLOAD = Ran("local", 4, 1.0, 1.0), Ran("offload", 0, 3.0, 2.0)
SPLIT, FIXED = Ran("split", 3, 1.0, 2.5), Ran("split", 2, 2.0, 4.0, fixed=True)


def test_figures_by_hand() -> None:
    outcomes = [
        outcome(LOCAL, OFFLOAD, SPLIT, FIXED),  # right
        outcome(OFFLOAD, LOCAL, SPLIT, FIXED),  # wrong, and predicted 50 % too high
        outcome(SPLIT, OFFLOAD, FIXED, kind="small_near"),  # local does not fit; 2.5 against 2.0 is wrong
        outcome(Ran("offload", 0, 2.0, 2.2), Ran("split", 3, 1.0, 2.0), FIXED, kind="small_near"),
    ]
    found = figures(outcomes)  # errors count from the third on: 1.5/2.5 and 0.2/2.2
    assert found["median_abs_error"] == pytest.approx((0.6 + 0.2 / 2.2) / 2)
    assert found["fastest_within_10pct"] == 0.5, "the last is exactly 10 % slower: as good"
    assert found["share_best_local"] == 0.5
    assert found["share_best_offload"] == found["share_best_split"] == 0.25
    assert found["total_over_fastest"] == pytest.approx((1.0 + 2.0 + 2.5 + 2.2) / (1.0 + 1.0 + 2.0 + 2.0))
    assert found["median_abs_error_split"] == pytest.approx(0.5)  # of 0.6, 0.5, 0.5, 0.5
    assert "median_abs_error_local" not in found, "it was not run after the first half"
    shares = policy_shares(outcomes)
    assert shares == {
        "always_local": 1.0,  # where it does not fit it offloads: the fastest, or as good, both times
        "always_offload": 0.5,
        "always_split": 0.0,
        "always_best_split": 0.25,
    }
    assert found["best_constant_policy"] == 1.0


def test_rows_hold_classes_and_every_request() -> None:
    made = rows([outcome(LOCAL, OFFLOAD), outcome(SPLIT, OFFLOAD, FIXED, kind="small_near")])
    classes = {row["class"]: row for row in made if row["what"] == "class"}
    assert classes.keys() == {"all", "idle_edge", "first_after_change", "small_near", "later"}
    assert classes["first_after_change"]["chosen_local"] == classes["later"]["chosen_split"] == 1
    assert classes["all"]["chosen_local"] == classes["all"]["chosen_split"] == 1
    assert classes["idle_edge"]["fastest_within_10pct"] == 1.0
    assert classes["small_near"]["fastest_offload"] == 1
    requests = [row for row in made if row["what"] == "request"]
    assert [row["chosen"] for row in requests] == ["local", "split 3"]
    assert requests[1]["fixed_split_observed_s"] == 4.0
    assert "local_observed_s" not in requests[1]


# ---- the edges ---------------------------------------------------------------------------------------


async def test_blocks_and_memory_are_set_between_requests(tiny: TinyModel) -> None:
    agent = LiveAgent(tiny.pack)
    await agent.start()
    try:
        for resident in (Resident(2, head=False), Resident(4, head=True), Resident(0, head=False)):
            await agent.settle(resident)
            assert agent.resident == resident
        run = await agent.run(ask(prompt_of(5), 3))
        assert run.decision.route == "local"
        assert run.total_s > 0
        agent.limit_memory(1)
        with pytest.raises(RouteInfeasibleError, match="the limit is 0"):
            agent.decide(ask(prompt_of(5), 3))
    finally:
        await agent.aclose()


@pytest.mark.processes
def test_a_small_run_of_it_all(tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    profile = measure_edge(tiny.pack, quick=True)
    # A seed whose links are near and whose answers are short.
    options = LiveOptions(
        str(tiny.checkpoint), num_requests=4, seed=2804, precision="fp32", profile=profile, pause_s=0.1
    )
    told: list[str] = []
    report = bench_router_live(tiny.pack, options, lambda label, share: told.append(label))
    result = report.to_dict()
    assert result["bench"] == "router"
    wanted = {"median_abs_error", "fastest_within_10pct", "best_constant_policy"}
    assert wanted | {"share_best_local", "share_best_split", "share_best_offload"} <= result["figures"].keys()
    requests = [row for row in result["rows"] if row["what"] == "request"]
    assert len(requests) == 4
    for row in requests:
        capped = KINDS[row["class"]].capped
        assert ("local_observed_s" in row) == (not capped), "the cap, and only the cap, forbids local"
        assert row["offload_observed_s"] > 0
        assert row["fixed_split_observed_s"] >= row["output_tokens"] * 0.005, "a round trip per token"
        assert row["observed_s"] in [value for name, value in row.items() if name.endswith("_observed_s")]
    assert sum(row["what"] == "phase" for row in result["rows"]) == 4
    assert any("edge slowed 6 times (emulated)" in label for label in told)

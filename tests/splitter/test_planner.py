"""The planner: constraints with both numbers, objectives, ties, words; and what holds in every world."""

from __future__ import annotations

from dataclasses import replace
from math import inf, isfinite, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.protocol.errors import ConfigError, RouteInfeasibleError
from isthmus.protocol.profiles import Prices
from isthmus.splitter.links import Estimate, LinkView
from isthmus.splitter.planner import MIB, OBJECTIVES, Objective, Plan, PlanRequest, Weights, plan
from isthmus.splitter.situation import Shape, World
from tests.splitter.worlds import NUM_LAYERS, edge_profile, make_world, shapes, worlds

ASKED = PlanRequest(prompt_tokens=32, output_tokens=11)
NEAR = LinkView.given(rtt_s=0.001)


def broken(answer: Plan) -> dict[str, str | None]:
    return {way.name: way.violated for way in answer.candidates}


def test_every_way_is_a_candidate_in_order() -> None:
    answer = plan(make_world(), ASKED)
    ways = [(way.route, way.split, way.shape) for way in answer.candidates]
    assert ways == [
        ("local", 4, None), ("offload", 0, None),
        ("split", 1, "prefix"), ("split", 2, "prefix"), ("split", 3, "prefix"),
    ]  # fmt: skip
    assert all(way.feasible for way in answer.candidates)
    assert answer.require() is answer.best


# ---- constraints -------------------------------------------------------------------------------------


def test_memory_refuses_what_does_not_fit_with_both_numbers() -> None:
    # 4 + 4 × 10 + 2 + 1 MB and the KV of 43 tokens; K = 2 takes 25 MB and half of that.
    answer = plan(make_world(), replace(ASKED, edge_memory_bytes=26 * MIB))
    assert broken(answer) == {
        "local": "memory", "offload": None, "split at K = 1": None, "split at K = 2": None,
        "split at K = 3": "memory",
    }  # fmt: skip
    local = answer.candidates[0]
    assert local.detail == "needs 47.2 MB, the limit is 26.0 MB"
    assert local.prediction is not None  # answered all the same
    assert local.detail in answer.reason


def test_memory_counts_the_kv_of_the_asked_context() -> None:
    world = make_world(kv_bytes=10_000)
    limit = replace(ASKED, edge_memory_bytes=48 * MIB)
    assert plan(world, limit).candidates[0].violated == "memory"
    small = plan(make_world(), limit)
    assert small.candidates[0].feasible
    longer = plan(make_world(), replace(limit, context_tokens=2000))
    assert longer.candidates[0].violated == "memory"


def test_min_depth_keeps_layers_on_the_edge() -> None:
    answer = plan(make_world(), replace(ASKED, min_depth=2))
    assert broken(answer) == {
        "local": None, "offload": "depth", "split at K = 1": "depth", "split at K = 2": None,
        "split at K = 3": None,
    }  # fmt: skip
    assert answer.candidates[1].detail == "K = 0 is below the minimum depth 2"


def test_a_context_that_the_cloud_does_not_take() -> None:
    answer = plan(make_world(), replace(ASKED, cloud_context=42))
    assert answer.candidates[1].violated == "context"
    assert answer.candidates[1].detail == "43 tokens, the cloud allows 42"
    assert answer.require().route == "local"


def test_slos_are_constraints_here() -> None:
    answer = plan(make_world(), replace(ASKED, slo_ttft_s=0.1, slo_tokens_per_s=100.0))
    assert broken(answer)["local"] == "slo_ttft"
    assert broken(answer)["offload"] is None
    assert broken(answer)["split at K = 1"] == "slo_ttft"
    slow = plan(make_world(), replace(ASKED, slo_tokens_per_s=60.0))
    assert broken(slow)["local"] == "slo_tokens_per_s"
    assert slow.candidates[0].detail == "52 tokens/s, asked are 60"


def test_an_slo_is_held_against_the_bad_days_of_a_link() -> None:
    steady = LinkView.given(rtt_s=0.02)
    shaky = replace(steady, rtt=Estimate(0.02, deviation=0.02))
    offload_s = plan(make_world(link=steady), ASKED).candidates[1].prediction
    assert offload_s is not None
    asked = replace(ASKED, slo_ttft_s=offload_s.ttft_s + 0.01)
    assert plan(make_world(link=steady), asked).candidates[1].feasible
    late = plan(make_world(link=shaky), asked).candidates[1]
    assert late.violated == "slo_ttft"
    assert late.prediction == offload_s  # the figures stay the usual ones
    narrow = replace(steady, up=Estimate(1e4, deviation=1e4))
    assert plan(make_world(link=narrow), asked).candidates[1].violated == "slo_ttft"


def test_without_a_cloud_there_is_only_local() -> None:
    answer = plan(make_world(cloud=None), ASKED)
    assert answer.require().route == "local"
    for way in answer.candidates[1:]:
        assert (way.violated, way.prediction, way.objective) == ("cloud", None, None)
        assert way.to_dict()["total_s"] is None


def test_the_first_broken_constraint_is_named() -> None:
    everything = replace(
        ASKED, min_depth=2, cloud_context=1, edge_memory_bytes=1, objective="energy", slo_ttft_s=1e-6
    )
    world = make_world(edge=edge_profile(active_w=None))
    assert list(broken(plan(world, everything)).values()) == [
        "memory",
        "depth",
        "depth",
        "context",
        "context",
    ]
    loose = replace(everything, edge_memory_bytes=None)
    assert plan(world, loose).candidates[0].violated == "energy"
    assert plan(make_world(), loose).candidates[0].violated == "slo_ttft"


def test_no_feasible_way_says_what_each_broke() -> None:
    answer = plan(make_world(), replace(ASKED, min_depth=2, edge_memory_bytes=MIB))
    assert answer.best is None
    with pytest.raises(RouteInfeasibleError) as caught:
        answer.require()
    assert caught.value.code == "no_feasible_plan"
    assert caught.value.exit_code == 1
    assert caught.value.hint
    for part in (
        "local: needs 47.2 MB, the limit is 1.0 MB",
        "offload: K = 0 is below",
        "split at K = 1: K = 1",
    ):
        assert part in caught.value.message


@pytest.mark.parametrize("field", ["prompt_tokens", "output_tokens"])
def test_no_request_has_no_tokens(field: str) -> None:
    counts = {"prompt_tokens": 1, "output_tokens": 1, field: 0}
    with pytest.raises(ConfigError, match=f"{field} is 0"):
        PlanRequest(counts["prompt_tokens"], counts["output_tokens"])


# ---- objectives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_best_is_least_in_its_objective(objective: Objective) -> None:
    world = make_world(prices=Prices(input_usd_per_mtok=1, output_usd_per_mtok=5))
    answer = plan(world, replace(ASKED, objective=objective))
    values = {
        way.name: {
            "latency": p.total_s,
            "throughput": p.bottleneck_s,
            "energy": p.energy_j,
            "money": p.cost_usd,
            "weighted": 1e-3 * p.total_s + 5e-5 * (p.energy_j or 0) + p.cost_usd,
        }[objective]
        for way in answer.candidates
        if (p := way.prediction) is not None
    }
    best = answer.require()
    assert best.objective == pytest.approx(values[best.name])
    assert values[best.name] == min(value for value in values.values() if value is not None)


def test_each_objective_has_a_winner_of_its_own() -> None:
    """The edge is slow, the cloud is dear and near: nothing is best at everything."""
    world = make_world(link=NEAR, prices=Prices(output_usd_per_mtok=1e3))
    best = {name: plan(world, replace(ASKED, objective=name)).require().name for name in OBJECTIVES}
    assert best["latency"] == "offload"
    assert best["money"] == "local"
    assert best["energy"] == "offload"


def test_weights_move_the_best() -> None:
    world = make_world(link=NEAR, prices=Prices(output_usd_per_mtok=1e3))
    asked = replace(ASKED, objective="weighted")
    hasty = plan(world, replace(asked, weights=Weights(usd_per_s=100)))
    thrifty = plan(world, replace(asked, weights=Weights(usd_per_s=1e-9, usd_per_j=0)))
    assert (hasty.require().name, thrifty.require().name) == ("offload", "local")


def test_weights_without_joules_need_no_watts() -> None:
    world = make_world(edge=edge_profile(active_w=None))
    asked = replace(ASKED, objective="weighted")
    assert {way.violated for way in plan(world, asked).candidates} == {"energy"}
    assert plan(world, replace(asked, weights=Weights(usd_per_j=0))).best is not None


def test_ties_go_to_fewer_bytes_then_to_the_smaller_k() -> None:
    free = plan(make_world(), replace(ASKED, objective="money"))
    assert free.require().route == "local"  # all cost nothing; it sends nothing
    tight = plan(make_world(), replace(ASKED, objective="money", min_depth=1, edge_memory_bytes=40 * MIB))
    assert tight.require().split == 1  # splits cost and send the same


def test_the_reason_gives_the_figures_of_the_other_routes() -> None:
    reason = plan(make_world(), ASKED).reason
    assert reason.startswith("offload: 0.1")
    assert "the best of 5 feasible" in reason
    assert "local: 0.3" in reason
    assert "split at K = 1: " in reason
    for objective, unit in (("throughput", "tokens/s"), ("energy", " J "), ("money", "$")):
        assert unit in plan(make_world(), replace(ASKED, objective=objective)).reason  # type: ignore[arg-type]


# ---- in every world ----------------------------------------------------------------------------------

requests = st.builds(
    PlanRequest,
    prompt_tokens=st.integers(1, 2000),
    output_tokens=st.integers(1, 500),
    min_depth=st.integers(0, NUM_LAYERS),
    shape=shapes,
    slo_ttft_s=st.none() | st.floats(1e-3, 10),
    slo_tokens_per_s=st.none() | st.floats(0.1, 200),
    objective=st.sampled_from(OBJECTIVES),
)
bytes_ = st.integers(0, 80 * MIB)


@given(worlds, requests, bytes_, bytes_)
def test_more_memory_never_worsens_the_best(world: World, request: PlanRequest, a: int, b: int) -> None:
    less, more = (plan(world, replace(request, edge_memory_bytes=limit)).best for limit in sorted((a, b)))
    if less is not None:
        assert more is not None
        assert less.objective is not None
        assert more.objective is not None
        assert more.objective <= less.objective


@given(worlds, requests, bytes_)
def test_every_candidate_is_answered_and_the_best_is_feasible(
    world: World, request: PlanRequest, limit: int
) -> None:
    answer = plan(world, replace(request, edge_memory_bytes=limit))
    assert len(answer.candidates) == NUM_LAYERS + 1
    assert all(bool(way.detail) == (way.violated is not None) for way in answer.candidates)
    feasible = [way for way in answer.candidates if way.feasible]
    assert (answer.best is None) == (not feasible)
    if answer.best is not None and answer.best.prediction is not None:
        assert answer.best in feasible
        assert answer.best.prediction.memory_bytes <= limit
    assert answer == plan(world, replace(request, edge_memory_bytes=limit))


@given(requests, st.sampled_from([nan, inf, 0.0, -1.0]), st.sampled_from([nan, inf, 0.0, -1.0]), shapes)
def test_odd_sensors_still_give_a_plan(request: PlanRequest, odd: float, spread: float, shape: Shape) -> None:
    world = make_world(link=LinkView(*(Estimate(odd, deviation=spread) for _ in range(3))))
    answer = plan(world, replace(request, min_depth=0, slo_ttft_s=None, slo_tokens_per_s=None, shape=shape))
    best = answer.require().prediction
    assert best is not None
    assert isfinite(best.total_s)

"""The router with predictions: the least weighted cost, hysteresis, budgets, bad sensors, and why."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge.calibration import Residuals
from isthmus.edge.policy import DeviceState, Policy, energy_weight
from isthmus.edge.requests import Slo
from isthmus.edge.router import RouterInputs, best, decide
from isthmus.protocol.errors import ConfigError, RouteInfeasibleError
from isthmus.protocol.profiles import Prices
from isthmus.splitter.cost import TERMS
from isthmus.splitter.links import LinkView
from isthmus.splitter.situation import CloudState, Work
from tests.splitter.worlds import (
    FAR,
    MB,
    NUM_LAYERS,
    cloud_profile,
    edge_profile,
    make_world,
    shapes,
    worlds,
)

ONLY_TIME = Policy(usd_per_nat=0.0, hysteresis=0.0)


def inputs(**changes: Any) -> RouterInputs:
    """An edge that takes 19 ms a token and a cloud that takes 4 ms and is 50 ms away."""
    fields: dict[str, Any] = {
        "num_layers": NUM_LAYERS,
        "layer_bytes": (10 * MB,) * NUM_LAYERS,
        "embed_bytes": 4 * MB,
        "head_bytes": 2 * MB,
        "kv_bytes": 1000,
        "tokens": 164,
        "cloud_state": "up",
        "world": make_world(),
        "work": Work(100, 40.0, 64),
        "policy": ONLY_TIME,
    }
    return RouterInputs(**{**fields, **changes})


def test_the_fastest_way_is_taken_where_only_time_counts() -> None:
    decision = decide(inputs())
    assert decision.route == "offload"
    predicted = [c for c in decision.candidates if c.total_s is not None]
    assert len(predicted) == len(decision.candidates) == NUM_LAYERS + 1
    totals = [c.total_s for c in predicted if c.total_s is not None]
    assert decision.chosen is not None
    assert decision.chosen.total_s == min(totals)
    assert decision.expected_tokens == 40.0
    assert decision.margin is not None
    assert decision.margin > 0
    for candidate in predicted:
        assert candidate.terms is not None
        assert candidate.total_s == pytest.approx(sum(candidate.terms.values()))
        assert set(candidate.terms) == set(TERMS)
        assert candidate.score_parts is not None
        assert candidate.score == pytest.approx(sum(candidate.score_parts.values()))
    near_edge = replace(
        make_world(), edge=edge_profile(decode=((0.0, 0.0001),), head_s=0.0001, prefill=((32.0, 0.001),))
    )
    assert decide(inputs(world=near_edge)).route == "local"


def test_the_reason_names_both_ways_and_what_is_saved() -> None:
    reason = decide(inputs()).reason
    assert reason.startswith("offload (")
    assert "local (" in reason
    assert reason.endswith("it saves time")
    prices = Prices(output_usd_per_mtok=1e6)
    assert decide(inputs(world=make_world(prices=prices))).reason.endswith("it saves money")
    assert "was asked" in decide(inputs(route="local")).reason


def test_money_energy_and_fidelity_each_turn_the_choice() -> None:
    dear = make_world(prices=Prices(gpu_usd_per_h=3600.0))
    assert decide(inputs(world=dear)).route == "local"
    assert decide(inputs(world=make_world(prices=Prices()))).route == "offload"
    # 19 ms a token at 10 W against waiting at 2 W.
    slow_cloud = make_world(cloud=cloud_profile(decode=((0.0, 0.008),)))
    policy = replace(ONLY_TIME, usd_per_j=1.0)
    assert decide(inputs(world=slow_cloud, policy=policy)).route == "local"
    empty = DeviceState(battery=0.05, plugged=False)
    assert decide(inputs(world=slow_cloud, policy=policy, device=empty)).route == "offload"
    assert (
        decide(inputs(world=slow_cloud, policy=policy, device=replace(empty, plugged=True))).route == "local"
    )
    rough = make_world(cloud=cloud_profile(kl=1.0), edge=edge_profile(kl=0.0))
    assert decide(inputs(world=rough, policy=replace(ONLY_TIME, usd_per_nat=1.0))).route == "local"


def test_what_is_expected_costs_by_how_likely_it_is_missed() -> None:
    # The offload's first token comes after 0.1 s, local's after some 0.4 s; a step takes local 19 ms.
    world = make_world(cloud=cloud_profile(decode=((0.0, 0.008),)))
    assert decide(inputs(world=world)).route == "local"
    hurried = inputs(world=world, slo=Slo(ttft_s=0.2))
    decision = decide(hurried)
    assert decision.route == "offload"
    missed = {c.route: c.score_parts["slo_miss"] for c in decision.candidates if c.score_parts}
    assert missed["local"] > missed["offload"]
    # Whose predictions were always far too low is not believed.
    liar = Residuals(ttft=(("offload", (1.5,) * 32), ("split", (1.5,) * 32)))
    assert decide(replace(hurried, residuals=liar)).route == "local"


def test_the_way_taken_last_is_kept_while_another_is_hardly_better() -> None:
    local, offload = (c for c in decide(inputs()).candidates if c.route != "split")
    assert local.score is not None
    assert offload.score is not None
    gap = local.score / offload.score - 1
    last = inputs(pinned=("local", NUM_LAYERS, None))
    assert decide(replace(last, policy=replace(ONLY_TIME, hysteresis=gap * 1.01))).route == "local"
    kept = decide(replace(last, policy=replace(ONLY_TIME, hysteresis=gap * 1.01)))
    assert "was taken last" in kept.reason
    assert kept.margin is not None
    assert kept.margin < 0
    assert decide(replace(last, policy=replace(ONLY_TIME, hysteresis=gap * 0.99))).route == "offload"
    broken = replace(last, policy=replace(ONLY_TIME, hysteresis=9.0), memory_bytes=MB)
    assert decide(broken).route == "offload"


def test_a_budget_covers_the_longest_answer() -> None:
    world = make_world(prices=Prices(input_usd_per_mtok=1.0, output_usd_per_mtok=1.0))
    most = (100 + 64) / 1e6
    assert decide(inputs(world=world, max_cost_usd=most * 1.01)).route == "offload"
    for bound in ({"max_cost_usd": most * 0.99}, {"budget_left_usd": most * 0.99}, {"budget_left_usd": nan}):
        decision = decide(inputs(world=world, **bound))
        assert decision.route == "local"
        offload = next(c for c in decision.candidates if c.route == "offload")
        assert offload.violated == "budget"
    with pytest.raises(RouteInfeasibleError, match=r"may cost \$0.000164, \$0 is allowed"):
        decide(inputs(world=world, budget_left_usd=-1.0, route="offload"))
    assert decide(inputs(budget_left_usd=0.0)).route == "offload", "what costs nothing needs no budget"


def test_memory_is_what_the_profile_measured() -> None:
    need = 4 * MB + NUM_LAYERS * 10 * MB + MB + 2 * MB + 1000 * NUM_LAYERS * 164
    assert decide(inputs(route="local", memory_bytes=need)).route == "local"
    with pytest.raises(RouteInfeasibleError, match=rf"needs {need / MB:.1f} MB, the limit is"):
        decide(inputs(route="local", memory_bytes=need - 1))


def test_without_a_word_from_the_cloud_the_simple_rule_holds() -> None:
    silent = inputs(world=make_world(cloud=None))
    decision = decide(silent)
    assert decision.route == "local"
    assert "the whole model fits" in decision.reason
    assert decision.chosen is not None
    assert decision.chosen.total_s is not None
    assert decide(replace(silent, memory_bytes=20 * MB)).route == "offload"
    alone = inputs(world=make_world(cloud=None), cloud_state="none")
    assert "best of what is possible" in decide(alone).reason


def test_what_was_measured_and_how_old_it_is_is_told() -> None:
    basis = decide(inputs()).basis
    assert basis["link"]["rtt_s"]["value"] == 0.05
    assert basis["link"]["up_bytes_per_s"]["source"] == "given"
    assert basis["edge"]["labels"]["decode"] == "modelled"
    assert basis["observed_over_predicted"]["local_decode"] == 1.0
    unmeasured = decide(inputs(world=make_world(link=LinkView()))).basis
    assert unmeasured["link"]["rtt_s"] == {"value": None, "source": "assumed"}


@pytest.mark.parametrize(
    ("device", "share"),
    [
        (DeviceState(), 0.0),
        (DeviceState(0.5, True), 0.0),
        (DeviceState(nan, False), 0.0),
        (DeviceState(1.0, False), 0.1),
        (DeviceState(0.5, False), 0.55),
        (DeviceState(0.0, False), 1.0),
        (DeviceState(-3.0, False), 1.0),
        (DeviceState(7.0, None), 0.1),
    ],
)
def test_energy_weighs_more_as_the_battery_falls(device: DeviceState, share: float) -> None:
    assert energy_weight(Policy(usd_per_j=2.0), device) == pytest.approx(2.0 * share)


@pytest.mark.parametrize("value", [-1.0, nan, inf])
def test_a_policy_of_no_number_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="usd_per_s"):
        Policy(usd_per_s=value)


def test_a_cloud_that_stands_idle_is_not_that_of_a_full_one() -> None:
    full = make_world(cloud_state=CloudState(queue_s=5.0))
    assert decide(inputs(world=full)).route == "local"


random_inputs = st.builds(
    inputs,
    world=worlds,
    work=st.builds(
        Work,
        prompt_tokens=st.integers(1, 2000),
        output_tokens=st.floats(1, 500),
        max_tokens=st.integers(500, 1000),
    ),
    tokens=st.integers(1, 3000),
    memory_bytes=st.sampled_from([None, 0, 20 * MB, 40 * MB, 500 * MB]),
    min_depth=st.integers(1, NUM_LAYERS),
    cloud_state=st.sampled_from(["none", "unknown", "up", "down", "refused"]),
    cloud_context=st.sampled_from([None, 100, 8192]),
    route=st.sampled_from(["auto", "local", "split", "offload"]),
    shape=st.none() | shapes,
    privacy=st.sampled_from(["any", "activations-only", "local-only"]),
    slo=st.builds(Slo, ttft_s=st.none() | st.floats(0.01, 10), tokens_per_s=st.none() | st.floats(1, 100)),
    budget_left_usd=st.none() | st.sampled_from([nan, -1.0, 0.0, 1e-4, 1.0, inf]),
    policy=st.builds(
        Policy,
        usd_per_s=st.floats(0, 1),
        usd_per_j=st.floats(0, 1),
        slo_miss_usd=st.floats(0, 10),
        usd_per_nat=st.floats(0, 1),
        hysteresis=st.floats(0, 1),
    ),
    device=st.builds(
        DeviceState,
        battery=st.none() | st.sampled_from([nan, -1.0, 0.0, 0.3, 1.0, inf]),
        plugged=st.none() | st.booleans(),
    ),
    pinned=st.sampled_from([None, ("local", NUM_LAYERS, None), ("offload", 0, None), ("split", 2, "prefix")]),
)


@given(random_inputs)
def test_no_state_loosens_privacy_or_takes_what_may_not_be(given_: RouterInputs) -> None:
    try:
        decision = decide(given_)
    except RouteInfeasibleError:
        with pytest.raises(RouteInfeasibleError):
            best(given_)
        return
    assert decide(given_) == decision or given_.budget_left_usd != given_.budget_left_usd
    assert best(given_) == (decision.route, decision.split, decision.shape)
    if given_.privacy == "local-only":
        assert decision.route == "local"
    if given_.privacy == "activations-only":
        deep = decision.route == "split" and decision.split >= given_.min_depth
        assert decision.route == "local" or (deep and decision.shape == "u")
    if given_.cloud_state in ("none", "down", "refused"):
        assert decision.route == "local"
    chosen = decision.chosen
    assert chosen is not None
    assert chosen.feasible
    if given_.budget_left_usd is not None and chosen.most_usd:
        assert chosen.most_usd <= given_.budget_left_usd
    if given_.memory_bytes is not None and chosen.memory_bytes is not None:
        assert chosen.memory_bytes <= given_.memory_bytes


@given(random_inputs, st.floats(0, 2))
def test_more_rtt_never_makes_split_more_attractive(given_: RouterInputs, more_s: float) -> None:
    world = given_.world
    assert world is not None
    near = replace(given_, world=replace(world, link=FAR), policy=ONLY_TIME, slo=Slo())
    far_link = LinkView.given(rtt_s=0.05 + more_s, up_bytes_per_s=1e6, down_bytes_per_s=2e6)
    far = replace(near, world=replace(world, link=far_link), pinned=None)
    near = replace(near, pinned=None)
    try:
        before = decide(near)
    except RouteInfeasibleError:
        return
    if before.route != "split":
        assert decide(far).route != "split"

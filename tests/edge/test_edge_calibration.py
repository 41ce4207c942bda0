"""What the router learns from its own requests: how fast, how it spreads, and what cannot lead it astray."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.edge.calibration import WINDOW, Calibrator, Observed, Residuals
from isthmus.splitter.cost import CostModel
from isthmus.splitter.links import Estimate, LinkView
from isthmus.splitter.situation import CloudState, EdgeState, Factors, Route, Shape, Work, World
from tests.splitter.worlds import NUM_LAYERS, make_world, worlds

Way = tuple[Route, int, Shape | None]
LOCAL: Way = ("local", NUM_LAYERS, None)
SPLIT: Way = ("split", 2, "prefix")
OFFLOAD: Way = ("offload", 0, None)
WORK = Work(prompt_tokens=64, output_tokens=20.0, max_tokens=100)
STEPS = 40


def really(
    way: Way, true: Factors, world: World, *, rng: np.random.Generator | None = None, noise: float = 0.0
) -> Observed:
    """How a request turns out where the profile is off by `true`."""
    p = CostModel(replace(world, factors=true), replace(WORK, output_tokens=STEPS + 1.0)).predict(*way)

    def noisy(seconds: float) -> float:
        return seconds if rng is None else seconds * math.exp(rng.normal(0.0, noise))

    edge, link, cloud = noisy(p.decode_edge_s), noisy(p.decode_link_s), noisy(p.decode_cloud_s)
    if way[0] != "split":
        return Observed(noisy(p.ttft_s), STEPS, edge + link + cloud)
    return Observed(noisy(p.ttft_s), STEPS, edge + link + cloud, edge, cloud, link)


def learn(
    calibrator: Calibrator, way: Way, true: Factors, world: World, *, times: int = 1, seed: int | None = None
) -> None:
    rng = None if seed is None else np.random.default_rng(seed)
    for _ in range(times):
        known = replace(world, factors=calibrator.factors())
        calibrator.observe(known, WORK, way, really(way, true, world, rng=rng, noise=0.1))


def off(calibrator: Calibrator, name: str, true: float) -> float:
    return abs(math.log(getattr(calibrator.factors(), name) / true))


# ---- factors ---------------------------------------------------------------------------------------


def test_knows_nothing_at_first() -> None:
    assert Calibrator().factors() == Factors()
    assert Calibrator().residuals() == Residuals()


def test_the_first_sample_counts_almost_fully() -> None:
    calibrator = Calibrator()
    learn(calibrator, LOCAL, Factors(local_prefill=2.0, local_decode=3.0), make_world())
    assert off(calibrator, "local_prefill", 2.0) < 0.15
    assert off(calibrator, "local_decode", 3.0) < 0.15


@pytest.mark.parametrize("seed", range(5))
def test_an_edge_slowed_fourfold_is_believed_at_once(seed: int) -> None:
    calibrator, world, slowed = Calibrator(), make_world(), Factors(local_prefill=4.0, local_decode=4.0)
    learn(calibrator, LOCAL, Factors(), world, times=50, seed=seed)
    learn(calibrator, LOCAL, slowed, world, seed=seed + 100)
    assert calibrator.factors().local_decode > 2.5
    learn(calibrator, LOCAL, slowed, world, times=4, seed=seed + 200)
    assert off(calibrator, "local_decode", 4.0) < 0.2
    assert off(calibrator, "local_prefill", 4.0) < 0.3


@pytest.mark.parametrize("seed", range(5))
def test_a_cloud_slowed_fourfold_is_believed_within_three_splits(seed: int) -> None:
    calibrator, world = Calibrator(), make_world()
    learn(calibrator, SPLIT, Factors(), world, times=50, seed=seed)
    learn(calibrator, SPLIT, Factors(split_cloud=4.0), world, times=3, seed=seed + 100)
    assert off(calibrator, "split_cloud", 4.0) < 0.3
    assert off(calibrator, "split_edge", 1.0) < 0.2


def test_one_answer_that_stood_still_is_hardly_believed() -> None:
    calibrator, world = Calibrator(), make_world()
    learn(calibrator, LOCAL, Factors(), world, times=50)
    learn(calibrator, LOCAL, Factors(local_decode=100.0), world)
    assert off(calibrator, "local_decode", 1.0) < 0.25
    learn(calibrator, LOCAL, Factors(), world, times=3)
    assert off(calibrator, "local_decode", 1.0) < 0.1


def test_follows_a_slow_drift() -> None:
    calibrator, world, rng = Calibrator(), make_world(), np.random.default_rng(0)
    errors = []
    for i in range(300):
        true = Factors(local_decode=math.exp(0.3 * math.sin(i / 40)))
        errors.append(off(calibrator, "local_decode", true.local_decode))
        known = replace(world, factors=calibrator.factors())
        calibrator.observe(known, WORK, LOCAL, really(LOCAL, true, world, rng=rng, noise=0.1))
    assert np.mean(errors[20:]) < 0.07  # the samples' own noise is 0.1, what it follows moves by 0.3


def test_a_slow_edge_seen_locally_is_believed_of_splits_and_not_of_the_cloud() -> None:
    calibrator = Calibrator()
    learn(calibrator, LOCAL, Factors(local_prefill=4.0, local_decode=4.0), make_world(), times=3)
    learned = calibrator.factors()
    assert 2.0 < learned.split_edge <= 4.0
    assert 1.2 < learned.split_prefill < 4.0  # the edge's share of it
    assert (learned.split_cloud, learned.offload_decode) == (1.0, 1.0)
    assert learned.offload_prefill == 1.0


def test_a_route_with_samples_of_its_own_keeps_to_them() -> None:
    calibrator, world = Calibrator(), make_world()
    true = Factors(local_decode=1.0, split_edge=2.0)
    for _ in range(30):
        learn(calibrator, LOCAL, true, world)
        learn(calibrator, SPLIT, true, world)
    assert off(calibrator, "local_decode", 1.0) < 0.05
    assert off(calibrator, "split_edge", 2.0) < 0.1
    assert off(calibrator, "split_cloud", 1.0) < 0.05


def test_what_both_share_moves_both() -> None:
    calibrator, world = Calibrator(), make_world()
    for _ in range(10):
        learn(calibrator, SPLIT, Factors(split_edge=2.0), world)
        learn(calibrator, LOCAL, Factors(), world)
    learn(calibrator, LOCAL, Factors(local_prefill=4.0, local_decode=4.0), world, times=8)
    assert calibrator.factors().split_edge > 3.0


def test_what_was_seen_long_ago_fades() -> None:
    calibrator, world = Calibrator(), make_world()
    learn(calibrator, OFFLOAD, Factors(offload_decode=8.0), world, times=5)
    before = calibrator.factors().offload_decode
    learn(calibrator, LOCAL, Factors(), world, times=700)
    after = calibrator.factors().offload_decode
    assert before > 7.0
    assert 1.0 < after < 2.5


def test_loading_and_handshake_are_not_taken_for_prefill() -> None:
    cold = make_world(
        edge_state=EdgeState(loaded_layers=3), cloud_state=CloudState(connected=False, tls=True)
    )
    calibrator = Calibrator()
    learn(calibrator, OFFLOAD, Factors(), cold)
    assert calibrator.factors() == Factors()
    # Where they are most of the time, they say nothing about the rest.
    loading = make_world(edge_state=EdgeState(loaded_layers=0, head_loaded=False))
    calibrator.observe(loading, WORK, LOCAL, Observed(0.4, 0))
    assert calibrator.factors() == Factors()
    assert ("local", "prefill") not in calibrator.ratios()


@pytest.mark.parametrize("nothing", [None, math.nan, 0.0, -1.0, math.inf])
def test_what_was_not_measured_teaches_nothing(nothing: float | None) -> None:
    calibrator = Calibrator()
    for way in (LOCAL, SPLIT, OFFLOAD):
        calibrator.observe(make_world(), WORK, way, Observed(nothing, 5, nothing, nothing, nothing, nothing))
        calibrator.observe(make_world(), WORK, way, Observed(nothing, 0, 1.0, 1.0, 1.0, 1.0))
    assert calibrator.factors() == Factors()
    assert calibrator.ratios() == {}


def test_without_a_profile_of_the_cloud_nothing_is_learned_of_it() -> None:
    calibrator, world = Calibrator(), make_world()
    calibrator.observe(replace(world, cloud=None), WORK, OFFLOAD, really(OFFLOAD, Factors(), world))
    assert calibrator.residuals() == Residuals()


def test_a_link_whose_rates_are_unsteady_teaches_less() -> None:
    steady = LinkView(Estimate(0.05, 0.001, 1.0, 50, "passive"), Estimate(1e6, 1e4, 1.0, 50, "passive"))
    unsteady = LinkView(Estimate(0.05, 0.03, 1.0, 50, "passive"), Estimate(1e6, 6e5, 1.0, 50, "passive"))
    learned = []
    for link in (steady, unsteady):
        calibrator = Calibrator()
        learn(calibrator, SPLIT, Factors(split_link=3.0), make_world(link=link))
        learned.append(calibrator.factors().split_link)
    assert learned[0] > learned[1] > 1.0


def test_ratios_are_against_what_was_predicted_then() -> None:
    calibrator, world = Calibrator(), make_world(factors=Factors(local_decode=2.0))
    calibrator.observe(world, WORK, LOCAL, really(LOCAL, Factors(local_decode=3.0), world))
    assert calibrator.ratios()[("local", "decode")] == pytest.approx(1.5)


@settings(max_examples=60)
@given(
    worlds,
    st.lists(
        st.tuples(
            st.sampled_from([LOCAL, SPLIT, OFFLOAD]),
            st.builds(
                Observed,
                st.none() | st.floats(),
                st.integers(0, 100),
                st.none() | st.floats(),
                st.none() | st.floats(),
                st.none() | st.floats(),
                st.none() | st.floats(),
            ),
        ),
        max_size=8,
    ),
)
def test_factors_stay_positive_numbers_whatever_is_observed(
    world: World, samples: list[tuple[Way, Observed]]
) -> None:
    calibrator = Calibrator()
    for way, observed in samples:
        calibrator.observe(replace(world, factors=calibrator.factors()), WORK, way, observed)
    for each in fields(Factors):
        value = getattr(calibrator.factors(), each.name)
        assert 0 < value < math.inf
    residuals = calibrator.residuals()
    for _, known in (*residuals.ttft, *residuals.step):
        assert list(known) == sorted(known)
        assert len(known) == WINDOW


# ---- residuals -------------------------------------------------------------------------------------


def test_without_samples_the_prior_answers() -> None:
    residuals = Residuals()
    assert residuals.p_miss("local", "ttft", 1.0, 1.0) == pytest.approx(0.5, abs=0.02)
    assert residuals.p_miss("local", "ttft", 1.0, math.exp(0.25)) == pytest.approx(0.17, abs=0.04)
    assert residuals.p_miss("split", "step", 1.0, 100.0) == 1 / (WINDOW + 1)
    assert residuals.p_miss("split", "step", 1.0, 0.01) == 1.0


def test_real_residuals_displace_the_prior() -> None:
    calibrator, world = Calibrator(), make_world()
    surprise = really(LOCAL, Factors(local_decode=2.0), world)
    before = calibrator.residuals().p_miss("local", "step", 1.0, 1.5)
    seen = [before]
    for _ in range(WINDOW):
        calibrator.observe(world, WORK, LOCAL, surprise)  # the world's factors stay: always off by 2
        seen.append(calibrator.residuals().p_miss("local", "step", 1.0, 1.5))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert calibrator.residuals().p_miss("local", "ttft", 1.0, 1.5) == 1 / (WINDOW + 1)
    assert calibrator.residuals().p_miss("offload", "step", 1.0, 1.5) == before


def test_p_values_are_valid_for_draws_of_one_distribution() -> None:
    rng = np.random.default_rng(1)
    misses, told = [], []
    for _ in range(2000):
        draws = np.sort(rng.standard_t(3, WINDOW + 1) * 0.2)
        mixed = rng.permutation(draws)
        known = Residuals(step=(("local", tuple(sorted(map(float, mixed[1:])))),))
        told.append(known.p_miss("local", "step", 1.0, 1.2))
        misses.append(math.exp(mixed[0]) > 1.2)
    assert 0.0 <= np.mean(told) - np.mean(misses) < 0.05


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.95])
def test_upper_covers_as_promised(coverage: float) -> None:
    rng = np.random.default_rng(2)
    held = []
    for _ in range(2000):
        draws = rng.normal(0.0, 0.3, WINDOW + 1)
        known = Residuals(ttft=(("split", tuple(sorted(map(float, draws[1:])))),))
        held.append(2.0 * math.exp(draws[0]) <= known.upper("split", "ttft", 2.0, coverage))
    assert coverage - 0.025 < np.mean(held) < coverage + 1 / (WINDOW + 1) + 0.025


def test_upper_of_more_than_can_be_known_is_infinite() -> None:
    assert Residuals().upper("local", "ttft", 1.0, 0.99) == math.inf
    assert 1.3 < Residuals().upper("local", "ttft", 1.0, 0.9) < 1.5


@pytest.mark.parametrize(
    ("predicted", "limit", "certain"),
    [
        (math.nan, 1.0, True),
        (1.0, math.nan, True),
        (math.inf, 1.0, True),
        (1.0, 0.0, True),
        (1.0, -1.0, True),
        (0.0, 1.0, False),
        (1.0, math.inf, False),
    ],
)
def test_p_miss_of_odd_numbers(predicted: float, limit: float, certain: bool) -> None:
    expected = 1.0 if certain else 1 / (WINDOW + 1)
    assert Residuals().p_miss("local", "ttft", predicted, limit) == expected


def test_p_miss_falls_as_the_limit_rises() -> None:
    told = [Residuals().p_miss("local", "ttft", 1.0, limit) for limit in np.linspace(0.1, 3.0, 50)]
    assert told == sorted(told, reverse=True)


# ---- the pulse ---------------------------------------------------------------------------------------


def test_a_device_that_recovers_while_the_cloud_works_is_believed() -> None:
    """Requests saw it six times slower; then only the pulse sees it."""
    calibrator, world, slow = Calibrator(), make_world(), Factors(local_prefill=6.0, local_decode=6.0)
    learn(calibrator, LOCAL, slow, world, times=5)
    for _ in range(5):
        calibrator.note_pulse(6e-3, 1e-3)
    for _ in range(6):
        calibrator.note_pulse(1e-3, 1e-3)
    assert off(calibrator, "local_decode", 1.0) < 0.4
    assert off(calibrator, "split_edge", 1.0) < 0.4
    learn(calibrator, LOCAL, Factors(), world, times=2)
    assert off(calibrator, "local_decode", 1.0) < 0.1


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_pulse_of_no_time_teaches_nothing(seconds: float) -> None:
    calibrator = Calibrator()
    calibrator.note_pulse(seconds, 1.0)
    calibrator.note_pulse(1.0, seconds)
    assert calibrator.factors() == Factors()


def test_a_link_that_changed_meanwhile_is_no_fault_of_the_model() -> None:
    near = make_world(link=LinkView.given(rtt_s=0.008, up_bytes_per_s=1e6, down_bytes_per_s=2e6))
    far = replace(near, link=LinkView.given(rtt_s=0.112, up_bytes_per_s=1e6, down_bytes_per_s=2e6))
    blind, seeing = Calibrator(), Calibrator()
    for _ in range(3):
        blind.observe(near, WORK, SPLIT, really(SPLIT, Factors(), far))
        seeing.observe(near, WORK, SPLIT, really(SPLIT, Factors(), far), link=far.link)
    assert off(seeing, "split_link", 1.0) < 0.01 < 0.2 < off(blind, "split_link", 1.0)
    assert dict(seeing.residuals().step)["split"] == dict(blind.residuals().step)["split"], (
        "it was off all the same"
    )

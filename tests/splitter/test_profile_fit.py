"""From timings and readings to figures: the fit of a step, monotone curves, groups of layers, footprints."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.splitter.profile_fit import fit_steps, layer_groups, never_falling, rounded, shares
from isthmus.splitter.profile_memory import Footprint, Readings, parse_readings


@given(st.floats(0, 1e-2), st.floats(1e-6, 1e-2), st.integers(2, 100))
def test_exact_steps_are_found_again(step: float, layer: float, deepest: int) -> None:
    depths = sorted({1, max(1, deepest // 4), deepest})
    found = fit_steps(depths, [step + layer * depth for depth in depths])
    assert found == pytest.approx((step, layer), rel=1e-4, abs=1e-9)


def test_a_shallow_step_weighs_as_much_as_a_deep_one() -> None:
    step, layer = fit_steps([1, 10, 100], [2.0, 11.0, 110.0])  # 10 % slower than 1 + n at the deep end
    assert step + layer == pytest.approx(2.0, rel=0.1)


def test_neither_part_of_a_step_is_negative() -> None:
    step, layer = fit_steps(
        [1, 10], [1.0, 20.0]
    )  # shallow steps ran from the caches: the line starts below 0
    assert step == 0
    assert 1 < layer < 2
    step, layer = fit_steps([1, 10], [3.0, 2.0])
    assert layer == 0
    assert 2 < step < 3
    assert fit_steps([4], [2.0]) == pytest.approx((0.0, 0.5))


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=12))
def test_a_curve_never_falls_and_keeps_its_mean(values: list[float]) -> None:
    curve = never_falling(values)
    assert all(a <= b + 1e-9 for a, b in pairwise(curve))
    assert sum(curve) == pytest.approx(sum(values))
    if all(a <= b for a, b in pairwise(values)):
        assert curve == values


def test_only_what_falls_is_evened_out() -> None:
    assert never_falling([1, 5, 3, 4, 9]) == [1, 4, 4, 4, 9]


def test_shares_add_up_to_the_layers() -> None:
    assert shares([1.0, 2.0, 3.0], [7, 8, 9]) == (0.5, 1.0, 1.5)
    # One layer was held up; those of its kind know better.
    assert shares([1.0, 90.0, 1.0, 3.0, 1.0], [7, 7, 7, 8, 7]) == pytest.approx(
        [5 / 7] * 3 + [15 / 7, 5 / 7], rel=1e-4
    )
    assert rounded(0.000123456789) == 0.00012346


@given(st.integers(1, 200), st.floats(1, 1e9), st.floats(0, 1e9), st.floats(0, 1e12))
def test_groups_cover_all_layers_and_fit(count: int, layer: float, fixed: float, budget: float) -> None:
    groups = layer_groups(count, layer, fixed, budget)
    assert [i for group in groups for i in group] == list(range(count))
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == 1 or fixed + max(sizes) * layer <= budget
    if fixed + count * layer <= budget:
        assert len(groups) == 1


def test_a_footprint_adds_up_to_what_was_seen() -> None:
    readings = Readings(idle=100, embed=150, layers=((1, 175), (2, 185), (4, 205)), chunk=215, head=245)
    size = readings.footprint()
    assert size == Footprint(layer_bytes=10, embed_bytes=50, head_bytes=30, scratch_bytes=25)
    assert readings.idle + size.embed_bytes + 4 * size.layer_bytes + size.scratch_bytes == readings.chunk


def test_a_footprint_is_never_negative() -> None:
    shrunk = Readings(idle=100, embed=90, layers=((1, 80),), chunk=60, head=50)
    assert shrunk.footprint() == Footprint(0, 0, 0, 0)


def test_readings_come_back_from_json() -> None:
    printed = {"idle": 1, "embed": 2, "layers": [[1, 3]], "chunk": 4, "head": 5}
    assert parse_readings(json.dumps(printed).encode()) == Readings(1, 2, ((1, 3),), 4, 5)

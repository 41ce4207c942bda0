"""Predicted output lengths: ranks, bounds, the window, and how often a session exceeds its prediction."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.splitter.output_lengths import OutputLengths


def known(lengths: list[int], **options: float) -> OutputLengths:
    predictor = OutputLengths(**options)  # type: ignore[arg-type]  # forwarded as given
    for length in lengths:
        predictor.observe(length)
    return predictor


@pytest.mark.parametrize(
    ("given", "bound", "expected"),
    [
        (0, 1000, 80),  # rank 0.8 * 100 of 99 lengths
        (0, 50, 50),
        (9, 1000, 82),  # 90 longer: rank ceil(72.8) = 73, from 10 on
        (90, 1000, 98),  # 9 longer: rank 8 of 91..99
        (95, 1000, 99),  # 4 longer: rank 4
        (96, 1000, 1000),  # 3 longer: rank 4 there is none
        (500, 1000, 1000),
        (500, 400, 400),
    ],
)
def test_the_quantile_is_a_rank_among_the_longer_ones(given: int, bound: int, expected: int) -> None:
    lengths = list(range(1, 100))
    random.Random(0).shuffle(lengths)
    assert known(lengths, coverage=0.8).quantile(given, bound) == expected


def test_with_few_lengths_the_bound_is_all_that_is_known() -> None:
    predictor = known([10] * 15)
    assert predictor.quantile(0, 77) == 77
    predictor.observe(10)
    assert predictor.quantile(0, 77) == 10
    assert predictor.quantile(10, 77) == 77, "nobody went on beyond 10 rows"


def test_the_window_forgets_the_oldest() -> None:
    predictor = known([500] * 20, window=20)
    for count in range(1, 21):
        predictor.observe(7)
        assert len(predictor) == 20
        assert predictor.quantile(0, 1000) == (7 if count >= 17 else 500)


@pytest.mark.parametrize(
    "options",
    [{"coverage": 0.0}, {"coverage": 1.0}, {"min_samples": 0}, {"min_samples": 9, "window": 8}],
)
def test_parameters_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must lie between"):
        known([], **options)


@given(
    lengths=st.lists(st.integers(0, 300), max_size=80),
    given=st.integers(0, 320),
    bound=st.integers(0, 400),
    coverage=st.floats(0.05, 0.95),
)
def test_a_prediction_lies_between_what_is_there_and_the_bound(
    lengths: list[int], given: int, bound: int, coverage: float
) -> None:
    predictor = known(lengths, coverage=coverage, window=64)
    found = predictor.quantile(given, bound)
    assert found <= bound
    assert found > given or found == bound
    assert predictor.quantile(given + 1, bound) >= found, "who came further is not expected to end sooner"


def geometric(draw: random.Random) -> int:
    return int(draw.expovariate(1 / 120))


def heavy_tailed(draw: random.Random) -> int:
    return min(4000, int(30 * draw.paretovariate(1.2)))


def two_kinds(draw: random.Random) -> int:
    return draw.randint(5, 20) if draw.random() < 0.7 else draw.randint(400, 600)


@pytest.mark.parametrize("lengths", [geometric, heavy_tailed, two_kinds])
@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("given", [0, 60])
def test_of_stationary_sessions_the_share_that_exceeds_its_prediction_is_one_minus_coverage(
    lengths: Callable[[random.Random], int], coverage: float, given: int
) -> None:
    """8000 sessions, each predicted (once it has reached `given`) from those before it. 3 points of error:
    a window of 512 says a quantile to within sqrt(q (1 - q) / 512), 2 points, and the errors of
    neighbours go together; of the sessions a part only comes as far as `given`."""
    draw = random.Random(f"{lengths.__name__} {coverage} {given}")
    predictor = OutputLengths(coverage=coverage)
    num_predicted = num_exceeded = 0
    for _ in range(8000):
        length = lengths(draw)
        if len(predictor) == predictor.window and length > given:
            num_predicted += 1
            num_exceeded += length > predictor.quantile(given, 10**6)
        predictor.observe(length)
    assert num_predicted > 1500
    assert num_exceeded / num_predicted == pytest.approx(1 - coverage, abs=0.03)


def test_lengths_that_change_are_followed_within_a_window() -> None:
    draw = random.Random(1)
    predictor = known([draw.randint(1, 100) for _ in range(1000)])
    assert 70 <= predictor.quantile(0, 10**6) <= 90
    for _ in range(predictor.window):
        predictor.observe(draw.randint(1001, 1100))
    assert 1070 <= predictor.quantile(0, 10**6) <= 1090

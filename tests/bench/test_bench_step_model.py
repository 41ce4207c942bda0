"""The step-time model: what it can express it finds, and its solver meets the conditions of optimality."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.bench.step_model import (
    OUTPUT_KNOTS,
    ROW_KNOTS,
    MeasuredStep,
    StepModel,
    StepSpan,
    features,
    fit,
    fit_error,
    nonnegative_least_squares,
    ramps,
)

LAYERS = 6
NUM_FEATURES = 1 + len(ROW_KNOTS) + len(OUTPUT_KNOTS) + 3


def planted() -> StepModel:
    """Flat up to 32 rows, then linear: 1 ms a layer, and 1 ms for every 32 rows more."""
    coefficients = np.zeros(NUM_FEATURES)
    coefficients[0] = 2e-3
    coefficients[1 + ROW_KNOTS.index(1)] = 1e-3
    for low, high in pairwise(ROW_KNOTS):
        if low >= 32:
            coefficients[1 + ROW_KNOTS.index(high)] = 1e-3 * (high - low) / 32
    coefficients[-6:] = [5e-3, 1e-3, 8e-3, 1e-5, 1e-7, 2e-9]
    return StepModel(coefficients, num_layers=LAYERS)


def random_steps(num: int, seed: int) -> list[tuple[StepSpan, ...]]:
    rng = np.random.default_rng(seed)
    return [
        tuple(
            StepSpan(int(rng.integers(0, LAYERS)), int(rng.integers(0, 3000)), int(2 ** rng.uniform(0, 9)))
            for _ in range(int(2 ** rng.uniform(0, 6)))
        )
        for _ in range(num)
    ]


def test_a_step_costs_the_sum_of_its_terms() -> None:
    model = planted()
    # Layers 0-3 run 2 rows, 4 and 5 run 66. The first span reads 101 keys, the other is a whole prompt.
    spans = (StepSpan(0, 99, 2), StepSpan(4, 0, 64))
    products = 4 * 1e-3 + 2 * (1e-3 + 34 / 32 * 1e-3)
    attention = 8 * 1e-5 + 6 * 101 * 1e-7 + (6 * 101 * 2 + 2 * 65 * 32) * 2e-9
    head = 5e-3 + 1e-3 / 7
    assert model.seconds(spans, 2) == pytest.approx(2e-3 + products + head + attention)
    assert model.layer_s(8192) == pytest.approx(1e-3 + 8160 / 32 * 1e-3)  # beyond the last knot: linear
    assert model.seconds((), 0) == model.base_s


def test_prediction_is_the_features_times_the_coefficients() -> None:
    model = planted()
    for spans in random_steps(20, seed=1):
        expected = features(spans, len(spans), LAYERS) @ model.coefficients
        assert model.seconds(spans, len(spans)) == pytest.approx(expected)


def test_the_fit_finds_what_was_planted() -> None:
    truth = planted()
    steps = [MeasuredStep(s, len(s), truth.seconds(s, len(s))) for s in random_steps(160, seed=2)]
    model = fit(steps[:120], num_layers=LAYERS)
    error = fit_error(model, steps[120:])
    assert error.num_steps == 40
    assert error.p95 < 1e-3
    assert error.total == pytest.approx(1, abs=1e-3)


def test_the_error_is_of_predicted_over_measured() -> None:
    model = planted()
    spans = random_steps(1, seed=3)[0]
    seconds = model.seconds(spans, 1)
    steps = [MeasuredStep(spans, 1, seconds / ratio) for ratio in (1.0, 1.1, 0.9)]
    error = fit_error(model, steps)
    assert error.median == pytest.approx(0.1)
    assert error.total == pytest.approx(3 / (1 + 1 / 1.1 + 1 / 0.9))


@given(st.integers(0, 5000))
def test_ramps_add_up_to_the_value(value: int) -> None:
    widths = np.diff((0, *ROW_KNOTS))
    assert ramps(value, ROW_KNOTS) @ widths == pytest.approx(value)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 10))
def test_the_solver_meets_the_conditions_of_optimality(seed: int, num_rows: int, num_columns: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((num_rows, num_columns)), rng.standard_normal(num_rows)
    x = nonnegative_least_squares(a, b)
    gradient = a.T @ (b - a @ x)
    assert (x >= 0).all()
    assert (gradient <= 1e-6 * num_rows).all()  # nothing more to gain by growing
    assert np.abs(gradient[x > 0]).max(initial=0) <= 1e-6 * num_rows  # nor by changing what is there

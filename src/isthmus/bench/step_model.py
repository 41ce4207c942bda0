"""How long a step of the cloud's engine takes, predicted from what it runs; fitted to measured steps. Pure.

    seconds = base + Σ_layers F(rows of the layer) + H(outputs)
            + Σ_sequences layers * (a + b * keys read + c * products)

F is piecewise linear in the rows a layer runs: a product is bound by reading the weights up to some tens of
rows, by arithmetic beyond, so nothing simpler fits both a decode and a prompt. H, the head and the sampler,
is piecewise linear in the outputs. Both only grow, and no term is negative. The last line is attention: new
rows behind others are multiplied with all keys of the sequence, read from its pages; a whole prompt reads
none, and each of its rows is multiplied with those before it only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ROW_KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
OUTPUT_KNOTS = (1, 8, 32)

Vector = NDArray[np.float64]


class StepSpan(NamedTuple):
    """Rows [start, start + num_rows) of one session that entered at layer `first_layer`."""

    first_layer: int
    start: int
    num_rows: int

    @property
    def num_keys_read(self) -> int:
        """Tokens whose keys and values a layer reads from pages."""
        return self.start + self.num_rows if self.start else 0

    @property
    def num_products(self) -> float:
        """Pairs of a row and a key that a layer multiplies."""
        if self.start:
            return self.num_rows * (self.start + self.num_rows)
        return self.num_rows * (self.num_rows + 1) / 2


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One step of the real engine: what it ran, how many of the rows drew a token, and its seconds."""

    spans: tuple[StepSpan, ...]
    num_outputs: int
    seconds: float


class StepModel:
    """Predicts seconds per step. Prediction is called once per simulated step, so it looks F and H up."""

    def __init__(self, coefficients: Vector, *, num_layers: int) -> None:
        """`coefficients` [num_features(), ] in the order of `features`: all in seconds, none negative."""
        self.coefficients = coefficients
        self.num_layers = num_layers
        self.base_s = float(coefficients[0])
        cut = 1 + len(ROW_KNOTS)
        self._row_steps, self._output_steps = coefficients[1:cut], coefficients[cut:-3]
        self.sequence_s, self.key_s, self.product_s = (float(c) for c in coefficients[-3:])
        self._layer_s: list[float] = []
        self._head_s: list[float] = []

    def layer_s(self, num_rows: int) -> float:
        """F: seconds of one layer's products over `num_rows` rows."""
        return float(ramps(num_rows, ROW_KNOTS) @ self._row_steps)

    def head_s(self, num_outputs: int) -> float:
        """H: seconds of the head and the sampler for `num_outputs` rows."""
        return float(ramps(num_outputs, OUTPUT_KNOTS) @ self._output_steps)

    def seconds(self, spans: Sequence[StepSpan], num_outputs: int) -> float:
        """One step's predicted duration."""
        entering = [0] * self.num_layers
        layers = keys = products = 0.0
        for span in spans:
            entering[span.first_layer] += span.num_rows
            depth = self.num_layers - span.first_layer
            layers += depth
            keys += depth * span.num_keys_read
            products += depth * span.num_products
        rows = list(accumulate(entering))
        while len(self._layer_s) <= rows[-1]:
            self._layer_s.append(self.layer_s(len(self._layer_s)))
        while len(self._head_s) <= num_outputs:
            self._head_s.append(self.head_s(len(self._head_s)))
        return (
            self.base_s
            + sum(map(self._layer_s.__getitem__, rows))
            + self._head_s[num_outputs]
            + self.sequence_s * layers
            + self.key_s * keys
            + self.product_s * products
        )


@dataclass(frozen=True, slots=True)
class FitError:
    """Predicted over measured seconds, of steps the model was not fitted to: median and 95th percentile of
    |ratio - 1|, and the ratio of the sums."""

    num_steps: int
    median: float
    p95: float
    total: float


def fit(steps: Sequence[MeasuredStep], *, num_layers: int) -> StepModel:
    """The non-negative coefficients with the least squared relative error."""
    rows = np.array([features(step.spans, step.num_outputs, num_layers) / step.seconds for step in steps])
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-30)  # columns of one size, for the solver's sake
    return StepModel(
        nonnegative_least_squares(rows / scale, np.ones(len(steps))) / scale, num_layers=num_layers
    )


def fit_error(model: StepModel, steps: Sequence[MeasuredStep]) -> FitError:
    predicted = np.array([model.seconds(step.spans, step.num_outputs) for step in steps])
    measured = np.array([step.seconds for step in steps])
    errors = np.abs(predicted / measured - 1)
    return FitError(
        len(steps),
        float(np.median(errors)),
        float(np.percentile(errors, 95)),
        float(predicted.sum() / measured.sum()),
    )


def features(spans: Sequence[StepSpan], num_outputs: int, num_layers: int) -> Vector:
    """What the coefficients multiply: one, ramps of rows summed over layers, ramps of outputs, and layers,
    layers * keys read and layers * products summed over sequences."""
    entering = np.zeros(num_layers, dtype=np.int64)
    attention = np.zeros(3)
    for span in spans:
        entering[span.first_layer] += span.num_rows
        depth = num_layers - span.first_layer
        attention += depth * np.array([1.0, span.num_keys_read, span.num_products])
    layer_rows = np.cumsum(entering)
    by_layer = sum((ramps(int(rows), ROW_KNOTS) for rows in layer_rows), np.zeros(len(ROW_KNOTS)))
    return np.concatenate([[1.0], by_layer, ramps(num_outputs, OUTPUT_KNOTS), attention])


def ramps(value: int, knots: Sequence[int]) -> Vector:
    """Share of each interval between knots (from 0 on) that lies below `value`; the last one goes on beyond
    1. A weighted sum of these is piecewise linear, and grows where the weights are positive."""
    found = np.zeros(len(knots))
    last = min(bisect_left(knots, value), len(knots) - 1)
    found[:last] = 1.0
    low = knots[last - 1] if last else 0
    found[last] = max(0, value - low) / (knots[last] - low)
    return found


def nonnegative_least_squares(a: Vector, b: Vector) -> Vector:
    """The x >= 0 that minimises |a @ x - b| (Lawson and Hanson 1974, algorithm NNLS); a is [m, n], b [m]."""
    num = a.shape[1]
    x, active = np.zeros(num), np.zeros(num, dtype=bool)
    for _ in range(10 * num):  # each round adds one; it has never needed more than some 2 n
        gradient = np.where(active, -np.inf, a.T @ (b - a @ x))
        if gradient.max() <= 1e-9 * len(b):
            break
        active[int(gradient.argmax())] = True
        while True:
            trial = np.zeros(num)
            trial[active] = np.linalg.lstsq(a[:, active], b, rcond=None)[0]
            falling = active & (trial <= 0)
            if not falling.any():
                break
            share = np.min(x[falling] / np.maximum(x[falling] - trial[falling], 1e-300))
            x += share * (trial - x)
            active &= x > 1e-14
        x = trial
    return x

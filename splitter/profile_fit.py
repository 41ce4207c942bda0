"""From timings to figures of a profile: pure functions."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

import numpy as np


def fit_steps(depths: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """(seconds of a step whatever it runs, of a layer) from the `seconds` of steps of `depths` layers.

    Least squares of the relative error, so that a shallow step counts as much as a deep one. Neither is
    negative: shallow steps find their weights in the processor's caches, which bends the line.
    """
    n, t = np.asarray(depths, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if len(set(depths)) > 1:
        system = np.stack([1 / t, n / t], axis=1)
        step, layer = np.linalg.lstsq(system, np.ones_like(t), rcond=None)[0]
        if step >= 0 and layer >= 0:
            return float(step), float(layer)
        if layer < 0:  # deeper was not slower: there is nothing but the step
            return float(np.sum(1 / t) / np.sum(1 / t**2)), 0.0
    return 0.0, float(np.sum(n / t) / np.sum((n / t) ** 2))


def never_falling(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to `values` in least squares (pool adjacent violators: Ayer et al.
    1955). More rows and more context are never faster; what a timing says otherwise is noise."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while pools and pools[-1][0] > mean:
            other, others = pools.pop()
            mean = (mean * count + other * others) / (count + others)
            count += others
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def shares(seconds: Sequence[float], kinds: Sequence[int]) -> tuple[float, ...]:
    """Each layer's time over the mean one's. Layers of one kind run the same operators over the same shapes:
    what tells them apart is noise, so each gets the median of its kind."""
    medians = {
        kind: statistics.median([s for s, other in zip(seconds, kinds, strict=True) if other == kind])
        for kind in set(kinds)
    }
    mean = statistics.fmean([medians[kind] for kind in kinds])
    return tuple(rounded(medians[kind] / mean) for kind in kinds)


def layer_groups(num_layers: int, layer_bytes: float, fixed_bytes: float, budget: float) -> list[range]:
    """Consecutive groups of layers, as even as can be, each of which fits `budget` bytes beside
    `fixed_bytes`. A group has at least one layer."""
    most = max(1, min(num_layers, int((budget - fixed_bytes) // max(layer_bytes, 1.0))))
    count = -(-num_layers // most)
    edges = [i * num_layers // count for i in range(count + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def rounded(value: float) -> float:
    """Five significant digits: more would claim a precision that no timing has."""
    return float(f"{value:.5g}")

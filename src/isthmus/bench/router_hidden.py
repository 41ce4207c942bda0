"""What changes in a simulated world and is told to nobody: how fast each part is, and the cloud's other load.

Seeded, and a function of time alone, so that every policy meets the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from isthmus.bench.router_recordings import Vector

DRIFT_TERMS: Final = ("edge_prefill", "edge_decode", "cloud_prefill", "cloud_decode", "queue", "link")
DRIFT_BOUND: Final = 0.3
_KNOT_S: Final = 120.0
_STEP: Final = 0.08  # standard deviation from knot to knot: from bound to bound takes about an hour
_LOAD_KNOT_S: Final = 10.0
_LOAD_KEPT: Final = 0.9  # of the load's log from knot to knot: half of it is forgotten in a minute
_MOST_SESSIONS: Final = 15.0


@dataclass(frozen=True, slots=True)
class CloudLoad:
    """The sessions of others: their mean and the spread of its log. Of each one beyond `free_sessions` a new
    session waits `wait_s`."""

    sessions: float = 2.0
    sigma: float = 0.7
    free_sessions: float = 4.0
    wait_s: float = 0.2


class Hidden:
    """The walks of one world, over `horizon_s`; beyond it they begin again."""

    def __init__(self, load: CloudLoad, *, horizon_s: float, seed: int) -> None:
        rng = np.random.default_rng((seed, 3))
        knots = int(horizon_s / _KNOT_S) + 2
        self._walks = {term: _reflected(rng, knots) for term in DRIFT_TERMS}
        steps = rng.standard_normal(int(horizon_s / _LOAD_KNOT_S) + 2)
        logs = np.empty_like(steps)
        state = steps[0]
        for i, step in enumerate(steps):
            state = _LOAD_KEPT * state + np.sqrt(1 - _LOAD_KEPT**2) * step if i else step
            logs[i] = state
        self._load = load
        self._sessions = load.sessions * np.exp(load.sigma * logs - load.sigma**2 / 2)

    def drift(self, term: str, at_s: Vector) -> Vector:
        """Times of `term` are multiplied with this, within 1 ± DRIFT_BOUND."""
        return 1.0 + _between(self._walks[term], at_s / _KNOT_S)

    def sessions(self, at_s: Vector) -> Vector:
        """Others that decode on the cloud."""
        return np.minimum(_between(self._sessions, at_s / _LOAD_KNOT_S), _MOST_SESSIONS)

    def published_queue_s(self, at_s: Vector) -> Vector:
        """The wait for a first row as the cloud reckons it; the true one drifts from it."""
        beyond = np.maximum(0.0, self.sessions(at_s) - self._load.free_sessions)
        return beyond * self._load.wait_s


def _reflected(rng: np.random.Generator, knots: int) -> Vector:
    """A random walk within ± DRIFT_BOUND, from an even draw."""
    walk = DRIFT_BOUND * (2 * rng.random() - 1) + np.concatenate(
        ([0.0], np.cumsum(_STEP * rng.standard_normal(knots - 1)))
    )
    folded = np.mod(walk + DRIFT_BOUND, 4 * DRIFT_BOUND)
    return np.asarray(np.where(folded > 2 * DRIFT_BOUND, 4 * DRIFT_BOUND - folded, folded) - DRIFT_BOUND)


def _between(knots: Vector, place: Vector) -> Vector:
    """Smooth between knots, level at each, so never beyond them."""
    low = np.floor(place).astype(np.int64)
    share = place - low
    share = share * share * (3 - 2 * share)
    first, second = knots[low % len(knots)], knots[(low + 1) % len(knots)]
    return np.asarray(first + share * (second - first))

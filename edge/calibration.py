"""What the router learns from its own requests: how far predictions are off, and how surely. Pure: no clock.

The log of observed over predicted of each (route, term) is taken as

    log factor = what its resource (edge, link, cloud) shares + what is its own

and both are estimated together by a Kalman filter (R. E. Kalman 1960), that is, by moving averages whose gain
follows from what is known so far: the first sample counts almost fully, later ones about a third; a slow edge
seen on one route is believed of the others, and less so once they have samples of their own. Time is counted
in requests. What was seen long ago fades towards the profile, so that a way once slow is tried again.

One sample far off is an outlier and moves little; several on the same side are a change (a CUSUM test, E. S.
Page 1954), and then the term is learned anew. A throttled edge shows in prompt and answer of one request, a
stall only in one of them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from isthmus.splitter.cost import CostModel, Prediction
from isthmus.splitter.links import Estimate, LinkView
from isthmus.splitter.situation import Factors, Route, Shape, Work, World

Metric = Literal["ttft", "step"]
Term = tuple[Route, str]
"""A route and "prefill", or "decode" (of a split "edge", "link", "cloud"): a field of Factors."""

_ROUTES: Final[tuple[Route, ...]] = ("local", "split", "offload")
WINDOW: Final = 32
"""Residuals that count, per route and metric; from the prior as long as there are fewer real ones. Equal for
all routes: a p-value is at least 1 / (WINDOW + 1), which must not tell them apart."""
PRIOR_SIGMA: Final = 0.25


@lru_cache(maxsize=WINDOW + 1)
def _prior(num: int) -> tuple[float, ...]:
    """`num` evenly spaced quantiles of N(0, PRIOR_SIGMA²)."""
    normal = NormalDist(0.0, PRIOR_SIGMA)
    return tuple(normal.inv_cdf((i + 0.5) / num) for i in range(num))


_PRIOR: Final = _prior(WINDOW)


@dataclass(frozen=True, slots=True)
class Residuals:
    """log(observed / predicted), rising, per route; a route that is not named has the prior.

    The tests are those of split conformal prediction (Vovk et al. 2005): if the next residual is exchangeable
    with these, its p-value is valid whatever their distribution.
    """

    ttft: tuple[tuple[Route, tuple[float, ...]], ...] = ()
    step: tuple[tuple[Route, tuple[float, ...]], ...] = ()

    def _of(self, route: Route, metric: Metric) -> tuple[float, ...]:
        for name, residuals in self.ttft if metric == "ttft" else self.step:
            if name == route:
                return residuals
        return _PRIOR

    def p_miss(self, route: Route, metric: Metric, predicted: float, limit: float) -> float:
        """How likely something predicted to take `predicted` seconds takes more than `limit`, in (0, 1]."""
        return self.against(metric, limit)(route, predicted)

    def against(self, metric: Metric, limit: float) -> Callable[[Route, float], float]:
        """`p_miss` of one limit, for many ways that are predicted."""
        known = {route: self._of(route, metric) for route in _ROUTES}
        log_limit = math.log(limit) if limit > 0 else -math.inf

        def p_miss(route: Route, predicted: float) -> float:
            residuals = known[route]
            num = len(residuals)
            if 0 < predicted < math.inf:
                # Subtracted, not divided: the quotient of two finite numbers may be infinite, or 0.
                num_over = num - bisect_right(residuals, log_limit - math.log(predicted))
            else:  # a prediction of NaN misses
                num_over = 0 if 0 <= predicted <= limit else num
            return (1 + num_over) / (num + 1)

        return p_miss

    def upper(self, route: Route, metric: Metric, predicted: float, coverage: float) -> float:
        """Seconds that it will not exceed with probability `coverage`; inf where too little is known."""
        known = self._of(route, metric)
        rank = math.ceil(coverage * (len(known) + 1))
        return math.inf if rank > len(known) else predicted * math.exp(known[max(0, rank - 1)])


@dataclass(frozen=True, slots=True)
class Observed:
    """How a request went, in seconds; None where not known. `steps`: tokens after the first; `decode_s` is
    their time, and `edge_s`, `cloud_s`, `link_s` its parts in a split. `first_cloud_s`: from the
    prompt's arrival at the cloud to its first token's leaving."""

    ttft_s: float | None
    steps: int
    decode_s: float | None = None
    edge_s: float | None = None
    cloud_s: float | None = None
    link_s: float | None = None
    first_cloud_s: float | None = None


_RESOURCES: Final = ("edge", "link", "cloud")
_TERMS: Final[dict[Term, str | None]] = {
    ("local", "prefill"): "edge",
    ("local", "decode"): "edge",
    ("split", "prefill"): None,
    ("split", "edge"): "edge",
    ("split", "cloud"): "cloud",
    ("split", "link"): "link",
    ("offload", "prefill"): None,
    ("offload", "decode"): "cloud",
}
"""The resource that a term depends on; None: on all of them, by their shares of its predicted time."""
_PULSE: Final = "pulse"
"""What is the pulse's own: it times a few layers over and over, which stay in the processor's caches."""
_SIZE: Final = len(_RESOURCES) + len(_TERMS) + 1
_AT: Final = {name: i for i, name in enumerate((*_RESOURCES, *_TERMS, _PULSE))}

# Standard deviations of the log of a factor, before any sample …
_SHARED_PRIOR, _OWN_PRIOR, _LINK_PRIOR, _PULSE_PRIOR = 0.7, 0.35, 0.2, 0.15
# … and by how much it moves from one request to the next. The link's rates are measured by themselves.
_SHARED_DRIFT, _OWN_DRIFT, _LINK_DRIFT = 0.04, 0.02, 0.01
# What is left of it after a request without a sample: half after 350, and 140.
_SHARED_KEPT, _OWN_KEPT = 0.998, 0.995
_PREFILL_NOISE = 0.15
_SURPRISE = 0.5  # of a pulse: half as long again
_DECODE_NOISE, _STEP_NOISE = 0.1, 0.2  # of the whole, and of each step by itself
_LINK_NOISE, _QUEUE_NOISE = 0.3, 0.5  # of their share, where no spread was measured
_OUTLIER = 3.0  # in standard deviations: no sample moves further
_EXPECTED, _FARTHEST, _CHANGE = (
    1.0,
    4.0,
    5.0,
)  # what a sample adds to its sum, at most; the sum that is a change
_MOST: Final = math.log(8.0)

_Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Sample:
    """One term of one request. `weights`: of the state in the log of its factor."""

    term: Term
    log_ratio: float
    weights: _Vector
    noise: float


class Calibrator:
    """Learns from each request; `factors` and `residuals` are what the next decision should know."""

    def __init__(self) -> None:
        num_own = len(_TERMS) + 1
        kept = [_SHARED_KEPT] * len(_RESOURCES) + [_OWN_KEPT] * num_own
        prior = [_LINK_PRIOR if name == "link" else _SHARED_PRIOR for name in _RESOURCES]
        drift = [_LINK_DRIFT if name == "link" else _SHARED_DRIFT for name in _RESOURCES]
        self._kept: _Vector = np.array(kept)
        self._prior: _Vector = np.array([*prior, *[_OWN_PRIOR] * len(_TERMS), _PULSE_PRIOR]) ** 2
        self._drift: _Vector = np.diag(np.array(drift + [_OWN_DRIFT] * num_own) ** 2)
        self._restarted = np.arange(_SIZE) != _AT["link"]
        self._state: _Vector = np.zeros(_SIZE)
        self._covariance: _Vector = np.diag(self._prior)
        self._weights = {
            term: _one_hot(term, resource) for term, resource in _TERMS.items() if resource is not None
        }
        self._sums: dict[tuple[object, int], float] = {}
        self._ratios: dict[Term, float] = {}
        self._residuals: dict[tuple[Metric, Route], deque[float]] = {}
        self._factors = Factors()
        self._shown = Residuals()

    def factors(self) -> Factors:
        """What to multiply predicted terms with."""
        return self._factors

    def residuals(self) -> Residuals:
        """How far predictions with the factors of their time were off."""
        return self._shown

    def ratios(self) -> dict[Term, float]:
        """Of each term's newest sample: observed over what was predicted with the factors of that time."""
        return dict(self._ratios)

    def observe(
        self,
        world: World,
        work: Work,
        way: tuple[Route, int, Shape | None],
        observed: Observed,
        *,
        link: LinkView | None = None,
    ) -> None:
        """Take in how a request went that took `way`, decided upon in `world`. `link`: as it showed itself
        meanwhile; what changed in it is no fault of the model, only of the prediction. What was not measured,
        is not a positive number, or was predicted to take no time teaches nothing."""
        if way[0] != "local" and world.cloud is None:
            return  # there was no prediction
        work = replace(work, output_tokens=observed.steps + 1.0)
        raw_model = CostModel(replace(world, factors=Factors(), link=link or world.link), work)
        raw, predicted = raw_model.predict(*way), CostModel(world, work).predict(*way)
        self._note_mixtures(raw_model, way)
        self._state *= self._kept
        self._covariance *= np.outer(self._kept, self._kept)
        self._covariance += self._drift
        for term, seen, expected in _terms(raw, observed):
            sample = self._sample(world, raw, term, seen, expected, observed.steps)
            if sample is not None:
                self._take(sample)
                self._ratios[term] = seen / (expected * getattr(world.factors, "_".join(term)))
        self._note_residual("ttft", way[0], observed.ttft_s, predicted.ttft_s)
        step_s = predicted.decode_edge_s + predicted.decode_link_s + predicted.decode_cloud_s
        self._note_residual("step", way[0], observed.decode_s, step_s)
        self._show()

    def note_pulse(self, observed_s: float, predicted_s: float) -> bool:
        """Take in how long the edge took for a step by itself; whether that is a surprise. No request went
        by: nothing fades."""
        if not _positive(observed_s) or not _positive(predicted_s):
            return False
        weights: _Vector = np.zeros(_SIZE)
        weights[[_AT["edge"], _AT[_PULSE]]] = 1.0
        self._covariance[_AT["edge"], _AT["edge"]] += _SHARED_DRIFT**2
        ratio = math.log(observed_s) - math.log(predicted_s)
        error = ratio - float(weights @ self._state)
        self._take(_Sample(("local", _PULSE), ratio, weights, _DECODE_NOISE**2 + _STEP_NOISE**2))
        self._show()
        return abs(error) > _SURPRISE

    def _note_mixtures(self, model: CostModel, way: tuple[Route, int, Shape | None]) -> None:
        """A prefill over the link takes the time of several resources: remember in which shares."""
        if model.cloud is None:
            return
        split = way if way[0] == "split" else ("split", model.num_layers // 2, "prefix")
        ways: list[tuple[Route, int, Shape | None]] = [("offload", 0, None)]
        if 0 < split[1] < model.num_layers:
            ways.append(split)
        for each in ways:
            prediction = model.predict(*each)
            whole = _prefill_s(prediction)
            if _positive(whole):
                term: Term = (each[0], "prefill")
                weights = self._weights[term] = _one_hot(term, None)
                for name in _RESOURCES:
                    weights[_AT[name]] = getattr(prediction, f"prefill_{name}_s") / whole

    def _sample(
        self, world: World, raw: Prediction, term: Term, seen: float, expected: float, steps: int
    ) -> _Sample | None:
        if not _positive(seen) or not _positive(expected):
            return None
        weights = self._weights[term]
        if term[1] == "prefill":
            noise = _PREFILL_NOISE**2 + (_QUEUE_NOISE * raw.queue_s / expected) ** 2
        else:
            noise = _DECODE_NOISE**2 + _STEP_NOISE**2 / steps
        noise += (weights[_AT["link"]] * _link_noise(world)) ** 2
        return _Sample(term, math.log(seen) - math.log(expected), weights, noise)

    def _take(self, sample: _Sample) -> None:
        """One step of the filter, not led astray by an outlier."""
        weights, covariance = sample.weights, self._covariance
        error = sample.log_ratio - float(weights @ self._state)
        spread = covariance @ weights
        variance = float(weights @ spread) + sample.noise
        if self._has_changed(sample.term, error / math.sqrt(variance)):
            covariance += np.diag(self._prior * (weights != 0) * self._restarted)
            spread = covariance @ weights
            variance = float(weights @ spread) + sample.noise
        most = min(_MOST, _OUTLIER * math.sqrt(variance))
        self._state += spread * (max(-most, min(most, error)) / variance)
        covariance -= np.outer(spread, spread) / variance

    def _has_changed(self, term: Term, error: float) -> bool:
        """Is this one of several samples that are far off on the same side? `error`: in standard deviations.
        Never of the link's own term: what changes there is measured elsewhere."""
        resource = _TERMS.get(term, "edge")  # the pulse is no term of a route
        if resource == "link":
            return False
        watched: object = resource or term
        changed = False
        for side in (1, -1):
            before = self._sums.get((watched, side), 0.0)
            total = max(0.0, before + min(side * error, _FARTHEST) - _EXPECTED)
            self._sums[watched, side] = 0.0 if total >= _CHANGE else total
            changed |= total >= _CHANGE
        return changed

    def _note_residual(self, metric: Metric, route: Route, seen: float | None, predicted: float) -> None:
        if _positive(seen) and _positive(predicted):
            assert seen is not None
            window = self._residuals.setdefault((metric, route), deque(maxlen=WINDOW))
            window.append(round(math.log(seen) - math.log(predicted), 4))

    def _show(self) -> None:
        logs = {term: float(weights @ self._state) for term, weights in self._weights.items()}
        self._factors = Factors(**{"_".join(term): math.exp(value) for term, value in logs.items()})
        shown: dict[Metric, list[tuple[Route, tuple[float, ...]]]] = {"ttft": [], "step": []}
        for (metric, route), window in sorted(self._residuals.items()):
            shown[metric].append((route, tuple(sorted((*window, *_prior(WINDOW - len(window)))))))
        self._shown = Residuals(tuple(shown["ttft"]), tuple(shown["step"]))


def _terms(raw: Prediction, observed: Observed) -> list[tuple[Term, float, float]]:
    """Each term of the way with its observed and its predicted seconds; NaN where not observed."""
    route = raw.route
    found: list[tuple[Term, float | None, float]] = []
    beside = raw.load_s + raw.handshake_s
    prefill = _prefill_s(raw)
    if route == "offload" and observed.first_cloud_s is not None:
        # An outage that several requests meet is not the cloud's doing, and the link is measured by itself.
        found.append(((route, "prefill"), raw.prefill_link_s + observed.first_cloud_s, prefill))
    elif observed.ttft_s is not None and beside <= prefill:  # else the sample tells about loading
        found.append(((route, "prefill"), observed.ttft_s - beside, prefill))
    if observed.steps > 0 and route == "split":
        found.append(((route, "edge"), observed.edge_s, raw.decode_edge_s))
        found.append(((route, "link"), observed.link_s, raw.decode_link_s))
        found.append(((route, "cloud"), observed.cloud_s, raw.decode_cloud_s))
    elif observed.steps > 0:
        decode = raw.decode_edge_s + raw.decode_link_s + raw.decode_cloud_s
        found.append(((route, "decode"), observed.decode_s, decode))
    return [(term, math.nan if seen is None else seen, expected) for term, seen, expected in found]


def _prefill_s(prediction: Prediction) -> float:
    return (
        prediction.queue_s
        + prediction.prefill_edge_s
        + prediction.prefill_link_s
        + prediction.prefill_cloud_s
    )


def _one_hot(term: Term, resource: str | None) -> _Vector:
    weights: _Vector = np.zeros(_SIZE)
    weights[_AT[term]] = 1.0
    if resource is not None:
        weights[_AT[resource]] = 1.0
    return weights


def _positive(value: float | None) -> bool:
    """A number one can take the logarithm of; NaN is none."""
    return value is not None and 0 < value < math.inf


def _link_noise(world: World) -> float:
    """Relative spread of the link's estimates, the greater of round trip and uplink."""
    return max(_relative(world.link.rtt), _relative(world.link.up))


def _relative(estimate: Estimate | None) -> float:
    if estimate is None:
        return _LINK_NOISE
    if estimate.source == "given":
        return 0.0
    spread = estimate.deviation / estimate.value if estimate.value > 0 else _LINK_NOISE
    return min(1.0, max(0.1, spread)) if math.isfinite(spread) else _LINK_NOISE

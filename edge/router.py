"""Which way a request takes: hard constraints first, then the least weighted cost. Pure, with reasons.

A way's score is dollars: what its time is worth, money, energy, the risk of missing what the user expects,
and what its precision gives away. The way that the conversation took last is kept while another is only a
little better. Where nothing was measured to predict from, one stated rule holds instead: **local** where the
model fits in memory (no network, no cloud cost); else **offload** (one round trip per request); else
**split** at the deepest K that fits (one round trip per token: it pays for memory and policy, not for
latency).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, isfinite
from typing import Any, NamedTuple

from isthmus.edge.constraints import MIB, RouterInputs, Way, edge_bytes, violation
from isthmus.edge.policy import energy_weight
from isthmus.edge.requests import Candidate, Decision, Route
from isthmus.protocol.errors import RouteInfeasibleError
from isthmus.protocol.profiles import DeviceProfile
from isthmus.splitter.cost import CostModel, Prediction
from isthmus.splitter.links import Estimate
from isthmus.splitter.sides import finite
from isthmus.splitter.situation import World

__all__ = ["MIB", "RouterInputs", "Way", "best", "decide", "edge_bytes"]


class Score(NamedTuple):
    """Dollars."""

    time: float
    money: float
    energy: float
    slo_miss: float
    quality: float


class _Looked(NamedTuple):
    """A way as it was looked at; `broken`: the first constraint it breaks, with its detail."""

    way: Way
    broken: tuple[str, str] | None
    prediction: Prediction | None
    score: Score | None
    total: float


def decide(inputs: RouterInputs) -> Decision:
    """Choose a way, with its reason and every candidate.

    Raises RouteInfeasibleError if what was asked, or everything, breaks a hard constraint."""
    _check_asked(inputs)
    every = list(_look(inputs))
    candidates = tuple(_candidate(looked) for looked in every)
    asked = [looked for looked in every if _matches(inputs, looked.way)]
    feasible = [looked for looked in asked if looked.broken is None]
    if not feasible:
        raise _nothing_left(inputs, [c for c in candidates if _matches(inputs, (c.route, c.split, c.shape))])
    if any(looked.score is None for looked in feasible):
        way, reason = _by_rule(inputs, every, feasible)
        return Decision(*way, reason, candidates)
    cheapest = min(feasible, key=_order)
    chosen = _kept(inputs, feasible, cheapest)
    others = [looked.total for looked in feasible if looked.way[0] != chosen.way[0]]
    assert inputs.work is not None
    return Decision(
        *chosen.way,
        _reason(inputs, chosen, cheapest, feasible),
        candidates,
        margin=min(others) - chosen.total if others else None,
        expected_tokens=inputs.work.output_tokens,
        basis=_basis(inputs.world),
    )


def best(inputs: RouterInputs) -> Way:
    """The way that `decide` takes, without reasons. Raises RouteInfeasibleError as it does."""
    world, work = inputs.world, inputs.work
    if world is None or world.cloud is None or work is None:
        decision = decide(inputs)
        return decision.route, decision.split, decision.shape
    _check_asked(inputs)
    model, score, most_usd = CostModel(world, work), _Scorer(inputs), inputs.most_usd
    least, feasible, pinned = inf, [], inputs.pinned
    asked = inputs.route != "auto" or inputs.split is not None
    for way in model.ways(inputs.split_shape):
        if asked and not _matches(inputs, way):
            continue
        prediction = model.predict(*way)
        total = score.total(prediction)
        if total > least and way != pinned:
            continue  # whatever it may or may not, it is not taken
        if violation(inputs, way, prediction.memory_bytes, prediction.most_usd, most_usd) is None:
            feasible.append(_Looked(way, None, prediction, None, total))
            least = min(least, total)
    if not feasible:
        decide(inputs)  # tells why
    return _kept(inputs, feasible, min(feasible, key=_order)).way


# ---- looking at every way ----------------------------------------------------------------------------


def _look(inputs: RouterInputs) -> Iterator[_Looked]:
    world, work = inputs.world, inputs.work
    model = CostModel(world, work) if world is not None and work is not None else None
    remote = world is not None and world.cloud is not None
    score, most_usd = _Scorer(inputs), inputs.most_usd
    shape = inputs.split_shape
    ways: list[Way] = [("local", inputs.num_layers, None), ("offload", 0, None)]
    ways += [("split", k, shape) for k in range(1, inputs.num_layers)]
    for way in ways:
        route, split, shape_ = way
        if model is None:
            broken = violation(inputs, way, edge_bytes(inputs, split, shape_), 0.0, most_usd)
            yield _Looked(way, broken, None, None, 0.0)
        elif route != "local" and not remote:
            broken = violation(inputs, way, model.memory_bytes(split, shape_), 0.0, most_usd)
            yield _Looked(way, broken, None, None, 0.0)
        else:
            prediction = model.predict(route, split, shape_)
            broken = violation(inputs, way, prediction.memory_bytes, prediction.most_usd, most_usd)
            parts = score(prediction)
            yield _Looked(way, broken, prediction, parts, sum(parts))


class _Scorer:
    """Scores of one decision's ways; what they have in common is worked out once."""

    __slots__ = ("_energy_usd_per_j", "_late", "_quality", "_slo_miss_usd", "_slow", "_usd_per_s")

    def __init__(self, inputs: RouterInputs) -> None:
        policy, world, work = inputs.policy, inputs.world, inputs.work
        self._usd_per_s = policy.usd_per_s
        self._energy_usd_per_j = energy_weight(policy, inputs.device)
        slo, residuals = inputs.slo, inputs.residuals
        self._slo_miss_usd = policy.slo_miss_usd if slo else 0.0
        self._late = None if slo.ttft_s is None else residuals.against("ttft", slo.ttft_s)
        self._slow = None if slo.tokens_per_s is None else residuals.against("step", 1.0 / slo.tokens_per_s)
        self._quality = (0.0, 0.0)
        if world is not None and work is not None:
            # What both sides' precision gives away over the whole answer, by the layers that each runs.
            edge = finite(world.edge.kl) or 0.0
            cloud = (finite(world.cloud.kl) or 0.0) if world.cloud else 0.0
            worth = policy.usd_per_nat * work.output_tokens
            self._quality = (worth * cloud, worth * (edge - cloud) / inputs.num_layers)

    def __call__(self, predicted: Prediction) -> Score:
        return Score(*self._parts(predicted))

    def total(self, predicted: Prediction) -> float:
        """The parts' sum."""
        return sum(self._parts(predicted))

    def _parts(self, predicted: Prediction) -> tuple[float, float, float, float, float]:
        base, per_layer = self._quality
        return (
            self._usd_per_s * predicted.total_s,
            predicted.cost_usd,
            self._energy_usd_per_j * (predicted.energy_j or 0.0),
            self._slo_miss_usd * self._p_miss(predicted) if self._slo_miss_usd else 0.0,
            base + per_layer * predicted.split,
        )

    def _p_miss(self, predicted: Prediction) -> float:
        """Probability that either expectation is missed, by how far earlier predictions were off."""
        kept = 1.0
        if self._late is not None:
            kept -= self._late(predicted.route, predicted.ttft_s)
        if self._slow is not None and predicted.tokens_per_s > 0:
            kept *= 1.0 - self._slow(predicted.route, 1.0 / predicted.tokens_per_s)
        return 1.0 - kept


def _order(looked: _Looked) -> tuple[float, float, int]:
    """Least score first; among equals what sends less, then what keeps less on the edge."""
    prediction = looked.prediction
    sent = 0.0 if prediction is None else prediction.bytes_up + prediction.bytes_down
    total = looked.total if isfinite(looked.total) else inf
    return total, sent, looked.way[1]


def _kept(inputs: RouterInputs, feasible: list[_Looked], cheapest: _Looked) -> _Looked:
    """The way taken last, where the cheapest is no more than the hysteresis better."""
    last = next((looked for looked in feasible if looked.way == inputs.pinned), None)
    if last is not None and last.total <= cheapest.total * (1.0 + inputs.policy.hysteresis):
        return last
    return cheapest


# ---- what was asked ----------------------------------------------------------------------------------


def _check_asked(inputs: RouterInputs) -> None:
    """A K that does not exist cannot be a candidate; it is refused with both numbers."""
    if inputs.split is None:
        return
    low, high = (0, inputs.num_layers) if inputs.route == "auto" else (1, inputs.num_layers - 1)
    if not low <= inputs.split <= high:
        raise RouteInfeasibleError(
            f"split is {inputs.split}, possible are {low} to {high} with {inputs.num_layers} layers",
            code="bad_split",
            hint="K = 0 is the route offload, K = N is local",
        )


def _matches(inputs: RouterInputs, way: Way) -> bool:
    """Is the way one of those the request asked for?"""
    if inputs.split is not None and way[1] != inputs.split:
        return False
    return inputs.route in ("auto", way[0])


def _nothing_left(inputs: RouterInputs, asked: list[Candidate]) -> RouteInfeasibleError:
    """The error for a request none of whose asked candidates is feasible."""
    first: dict[tuple[Route, str | None], Candidate] = {}
    for candidate in asked:
        first.setdefault((candidate.route, candidate.violated), candidate)
    details = "; ".join(f"{c.route}: {c.detail}" for c in first.values())
    wanted = "no route" if inputs.route == "auto" else f"route {inputs.route} not"
    hints = {
        "privacy": "the privacy of a request is never loosened: change the request or the route",
        "grammar": "take the route local, or split in the U-shape: there this device samples",
        "budget": "allow more money, fewer tokens, or a route on this device",
        "memory": "give the edge more memory, a smaller K, or a shorter context",
        "blocks": "start the edge with --pull-from-cloud and a larger --split, or without it",
        "cloud": "name a reachable cloud with --cloud, or take route local",
    }
    hint = next((hints[c.violated] for c in asked if c.violated in hints), "")
    return RouteInfeasibleError(f"{wanted} possible: {details}", hint=hint)


# ---- without predictions -----------------------------------------------------------------------------


def _by_rule(inputs: RouterInputs, every: list[_Looked], feasible: list[_Looked]) -> tuple[Way, str]:
    """The stated rule among the feasible ways that were asked for."""
    ways = [looked.way for looked in feasible]
    why = {looked.way[0]: looked.broken[1] for looked in reversed(every) if looked.broken is not None}
    if inputs.split is not None:
        return ways[0], f"K = {inputs.split} was asked"
    if inputs.route in ("local", "offload"):
        return ways[0], f"route {inputs.route} was asked"
    if inputs.route == "split":
        middle = max(inputs.num_layers // 2, inputs.min_depth)
        shallow = [way for way in ways if way[1] <= middle]
        chosen = shallow[-1] if shallow else ways[0]
        return chosen, f"route split was asked; K = {chosen[1]}: the deepest that fits, up to the middle"
    found = {way[0]: way for way in ways}  # of the splits, the deepest
    if "local" in found:
        return found["local"], "the whole model fits on the edge: no network, no cloud cost"
    local = why.get("local", "not possible")
    if "offload" in found:
        return (
            found["offload"],
            f"local: {local}; offload costs one round trip per request, split one per token",
        )
    offload = why.get("offload", "not possible")
    return found["split"], f"local: {local}; offload: {offload}; split at the deepest K that fits"


# ---- reasons -----------------------------------------------------------------------------------------


def _candidate(looked: _Looked) -> Candidate:
    name, detail = looked.broken or (None, "")
    predicted, score = looked.prediction, looked.score
    if predicted is None or score is None:
        return Candidate(*looked.way, looked.broken is None, name, detail)
    return Candidate(
        *looked.way, looked.broken is None, name, detail,
        predicted.ttft_s, predicted.total_s, predicted.tokens_per_s, predicted.energy_j,
        predicted.cost_usd, predicted.most_usd, predicted.bytes_up, predicted.bytes_down,
        predicted.memory_bytes, predicted.terms(), looked.total, score._asdict(),
    )  # fmt: skip


def _told(looked: _Looked) -> str:
    """A way in a few words, with its figures."""
    route, split, _ = looked.way
    predicted = looked.prediction
    assert predicted is not None
    name = f"split at K = {split}" if route == "split" else route
    parts = [f"{predicted.total_s:.2f} s"]
    if predicted.cost_usd:
        parts.append(f"${predicted.cost_usd:.2g}")
    if looked.score is not None and looked.score.energy:
        parts.append(f"{predicted.energy_j:.1f} J")
    return f"{name} ({', '.join(parts)})"


def _reason(inputs: RouterInputs, chosen: _Looked, cheapest: _Looked, feasible: list[_Looked]) -> str:
    """Why this way, in a sentence."""
    if inputs.split is not None or inputs.route in ("local", "offload"):
        asked = f"K = {inputs.split}" if inputs.split is not None else f"route {inputs.route}"
        return f"{asked} was asked: {_told(chosen)}"
    if chosen is not cheapest:
        return f"{_told(chosen)} was taken last, and {_told(cheapest)} is hardly better"
    others = [looked for looked in feasible if looked.way[0] != chosen.way[0]]
    if not others:
        return f"{_told(chosen)} is the best of what is possible"
    second = min(others, key=_order)
    assert chosen.score is not None
    assert second.score is not None
    saved = {name: b - a for name, a, b in zip(Score._fields, chosen.score, second.score, strict=True)}
    most = max(saved, key=lambda name: saved[name])
    return f"{_told(chosen)} costs least, before {_told(second)}: it saves {_WORDS[most]}"


_WORDS = {
    "time": "time",
    "money": "money",
    "energy": "energy",
    "slo_miss": "the risk of missing what was expected",
    "quality": "precision",
}


def _basis(world: World | None) -> dict[str, Any]:
    """What the predictions rest on, and how old it is."""
    if world is None:
        return {}
    link = {"rtt_s": world.link.rtt, "up_bytes_per_s": world.link.up, "down_bytes_per_s": world.link.down}
    basis: dict[str, Any] = {
        "edge": _told_device(world.edge),
        "link": {name: _told_estimate(estimate) for name, estimate in link.items()},
    }
    if world.cloud is not None:
        state = world.cloud_state
        load = {"sessions": state.sessions, "queue_s": state.queue_s, "load_age_s": state.age_s}
        basis["cloud"] = {**_told_device(world.cloud), **load}
    factors = world.factors
    basis["observed_over_predicted"] = {name: getattr(factors, name) for name in factors.__slots__}
    return basis


def _told_device(profile: DeviceProfile) -> dict[str, Any]:
    labels = dict(profile.labels)
    return {"device": profile.device, "dated": profile.dated, "note": profile.note, "labels": labels}


def _told_estimate(estimate: Estimate | None) -> dict[str, Any]:
    if estimate is None or not isfinite(estimate.value):
        return {"value": None, "source": "unlimited" if estimate is not None else "assumed"}
    return {
        "value": estimate.value,
        "deviation": estimate.deviation,
        "age_s": estimate.age_s,
        "num_samples": estimate.num_samples,
        "source": estimate.source,
    }

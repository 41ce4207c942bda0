"""Which way is best for a kind of request on given devices and link: K under constraints, by an objective.

Pure, like the cost model it asks. Constraints are checked in the order cloud, depth, context, memory, energy,
slo_ttft, slo_tokens_per_s; a way names the first one it breaks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from isthmus.protocol.errors import ConfigError, RouteInfeasibleError
from isthmus.splitter.cost import CostModel, Prediction
from isthmus.splitter.links import Estimate, LinkView
from isthmus.splitter.situation import Route, Shape, Work, World

Objective = Literal["latency", "throughput", "energy", "money", "weighted"]
OBJECTIVES: Final[tuple[Objective, ...]] = ("latency", "throughput", "energy", "money", "weighted")
MIB: Final = 1 << 20
SLO_Z: Final = 1.2816
"""An SLO is held against the link's 90 % quantile, not its mean: this many deviations (of a normal) off."""

_HINTS: Final = {
    "cloud": "name a cloud with --cloud, or its profile with --cloud-profile",
    "depth": "a smaller --min-depth leaves more ways",
    "context": "fewer tokens, or a cloud with a longer context",
    "memory": "give the edge more memory, fewer bits, or a shorter context",
    "energy": "a profile with watts (isthmus profile --active-watts), or another objective",
    "slo_ttft": "a later first token, or a nearer cloud",
    "slo_tokens_per_s": "fewer tokens per second, or a nearer cloud",
}


@dataclass(frozen=True, slots=True)
class Weights:
    """What the objective `weighted` pays for a second and for a joule of the edge, in dollars."""

    usd_per_s: float = 1e-3
    usd_per_j: float = 5e-5


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """A kind of request and what is wanted of it.

    `context_tokens`: for how many tokens the edge must hold the KV (least: prompt and output).
    `edge_memory_bytes`: what the model may add to an idle agent (None: no limit). `min_depth`: fewest layers
    on the edge; 0 allows offload. `cloud_context`: most tokens that the cloud takes in a session (None:
    unknown).
    """

    prompt_tokens: int
    output_tokens: int
    context_tokens: int = 0
    edge_memory_bytes: int | None = None
    min_depth: int = 0
    cloud_context: int | None = None
    shape: Shape = "prefix"
    slo_ttft_s: float | None = None
    slo_tokens_per_s: float | None = None
    objective: Objective = "latency"
    weights: Weights = Weights()

    def __post_init__(self) -> None:
        for name, value in (("prompt_tokens", self.prompt_tokens), ("output_tokens", self.output_tokens)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, the least is 1", code="bad_plan")

    @property
    def tokens(self) -> int:
        """Tokens whose KV is held."""
        return max(self.context_tokens, self.prompt_tokens + self.output_tokens)


@dataclass(frozen=True, slots=True)
class PlannedWay:
    """A way, its figures (None where there is no cloud to predict from), and the first constraint it breaks.

    `objective`: what is minimised: seconds, seconds per token, joules or dollars.
    """

    route: Route
    split: int
    shape: Shape | None
    prediction: Prediction | None
    objective: float | None
    violated: str | None = None
    detail: str = ""

    @property
    def feasible(self) -> bool:
        return self.violated is None

    @property
    def name(self) -> str:
        """For people: `local`, `offload`, `split at K = 12`."""
        return f"split at K = {self.split}" if self.route == "split" else self.route

    def to_dict(self) -> dict[str, Any]:
        """As the JSON output has it; seconds, joules, dollars, bytes."""
        told: dict[str, Any] = {
            "route": self.route, "split": self.split, "shape": self.shape,
            "feasible": self.feasible, "violated": self.violated, "detail": self.detail,
            "objective": self.objective,
        }  # fmt: skip
        p = self.prediction
        names = ("ttft_s", "tokens_per_s", "total_s", "bottleneck_s", "energy_j", "cost_usd", "bytes_up",
                 "bytes_down", "memory_bytes")  # fmt: skip
        told |= {name: None if p is None else getattr(p, name) for name in names}
        return told | {"terms": None if p is None else p.terms()}


@dataclass(frozen=True, slots=True)
class Plan:
    """Every candidate in the order local, offload, K = 1 …; the best feasible one, and why it is that."""

    request: PlanRequest
    best: PlannedWay | None
    candidates: tuple[PlannedWay, ...]
    reason: str

    def require(self) -> PlannedWay:
        """The best way. RouteInfeasibleError, with what each broke first, where there is none."""
        if self.best is not None:
            return self.best
        first = next(way.violated for way in reversed(self.candidates) if way.violated is not None)
        raise RouteInfeasibleError(
            f"no way is feasible: {self.reason}", code="no_feasible_plan", hint=_HINTS[first]
        )


def plan(world: World, request: PlanRequest) -> Plan:
    """The best way under the request's constraints, and every other one beside it.

    Ties go to fewer bytes on the link, then to the smaller K. Deterministic.
    """
    longest = request.tokens - request.prompt_tokens
    work = Work(request.prompt_tokens, request.output_tokens, longest)
    usual = CostModel(world, work)
    slow = _slow_link(world.link)
    wary = usual if slow == world.link else CostModel(replace(world, link=slow), work)
    ways = tuple(_planned(usual, wary, request, *way) for way in usual.ways(request.shape))
    feasible = sorted((way for way in ways if way.feasible), key=_rank)
    best = feasible[0] if feasible else None
    return Plan(request, best, ways, _reason(request, ways, feasible))


def _planned(
    usual: CostModel, wary: CostModel, request: PlanRequest, route: Route, split: int, shape: Shape | None
) -> PlannedWay:
    if route != "local" and usual.cloud is None:
        return PlannedWay(route, split, shape, None, None, "cloud", "no cloud is known")
    prediction = usual.predict(route, split, shape)
    objective = _objective(prediction, request)
    way = PlannedWay(route, split, shape, prediction, objective)
    pessimistic = prediction if wary is usual else wary.predict(route, split, shape)
    broken = _violation(prediction, pessimistic, objective, request)
    return way if broken is None else replace(way, violated=broken[0], detail=broken[1])


def _violation(
    usual: Prediction, wary: Prediction, objective: float | None, request: PlanRequest
) -> tuple[str, str] | None:
    """The first constraint broken, with both numbers."""
    if usual.split < request.min_depth:
        return "depth", f"K = {usual.split} is below the minimum depth {request.min_depth}"
    limit = request.cloud_context
    if usual.route != "local" and limit is not None and request.tokens > limit:
        return "context", f"{request.tokens} tokens, the cloud allows {limit}"
    memory = request.edge_memory_bytes
    if memory is not None and usual.memory_bytes > memory:
        return "memory", f"needs {usual.memory_bytes / MIB:.1f} MB, the limit is {memory / MIB:.1f} MB"
    if objective is None:
        return "energy", f"the edge's power is unknown, and the objective is {request.objective}"
    asked = request.slo_ttft_s
    if asked is not None and wary.ttft_s > asked:
        return "slo_ttft", f"first token after {wary.ttft_s:.3g} s, asked within {asked:.3g} s"
    speed = request.slo_tokens_per_s
    if speed is not None and wary.tokens_per_s < speed:
        return "slo_tokens_per_s", f"{wary.tokens_per_s:.3g} tokens/s, asked are {speed:.3g}"
    return None


def _objective(p: Prediction, request: PlanRequest) -> float | None:
    """What is minimised; None where it takes the edge's power and that is unknown."""
    match request.objective:
        case "latency":
            return p.total_s
        case "throughput":
            return p.bottleneck_s
        case "energy":
            return p.energy_j
        case "money":
            return p.cost_usd
        case "weighted":
            weights = request.weights
            if weights.usd_per_j == 0:
                return weights.usd_per_s * p.total_s + p.cost_usd
            if p.energy_j is None:
                return None
            return weights.usd_per_s * p.total_s + weights.usd_per_j * p.energy_j + p.cost_usd


def _rank(way: PlannedWay) -> tuple[float, float, int]:
    assert way.objective is not None  # feasible
    assert way.prediction is not None
    return way.objective, way.prediction.bytes_up + way.prediction.bytes_down, way.split


def _slow_link(link: LinkView) -> LinkView:
    """The link at its 90 % quantile: slower by SLO_Z deviations, though never below a quarter of its rate."""

    def rate(estimate: Estimate | None) -> Estimate | None:
        if estimate is None or not estimate.deviation > 0:
            return estimate
        least = max(estimate.value / 4, estimate.value - SLO_Z * estimate.deviation)
        return replace(estimate, value=least)

    rtt = link.rtt
    if rtt is not None and rtt.deviation > 0:
        rtt = replace(rtt, value=rtt.value + SLO_Z * rtt.deviation)
    return LinkView(rtt, rate(link.up), rate(link.down))


# ---- in words --------------------------------------------------------------------------------------


def objective_text(way: PlannedWay, objective: Objective) -> str:
    """The objective's value of a way with figures, in its unit."""
    value, p = way.objective, way.prediction
    assert value is not None
    assert p is not None
    match objective:
        case "latency":
            return f"{value:.3g} s in all"
        case "throughput":
            return f"{1 / value:.3g} tokens/s of many requests" if value > 0 else "no limit"
        case "energy":
            return f"{value:.3g} J on the edge"
        case "money" | "weighted":
            return f"${value:.3g}"


def _reason(request: PlanRequest, ways: Iterable[PlannedWay], feasible: list[PlannedWay]) -> str:
    """Why the best is the best: its figure, the best of each other route, or what that breaks first."""
    broken: dict[tuple[Route, str | None], PlannedWay] = {}
    for way in ways:
        if not way.feasible:
            broken.setdefault((way.route, way.violated), way)
    if not feasible:
        return "; ".join(f"{way.name}: {way.detail}" for way in broken.values())
    best = feasible[0]
    told = [f"{best.name}: {objective_text(best, request.objective)}, the best of {len(feasible)} feasible"]
    for route in ("local", "offload", "split"):
        if route == best.route:
            continue
        other = next((way for way in feasible if way.route == route), None)
        if other is not None:
            told.append(f"{other.name}: {objective_text(other, request.objective)}")
        else:
            told += [f"{way.name}: {way.detail}" for (of, _), way in broken.items() if of == route]
    return "; ".join(told)

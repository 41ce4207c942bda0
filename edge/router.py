"""Which route a request takes: hard constraints first, then one stated simple rule. Pure functions.

The rule of `auto`: **local** where the model fits in memory (no network, no cloud cost); else
**offload** (one round trip per request); else **split** at the deepest K that fits (one round trip per
token: it pays for memory and policy, not for latency). Constraints are checked in the order privacy,
cloud, identity, depth, context, memory; a candidate names the first one it breaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from isthmus.edge.requests import Candidate, Decision, Privacy, Route, RouteAsk, Shape
from isthmus.protocol.errors import RouteInfeasibleError

MIB = 1 << 20


@dataclass(frozen=True)
class RouterInputs:
    """Everything a decision depends on; equal inputs give equal decisions.

    `tokens`: prompt + max_tokens. `layer_bytes`: weights of each layer; `kv_bytes`: per token and layer.
    `memory_bytes` None = unlimited. `cloud_state`: "none" (not configured), "unknown" (never tried),
    "up", "down", "refused" (another model; `cloud_detail` says what differs).
    `cloud_context` None = unknown yet. `min_depth` binds privacy `activations-only`; `shape` concerns
    splits only.
    """

    num_layers: int
    layer_bytes: tuple[int, ...]
    embed_bytes: int
    head_bytes: int
    kv_bytes: int
    tokens: int
    memory_bytes: int | None = None
    min_depth: int = 1
    cloud_state: str = "none"
    cloud_detail: str = ""
    cloud_context: int | None = None
    route: RouteAsk = "auto"
    split: int | None = None
    shape: Shape | None = None
    privacy: Privacy = "any"


def edge_bytes(inputs: RouterInputs, split: int, shape: Shape | None) -> int:
    """What running this candidate adds to an idle agent: weights of its blocks and the KV, in bytes.

    `head_bytes` counts what the head reads beyond the embedding (0 if tied, then it reads that)."""
    if split == 0:
        return 0
    weights = inputs.embed_bytes + sum(inputs.layer_bytes[:split])
    if shape != "prefix":
        weights += inputs.head_bytes
    return weights + inputs.kv_bytes * split * inputs.tokens


def _violation(inputs: RouterInputs, route: Route, split: int, shape: Shape | None) -> tuple[str, str] | None:
    """The first hard constraint the candidate breaks and its detail, or None."""
    if inputs.privacy == "local-only" and route != "local":
        return "privacy", "privacy is local-only: nothing may leave the device"
    if inputs.privacy == "activations-only" and route == "offload":
        return "privacy", "privacy is activations-only: offload would send token ids"
    if inputs.privacy == "activations-only" and shape == "prefix":
        return "privacy", "privacy is activations-only: in the prefix shape the cloud sees the output ids"
    if route != "local":
        if inputs.cloud_state == "none":
            return "cloud", "no cloud is configured"
        if inputs.cloud_state == "down":
            return "cloud", inputs.cloud_detail or "the cloud is not reachable"
        if inputs.cloud_state == "refused":
            return "identity", inputs.cloud_detail or "the cloud serves another model"
    if route == "split" and inputs.privacy == "activations-only" and split < inputs.min_depth:
        return "depth", f"K = {split} is below the minimum depth {inputs.min_depth}"
    if route != "local" and inputs.cloud_context is not None and inputs.tokens > inputs.cloud_context:
        return "context", f"{inputs.tokens} tokens, the cloud allows {inputs.cloud_context}"
    if inputs.memory_bytes is not None and (need := edge_bytes(inputs, split, shape)) > inputs.memory_bytes:
        return "memory", f"needs {need / MIB:.1f} MB, the limit is {inputs.memory_bytes / MIB:.1f} MB"
    return None


def _shape(inputs: RouterInputs) -> Shape:
    """The shape a split takes: the asked one; else U where privacy demands it, else prefix (fewer bytes
    down, no head on the edge)."""
    return inputs.shape or ("u" if inputs.privacy == "activations-only" else "prefix")


def candidates(inputs: RouterInputs) -> Iterator[Candidate]:
    """Every way to serve the request: local, offload, and a split at each K."""
    ways: list[tuple[Route, int, Shape | None]] = [("local", inputs.num_layers, None), ("offload", 0, None)]
    ways += [("split", k, _shape(inputs)) for k in range(1, inputs.num_layers)]
    for route, split, shape in ways:
        broken = _violation(inputs, route, split, shape)
        if broken is None:
            yield Candidate(route, split, shape, feasible=True)
        else:
            yield Candidate(route, split, shape, feasible=False, violated=broken[0], detail=broken[1])


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


def decide(inputs: RouterInputs) -> Decision:
    """Choose a route, with its reason and every candidate.

    Raises RouteInfeasibleError if what was asked, or everything, breaks a hard constraint."""
    _check_asked(inputs)
    every = tuple(candidates(inputs))
    asked = [c for c in every if _matches(inputs, c)]
    feasible = [c for c in asked if c.feasible]
    if not feasible:
        raise _nothing_left(inputs, asked)
    chosen, reason = _choose(inputs, every, feasible)
    return Decision(chosen.route, chosen.split, chosen.shape, reason, every)


def _matches(inputs: RouterInputs, candidate: Candidate) -> bool:
    """Is the candidate one of those the request asked for?"""
    if inputs.split is not None and candidate.split != inputs.split:
        return False
    return inputs.route in ("auto", candidate.route)


def _choose(
    inputs: RouterInputs, every: tuple[Candidate, ...], feasible: list[Candidate]
) -> tuple[Candidate, str]:
    """The stated rule among the feasible candidates that were asked for."""
    if inputs.split is not None:
        return feasible[0], f"K = {inputs.split} was asked"
    if inputs.route in ("local", "offload"):
        return feasible[0], f"route {inputs.route} was asked"
    if inputs.route == "split":
        middle = max(inputs.num_layers // 2, inputs.min_depth)
        shallow = [c for c in feasible if c.split <= middle]
        chosen = shallow[-1] if shallow else feasible[0]
        return chosen, f"route split was asked; K = {chosen.split}: the deepest that fits, up to the middle"
    for candidate in feasible:
        if candidate.route == "local":
            return candidate, "the whole model fits on the edge: no network, no cloud cost"
    local = next(c for c in every if c.route == "local")
    why = local.detail or "local is not possible"
    for candidate in feasible:
        if candidate.route == "offload":
            return candidate, f"local: {why}; offload costs one round trip per request, split one per token"
    chosen = feasible[-1]
    offload = next(c for c in every if c.route == "offload")
    return chosen, f"local: {why}; offload: {offload.detail}; split at the deepest K that fits"


def _nothing_left(inputs: RouterInputs, asked: list[Candidate]) -> RouteInfeasibleError:
    """The error for a request none of whose asked candidates is feasible."""
    first: dict[tuple[Route, str | None], Candidate] = {}
    for candidate in asked:
        first.setdefault((candidate.route, candidate.violated), candidate)
    details = "; ".join(f"{c.route}: {c.detail}" for c in first.values())
    wanted = "no route" if inputs.route == "auto" else f"route {inputs.route} not"
    hints = {
        "privacy": "the privacy of a request is never loosened: change the request or the route",
        "memory": "give the edge more memory, a smaller K, or a shorter context",
        "cloud": "name a reachable cloud with --cloud, or take route local",
    }
    hint = next((hints[c.violated] for c in asked if c.violated in hints), "")
    return RouteInfeasibleError(f"{wanted} possible: {details}", hint=hint)

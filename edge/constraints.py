"""What may not be, whatever it would save: the hard constraints of a route, checked before all weighing.

In this order: privacy, grammar, cloud, identity, depth, context, blocks, memory, budget. A way names the
first one it breaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from isthmus.edge.calibration import Residuals
from isthmus.edge.policy import DeviceState, Policy
from isthmus.edge.requests import Privacy, RouteAsk, Slo
from isthmus.splitter.situation import Route, Shape, Work, World

MIB: Final = 1 << 20

Way = tuple[Route, int, Shape | None]
"""Route, layers on the edge, shape of a split."""


@dataclass(frozen=True)
class RouterInputs:
    """Everything a decision depends on; equal inputs give equal decisions.

    `tokens`: prompt + max_tokens. `layer_bytes`: weights of each layer; `kv_bytes`: per token and layer.
    `memory_bytes` None = unlimited. `cloud_state`: "none" (not configured), "unknown" (never tried),
    "up", "down", "refused" (another model; `cloud_detail` says what differs).
    `cloud_context` None = unknown yet. `min_depth` binds privacy `activations-only`; `shape` concerns
    splits only. `layers_here`: how many layers this device has, from the first on; None = all. `head_here`:
    whether it has the head. `grammar`: whether the answer is held to one.

    `world`, `work`: what predictions rest on; None where this device has no profile. `pinned`: the way that
    the conversation took last. `budget_left_usd`: what may still be spent. `residuals`: how far predictions
    were off.
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
    layers_here: int | None = None
    head_here: bool = True
    route: RouteAsk = "auto"
    split: int | None = None
    shape: Shape | None = None
    privacy: Privacy = "any"
    grammar: bool = False
    world: World | None = None
    work: Work | None = None
    slo: Slo = Slo()
    max_cost_usd: float | None = None
    budget_left_usd: float | None = None
    policy: Policy = Policy()
    device: DeviceState = DeviceState()
    residuals: Residuals = Residuals()
    pinned: Way | None = None

    @property
    def split_shape(self) -> Shape:
        """The shape a split takes: the asked one; else U where privacy or a grammar demands it, else prefix
        (fewer bytes down, no head on the edge)."""
        return self.shape or ("u" if self.privacy == "activations-only" or self.grammar else "prefix")

    @property
    def most_usd(self) -> float | None:
        """What this request may cost at most; None: anything."""
        bounds = [b for b in (self.max_cost_usd, self.budget_left_usd) if b is not None]
        return min(bounds) if bounds else None


def edge_bytes(inputs: RouterInputs, split: int, shape: Shape | None) -> int:
    """What running this way adds to an idle agent, as the pack tells it: weights of its blocks and the KV, in
    bytes. A profile knows better: it has measured what the weights take in memory.

    `head_bytes` counts what the head reads beyond the embedding (0 if tied, then it reads that)."""
    if split == 0:
        return 0
    weights = inputs.embed_bytes + sum(inputs.layer_bytes[:split])
    if shape != "prefix":
        weights += inputs.head_bytes
    return weights + inputs.kv_bytes * split * inputs.tokens


def violation(
    inputs: RouterInputs, way: Way, need_bytes: int, most_usd: float, allowed_usd: float | None
) -> tuple[str, str] | None:
    """The first hard constraint the way breaks and its detail, or None. `need_bytes`: memory that it takes,
    `most_usd`: what it may come to cost, of the `allowed_usd` that `inputs.most_usd` says."""
    route, split, shape = way
    if inputs.privacy != "any" and (broken := _private(inputs, route, split, shape)) is not None:
        return broken
    if inputs.grammar and (route == "offload" or shape == "prefix"):
        return "grammar", "the cloud samples there, and cannot be held to a grammar"
    if route != "local":
        if inputs.cloud_state == "none":
            return "cloud", "no cloud is configured"
        if inputs.cloud_state == "down":
            return "cloud", inputs.cloud_detail or "the cloud is not reachable"
        if inputs.cloud_state == "refused":
            return "identity", inputs.cloud_detail or "the cloud serves another model"
        if route == "split" and inputs.privacy == "activations-only" and split < inputs.min_depth:
            return "depth", f"K = {split} is below the minimum depth {inputs.min_depth}"
        if inputs.cloud_context is not None and inputs.tokens > inputs.cloud_context:
            return "context", f"{inputs.tokens} tokens, the cloud allows {inputs.cloud_context}"
    if (missing := _missing(inputs, split, shape)) is not None:
        return "blocks", missing
    if inputs.memory_bytes is not None and need_bytes > inputs.memory_bytes:
        return (
            "memory",
            f"needs {need_bytes / MIB:.1f} MB, the limit is {inputs.memory_bytes / MIB:.1f} MB",
        )
    # Written so that a bound of NaN refuses.
    if most_usd > 0 and allowed_usd is not None and not most_usd <= allowed_usd:
        return "budget", f"may cost ${most_usd:.3g}, ${max(0.0, allowed_usd):.3g} is allowed"
    return None


def _missing(inputs: RouterInputs, split: int, shape: Shape | None) -> str | None:
    """What the way needs of the model that was not pulled to this device."""
    here = inputs.layers_here
    if here is not None and split > here:
        has = f"{0}..{here - 1}" if here else "none"
        return f"needs layers {here}..{split - 1}, this device has {has}"
    if split and shape != "prefix" and not inputs.head_here:
        return "needs the head, which is not on this device"
    return None


def _private(inputs: RouterInputs, route: Route, split: int, shape: Shape | None) -> tuple[str, str] | None:
    if inputs.privacy == "local-only":
        if route == "local":
            return None
        return "privacy", "privacy is local-only: nothing may leave the device"
    if route == "offload":
        return "privacy", "privacy is activations-only: offload would send token ids"
    if shape == "prefix":
        return "privacy", "privacy is activations-only: in the prefix shape the cloud sees the output ids"
    return None

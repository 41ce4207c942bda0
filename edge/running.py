"""A request that runs: what it holds, and what it may still do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from isthmus.edge.requests import Decision, Finished, GenerateRequest, Route, Shape
from isthmus.edge.router import decide
from isthmus.protocol.errors import RouteInfeasibleError

if TYPE_CHECKING:
    from isthmus.edge.constraints import RouterInputs
    from isthmus.edge.grammar import Compiled
    from isthmus.edge.link import CloudLink
    from isthmus.edge.placement import Placement


@dataclass(eq=False)
class Running:
    """What a running request holds: layers, whether the head, and tokens its KV may grow to; and its way."""

    request: GenerateRequest
    split: int
    head: bool
    tokens: int
    grammar: Compiled | None = None
    placement: Placement | None = None
    num_out: int = 0
    finished: Finished | None = None
    route: Route = "local"
    shape: Shape | None = None

    def use(self, decision: Decision) -> None:
        self.route, self.split, self.shape = decision.route, decision.split, decision.shape
        self.head = decision.route == "local" or decision.shape == "u"


class Inputs(Protocol):
    """The agent's view of now (see `Agent._inputs`)."""

    def __call__(
        self, request: GenerateRequest, running: Running | None = None, *, link: CloudLink | None = None
    ) -> RouterInputs: ...


class StillFeasible:
    """The router's hard constraints, for a request that runs already."""

    def __init__(self, inputs: Inputs, running: Running) -> None:
        self._inputs = inputs
        self._running = running

    def local(self) -> Decision | None:
        """The decision to go on on this device, if that is possible."""
        wish = replace(self._running.request, route="local", split=None, shape=None)
        try:
            return decide(self._inputs(wish, self._running))
        except RouteInfeasibleError:
            return None

    def check(self, decision: Decision, link: CloudLink) -> None:
        """RouteInfeasibleError where `decision` cannot be taken at this cloud."""
        split = decision.split if decision.route == "split" else None
        shape = decision.shape if decision.route == "split" else None
        wish = replace(self._running.request, route=decision.route, split=split, shape=shape)
        decide(self._inputs(wish, self._running, link=link))

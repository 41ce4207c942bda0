"""Who chooses: constants, thresholds, chance, and the two oracles; and what became of their choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from isthmus.bench.router_recordings import Indices, Vector
from isthmus.bench.router_world import Costs, SimWorld, State


class Chooser(Protocol):
    """A policy. It sees the world's state, and learns what its own choices showed. `probed`: bytes up and
    down that it sent to measure the link since the last request; they are charged to it."""

    probed: tuple[float, float]

    def choose(self, i: int, state: State) -> int:
        """The cut for request `i`."""

    def served(self, i: int, cut: int, costs: Costs) -> None:
        """Request `i` was cut there, and this came of it."""


@dataclass(frozen=True, slots=True)
class Run:
    """One policy's way through a world, arrays [requests]; a request that no way may serve costs nothing, its
    cut is -1. `fell_back`: its wish was not possible;
    `infeasible`: what it did broke a constraint, by the world's truth."""

    cost: Vector
    ttft_s: Vector
    total_s: Vector
    energy_j: Vector
    usd: Vector
    missed: Vector
    cut: Indices
    fell_back: NDArray[np.bool_]
    infeasible: NDArray[np.bool_]

    @property
    def total_cost(self) -> float:
        return float(self.cost.sum())


def play(world: SimWorld, chooser: Chooser, *, connected: bool = False) -> Run:
    """All requests in turn that any way may serve. `connected`: the link stands from the start."""
    state, num = State(connected=connected), len(world.requests)
    columns = {name: np.zeros(num) for name in ("cost", "ttft_s", "total_s", "energy_j", "usd", "missed")}
    cuts = np.full(num, -1)
    fell_back, infeasible = np.zeros(num, bool), np.zeros(num, bool)
    for i in range(num):
        if not world.servable(i):
            continue
        cut = chooser.choose(i, state)
        fell_back[i] = isinstance(chooser, _Wishing) and chooser.fell_back
        infeasible[i] = not world.feasible(i, state, actual=True)[cut]
        extra = world.charge(chooser.probed, state)
        costs = world.serve(i, cut, state)
        for name, column in columns.items():
            column[i] = getattr(costs, name)[cut]
        for name, amount in extra.items():
            columns[name][i] += amount
        cuts[i] = cut
        chooser.served(i, cut, costs)
    return Run(**columns, cut=cuts, fell_back=fell_back, infeasible=infeasible)


class Oracle:
    """The cheapest possible way of each request, given its own state. `hindsight`: as it will turn out.
    Otherwise from the present state of everything, drift included, and the mean answer to such prompts."""

    probed = (0.0, 0.0)

    def __init__(self, world: SimWorld, *, hindsight: bool) -> None:
        self._world, self._hindsight = world, hindsight

    def choose(self, i: int, state: State) -> int:
        allowed = self._world.feasible(i, state, actual=self._hindsight)
        cost = self._world.costs(i, state, actual=self._hindsight).cost
        return int(np.argmin(np.where(allowed, cost, np.inf)))

    def served(self, i: int, cut: int, costs: Costs) -> None:
        """Nothing that it did not know."""


class _Wishing:
    """Wants one cut per request. Where that is not possible, the stated rule decides: local, else offload,
    else the deepest split."""

    probed = (0.0, 0.0)

    def __init__(self, world: SimWorld) -> None:
        self._world = world
        self.fell_back = False

    def wish(self, i: int) -> int:
        raise NotImplementedError

    def choose(self, i: int, state: State) -> int:
        allowed = self._world.feasible(i, state, actual=False)
        wish = self.wish(i)
        self.fell_back = not bool(allowed[wish])
        if not self.fell_back:
            return wish
        for cut in (self._world.num_layers, 0):
            if allowed[cut]:
                return cut
        return int(np.flatnonzero(allowed)[-1])

    def served(self, i: int, cut: int, costs: Costs) -> None:
        """Learns nothing."""


class Constant(_Wishing):
    """Always the same cut."""

    def __init__(self, world: SimWorld, cut: int) -> None:
        super().__init__(world)
        self._cut = cut

    def wish(self, i: int) -> int:
        return self._cut


class Threshold(_Wishing):
    """Offload from so many prompt tokens on, shorter prompts go the `other` way; or the other way round."""

    def __init__(self, world: SimWorld, other: int, tokens: float, *, offload_long: bool) -> None:
        super().__init__(world)
        self._other, self._tokens, self._offload_long = other, tokens, offload_long

    def wish(self, i: int) -> int:
        is_long = self._world.requests[i].prompt >= self._tokens
        return 0 if is_long == self._offload_long else self._other


class Random(_Wishing):
    """Offload by chance, such that it takes `share` of all requests; else the `other` way."""

    def __init__(self, world: SimWorld, other: int, share: float, *, seed: int) -> None:
        super().__init__(world)
        self._other = other
        share /= max(1e-9, float(np.mean([request.privacy == "any" for request in world.requests])))
        self._offload = np.random.default_rng((seed, 11)).random(len(world.requests)) < share

    def wish(self, i: int) -> int:
        return 0 if self._offload[i] else self._other


def best_split(world: SimWorld) -> tuple[int, Run]:
    """The constant split that did best, in hindsight."""
    runs = {cut: play(world, Constant(world, cut)) for cut in range(1, world.num_layers)}
    cut = min(runs, key=lambda cut: runs[cut].total_cost)
    return cut, runs[cut]


def best_threshold(world: SimWorld, other: int) -> tuple[str, Run]:
    """The threshold on the prompt's length, between offload and the `other` way, that did best in hindsight;
    both ways round."""
    prompts = np.array([request.prompt for request in world.requests])
    levels = sorted({float(level) for level in np.quantile(prompts, np.linspace(0.1, 0.9, 9))})
    found: list[tuple[str, Run]] = []
    for tokens in levels:
        for offload_long in (True, False):
            name = f"offload {'from' if offload_long else 'below'} {tokens:.0f} tokens"
            found.append((name, play(world, Threshold(world, other, tokens, offload_long=offload_long))))
    return min(found, key=lambda each: each[1].total_cost)

"""What runs by every route say about a router: its errors, how often it chose well, what a constant would do.
Pure: outcomes in, figures and rows out."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

Route = Literal["local", "split", "offload"]
ROUTES: Final[tuple[Route, ...]] = ("local", "split", "offload")
NEAR: Final = 1.10
"""A choice is as good as the fastest up to this factor."""
LEARNING: Final = 20
"""The first requests, in which the router gets to know its world; errors count from then on."""


@dataclass(frozen=True, slots=True)
class Ran:
    """One way that really was run; both times in seconds, of the whole request. `fixed`: it is the split
    whose K never changes."""

    route: Route
    split: int
    predicted_s: float
    observed_s: float
    fixed: bool = False

    @property
    def error(self) -> float:
        """|predicted - observed| over observed."""
        return abs(self.predicted_s - self.observed_s) / self.observed_s


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request: under which kind of condition and in which phase it ran, whether as the first one after
    the change, its lengths, the way that was chosen, and every other feasible one."""

    phase: int
    kind: str
    first: bool
    prompt_tokens: int
    output_tokens: int
    chosen: Ran
    others: tuple[Ran, ...]

    @property
    def every(self) -> tuple[Ran, ...]:
        return (self.chosen, *self.others)

    @property
    def fastest(self) -> Ran:
        return min(self.every, key=lambda ran: ran.observed_s)

    def near(self, ran: Ran) -> bool:
        """Is it the fastest, or as good?"""
        return ran.observed_s <= NEAR * self.fastest.observed_s

    def of(self, route: Route, *, fixed: bool = False) -> Ran | None:
        """The way of this route that was run, the one predicted to be its best; `fixed`: the fixed split."""
        found = [ran for ran in self.every if ran.route == route and (ran.fixed or not fixed)]
        return min(found, key=lambda ran: ran.predicted_s) if found else None


def constant_policies(outcome: Outcome) -> dict[str, Ran | None]:
    """What always doing the same would have meant. Where it is not feasible, the request is offloaded."""
    offload = outcome.of("offload")
    return {
        "always_local": outcome.of("local") or offload,
        "always_offload": offload,
        "always_split": outcome.of("split", fixed=True) or offload,
        "always_best_split": outcome.of("split") or offload,
    }


def figures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The headline figures."""
    known = outcomes[min(LEARNING, len(outcomes) // 2) :]
    found = {
        "median_abs_error": statistics.median([outcome.chosen.error for outcome in known]),
        "fastest_within_10pct": _share([outcome.near(outcome.chosen) for outcome in outcomes]),
        "best_constant_policy": max(policy_shares(outcomes).values()),
        "total_over_fastest": _total([outcome.chosen for outcome in outcomes])
        / _total([outcome.fastest for outcome in outcomes]),
    }
    for route in ROUTES:
        errors = [ran.error for outcome in known for ran in outcome.every if ran.route == route]
        if errors:
            found[f"median_abs_error_{route}"] = statistics.median(errors)
        found[f"share_best_{route}"] = _share([outcome.fastest.route == route for outcome in outcomes])
    return found


def policy_shares(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Of each constant policy: the share of requests in which it is the fastest way or as good."""
    near: dict[str, list[bool]] = {}
    for outcome in outcomes:
        for name, ran in constant_policies(outcome).items():
            near.setdefault(name, []).append(ran is not None and outcome.near(ran))
    return {name: _share(each) for name, each in near.items()}


def rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for all, for each kind of condition, for the first requests after a change and for the later
    ones; and one per request."""
    classes: dict[str, list[Outcome]] = {"all": list(outcomes)}
    for outcome in outcomes:
        classes.setdefault(outcome.kind, []).append(outcome)
        classes.setdefault("first_after_change" if outcome.first else "later", []).append(outcome)
    return [
        *(_class_row(name, members) for name, members in classes.items()),
        *(_request_row(number, outcome) for number, outcome in enumerate(outcomes)),
    ]


def _class_row(name: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "what": "class",
        "class": name,
        "requests": len(outcomes),
        "median_abs_error": statistics.median([outcome.chosen.error for outcome in outcomes]),
        "fastest_within_10pct": _share([outcome.near(outcome.chosen) for outcome in outcomes]),
        **policy_shares(outcomes),
        "chosen_s": _total([outcome.chosen for outcome in outcomes]),
        "fastest_s": _total([outcome.fastest for outcome in outcomes]),
    }
    for title, taken in (
        ("chosen", Counter(outcome.chosen.route for outcome in outcomes)),
        ("fastest", Counter(outcome.fastest.route for outcome in outcomes)),
    ):
        row |= {f"{title}_{route}": taken[route] for route in ROUTES}
    return row


def _request_row(number: int, outcome: Outcome) -> dict[str, Any]:
    ways = ("local", outcome.of("local")), ("offload", outcome.of("offload")), ("split", outcome.of("split"))
    row: dict[str, Any] = {
        "what": "request",
        "class": outcome.kind,
        "request": number,
        "phase": outcome.phase,
        "prompt_tokens": outcome.prompt_tokens,
        "output_tokens": outcome.output_tokens,
        "chosen": _name(outcome.chosen),
        "fastest": _name(outcome.fastest),
        "predicted_s": outcome.chosen.predicted_s,
        "observed_s": outcome.chosen.observed_s,
    }
    for name, ran in (*ways, ("fixed_split", outcome.of("split", fixed=True))):
        if ran is not None:
            row |= {f"{name}_predicted_s": ran.predicted_s, f"{name}_observed_s": ran.observed_s}
    return row


def _name(ran: Ran) -> str:
    return f"split {ran.split}" if ran.route == "split" else ran.route


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _total(runs: Sequence[Ran]) -> float:
    return sum(ran.observed_s for ran in runs)

"""A decision in brief: the way taken and the best of each route, or all ways with neighbours folded. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from math import isfinite
from typing import NamedTuple

from isthmus.edge.requests import Candidate, Decision, Route


class Row(NamedTuple):
    """Neighbouring candidates that share their fate, K from `first` to `last`. `candidate`: the best of them
    (where none can be taken: the first). `best`: it is the best of its route, or the one taken."""

    candidate: Candidate
    first: int
    last: int
    best: bool


def best_of_routes(decision: Decision) -> tuple[Candidate, ...]:
    """One candidate per route, in their order: the one taken, of other routes the best: feasible ones before
    others, by score, of equals the first."""
    routes: dict[Route, list[Candidate]] = {}
    for candidate in decision.candidates:
        routes.setdefault(candidate.route, []).append(candidate)
    taken = decision.chosen
    return tuple(taken if taken in every else _best(every) for every in routes.values())


def folded(decision: Decision) -> tuple[Row, ...]:
    """All candidates: the one taken and the best of each route by themselves, other neighbours with the same
    fate as one row."""
    taken = decision.chosen
    best = [
        one for one in best_of_routes(decision) if one is taken or (one.feasible and one.score is not None)
    ]

    def fate(candidate: Candidate) -> tuple[object, ...]:
        alone = candidate.split if candidate in best else None
        return candidate.route, candidate.violated, alone

    rows = []
    for (_, _, alone), group in groupby(decision.candidates, fate):
        every = list(group)
        shown = _best(every) if every[0].feasible else every[0]
        rows.append(Row(shown, every[0].split, every[-1].split, alone is not None))
    return tuple(rows)


def _best(every: Iterable[Candidate]) -> Candidate:
    def rank(candidate: Candidate) -> tuple[bool, float]:
        score = candidate.score
        return not candidate.feasible, score if score is not None and isfinite(score) else float("inf")

    return min(every, key=rank)

"""A plan as people read it: one line per way by K, neighbours that fail alike folded into one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from math import isfinite
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from isthmus.splitter.links import Estimate, LinkView
    from isthmus.splitter.planner import Plan, PlannedWay
    from isthmus.splitter.situation import World

MIB = 1 << 20


def plan_table(plan: Plan, world: World) -> Table:
    """Offload (K = 0), the splits, local (K = N): the best one marked, the infeasible with their reason."""
    cloud = "no cloud" if world.cloud is None else world.cloud.device
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=f"{world.edge.device} · {link_text(world.link) if world.cloud else 'alone'} · {cloud}",
        caption=f"{plan.request.prompt_tokens} prompt tokens, {plan.request.output_tokens} new ones; "
        f"objective {plan.request.objective}; where K is a range, the figures are the first one's",
    )
    table.add_column("K", justify="right", no_wrap=True)
    table.add_column("route", no_wrap=True)
    for name in ("s", "1st s", "tok/s", "J", "$", "KB up", "down", "MB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("breaks", no_wrap=True)
    for ways in _folded(plan):
        first = ways[0]
        chosen = first is plan.best
        style = "bold" if chosen else "" if first.feasible else "dim"
        layers = f"▶ {first.split}" if chosen else _layers(ways)
        table.add_row(layers, first.route, *_figures(first), first.violated or "", style=style)
    return table


def plan_notes(plan: Plan) -> list[str]:
    """Why the best is the best, and what rules the others out, with both numbers."""
    broken = [ways for ways in _folded(plan) if ways[0].detail not in plan.reason]
    return [plan.reason, *(f"from K = {ways[0].split}: {ways[0].detail}" for ways in broken)]


def _layers(ways: list[PlannedWay]) -> str:
    return f"{ways[0].split}" if len(ways) == 1 else f"{ways[0].split} … {ways[-1].split}"


def link_text(link: LinkView) -> str:
    """`RTT 20 ms, 10 Mbit/s up, 50 down`."""

    def rate(estimate: Estimate | None) -> str:
        if estimate is None:
            return "unmeasured"
        return f"{estimate.value * 8 / 1e6:.3g} Mbit/s" if isfinite(estimate.value) else "unlimited"

    rtt = "unmeasured" if link.rtt is None else f"{link.rtt.value * 1e3:.3g} ms"
    up, down = rate(link.up), rate(link.down)
    return f"RTT {rtt}, {up} up and down" if up == down else f"RTT {rtt}, {up} up, {down} down"


def _folded(plan: Plan) -> Iterator[list[PlannedWay]]:
    """By K; splits next to each other that break the same constraint together."""
    ordered = sorted(plan.candidates, key=lambda way: way.split)
    for key, group in groupby(ordered, key=lambda way: (way.route, way.violated)):
        ways = list(group)
        if key[1] is None:
            yield from ([way] for way in ways)
        else:
            yield ways


def _figures(way: PlannedWay) -> list[str]:
    p = way.prediction
    if p is None:
        return ["–"] * 8
    return [
        f"{p.total_s:.3g}",
        f"{p.ttft_s:.3g}",
        f"{p.tokens_per_s:.3g}",
        "–" if p.energy_j is None else f"{p.energy_j:.3g}",
        f"{p.cost_usd:.2g}" if p.cost_usd else "0",
        f"{p.bytes_up / 1e3:.3g}",
        f"{p.bytes_down / 1e3:.3g}",
        f"{p.memory_bytes / MIB:.0f}",
    ]

"""A decision as a person reads it: every way with its figures, where the time goes, what that rests on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from isthmus.commands.output import plain_text

if TYPE_CHECKING:
    from isthmus.edge.digest import Row
    from isthmus.edge.requests import Candidate, Decision

BAR_WIDTH = 44
# Where a term's time is spent, by the last word of its name.
COLOURS = {"edge": "cyan", "link": "yellow", "cloud": "magenta"}
PARTS = ("time", "money", "energy", "slo_miss", "quality")


def explanation(decision: Decision) -> RenderableType:
    """What `--explain` prints. Without predictions: the candidates and the first constraint each broke."""
    from isthmus.edge.digest import best_of_routes, folded

    named = decision.reason.startswith(decision.route)
    head = plain_text(decision.reason if named else f"{decision.route}: {decision.reason}", style="bold")
    rows, taken = folded(decision), decision.chosen
    if not any(candidate.total_s is not None for candidate in decision.candidates):
        return Group(head, _feasibility(rows, taken))
    parts: list[RenderableType] = [head, "", _figures(rows, taken)]
    if any(row.first != row.last for row in rows):
        parts.append(_note("a row of several K shows the best of them (✗: the first)"))
    parts += [
        _note(f"✗ {_name(row)}: {row.candidate.violated}: {row.candidate.detail}")
        for row in rows
        if not row.candidate.feasible
    ]
    parts += ["", _score_parts(best_of_routes(decision), taken)]
    if taken is not None and taken.terms is not None:
        parts += ["", *_terms(taken)]
    return Group(*parts, "", *_closing(decision))


def _way(candidate: Candidate) -> str:
    return f"split {candidate.split}" if candidate.route == "split" else candidate.route


def _name(row: Row) -> str:
    return _way(row.candidate) if row.first == row.last else f"split {row.first}…{row.last}"


def _marked(name: str, taken: bool) -> str:
    return f"{'▸' if taken else ' '} {name}"


# ---- tables -------------------------------------------------------------------------------------------


def _grid(*heads: str) -> Table:
    """A table without lines: a name, then figures."""
    table = Table(box=None, padding=(0, 1, 0, 0), show_edge=False, header_style="dim")
    table.add_column(plain_text(heads[0]), no_wrap=True)
    for head in heads[1:]:
        table.add_column(plain_text(head), justify="right", no_wrap=True)
    return table


def _figures(rows: tuple[Row, ...], chosen: Candidate | None) -> Table:
    """Every way with what it is predicted to take."""
    table = _grid("  way", "total s", "first s", "tok/s", "J", "$", "up kB", "down kB", "score $")
    for row in rows:
        one, taken = row.candidate, row.candidate is chosen
        cells = (
            one.total_s, one.ttft_s, one.tokens_per_s, one.energy_j, one.cost_usd, _kilo(one.bytes_up),
            _kilo(one.bytes_down),
        )  # fmt: skip
        verdict = figure(one.score) if one.feasible else f"✗ {one.violated}"
        style = "bold" if taken else "" if row.best else "dim"
        table.add_row(
            *map(plain_text, (_marked(_name(row), taken), *map(figure, cells), verdict)), style=style
        )
    return table


def _score_parts(best: tuple[Candidate, ...], chosen: Candidate | None) -> Table:
    """What the scores add up from, in dollars; and the memory that each way takes here."""
    table = _grid("  score in $", "time", "money", "energy", "SLO miss", "quality", "memory MB")
    for one in best:
        if one.score_parts is None or one.memory_bytes is None:
            continue
        cells = [figure(one.score_parts[name]) for name in PARTS]
        name, memory = _marked(_way(one), one is chosen), figure(one.memory_bytes / (1 << 20))
        style = "bold" if one is chosen else "" if one.feasible else "dim"
        table.add_row(*map(plain_text, (name, *cells, memory)), style=style)
    return table


def _terms(taken: Candidate) -> list[RenderableType]:
    """Where the time of the way taken goes, one term after the other."""
    assert taken.terms is not None
    total = sum(taken.terms.values())
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(width=BAR_WIDTH)
    begin = 0.0
    for name, seconds in taken.terms.items():
        if not seconds > 0:
            continue
        words = name.removesuffix("_s").replace("_", " ")
        colour = COLOURS.get(words.split()[-1], "white")
        bar = Bar(total, begin, begin + seconds, width=BAR_WIDTH, color=colour)
        table.add_row(plain_text(f"  {words}"), plain_text(f"{figure(seconds)} s"), bar)
        begin += seconds
    return [_note(f"  where the {figure(total)} s of {_way(taken)} go"), table]


def _feasibility(rows: tuple[Row, ...], chosen: Candidate | None) -> Table:
    """Where nothing was measured: which ways there are, and why not the others."""
    table = Table("route", "layers here", "shape", "feasible", "why not")
    for row in rows:
        one = row.candidate
        layers = str(row.first) if row.first == row.last else f"{row.first} … {row.last}"
        why = ": ".join(part for part in (one.violated, one.detail) if part)
        cells = (one.route, layers, one.shape or "–", "yes" if one.feasible else "no", why)
        table.add_row(*map(plain_text, cells), style="bold" if one is chosen else None)
    return table


# ---- what it rests on ---------------------------------------------------------------------------------


def _closing(decision: Decision) -> Iterator[RenderableType]:
    """Margin, expected length, and what was measured and how old that is."""
    said = []
    if decision.margin is not None:
        compared = "more" if decision.margin >= 0 else "less"
        said.append(f"the best of another route scores {figure(abs(decision.margin))} $ {compared}")
    if decision.expected_tokens is not None:
        said.append(f"{figure(decision.expected_tokens)} tokens expected")
    if said:
        yield _note("; ".join(said))
    basis = decision.basis
    for side in ("edge", "cloud"):
        if side in basis:
            yield _note(f"{side}: {_device(basis[side])}")
    if "link" in basis:
        yield _note(f"link: {_link(basis['link'])}")
    learnt = [
        f"{name.replace('_', ' ')} × {value:.2f}"
        for name, value in basis.get("observed_over_predicted", {}).items()
        if abs(value - 1.0) >= 0.005
    ]
    if learnt:
        yield _note(f"learnt: {', '.join(learnt)}")


def _device(known: dict[str, Any]) -> str:
    """A profile's origin, and a cloud's load."""
    by_label: dict[str, list[str]] = {}
    for name, label in known["labels"].items():
        by_label.setdefault(label, []).append(name.replace("_", " "))
    usual, *others = sorted(by_label, key=lambda label: -len(by_label[label]))
    but = "; ".join(f"{', '.join(by_label[label])} {label}" for label in others)
    said = [known["device"], f"profile of {known['dated']}, {usual}" + (f" ({but})" if but else "")]
    if known.get("note"):
        said.append(known["note"])
    if known.get("load_age_s") is not None:
        load = f"{figure(known['sessions'])} other sessions, queue {figure(known['queue_s'])} s"
        said.append(f"{load}, told {_age(known['load_age_s'])}")
    return "; ".join(said)


def _link(known: dict[str, dict[str, Any]]) -> str:
    words = {"rtt_s": "round trip", "up_bytes_per_s": "up", "down_bytes_per_s": "down"}
    return "; ".join(f"{words[name]} {_estimate(name, estimate)}" for name, estimate in known.items())


def _estimate(name: str, known: dict[str, Any]) -> str:
    """A link's figure with its spread and age; ms or Mbit/s."""
    if known["value"] is None:
        return str(known["source"])
    factor, unit = (1e3, "ms") if name == "rtt_s" else (8e-6, "Mbit/s")
    said = f"{figure(known['value'] * factor)} ± {figure(known['deviation'] * factor)} {unit}"
    if known["source"] == "given":
        return f"{said} (given)"
    count = known["num_samples"]
    return f"{said} ({known['source']}, {count} sample{'s' * (count != 1)}, {_age(known['age_s'])})"


def _age(seconds: float) -> str:
    return f"{figure(seconds)} s ago" if seconds >= 0.1 else "just now"


# ---- words --------------------------------------------------------------------------------------------


def figure(value: float | None) -> str:
    """Three digits that matter; an en dash for what is unknown."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def _kilo(count: float | None) -> float | None:
    return None if count is None else count / 1000


def _note(words: str) -> Text:
    return plain_text(words, style="dim")

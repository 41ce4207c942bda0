"""`isthmus plan --plot`: the time of each K as a stack of its terms, what rules ways out, and the best one.

Where a term is spent shows in hue and pattern (edge plain blue, link hatched amber, cloud dotted green), the
phase in lightness (prompt dark, answer light), so that it can be read in black and white and by colour-blind
readers. The hues are those of Okabe and Ito, muted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from isthmus.commands.plan_table import MIB, link_text
from isthmus.protocol.errors import ConfigError, IsthmusError
from isthmus.splitter.planner import objective_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from isthmus.splitter.planner import Objective, Plan, PlannedWay
    from isthmus.splitter.situation import World

SUFFIXES: Final = (".png", ".svg", ".pdf")
INK: Final = "#22272e"
SOFT: Final = "#6b7480"
RULE: Final = "#d5d9de"
BAND: Final = "#f3f4f6"
ACCENT: Final = "#b3432b"
_WIDTH: Final = 0.82
_WIDTH_IN: Final = 11.0
_HEADER_IN: Final = 1.32
_HEADROOM: Final = 1.3
_LINE: Final = 130  # characters that fit the width
_STYLE: Final[Any] = {
    "font.size": 9.0, "text.color": INK, "axes.edgecolor": RULE, "axes.labelcolor": SOFT,
    "xtick.color": SOFT, "ytick.color": SOFT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.8, "hatch.linewidth": 0.6, "svg.fonttype": "none", "svg.hashsalt": "isthmus",
    "axes.grid.axis": "y", "grid.color": "#e8eaed", "grid.linewidth": 0.7, "axes.axisbelow": True,
}  # fmt: skip


class _Layer(NamedTuple):
    """What of the stack is drawn alike."""

    label: str
    terms: tuple[str, ...]
    colour: str
    hatch: str


LAYERS: Final = (
    _Layer("load, handshake, queue", ("load_s", "handshake_s", "queue_s"), "#8a9099", "xxxx"),
    _Layer("prompt, edge", ("prefill_edge_s",), "#2b5f8c", ""),
    _Layer("prompt, link", ("prefill_link_s",), "#c98a1b", "////"),
    _Layer("prompt, cloud", ("prefill_cloud_s",), "#2f8068", "...."),
    _Layer("answer, edge", ("decode_edge_s",), "#7fabd0", ""),
    _Layer("answer, link", ("decode_link_s",), "#f0c869", "////"),
    _Layer("answer, cloud", ("decode_cloud_s",), "#8cc7b2", "...."),
)
_REASONS: Final = {
    "cloud": "no cloud", "depth": "below the\nminimum depth", "context": "beyond the\ncloud's context",
    "memory": "over the\nmemory limit", "energy": "power\nunknown", "slo_ttft": "first token\ntoo late",
    "slo_tokens_per_s": "too few\ntokens/s",
}  # fmt: skip
_UNITS: Final[dict[Objective, tuple[str, float]]] = {
    "throughput": ("ms per token,\nbusiest part", 1e3), "energy": ("J on\nthe edge", 1.0),
    "money": ("$ per\n1,000 requests", 1e3), "weighted": ("weighted $,\n1,000 requests", 1e3),
}  # fmt: skip


def check_plot(path: Path) -> None:
    """ConfigError for a file of another kind, IsthmusError (`no_matplotlib`) where nothing can be drawn."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"--plot {path} is no kind of picture that is drawn",
            code="bad_plot",
            hint=f"its name must end in {', '.join(SUFFIXES)}",
        )
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise IsthmusError(
            f"--plot needs matplotlib: {error}",
            code="no_matplotlib",
            hint="pip install 'isthmus[plot]'",
        ) from error


def save_plot(path: Path, plan: Plan, world: World) -> None:
    """Draw `plan` into a file; equal plans give equal bytes. Raises what `check_plot` does, and ConfigError
    (`bad_plot`) where the file can't be written."""
    check_plot(path)
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure = draw(plan, world)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        try:
            figure.savefig(path, dpi=160, metadata=metadata)
        except OSError as error:
            raise ConfigError(
                f"cannot write {path}: {error.strerror}",
                code="bad_plot",
                hint="name a file in a folder that is there",
            ) from error


def draw(plan: Plan, world: World) -> Figure:
    """Time against K above; below it, where it is not the time, the objective; the memory at the bottom."""
    from matplotlib.figure import Figure

    ways = sorted(plan.candidates, key=lambda way: way.split)
    objective = plan.request.objective
    heights = [3.9, 0.9] if objective == "latency" else [3.9, 0.9, 0.9]  # inches, as all below
    height = sum(heights) + 0.2 * len(heights) + _HEADER_IN + 0.4
    figure = Figure(figsize=(_WIDTH_IN, height))
    panels = figure.subplots(
        len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights, "hspace": 0.13}
    )
    figure.subplots_adjust(left=0.075, right=0.975, top=1 - _HEADER_IN / height, bottom=0.52 / height)
    _time(panels[0], plan, ways)
    if objective != "latency":
        _line(panels[1], plan, ways, *_UNITS[objective])
    _memory(panels[-1], plan, ways)
    for panel in panels:
        panel.grid(visible=True, axis="y")
        panel.tick_params(length=0)
        _bands(panel, ways)
    _axis(panels[-1], len(ways) - 1)
    _words(figure, plan, world)
    return figure


# ---- panels ------------------------------------------------------------------------------------------


def _time(panel: Axes, plan: Plan, ways: Sequence[PlannedWay]) -> None:
    """The stacks, the reasons above what is ruled out, and the best one's mark."""
    stacks = [None if way.prediction is None else way.prediction.terms() for way in ways]
    bottoms = [0.0] * len(ways)
    for layer in LAYERS:
        parts = [0.0 if terms is None else sum(terms[name] for name in layer.terms) for terms in stacks]
        if not any(parts):
            continue
        for feasible in (True, False):
            at = [i for i, way in enumerate(ways) if way.feasible is feasible and parts[i]]
            bars = panel.bar(
                [ways[i].split for i in at],
                [parts[i] for i in at],
                _WIDTH,
                bottom=[bottoms[i] for i in at],
                color=layer.colour if feasible else "#c9cdd3",
                edgecolor="white",
                linewidth=0.4,
                hatch=layer.hatch or None,
                alpha=1.0 if feasible else 0.6,
            )
            bars.set_label("_")  # the legend is made by hand: all layers, in their own colours
        bottoms = [a + b for a, b in zip(bottoms, parts, strict=True)]
    top = max(bottoms) * _HEADROOM or 1.0
    panel.set_ylim(0, top)
    panel.set_ylabel("seconds for the whole answer")
    for first, last, violated in _ruled_out(ways):
        width = last - first + 1
        slim = width < 0.11 * len(ways)
        panel.text(
            (first + last) / 2,
            top * 0.985,
            _REASONS[violated].replace("\n", " ") if slim else _REASONS[violated],
            ha="center",
            va="top",
            rotation=90 if slim else 0,
            fontsize=8,
            color=SOFT,
            style="italic",
            linespacing=1.15,
            zorder=5,
            bbox={"facecolor": BAND, "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        )
    if plan.best is not None:
        _mark(panel, plan.best, bottoms, top)


def _mark(panel: Axes, best: PlannedWay, heights: Sequence[float], top: float) -> None:
    """A frame and a triangle on the best bar; its figure above what stands around it."""
    k, last = best.split, len(heights) - 1
    height = heights[k]
    panel.bar([k], [height], _WIDTH + 0.1, color="none", edgecolor=ACCENT, linewidth=1.6, zorder=4)
    panel.plot([k], [height + 0.02 * top], marker="v", color=ACCENT, markersize=7, zorder=6)
    reach = max(2, round(0.17 * len(heights)))  # bars that the words stand over
    side = -1 if k < last / 3 else 1 if k > 2 * last / 3 else 0
    around = heights[max(0, k - (reach if side >= 0 else 0)) : k + 1 + (reach if side <= 0 else 0)]
    at = max(height + 0.06 * top, max(around) + 0.025 * top)
    if at > height + 0.07 * top:
        panel.plot([k, k], [height + 0.04 * top, at + 0.01 * top], color=ACCENT, linewidth=1.0, zorder=6)
    panel.text(
        k + 0.42 * side,
        at,
        f"{best.name}: {height:.3g} s",
        ha={-1: "left", 0: "center", 1: "right"}[side],
        va="bottom",
        color=ACCENT,
        weight="bold",
        fontsize=10,
        zorder=7,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0},
    )


def _line(panel: Axes, plan: Plan, ways: Sequence[PlannedWay], label: str, unit: float) -> None:
    """The objective of every way that has one."""
    known = [way for way in ways if way.objective is not None]
    panel.plot(
        [way.split for way in known],
        [(way.objective or 0.0) * unit for way in known],
        color=INK,
        linewidth=1.1,
        marker="o",
        markersize=2.6,
    )
    if plan.best is not None:
        value = (plan.best.objective or 0.0) * unit
        panel.plot([plan.best.split], [value], marker="v", color=ACCENT, markersize=7, zorder=6)
    panel.set_ylim(bottom=0)
    panel.locator_params(axis="y", nbins=3)
    panel.set_ylabel(label, fontsize=8)


def _memory(panel: Axes, plan: Plan, ways: Sequence[PlannedWay]) -> None:
    """What the edge has to hold, and its limit."""
    known = [(way.split, way.prediction.memory_bytes / MIB) for way in ways if way.prediction is not None]
    panel.bar([k for k, _ in known], [mb for _, mb in known], _WIDTH, color="#aab2bd", edgecolor="none")
    highest = max(mb for _, mb in known)
    limit = plan.request.edge_memory_bytes
    if limit is not None:
        at = limit / MIB
        highest = max(highest, at)
        panel.axhline(at, color=ACCENT, linewidth=1.1, linestyle=(0, (5, 3)), zorder=4)
        panel.annotate(
            f"limit {at:.0f} MB",
            (0, at),
            xycoords=("axes fraction", "data"),
            xytext=(6, 3),
            textcoords="offset points",
            color=ACCENT,
            fontsize=8,
            zorder=5,
        )
    panel.set_ylim(0, highest * 1.35 or 1.0)
    panel.locator_params(axis="y", nbins=3)
    panel.set_ylabel("edge\nmemory, MB", fontsize=8)


def _bands(panel: Axes, ways: Sequence[PlannedWay]) -> None:
    """A pale band behind what is ruled out."""
    for first, last, _ in _ruled_out(ways):
        panel.axvspan(first - 0.5, last + 0.5, facecolor=BAND, edgecolor="none", zorder=0)


def _axis(panel: Axes, num_layers: int) -> None:
    """K, from offload to local."""
    step = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1024) if num_layers / n <= 32)
    inner = [k for k in range(step, num_layers, step) if num_layers - k >= step]
    ticks = [0, *inner, num_layers]
    panel.set_xticks(ticks, ["offload", *(str(k) for k in inner), "local"])
    panel.set_xlim(-0.7, num_layers + 0.7)
    panel.set_xlabel(f"K, layers on the edge (of {num_layers})")


def _words(figure: Figure, plan: Plan, world: World) -> None:
    """Title, what the plan is for, and the legend."""
    from matplotlib.patches import Patch

    request = plan.request
    chosen = "nothing is feasible"
    if plan.best is not None:
        chosen = f"{plan.best.name}, {objective_text(plan.best, request.objective)}"
    link = "" if world.cloud is None else f"  ·  {link_text(world.link)}"
    aim = "the weighted sum" if request.objective == "weighted" else request.objective
    title = f"Best for {aim}: {chosen}"
    kind = f"{request.prompt_tokens} prompt tokens, {request.output_tokens} new ones{link}"
    devices = "  ↔  ".join(f"{one.device} ({one.precision})" for one in (world.edge, world.cloud) if one)
    inches = figure.get_figheight()
    loud: dict[str, Any] = {"fontsize": 13.5, "weight": "bold"}
    soft: dict[str, Any] = {"fontsize": 9, "color": SOFT}
    for text, below, look in ((title, 0.30, loud), (kind, 0.56, soft), (devices, 0.76, soft)):
        short = text if len(text) <= _LINE else text[: _LINE - 1] + "…"
        figure.text(0.075, 1 - below / inches, short, va="center", **look)
    drawn = [way.prediction.terms() for way in plan.candidates if way.prediction is not None]
    handles: list[Any] = [
        Patch(facecolor=layer.colour, hatch=layer.hatch or None, edgecolor="white", label=layer.label)
        for layer in LAYERS
        if any(terms[name] for terms in drawn for name in layer.terms)
    ]
    if any(not way.feasible for way in plan.candidates):
        handles.append(Patch(facecolor="#c9cdd3", edgecolor="white", alpha=0.6, label="ruled out"))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.067, 1 - 0.87 / inches),
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
        handlelength=1.5,
        handleheight=1.1,
        columnspacing=1.4,
        handletextpad=0.5,
    )


def _ruled_out(ways: Sequence[PlannedWay]) -> list[tuple[int, int, str]]:
    """(first K, last K, constraint) of neighbours that break the same one."""
    spans = []
    for violated, group in groupby(ways, key=lambda way: way.violated):
        members = list(group)
        if violated is not None:
            spans.append((members[0].split, members[-1].split, violated))
    return spans

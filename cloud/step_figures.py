"""Which steps to time for a profile, and what one layer takes of them. Pure.

    seconds of a step = step + embed_row * ids + layers run * seconds of one layer + head

The step's own share comes from a row that enters deep in the model; not so deep that the layers it runs stay
in the processor's cache, as they do not in a whole pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from isthmus.cloud.step_timer import Span

PREFILL_ROWS: Final = (128, 512, 16, 64, 256)
DECODE_CONTEXTS: Final = (1023, 255, 4095)  # the row that decodes fills a page
BATCHES: Final = (1, 4, 16, 2, 8)
_SHORT: Final = 15
_DEEP: Final = 4  # a row that enters deep runs this fraction of the layers
_BATCH_CONTEXT: Final = 127
_BEHIND: Final = (128, 1024)  # rows, and the context they stand behind
# Chunks with more rows enter so deep that they cost what so many do over all layers.
_WHOLE_DEPTH_ROWS: Final = 48
_LEAST_S: Final = 1e-9  # noise must not make a layer free

Kind = Literal["decode", "deep", "prefill", "behind", "batch"]
Points = tuple[tuple[float, float], ...]


class Probe(NamedTuple):
    """A step to time; `x` is what its figure is a function of: tokens of context, rows, or sessions."""

    kind: Kind
    x: int
    mix: tuple[Span, ...]


@dataclass(frozen=True)
class StepFigures:
    """What of a DeviceProfile comes from whole steps, in its terms."""

    prefill: Points
    prefill_context_s: float
    decode: Points
    step_s: float
    batch: Points


def probes(num_layers: int, context_length: int) -> list[Probe]:
    """The steps to time, what matters most first: without the first three there are no figures."""
    short, shared = (min(context, context_length - 1) for context in (_SHORT, _BATCH_CONTEXT))

    def chunk(kind: Kind, x: int, context: int = 0) -> Probe:
        depth = max(1, min(num_layers, num_layers * _WHOLE_DEPTH_ROWS // x))
        return Probe(kind, x, ((num_layers - depth, context, x),))

    found = [
        Probe("decode", short, ((0, short, 1),)),
        Probe("deep", short, ((num_layers - max(1, num_layers // _DEEP), short, 1),)),
        chunk("prefill", 1),
        *(chunk("prefill", rows) for rows in PREFILL_ROWS if rows <= context_length),
        *(Probe("decode", x, ((0, x, 1),)) for x in DECODE_CONTEXTS if short < x < context_length),
        *(Probe("batch", sessions, ((0, shared, 1),) * sessions) for sessions in BATCHES),
    ]
    rows, context = _BEHIND
    context = min(context, context_length - rows)
    return [*found, chunk("behind", rows, context)] if context > 0 else found


def step_figures(
    timed: Mapping[Probe, float], *, num_layers: int, embed_row_s: float, head_s: float
) -> StepFigures:
    """One layer's seconds from those of whole steps. `timed` has at least the first three of `probes`."""
    kinds: dict[Kind, dict[int, Probe]] = {}
    for probe in sorted(timed, key=lambda probe: probe.x):
        kinds.setdefault(probe.kind, {})[probe.x] = probe
    (deep,) = kinds["deep"].values()
    step_s = 0.0
    if num_layers > 1:
        # The two steps differ by the layers before the deep one's entry, and by the embedding.
        ((entry, _, _),) = deep.mix
        whole_s = timed[kinds["decode"][deep.x]]
        layer_s = max(_LEAST_S, (whole_s - embed_row_s - timed[deep]) / entry)
        step_s = max(0.0, timed[deep] - (num_layers - entry) * layer_s - head_s)

    def layer_s_of(probe: Probe) -> float:
        ((first_layer, _, num_rows),) = probe.mix
        embed_s = embed_row_s * num_rows if first_layer == 0 else 0.0
        return max(_LEAST_S, (timed[probe] - step_s - head_s - embed_s) / (num_layers - first_layer))

    def curve(kind: Kind) -> Points:
        return tuple((float(x), layer_s_of(probe)) for x, probe in kinds[kind].items())

    context_s = 0.0
    for rows, probe in kinds.get("behind", {}).items():
        if (alone := kinds["prefill"].get(rows)) is not None:
            more_s = max(0.0, layer_s_of(probe) - layer_s_of(alone))
            context_s = more_s / (rows * probe.mix[0][1])
    batch = [(float(x), timed[probe]) for x, probe in kinds.get("batch", {}).items()]
    return StepFigures(
        prefill=curve("prefill"),
        prefill_context_s=context_s,
        decode=curve("decode"),
        step_s=step_s,
        batch=tuple((x, seconds / batch[0][1]) for x, seconds in batch) or ((1.0, 1.0),),
    )

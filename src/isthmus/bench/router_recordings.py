"""Recorded service times of a real edge and a real cloud, as a simulated world draws from them.

What was measured is kept as it was, nothing is fitted: a draw is a sample of a given rank. Between recorded
numbers of layers, rows and tokens of context, samples of equal rank are interpolated linearly; behind the
last number of tokens, extrapolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from isthmus.protocol.errors import ConfigError
from isthmus.protocol.profiles import DeviceProfile
from isthmus.splitter.store import write_atomically

Vector = NDArray[np.float64]
Indices = NDArray[np.int64]

# A request's decode is drawn as the mean of so many steps in a row: neighbouring steps are slow together.
RUN_STEPS: Final = 16

Samples = Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=2)]


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cell(_Kept):
    """Seconds of `rows` rows behind `context` tokens through `layers` layers, in the order of measuring."""

    layers: Annotated[int, Field(ge=1)]
    rows: Annotated[int, Field(ge=1)]
    context: Annotated[int, Field(ge=0)]
    seconds: Samples


class Crowd(_Kept):
    """Seconds of a step in which `sessions` decode at once, through all layers."""

    sessions: Annotated[int, Field(ge=1)]
    seconds: Samples


class Boundary(_Kept):
    """Rows that leave the edge behind `layers` layers: bytes of a row in a chunk, seconds to encode a row."""

    layers: Annotated[int, Field(ge=1)]
    row_bytes: Annotated[float, Field(gt=0)]
    row_s: Samples


class Recordings(_Kept):
    """`edge` and `cloud` are the profiles that were measured beside the samples, by the code that measures
    them in use. The edge's cells begin with the token ids, the cloud's draw a token. Cells of one kind cover
    every combination of their layers, rows and contexts. `head_s`: norm, head and draw on the edge; `load_s`:
    a layer's load. `disturbed`: other processes held cores meanwhile."""

    format: Literal[1] = 1
    model: str
    machine: str
    dated: str
    disturbed: bool = False
    context_length: Annotated[int, Field(ge=2)]
    kv_bytes: Annotated[int, Field(ge=1)]
    edge: DeviceProfile
    cloud: DeviceProfile
    edge_chunks: tuple[Cell, ...]
    edge_steps: tuple[Cell, ...]
    cloud_chunks: tuple[Cell, ...]
    cloud_steps: tuple[Cell, ...]
    crowds: Annotated[tuple[Crowd, ...], Field(min_length=1)]
    boundaries: Annotated[tuple[Boundary, ...], Field(min_length=1)]
    head_s: Samples
    load_s: Samples

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.edge.num_layers != self.cloud.num_layers:
            raise ValueError(f"edge of {self.edge.num_layers} layers, cloud of {self.cloud.num_layers}")
        for name in ("edge_chunks", "edge_steps", "cloud_chunks", "cloud_steps"):
            cells: tuple[Cell, ...] = getattr(self, name)
            points = {(c.layers, c.rows, c.context) for c in cells}
            axes = [sorted({p[i] for p in points}) for i in range(3)]
            wanted = len(axes[0]) * len(axes[1]) * len(axes[2])
            if not cells or len(points) != len(cells) or wanted != len(cells):
                raise ValueError(f"{name}: {len(cells)} cells are no whole grid of {wanted}")
        return self

    @property
    def num_layers(self) -> int:
        return self.edge.num_layers

    def save(self, path: Path) -> None:
        write_atomically(path, self.model_dump_json().encode())

    @classmethod
    def load(cls, path: Path) -> Self:
        """ConfigError `bad_recordings` names the file and the first thing wrong with it."""
        hint = "make them anew with `isthmus bench router --record`"
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error}", code="bad_recordings", hint=hint) from error
        except ValueError as error:  # pydantic's ValidationError is one
            first = str(error).replace("\n", " ")[:300]
            raise ConfigError(f"{path}: {first}", code="bad_recordings", hint=hint) from error


class _Place(NamedTuple):
    """Between which recorded values each wanted one lies."""

    low: Indices
    share: Vector


def _place(axis: Vector, wanted: Vector) -> _Place:
    if len(axis) == 1:
        return _Place(np.zeros(wanted.shape, np.int64), np.zeros(wanted.shape))
    low = np.clip(np.searchsorted(axis, wanted, side="right") - 1, 0, len(axis) - 2)
    return _Place(low, (wanted - axis[low]) / (axis[low + 1] - axis[low]))


class Table:
    """The samples of one kind of cells, ready to be drawn for many requests and all cuts at once.

    `layers[k]`: how many layers run if the model is cut at k; 0 takes no time.
    """

    def __init__(self, cells: Sequence[Cell], layers: Sequence[int], *, runs: int = 1) -> None:
        """`runs`: a sample stands for the mean of so many steps in a row."""
        axes = [sorted({getattr(c, name) for c in cells}) for name in ("layers", "rows", "context")]
        num = min(len(c.seconds) for c in cells) - runs + 1
        if num < 2:
            runs, num = 1, min(len(c.seconds) for c in cells)
        grid = np.empty((*(len(axis) for axis in axes), num + 1))
        for cell in cells:
            at = tuple(
                axis.index(v) for axis, v in zip(axes, (cell.layers, cell.rows, cell.context), strict=True)
            )
            means = np.convolve(cell.seconds, np.full(runs, 1 / runs), "valid")[:num]
            grid[at][:num] = np.sort(means)
            grid[at][num] = means.mean()
        self._num = num
        self._rows, self._contexts = (np.array(axis, np.float64) for axis in axes[1:])
        place = _place(np.array(axes[0], np.float64), np.array(layers, np.float64))
        high = np.minimum(place.low + 1, len(axes[0]) - 1)
        share = place.share.reshape(-1, 1, 1, 1)
        by_cut = grid[place.low] * (1 - share) + grid[high] * share
        by_cut[np.array(layers) == 0] = 0.0
        self._samples = np.ascontiguousarray(np.moveaxis(by_cut, 0, -1))  # rows, contexts, ranks, cuts
        self._least: Vector = self._samples.min(axis=(0, 1))

    def draw(self, rows: Vector, context: Vector, rank: Vector | None) -> Vector:
        """Seconds [n, cuts] of `rows` [n] behind `context` [n]; `rank` [n] in [0, 1), None: means."""
        which = np.full(rows.shape, self._num) if rank is None else (rank * self._num).astype(np.int64)
        row, context_ = _place(self._rows, rows), _place(self._contexts, context)
        result = np.zeros((len(rows), self._samples.shape[-1]))
        for up in (0, 1):
            for right in (0, 1):
                weight = (row.share if up else 1 - row.share) * (
                    context_.share if right else 1 - context_.share
                )
                if not weight.any():
                    continue
                i = np.minimum(row.low + up, len(self._rows) - 1)
                j = np.minimum(context_.low + right, len(self._contexts) - 1)
                result += weight[:, None] * self._samples[i, j, which]
        # Beyond what was recorded lines are drawn on, and those of a few noisy samples may fall.
        floor: Vector = np.maximum(result, self._least[which])
        return floor


class Tables:
    """All of a `Recordings`, by the cut: at k the edge runs k layers, the cloud the others."""

    def __init__(self, recordings: Recordings) -> None:
        num = recordings.num_layers
        here, there = range(num + 1), range(num, -1, -1)
        self.num_layers = num
        self.edge_chunks = Table(recordings.edge_chunks, here)
        self.edge_steps = Table(recordings.edge_steps, here, runs=RUN_STEPS)
        self.cloud_chunks = Table(recordings.cloud_chunks, there)
        self.cloud_steps = Table(recordings.cloud_steps, there, runs=RUN_STEPS)
        crowds = sorted(recordings.crowds, key=lambda crowd: crowd.sessions)
        self._crowd_at = np.array([crowd.sessions for crowd in crowds], np.float64)
        means = np.array([np.median(crowd.seconds) for crowd in crowds])
        self._crowd_over_one = means / means[0]
        self._head, self._load = np.sort(recordings.head_s), np.sort(recordings.load_s)
        edges = sorted(recordings.boundaries, key=lambda edge: edge.layers)
        at = [edge.layers for edge in edges]
        self.row_bytes = np.interp(here, at, [edge.row_bytes for edge in edges])
        self.codec_row_s = np.interp(here, at, [np.mean(edge.row_s) for edge in edges])

    def crowding(self, sessions: Vector) -> Vector:
        """How much longer a step takes with `sessions` others in it."""
        return np.asarray(np.interp(1.0 + sessions, self._crowd_at, self._crowd_over_one))

    def head_s(self, rank: Vector | None, num: int) -> Vector:
        return _ranked(self._head, rank, num)

    def load_s(self, rank: Vector | None, num: int) -> Vector:
        return _ranked(self._load, rank, num)


def _ranked(ordered: Vector, rank: Vector | None, num: int) -> Vector:
    if rank is None:
        return np.full(num, ordered.mean())
    return np.asarray(np.take(ordered, (rank * len(ordered)).astype(np.int64)), np.float64)

"""CUDA graphs of the parts of a layer that work row by row; attention stays eager between them.

A small model's step on a GPU is bound by launching kernels: a graph launches a dozen at once. Graphs have
fixed shapes, so rows are padded to the next of a few counts. Padding cannot leak: no row's answer depends on
another row. Everything but the capture itself is the same on CPU, where tests replay by calling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
"""Row counts with graphs; beyond, kernels take long enough to hide their launches."""

KEEP_BELOW: Final = 0.97
"""Share of the eager step's time below which a bucket's graphs are kept."""

RowFunction = Callable[..., Tensor]
"""Tensors [n, …] → a new tensor [n, …], row i from rows i alone."""

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Something to run → something that runs it again on the same memory."""


class RowGraphs:
    """Replays row functions over padded copies of their inputs.

    The answer is a view of a buffer, good until the same kind of part runs again. Not thread-safe.
    """

    def __init__(self, capture: Capture, buckets: Sequence[int] = BUCKETS) -> None:
        self.kept = self._buckets = tuple(sorted(buckets))
        self._capture = capture
        self._inputs: dict[str, tuple[Tensor, ...]] = {}
        self._outputs: dict[str, Tensor] = {}
        self._replays: dict[tuple[str, int, int], Callable[[], None]] = {}

    def bucket(self, num_rows: int) -> int | None:
        """The row count that `num_rows` are padded to; None: they run eagerly."""
        bucket = next((count for count in self._buckets if count >= num_rows), None)
        return bucket if bucket in self.kept else None

    def run(self, kind: str, layer: int, function: RowFunction, *inputs: Tensor) -> Tensor:
        """function(*inputs), inputs [n, …]. One `kind` has the same shapes but for n in every layer."""
        num_rows = inputs[0].shape[0]
        bucket = self.bucket(num_rows)
        if bucket is None:
            return function(*inputs)
        if kind not in self._inputs:
            self._allocate(kind, function, inputs)
        buffers, out = self._inputs[kind], self._outputs[kind]
        for buffer, value in zip(buffers, inputs, strict=True):
            buffer[:num_rows].copy_(value)
        key = (kind, layer, bucket)
        if key not in self._replays:
            padded, answer = [buffer[:bucket] for buffer in buffers], out[:bucket]

            def body() -> None:
                answer.copy_(function(*padded))

            self._replays[key] = self._capture(body)
        self._replays[key]()
        return out[:num_rows]

    def _allocate(self, kind: str, function: RowFunction, inputs: Sequence[Tensor]) -> None:
        """Buffers of the largest bucket; the answer's shape is seen by running once."""
        most, answer = self._buckets[-1], function(*inputs)
        self._inputs[kind] = tuple(value.new_zeros((most, *value.shape[1:])) for value in inputs)
        self._outputs[kind] = answer.new_zeros((most, *answer.shape[1:]))


def cuda_capture() -> Capture:
    """Captures into one memory pool: of graphs that never run at the same time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(body: Callable[[], None]) -> Callable[[], None]:
        # Libraries set up workspaces in the first run, which a capture must not contain.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            body()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            body()
        return graph.replay

    return capture


class _Model(Protocol):
    graphs: RowGraphs | None


def tune_graphs(
    model: _Model,
    step_s: Callable[[int], float],
    *,
    capture: Callable[[], Capture] = cuda_capture,
    buckets: Sequence[int] = BUCKETS,
) -> dict[str, object]:
    """Leaves `model.graphs` with the buckets whose decode step they make faster, or None → what was measured.

    `step_s(n)` runs decode steps of n sessions on the model as it is and gives the seconds of one. Everything
    is captured here: while serving, nothing is. A failure leaves the model eager and is told.
    """
    model.graphs = None
    eager = {count: step_s(count) for count in buckets}
    try:
        model.graphs = graphs = RowGraphs(capture(), buckets)
        replayed = {count: step_s(count) for count in buckets}
    except RuntimeError as error:
        model.graphs = None
        return {"kept": (), "failed": str(error)}
    graphs.kept = tuple(count for count in buckets if replayed[count] < KEEP_BELOW * eager[count])
    if not graphs.kept:
        model.graphs = None
    times = {str(count): f"{eager[count] * 1e3:.2f}>{replayed[count] * 1e3:.2f} ms" for count in buckets}
    return {"kept": graphs.kept, **times}

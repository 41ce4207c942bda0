"""One step over a range of layers, bound once: the same buffers are read and written at every run."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from isthmus.splitter.cache import F32, KVCache, aligned_zeros

if TYPE_CHECKING:
    from isthmus.splitter.spec import ModelSpec


class RotaryTables:
    """cos and sin as OrtValues [length, head_dim/2], shared by all sessions; grown by need, thread-safe."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._lock = threading.Lock()
        self._length = 0
        self._tables: tuple[Any, Any] | None = None

    def for_length(self, length: int) -> tuple[Any, Any]:
        """Tables of at least `length` positions. Steps bound to shorter ones keep those."""
        with self._lock:
            if self._tables is None or length > self._length:
                # doubling, so that a growing conversation recomputes them seldom
                self._length = min(
                    max(length, 2 * self._length, 1024), max(length, self._spec.context_length)
                )
                cos, sin = self._spec.rope_tables(self._length)
                self._tables = (ort_view(cos), ort_view(sin))
            return self._tables


class BoundStep:
    """`rows` rows through the layers of `cache`, with keys and values written in place.

    The hidden rows go back and forth between two buffers. Binding once is what makes a session per layer
    cheap: a run of a bound session costs 3 µs besides its kernels (binding all of 30 layers takes 0.8 ms).
    Dies with the cache's buffers (see KVCache.steps).
    """

    def __init__(
        self, sessions: Sequence[Any], cache: KVCache, rows: int, hidden: int, tables: tuple[Any, Any]
    ) -> None:
        self.rows = rows
        self._input = aligned_zeros((1, rows, hidden))
        other = aligned_zeros((1, rows, hidden))
        self._output = self._input if len(sessions) % 2 == 0 else other
        self._seqlens_k = np.zeros(1, dtype=np.int32)
        self._total_len = np.zeros(1, dtype=np.int32)
        lengths = {"seqlens_k": ort_view(self._seqlens_k), "total_len": ort_view(self._total_len)}
        shared = {**lengths, "cos": tables[0], "sin": tables[1]}
        x, y = ort_view(self._input), ort_view(other)
        # An IOBinding holds addresses, not numpy arrays: what they belong to must live as long as it does.
        self._alive: list[Any] = [shared, x, y]
        self._runs: list[tuple[Any, Any]] = []
        for i, session in enumerate(sessions):
            key, value = ort_view(cache.keys[i]), ort_view(cache.values[i])
            binding = session.io_binding()
            for name, bound in {"x": x, "past_key": key, "past_value": value, **shared}.items():
                binding.bind_ortvalue_input(name, bound)
            for name, bound in {"y": y, "present_key": key, "present_value": value}.items():
                binding.bind_ortvalue_output(name, bound)
            self._alive += [key, value]
            self._runs.append((session.run_with_iobinding, binding))
            x, y = y, x

    def run(self, source: F32, target: F32, length: int) -> None:
        """float32 [rows, hidden] from `source` to `target`, placed after `length` rows of the cache."""
        self._input[0] = source
        self._total_len[0] = length + self.rows
        self._seqlens_k[0] = length + self.rows - 1
        # No RunOptions: onnxruntime's wrapper looks a key up in them that is never there, at 20 µs a call.
        for run, binding in self._runs:
            run(binding)
        target[:] = self._output[0]


def ort_view(array: Any) -> Any:
    """An OrtValue over the memory of a numpy array; keeps the array alive as long as itself."""
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(array)

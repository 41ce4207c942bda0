"""The whole decoder as one ONNX Runtime session: what the block-wise runner is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from isthmus.splitter.cache import F32, KVCache
from isthmus.splitter.providers import choose_provider
from isthmus.splitter.sessions import configure_threads, open_session
from isthmus.splitter.step import RotaryTables, ort_view

if TYPE_CHECKING:
    from isthmus.splitter.pack import Pack


def build_single_session(pack: Pack, *, capacity: int = 1024, threads: int | None = None) -> SingleRunner:
    """Joins the blocks of `pack` into one graph (in memory) and opens it, with room for `capacity` rows."""
    from isthmus.splitter.graph import emit_whole

    configure_threads(threads)
    tensors = pack.manifest.tensors.values()
    placements = {name: entry.placement() for block in tensors for name, entry in block.items()}
    graph = emit_whole(pack.spec, placements)
    session = open_session(graph, pack.path, choose_provider("cpu"), "the joined graph")
    return SingleRunner(session, KVCache(pack.spec, range(pack.spec.num_layers), capacity=capacity), pack)


class SingleRunner:
    """One sequence through one session. For benches and tests; nothing in the product runs it."""

    def __init__(self, session: Any, cache: KVCache, pack: Pack) -> None:
        self.cache = cache
        self._session = session
        self._binding = session.io_binding()
        self._ids: dict[int, tuple[Any, Any]] = {}
        self._seqlens_k = np.zeros(1, dtype=np.int32)
        self._total_len = np.zeros(1, dtype=np.int32)
        self._logits = np.zeros((1, 1, pack.spec.vocab_size), dtype=np.float32)
        cos, sin = RotaryTables(pack.spec).for_length(cache.capacity)
        inputs = {
            "seqlens_k": ort_view(self._seqlens_k),
            "total_len": ort_view(self._total_len),
            "cos": cos,
            "sin": sin,
        }
        outputs = {"logits": ort_view(self._logits)}
        for i in cache.layers:
            for part, buffers in (("key", cache.keys), ("value", cache.values)):
                inputs[f"past_{part}.{i}"] = outputs[f"present_{part}.{i}"] = ort_view(buffers[i])
        for name, value in inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self._alive = [inputs, outputs]

    def prefill(self, ids: Sequence[int]) -> F32:
        """Appends `ids` in one run; logits float32 [vocab] of the last. Rewind with `cache.truncate`."""
        count = len(ids)
        if self.cache.length + count > self.cache.capacity:
            raise ValueError(f"{self.cache.length} + {count} rows in a capacity of {self.cache.capacity}")
        if count not in self._ids:
            array = np.zeros((1, count), dtype=np.int64)
            self._ids[count] = (array, ort_view(array))
        array, value = self._ids[count]
        array[0] = ids
        self._binding.bind_ortvalue_input("ids", value)
        self._total_len[0] = self.cache.length + count
        self._seqlens_k[0] = self.cache.length + count - 1
        self._session.run_with_iobinding(self._binding)
        self.cache.advance(count)
        logits: F32 = self._logits[0, 0].copy()
        return logits

    def decode(self, token: int) -> F32:
        """Appends one id; logits float32 [vocab] for the next."""
        return self.prefill((token,))

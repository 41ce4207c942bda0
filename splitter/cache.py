"""The keys and values of one sequence over a range of layers: buffers bound in place, grown by doubling."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from isthmus.protocol.errors import IsthmusError, RequestError

if TYPE_CHECKING:
    from isthmus.splitter.spec import ModelSpec

F32 = npt.NDArray[np.float32]

_ALIGNMENT = 64  # bytes: one cache line, one AVX-512 register


def aligned_zeros(shape: tuple[int, ...]) -> F32:
    """float32 zeros on a cache-line boundary. Large ones cost no memory until they are written."""
    nbytes = 4 * int(np.prod(shape))
    raw = np.zeros(nbytes + _ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(np.float32).reshape(shape)


class KVCache:
    """KV of one sequence for `layers`. Every layer holds the same `length` rows, at most `max_length`.

    `keys[i]`, `values[i]` are float32 [1, kv_heads, capacity, head_dim] for layer `layers[i]`. Rows from
    `length` on are leftovers: the kernels neither read them nor need them cleared, so `truncate` is free.
    Not for use by two threads at once; the runner takes `lock` around every step.
    """

    def __init__(self, spec: ModelSpec, layers: range, *, capacity: int = 256) -> None:
        if layers.step != 1 or not 0 <= layers.start <= layers.stop <= spec.num_layers:
            raise RequestError(
                f"layers {layers.start}..{layers.stop} are no range of a model of {spec.num_layers} layers",
                code="bad_layer_range",
            )
        if capacity < 1:
            raise RequestError(f"a KV cache of capacity {capacity} holds nothing", code="bad_capacity")
        self.layers = layers
        self.max_length = spec.context_length
        self.capacity = min(capacity, self.max_length)
        self.lock = threading.RLock()
        self._row = (spec.num_kv_heads, spec.head_dim)
        self._length = 0
        self._touched = 0  # rows ever written, truncated ones included
        self._closed = False
        self.keys = [self._buffer(self.capacity) for _ in layers]
        self.values = [self._buffer(self.capacity) for _ in layers]
        # Runners keep their bound steps here, by number of rows; they die with the buffers they are bound to.
        self.steps: dict[int, Any] = {}

    @property
    def length(self) -> int:
        """Rows held by every layer."""
        return self._length

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers at the present capacity; untouched rows may not be resident."""
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))

    def reserve(self, length: int) -> None:
        """Makes room for `length` rows, growing by doubling (a strided copy, so seldom).

        Raises RequestError (`context_overflow`) beyond the model's context, IsthmusError (`cache_closed`).
        """
        if self._closed:
            raise IsthmusError("the KV cache was closed", code="cache_closed")
        if length > self.max_length:
            raise RequestError(
                f"{length} tokens do not fit the context of {self.max_length}",
                code="context_overflow",
                hint="shorten the prompt or ask for fewer tokens",
            )
        if length > self.capacity:
            capacity = self.capacity
            while capacity < length:
                capacity *= 2
            self._grow(min(capacity, self.max_length))
        self._touched = max(self._touched, length)

    def advance(self, rows: int) -> None:
        """Counts `rows` more, after every layer has written them."""
        if not 0 <= rows <= self.capacity - self._length:
            raise IsthmusError(
                f"{rows} rows after {self._length} in a capacity of {self.capacity}",
                code="cache_overflow",
            )
        self._length += rows

    def truncate(self, to: int) -> None:
        """Forgets all rows from `to` on. Raises RequestError beyond the end."""
        with self.lock:
            if not 0 <= to <= self._length:
                raise RequestError(
                    f"cannot truncate a KV cache of {self._length} rows to {to}", code="bad_truncate"
                )
            self._length = to

    def restore(self, to: int) -> None:
        """Takes a `truncate` back: counts the rows up to `to` again, none of which was overwritten with
        another token's meanwhile. Raises RequestError beyond what was ever written."""
        with self.lock:
            if not self._length <= to <= min(self._touched, self.capacity):
                raise RequestError(
                    f"cannot restore a KV cache of {self._length} rows to {to}: {self._touched} were written",
                    code="bad_restore",
                )
            self._length = to

    def join(self, deeper: KVCache) -> None:
        """Takes over `deeper`, which holds as many rows for the layers right behind these, and is empty and
        closed afterwards. Raises RequestError where the two don't fit together."""
        with self.lock, deeper.lock:
            if deeper.layers.start != self.layers.stop or deeper.length != self._length:
                raise RequestError(
                    f"layers {deeper.layers.start}..{deeper.layers.stop} with {deeper.length} rows don't go "
                    f"on from layers {self.layers.start}..{self.layers.stop} with {self._length}",
                    code="bad_layer_range",
                )
            capacity = max(self.capacity, deeper.capacity)
            for cache in (self, deeper):
                if cache.capacity < capacity:
                    cache._grow(capacity)
            self.layers = range(self.layers.start, deeper.layers.stop)
            self.keys += deeper.keys
            self.values += deeper.values
            self._touched = max(self._touched, deeper._touched)
            self.steps.clear()
            deeper.steps.clear()
            deeper.keys, deeper.values = [], []
            deeper._length = 0
            deeper._closed = True

    def close(self) -> None:
        """Overwrites everything with zeros (the next owner of the memory sees no one's text) and lets go."""
        with self.lock:
            if self._closed:
                return
            self.steps.clear()
            for buffer in (*self.keys, *self.values):
                buffer[:, :, : self._touched] = 0  # not the rest: that would make it resident first
            self.keys, self.values = [], []
            self._length = 0
            self._closed = True

    def _buffer(self, capacity: int) -> F32:
        heads, head_dim = self._row
        return aligned_zeros((1, heads, capacity, head_dim))

    def _grow(self, capacity: int) -> None:
        self.steps.clear()
        for buffers in (self.keys, self.values):
            for i, old in enumerate(buffers):
                new = self._buffer(capacity)
                new[:, :, : self._length] = old[:, :, : self._length]
                old.fill(0)
                buffers[i] = new
        self.capacity = capacity

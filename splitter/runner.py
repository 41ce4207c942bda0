"""Runs a range of a pack's blocks: loads only what the range needs and appends to a KVCache."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from isthmus.protocol.errors import IsthmusError, RequestError
from isthmus.splitter.cache import F32, KVCache
from isthmus.splitter.providers import choose_provider, provider_used
from isthmus.splitter.sessions import configure_threads, open_session, release_memory
from isthmus.splitter.step import BoundStep, RotaryTables

if TYPE_CHECKING:
    from isthmus.splitter.pack import Pack

__all__ = ["BlockRunner", "KVCache", "configure_threads"]

MAX_CHUNK = 512
"""Rows computed at once in a prefill. GroupQueryAttention works in tiles, so its scratch does not grow with
the context: 8,000 tokens in chunks of 512 peaked at 40 MB beside the KV."""

_KEPT_ROWS = 16
"""Steps of up to this many rows stay bound between calls (decode, verification of drafts); a prefill's
buffers would be megabytes per conversation, and binding costs it less than 1 %."""

_KEPT_STEPS = 4

_HEAD_ROWS = 64
"""Rows whose logits are computed at once: more would hold the result twice."""


class BlockRunner:
    """Blocks of one pack in ONNX Runtime. Thread-safe for different caches.

    Rows are the residual stream, float32 [n, hidden]; ids are token ids below the vocabulary's size.
    """

    def __init__(
        self, pack: Pack, *, provider: str = "cpu", threads: int | None = None, max_chunk: int = MAX_CHUNK
    ) -> None:
        self.pack = pack
        self.spec = pack.spec
        self.max_chunk = max_chunk
        self._provider = choose_provider(provider)
        self.threads = configure_threads(threads)
        self._sessions: dict[str, Any] = {}
        self._loading = threading.Lock()
        self._listing = threading.Lock()  # a WeakSet must not grow while it is iterated
        self._caches: weakref.WeakSet[KVCache] = weakref.WeakSet()
        self._tables = RotaryTables(self.spec)

    # --- what is in memory

    def load(self, layers: range, *, embed: bool = False, head: bool = False) -> None:
        """Loads what is missing of `layers` (and of the embedding and the head). Idempotent.

        Raises ModelFileError where the pack's bytes are not what its manifest says.
        """
        names = [f"layer.{i}" for i in layers]
        names += ["embed"] * embed + ["head"] * head
        with self._loading:
            for name in names:
                if name not in self._sessions:
                    graph = self.pack.graph_bytes(name)
                    session = open_session(graph, self.pack.path, self._provider, f"block {name!r}")
                    self._sessions[name] = session

    def unload(self, layers: range, *, embed: bool = False, head: bool = False) -> None:
        """Lets go of the weights of `layers` (and of the embedding and the head). Idempotent.

        Waits for steps that use them. Caches stay valid; their next step needs the layers loaded again.
        """
        with self._loading:
            for name in [f"layer.{i}" for i in layers] + ["embed"] * embed + ["head"] * head:
                self._sessions.pop(name, None)
        with self._listing:
            caches = [cache for cache in self._caches if set(cache.layers) & set(layers)]
        for cache in caches:
            with cache.lock:
                cache.steps.clear()
        release_memory()

    @property
    def loaded_layers(self) -> tuple[int, ...]:
        """Indices of the layers in memory, ascending."""
        names = list(self._sessions)
        return tuple(sorted(int(name[6:]) for name in names if name.startswith("layer.")))

    @property
    def head_loaded(self) -> bool:
        """Whether norm and head are in memory."""
        return "head" in self._sessions

    @property
    def provider_used(self) -> str:
        """The provider that really runs: what the sessions report (what was asked for until one is open)."""
        sessions = list(self._sessions.values())
        return provider_used(sessions[0].get_providers()) if sessions else self._provider.name

    # --- computing

    def new_cache(self, layers: range, capacity: int = 256) -> KVCache:
        """An empty cache for `layers`, with room for `capacity` rows before it first grows."""
        cache = KVCache(self.spec, layers, capacity=capacity)
        with self._listing:
            self._caches.add(cache)
        return cache

    def embed(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> F32:
        """Rows that enter layer 0, float32 [n, hidden]. RequestError for an id outside the vocabulary."""
        array = np.asarray(ids, dtype=np.int64)
        if not array.size:
            return np.empty((0, self.spec.hidden), dtype=np.float32)
        if not 0 <= int(array.min()) <= int(array.max()) < self.spec.vocab_size:
            wrong = next(int(i) for i in array if not 0 <= i < self.spec.vocab_size)
            raise RequestError(
                f"token id {wrong} is outside the vocabulary of {self.spec.vocab_size}", code="bad_token_id"
            )
        rows: F32 = self._session("embed").run(["y"], {"ids": array.reshape(1, -1)})[0][0]
        return rows

    def forward(
        self, cache: KVCache, rows: F32, *, start_layer: int | None = None, stop_layer: int | None = None
    ) -> F32:
        """Runs float32 [n, hidden] through the cache's layers, appending at `cache.length`; same shape out.

        All layers of a cache advance together, so `start_layer` and `stop_layer`, where given, must be the
        cache's. A prefill is computed in chunks; whatever fails in mid-way, the cache keeps its length.
        Raises RequestError for rows of another shape, beyond the model's context, or another runner's cache.
        """
        given = (cache.layers.start if start_layer is None else start_layer,
                 cache.layers.stop if stop_layer is None else stop_layer)  # fmt: skip
        if given != (cache.layers.start, cache.layers.stop):
            raise RequestError(
                f"layers {given[0]}..{given[1]} asked for, the cache holds {cache.layers.start}.."
                f"{cache.layers.stop}",
                code="bad_layer_range",
                hint="all layers of a cache advance together; make a cache per range",
            )
        if rows.ndim != 2 or rows.shape[1] != self.spec.hidden or rows.dtype != np.float32:
            raise RequestError(
                f"rows are {rows.dtype}{list(rows.shape)}, expected float32 [n, {self.spec.hidden}]",
                code="bad_rows",
            )
        if cache not in self._caches:
            raise RequestError("the KV cache belongs to another runner", code="foreign_cache")
        out: F32 = np.empty(rows.shape, dtype=np.float32)
        with cache.lock:
            start = cache.length
            cache.reserve(start + len(rows))
            try:
                self._run_chunks(cache, rows, out)
            except BaseException:
                cache.truncate(start)
                raise
        return out

    def _run_chunks(self, cache: KVCache, rows: F32, out: F32) -> None:
        if not cache.layers:  # K = 0: nothing to compute, but positions count all the same
            out[:] = rows
            cache.advance(len(rows))
            return
        step: BoundStep | None = None
        for at in range(0, len(rows), self.max_chunk):
            part = slice(at, min(at + self.max_chunk, len(rows)))
            count = part.stop - at
            if step is None or step.rows != count:
                step = self._step(cache, count)
            step.run(rows[part], out[part], cache.length)
            cache.advance(count)

    def head(self, rows: F32) -> F32:
        """Logits float32 [n, vocab] of final rows float32 [n, hidden]. Pass only the rows you need: at 49k
        tokens of vocabulary the head costs as much as nine layers of a 135M model."""
        session = self._session("head")
        if 0 < len(rows) <= _HEAD_ROWS:
            logits: F32 = session.run(["logits"], {"x": rows[None]})[0][0]
            return logits
        whole = np.empty((len(rows), self.spec.vocab_size), dtype=np.float32)
        for at in range(0, len(rows), _HEAD_ROWS):
            part = rows[None, at : at + _HEAD_ROWS]
            whole[at : at + _HEAD_ROWS] = session.run(["logits"], {"x": part})[0][0]
        return whole

    def _step(self, cache: KVCache, rows: int) -> BoundStep:
        """The bound step for `rows` rows, from the cache or made new. Holds cache.lock."""
        step: BoundStep | None = cache.steps.pop(rows, None)
        if step is None:
            sessions = [self._session(f"layer.{i}") for i in cache.layers]
            step = BoundStep(sessions, cache, rows, self.spec.hidden, self._tables.for_length(cache.capacity))
        if rows <= _KEPT_ROWS:
            cache.steps[rows] = step  # last in the dict: the most recently used
            while len(cache.steps) > _KEPT_STEPS:
                cache.steps.pop(next(iter(cache.steps)))
        return step

    def _session(self, name: str) -> Any:
        session = self._sessions.get(name)
        if session is None:
            raise IsthmusError(
                f"block {name!r} is not loaded",
                code="not_loaded",
                hint=f"loaded layers: {list(self.loaded_layers)}; call load() first",
            )
        return session

"""The edge's half of one request: blocks [0, K), and norm, head and sampler where they are its part.

Every method computes. They run in the agent's one worker thread, which also owns the cache pool, so nothing
here needs a lock, and what is put away is not in use any more. Only `chunk` and `drawn` of one row, which
touch no pool, may run on the event loop instead, while no other request runs (`Generation._is_short`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.edge.conversation import CachePool
from isthmus.protocol.activations import Encoded
from isthmus.protocol.sampling import Sampled, SamplingParams, TokenCounts, sample

if TYPE_CHECKING:
    from isthmus.protocol.activations import RowCodec
    from isthmus.splitter.cache import KVCache
    from isthmus.splitter.runner import BlockRunner

# A cache starts with room for this many new tokens; beyond, it doubles (a strided copy).
ROOM_TOKENS = 256

Rows = NDArray[np.float32]


class Chunk(NamedTuple):
    """Consecutive boundary rows f32[n, hidden], and their encoding."""

    rows: Rows
    encoded: Encoded


class EdgeHalf:
    """Blocks [0, `split`) over one KV cache. `split` 0: nothing to run, and no cache. `make_room` is called
    before anything is loaded."""

    def __init__(
        self,
        runner: BlockRunner,
        pool: CachePool[KVCache],
        split: int,
        *,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: SamplingParams,
        draws: bool,
        codec: RowCodec | None,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        self.split = split
        self.rows_computed = 0
        self.chunk_s = inf  # how long the last chunk took, in seconds
        self._runner = runner
        self._pool = pool
        self._prompt = prompt
        self._max_tokens = max_tokens
        self._sampling = sampling
        self._draws = draws
        self._codec = codec
        self._make_room = make_room
        self._cache: KVCache | None = None
        needs_counts = draws and sampling.needs_context
        self._counts = TokenCounts(prompt, ()) if needs_counts else None

    def prepare(self) -> int:
        """Find a cache and load what is missing. Number of prompt tokens whose rows the cache holds."""
        self._cache = self._pool.take(self.split, self._prompt) if self.split else None
        self._make_room()  # after the cache was taken out: it is not to be dropped
        if self.split == 0:
            return 0
        self._runner.load(range(self.split), embed=True, head=self._draws)
        if self._cache is None:
            capacity = len(self._prompt) + min(self._max_tokens, ROOM_TOKENS)
            self._cache = self._runner.new_cache(range(self.split), capacity=capacity)
        return self._cache.length

    def truncate(self, to: int) -> None:
        """Forget the rows from position `to` on."""
        if self._cache is not None and to < self._cache.length:
            self._cache.truncate(to)

    def rows(self, ids: Sequence[int]) -> Rows:
        """Append `ids`; their rows f32[n, hidden] at the boundary."""
        assert self._cache is not None, "prepare() first"
        self.rows_computed += len(ids)
        embedded = self._runner.embed(ids)
        return self._runner.forward(self._cache, embedded, start_layer=0, stop_layer=self.split)

    def chunk(self, ids: Sequence[int]) -> Chunk:
        """Append `ids`; their rows, also as they travel."""
        assert self._codec is not None, "this half sends nothing"
        started = perf_counter()
        rows = self.rows(ids)
        encoded = self._codec.encode(rows)
        self.chunk_s = perf_counter() - started
        return Chunk(rows, encoded)

    def drawn(self, hidden: Rows, index: int) -> Sampled:
        """The token of output `index` from the last of `hidden` f32[n, hidden], by norm, head and sampler."""
        logits = self._runner.head(hidden[-1:])[-1]
        result = sample(logits, self._sampling, position=len(self._prompt) + index, counts=self._counts)
        if self._counts is not None:
            self._counts.add(result.token)
        return result

    def rows_and_drawn(self, ids: Sequence[int], index: int) -> Sampled:
        """`rows` and `drawn` in one job: a whole local step."""
        return self.drawn(self.rows(ids), index)

    def release(self, ids: Sequence[int]) -> None:
        """Put the cache away for the conversation's next turn. `ids`: all tokens so far, of which the
        cache holds the rows of the first ones. Idempotent."""
        if self._cache is not None:
            cache, self._cache = self._cache, None
            self._pool.put(self.split, ids[: cache.length], cache)

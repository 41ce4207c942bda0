"""The edge's half of one request: blocks [0, K), and norm, head and sampler where they are its part.

Every method computes. They run in the agent's one worker thread, which also owns the cache pool, so nothing
here needs a lock, and what is put away is not in use any more. Only `chunk` and `drawn` of one row, which
touch no pool, may run on the event loop instead, while no other request runs (`Leg._is_short`) and no grammar
may take long over a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.edge.conversation import CachePool
from isthmus.edge.draws import Draws
from isthmus.edge.history import Raw
from isthmus.protocol.activations import Encoded
from isthmus.protocol.sampling import Sampled, SamplingParams

if TYPE_CHECKING:
    from isthmus.edge.grammar import Compiled
    from isthmus.protocol.activations import RowCodec
    from isthmus.splitter.cache import KVCache
    from isthmus.splitter.runner import BlockRunner

# A cache starts with room for this many new tokens; beyond, it doubles (a strided copy).
ROOM_TOKENS = 256

Rows = NDArray[np.float32]


class Chunk(NamedTuple):
    """Consecutive boundary rows uint8[n, row_bytes], and the same as they travel."""

    raw: Raw
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
        grammar: Compiled | None = None,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        self.split = split
        self.grammar = grammar
        self.rows_computed = 0
        self.chunk_s = inf  # how long the last chunk took, in seconds
        self.busy_s = 0.0  # computing, in seconds
        self._runner = runner
        self._pool = pool
        self._prompt = prompt
        self._max_tokens = max_tokens
        self._sampling = sampling
        self._draws = draws
        self._codec = codec
        self._make_room = make_room
        self._cache: KVCache | None = None
        self._deeper: KVCache | None = None
        self._drawing: Draws | None = None

    @property
    def length(self) -> int:
        """Rows that the KV cache holds."""
        return self._cache.length if self._cache is not None else 0

    def prepare(self, ids: Sequence[int] | None = None) -> int:
        """Find a cache and load what is missing, unless that was done. `ids` (default: the prompt): all
        tokens so far. Number of them whose rows the cache holds."""
        known = self._prompt if ids is None else ids
        if self._draws and self._drawing is None:
            outputs = known[len(self._prompt) :]
            self._drawing = Draws(self._prompt, self._sampling, self.grammar, outputs)
        if self._cache is not None:
            return self._cache.length
        self._cache = self._pool.take(self.split, known) if self.split else None
        self._make_room()  # after the cache was taken out: it is not to be dropped
        if self.split == 0:
            return 0
        self._runner.load(range(self.split), embed=True, head=self._draws)
        if self._cache is None:
            self._cache = self._runner.new_cache(range(self.split), capacity=self._capacity(len(known)))
        return self._cache.length

    def _capacity(self, known: int) -> int:
        most = len(self._prompt) + self._max_tokens
        return max(1, min(most, known + ROOM_TOKENS))

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

    def rows_again(self, ids: Sequence[int], start: int) -> Rows:
        """The rows f32[n, hidden] of `ids` at the positions from `start` on, which the cache holds already.
        It holds the same rows afterwards, and all behind them."""
        assert self._cache is not None, "prepare() first"
        length = self._cache.length
        self._cache.truncate(start)
        try:
            return self.rows(ids)
        finally:
            self._cache.restore(length)

    def chunk(self, ids: Sequence[int]) -> Chunk:
        """Append `ids`; their rows as they travel."""
        started = perf_counter()
        chunk = self.encoded(self.rows(ids))
        self.chunk_s = perf_counter() - started
        self.busy_s += self.chunk_s
        return chunk

    def encoded(self, rows: Rows) -> Chunk:
        """Rows f32[n, hidden] as they travel."""
        assert self._codec is not None, "this half sends nothing"
        raw = self._codec.encode_raw(rows)
        return Chunk(raw, self._codec.pack(raw))

    def drawn(self, hidden: Rows, index: int) -> Sampled:
        """The token of output `index` from the last of `hidden` f32[n, hidden], by norm, head and sampler."""
        assert self._drawing is not None, "prepare() first"
        started = perf_counter()
        result = self._drawing.draw(self._runner.head(hidden[-1:])[-1], index)
        self.busy_s += perf_counter() - started
        return result

    def rows_and_drawn(self, ids: Sequence[int], index: int) -> Sampled:
        """`rows` and `drawn` in one job: a whole local step."""
        return self.drawn(self.rows(ids), index)

    # ---- another cut in mid-generation -----------------------------------------------------------

    def retarget(self, *, draws: bool, codec: RowCodec | None) -> None:
        """Go on with the same blocks and another part in the rest: who draws, and how rows travel."""
        self._draws = draws
        self._codec = codec
        self._drawing = None  # `prepare` makes it anew: the cloud may have drawn meanwhile
        self._make_room()
        self._runner.load(range(self.split), embed=True, head=draws)

    def deepen(self, split: int) -> None:
        """Begin to take the blocks [`self.split`, `split`) over, too: `through` fills their cache."""
        assert self._cache is not None, "prepare() first"
        self._make_room()
        self._runner.load(range(split), embed=True, head=False)
        layers = range(self.split, split)
        self._deeper = self._runner.new_cache(layers, capacity=self._cache.capacity)

    def through(self, rows: Rows) -> Rows:
        """Rows f32[n, hidden] at the old boundary, in order from position 0 on, to the new one."""
        assert self._deeper is not None, "deepen() first"
        self.rows_computed += len(rows)
        return self._runner.forward(self._deeper, rows)

    def deepened(self) -> None:
        """The new blocks are part of this half; rows that did not go through are forgotten."""
        assert self._cache is not None
        assert self._deeper is not None
        self._cache.truncate(self._deeper.length)
        split = self._deeper.layers.stop
        self._cache.join(self._deeper)
        self._deeper, self.split = None, split

    def release(self, ids: Sequence[int]) -> None:
        """Put the cache away for the conversation's next turn. `ids`: all tokens so far, of which the
        cache holds the rows of the first ones. Idempotent."""
        if self._deeper is not None:
            self._deeper.close()
            self._deeper = None
        if self._cache is not None:
            cache, self._cache = self._cache, None
            self._pool.put(self.split, ids[: cache.length], cache)

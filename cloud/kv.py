"""KV page accounting: which page holds which tokens of which layer, and who refers to it. No torch, no clock.

A page holds the keys and values of 16 tokens of ONE layer, so a session that enters the model at
layer K owns no pages below K. Every page is in exactly one state:

    free    nobody refers to it
    used    at least one block table holds it (the prefix cache may keep it too)
    cached  only the prefix cache keeps it; `alloc` may reclaim it

    num_free + num_used + num_cached == num_pages
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import IsthmusError, OverloadedError, SequenceError

if TYPE_CHECKING:
    from isthmus.cloud.prefix_cache import PrefixMatch

PAGE_TOKENS = 16

PageArray = NDArray[np.int32]


def columns_for(num_tokens: int, page_tokens: int = PAGE_TOKENS) -> int:
    """Pages per layer that `num_tokens` tokens take."""
    return -(-num_tokens // page_tokens)


def _invariant(message: str) -> IsthmusError:
    return IsthmusError(message, code="kv_invariant", hint="this is a bug in the page accounting")


@dataclass(frozen=True, slots=True)
class PageCopies:
    """Page contents to copy before the next write or allocation: page src[i] over page dst[i]."""

    src: PageArray
    dst: PageArray

    def __len__(self) -> int:
        return len(self.src)


class PagePool:
    """Hands out page numbers 0..num_pages-1 and counts references.

    `on_alloc` is called with every batch of newly allocated page numbers, before anyone sees them: the KV
    store zeroes them there (a stale NaN times a zero attention weight is NaN, and would cross tenants).
    In each call the page numbers must be distinct.
    """

    def __init__(
        self,
        num_pages: int,
        *,
        page_tokens: int = PAGE_TOKENS,
        on_alloc: Callable[[PageArray], None] | None = None,
    ) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._on_alloc = on_alloc
        self._reclaim: Callable[[int], int] | None = None
        # Lowest numbers on top of the stack: a fresh pool hands out 0, 1, 2, …
        self._stack: PageArray = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._held = np.zeros(num_pages, dtype=np.int32)
        self._kept = np.zeros(num_pages, dtype=np.int32)
        self.num_free = num_pages
        self.num_cached = 0

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free - self.num_cached

    @property
    def num_available(self) -> int:
        """Pages that `alloc` can hand out: free ones and those only the prefix cache keeps."""
        return self.num_free + self.num_cached

    def set_reclaimer(self, reclaim: Callable[[int], int]) -> None:
        """`reclaim(n)` frees at least n cached pages if there are so many (the prefix cache's eviction)."""
        self._reclaim = reclaim

    def alloc(self, num: int) -> PageArray:
        """`num` zeroed pages, each held once.

        Raises:
            OverloadedError (`kv_pool_exhausted`): fewer are available; nothing is changed then.
        """
        if num > self.num_available:
            raise OverloadedError(
                f"{num} KV pages asked, {self.num_available} of {self.num_pages} are available",
                code="kv_pool_exhausted",
                hint="wait for sessions to end, or start the cloud with more KV pages",
            )
        if num > self.num_free and self._reclaim is not None:
            self._reclaim(num - self.num_free)
        if num > self.num_free:
            raise _invariant(f"{num} pages asked, {self.num_free} free after reclaiming")
        self.num_free -= num
        pages = self._stack[self.num_free : self.num_free + num][::-1].copy()
        self._held[pages] = 1
        if num and self._on_alloc is not None:
            self._on_alloc(pages)
        return pages

    def hold(self, pages: PageArray) -> None:
        """One more block table refers to each of `pages` (used or cached, never free)."""
        idle = self._held[pages] == 0
        if (self._kept[pages[idle]] == 0).any():
            raise _invariant("a free page was held")
        self._held[pages] += 1
        self.num_cached -= int(idle.sum())

    def release(self, pages: PageArray) -> int:
        """A block table lets go of each of `pages`. Returns how many of them became free."""
        held = self._held[pages] - 1
        if (held < 0).any():
            raise _invariant("a page was released more often than held")
        self._held[pages] = held
        idle = pages[held == 0]
        kept = self._kept[idle] > 0
        self.num_cached += int(kept.sum())
        return self._push(idle[~kept])

    def keep(self, pages: PageArray) -> None:
        """One more prefix cache entry refers to each of `pages` (not free)."""
        if ((self._held[pages] == 0) & (self._kept[pages] == 0)).any():
            raise _invariant("a free page was kept")
        self._kept[pages] += 1

    def drop(self, pages: PageArray) -> int:
        """A prefix cache entry lets go of each of `pages`. Returns how many of them became free."""
        kept = self._kept[pages] - 1
        if (kept < 0).any():
            raise _invariant("a page was dropped more often than kept")
        self._kept[pages] = kept
        freed = pages[(kept == 0) & (self._held[pages] == 0)]
        self.num_cached -= len(freed)
        return self._push(freed)

    def shared(self, pages: PageArray) -> NDArray[np.bool_]:
        """Which of `pages` somebody besides one holder refers to: writing to those needs a copy."""
        many: NDArray[np.bool_] = (self._held[pages] + self._kept[pages]) > 1
        return many

    def idle(self, pages: PageArray) -> NDArray[np.bool_]:
        """Which of `pages` no block table holds."""
        idle: NDArray[np.bool_] = self._held[pages] == 0
        return idle

    def references(self, page: int) -> tuple[int, int]:
        """(block tables, prefix cache entries) that refer to `page`."""
        return int(self._held[page]), int(self._kept[page])

    def _push(self, pages: PageArray) -> int:
        self._stack[self.num_free : self.num_free + len(pages)] = pages
        self.num_free += len(pages)
        return len(pages)

    def check(self) -> None:
        """Raises if the counters, the reference counts and the free stack disagree. O(num_pages)."""
        free = self._stack[: self.num_free]
        if len(np.unique(free)) != len(free):
            raise _invariant("a page is in the free stack twice")
        referred = (self._held > 0) | (self._kept > 0)
        if referred[free].any():
            raise _invariant("a free page is referred to")
        if int(referred.sum()) != self.num_pages - self.num_free:
            raise _invariant(f"{int(referred.sum())} pages in use, {self.num_free} of {self.num_pages} free")
        if int(((self._held == 0) & (self._kept > 0)).sum()) != self.num_cached:
            raise _invariant("the count of cached pages is wrong")


class BlockTable:
    """The pages of one session: `pages` is int32 [depth, num_columns], row i for layer first_layer + i.

    Column c holds tokens [16c, 16c+16). `length` counts the tokens whose keys and values are there.
    Life of a step: `ensure(length + n)` → the store copies pages → the layers write rows
    [length, length+n) → `advance(n)`.
    """

    def __init__(self, pool: PagePool, *, first_layer: int, num_layers: int) -> None:
        """`num_layers` is the model's N, `first_layer` the session's entry layer K < N."""
        if not 0 <= first_layer < num_layers:
            raise _invariant(f"entry layer {first_layer} outside 0..{num_layers - 1}")
        self.pool = pool
        self.first_layer = first_layer
        self.num_layers = num_layers
        self.length = 0
        self.num_columns = 0
        self._pages = np.zeros((self.depth, 8), dtype=np.int32)

    @property
    def depth(self) -> int:
        """Layers that own pages: N - K."""
        return self.num_layers - self.first_layer

    @property
    def pages(self) -> PageArray:
        """int32 [depth, num_columns], a view; do not write."""
        return self._pages[:, : self.num_columns]

    @property
    def num_pages(self) -> int:
        return self.depth * self.num_columns

    @property
    def capacity(self) -> int:
        """Tokens the allocated pages can hold."""
        return self.num_columns * self.pool.page_tokens

    def pages_needed(self, num_tokens: int) -> int:
        """Pages `ensure(num_tokens)` would allocate, copies of shared pages included."""
        fresh = max(0, columns_for(num_tokens, self.pool.page_tokens) - self.num_columns)
        return self.depth * fresh + int(self._shared_mask(num_tokens).sum())

    def ensure(self, num_tokens: int) -> PageCopies:
        """Makes rows [length, num_tokens) writable: allocates missing pages, replaces shared ones.

        Returns the page copies to make before anything is written or allocated again: the source pages may
        be handed out by the next `alloc`.

        Raises:
            OverloadedError (`kv_pool_exhausted`): the pool has too few pages; nothing is changed then.
        """
        pool = self.pool
        fresh_columns = max(0, columns_for(num_tokens, pool.page_tokens) - self.num_columns)
        num_fresh = self.depth * fresh_columns
        num_shared = int(self._shared_mask(num_tokens).sum())
        if not num_fresh and not num_shared:
            return PageCopies(np.zeros(0, np.int32), np.zeros(0, np.int32))
        new = pool.alloc(num_fresh + num_shared)
        # Reclaiming may just have evicted the cache entries that shared a page: look again.
        mask = self._shared_mask(num_tokens)
        first = self.length // pool.page_tokens
        window = self._pages[:, first : first + mask.shape[1]]
        shared = window[mask]
        copies, spare = new[num_fresh : num_fresh + len(shared)], new[num_fresh + len(shared) :]
        window[mask] = copies
        if num_shared:
            pool.release(shared)
            pool.release(spare)
        self._append_columns(new[:num_fresh].reshape(self.depth, fresh_columns))
        return PageCopies(shared, copies)

    def advance(self, num_tokens: int) -> None:
        """Commits `num_tokens` written rows."""
        if self.length + num_tokens > self.capacity:
            raise _invariant(f"{self.length} + {num_tokens} tokens exceed the capacity of {self.capacity}")
        self.length += num_tokens

    def truncate(self, to: int) -> int:
        """Forgets the tokens from position `to` on. Returns how many pages became free.

        Raises:
            SequenceError (`truncate_past_end`): `to` is negative or beyond the length.
        """
        if not 0 <= to <= self.length:
            raise SequenceError(
                f"cannot truncate to {to}: the session holds {self.length} tokens",
                code="truncate_past_end",
                hint="truncate to a position the session has reached",
            )
        columns = columns_for(to, self.pool.page_tokens)
        freed = self.pool.release(self._pages[:, columns : self.num_columns].ravel())
        self.num_columns = columns
        self.length = to
        return freed

    def free_all(self) -> int:
        """Lets go of every page. Returns how many pages the table held."""
        num = self.num_pages
        self.truncate(0)
        return num

    def adopt(self, match: PrefixMatch) -> None:
        """Starts an empty table with cached pages. The table takes over the match's references; a partly
        used last page stays shared until `ensure` copies it."""
        if self.num_columns:
            raise _invariant("only an empty block table can adopt a cached prefix")
        if match.pages.shape[0] != self.depth:
            raise _invariant(f"cached prefix of {match.pages.shape[0]} layers, table of {self.depth}")
        self._append_columns(match.pages)
        self.length = match.num_tokens

    def fork(self) -> BlockTable:
        """A second table over the same tokens; whoever writes first to a shared page copies it."""
        twin = BlockTable(self.pool, first_layer=self.first_layer, num_layers=self.num_layers)
        columns = columns_for(self.length, self.pool.page_tokens)
        self.pool.hold(self._pages[:, :columns].ravel())
        twin._append_columns(self._pages[:, :columns])
        twin.length = self.length
        return twin

    def _shared_mask(self, num_tokens: int) -> NDArray[np.bool_]:
        """bool [depth, columns]: which pages of the existing columns that rows [length, num_tokens) hit
        are shared."""
        first = self.length // self.pool.page_tokens
        last = min(columns_for(num_tokens, self.pool.page_tokens), self.num_columns)
        return self.pool.shared(self._pages[:, first : max(first, last)])

    def _append_columns(self, columns: PageArray) -> None:
        total = self.num_columns + columns.shape[1]
        if total > self._pages.shape[1]:
            grown = np.zeros((self.depth, max(total, 2 * self._pages.shape[1])), dtype=np.int32)
            grown[:, : self.num_columns] = self.pages
            self._pages = grown
        self._pages[:, self.num_columns : total] = columns
        self.num_columns = total

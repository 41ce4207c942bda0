"""Cached prefixes: finds KV pages by the digests an edge offers (PROTOCOL.md rule 9). No torch, no clock.

One node per digest, in a forest: a full node ends at a multiple of 16 tokens and has the full node before
it as parent (long offers leave out some multiples, so a node may cover several columns); a tail node covers
the first few tokens of a column. The digest at n tokens covers everything before it, so the longest match
is the deepest offered digest that is known.
Digests are opaque HMACs keyed by the edge; tenant and entry layer are part of the key, so nothing
matches across tenants, and never with pages of another depth.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isthmus.cloud.kv import BlockTable, PageArray, PagePool, columns_for
from isthmus.protocol.errors import IsthmusError, SequenceError

Key = tuple[str, int, int, str]
"""(tenant, entry layer, number of tokens, digest)"""


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """A cached prefix, its pages held for the caller, who gives it to `BlockTable.adopt` (or to
    `PrefixCache.discard`). `pages` is int32 [depth, columns]; the last column may hold more tokens.
    `payloads` are what `register` was given for the pieces of the prefix, in order."""

    num_tokens: int
    pages: PageArray
    payloads: tuple[Any, ...] = ()


@dataclass(slots=True)
class _Node:
    pages: PageArray  # [depth, columns]: the pages with the tokens from the parent's end on
    parent: Key | None
    payload: Any = None
    num_children: int = 0


class PrefixCache:
    """Keeps pages of finished sessions; gives them up oldest first when the pool runs short.

    In `_nodes` every node lies before its ancestors (touching a path moves the leaf first, the root last),
    so going through it in order meets the least recently used leaves first.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._nodes: OrderedDict[Key, _Node] = OrderedDict()
        self.num_hits = 0
        self.num_misses = 0
        self.num_hit_tokens = 0
        self.num_evictions = 0
        pool.set_reclaimer(self.reclaim)

    @property
    def num_entries(self) -> int:
        return len(self._nodes)

    def register(
        self,
        tenant: str,
        offer: Sequence[tuple[int, str]],
        table: BlockTable,
        payload: Callable[[int, int], Any] | None = None,
    ) -> int:
        """Keeps the pages of `table` under the digests of `offer` ((num_tokens, digest), ascending).

        Entries beyond the table's length are ignored. `payload(start, stop)` gives what to keep beside the
        pages of tokens [start, stop), for `PrefixMatch.payloads`. Returns the number of tokens that a later
        lookup can find.

        Raises:
            SequenceError (`bad_prefix_offer`): the lengths do not ascend.
        """
        _check_ascending(offer)
        size = self._pool.page_tokens
        touched: dict[Key, None] = {}
        parent: Key | None = None
        covered = full = 0
        for num_tokens, digest in offer:
            if num_tokens > table.length:
                break
            key = (tenant, table.first_layer, num_tokens, digest)
            if key not in self._nodes:
                pages = table.pages[:, full // size : columns_for(num_tokens, size)].copy()
                self._insert(key, _Node(pages, parent, payload(full, num_tokens) if payload else None))
            touched[key] = None
            covered = num_tokens
            if num_tokens % size == 0:
                parent, full = key, num_tokens
        for key in reversed(touched):
            self._nodes.move_to_end(key)
            # A known node may have another parent: an offer that left out other multiples made it.
            above = self._nodes[key].parent
            if above is not None and above not in touched:
                self._touch_path(above)
        return covered

    def lookup(
        self, tenant: str, offer: Sequence[tuple[int, str]], *, first_layer: int, max_tokens: int
    ) -> PrefixMatch | None:
        """The longest known prefix among `offer`, cut to `max_tokens`, its pages held for the caller.

        The caller passes max_tokens = prompt length - 1: the last row must be computed to produce a token.
        """
        _check_ascending(offer)
        for num_tokens, digest in reversed(offer):
            key = (tenant, first_layer, num_tokens, digest)
            usable = min(num_tokens, max_tokens)
            if usable <= 0 or key not in self._nodes:
                continue
            nodes = [self._nodes[step] for step in reversed(self._touch_path(key))]
            pages = np.concatenate([node.pages for node in nodes], axis=1)
            pages = pages[:, : columns_for(usable, self._pool.page_tokens)]
            self._pool.hold(pages.ravel())
            self.num_hits += 1
            self.num_hit_tokens += usable
            return PrefixMatch(usable, pages, tuple(node.payload for node in nodes))
        self.num_misses += bool(offer)
        return None

    def discard(self, match: PrefixMatch) -> None:
        """Gives back a match that no table adopted."""
        self._pool.release(match.pages.ravel())

    def reclaim(self, num_pages: int) -> int:
        """Evicts least recently used leaves until `num_pages` pages became free or nothing more can.
        Returns the pages freed. Prefixes in use go last: dropping them frees nothing by itself."""
        freed = 0
        for spare_used in (True, False):
            for key in list(self._nodes):
                if freed >= num_pages or not self._pool.num_cached:
                    return freed
                node = self._nodes[key]
                if node.num_children or (spare_used and not self._pool.idle(node.pages.ravel()).any()):
                    continue
                freed += self._evict(key)
        return freed

    def clear(self, tenant: str | None = None) -> int:
        """Forgets everything (of one tenant). Returns the pages freed."""
        return sum(self._evict(key) for key in list(self._nodes) if tenant in (None, key[0]))

    def check(self) -> None:
        """Raises if the forest, its order or the pool's counts of kept pages are wrong."""
        kept = np.zeros(self._pool.num_pages, dtype=np.int64)
        children: dict[Key, int] = {}
        seen: set[Key] = set()
        for key, node in self._nodes.items():
            np.add.at(kept, node.pages, 1)
            seen.add(key)
            if node.parent is None:
                continue
            if node.parent not in self._nodes or node.parent in seen:
                raise IsthmusError(f"prefix node at {key[2]} tokens outlives its parent", code="kv_invariant")
            children[node.parent] = children.get(node.parent, 0) + 1
        for key, node in self._nodes.items():
            if node.num_children != children.get(key, 0):
                raise IsthmusError(f"prefix node at {key[2]} tokens miscounts children", code="kv_invariant")
        for page in range(self._pool.num_pages):
            counted = self._pool.references(page)[1]
            if counted != kept[page]:
                raise IsthmusError(f"page {page}: kept {kept[page]}, counted {counted}", code="kv_invariant")

    def _insert(self, key: Key, node: _Node) -> None:
        self._pool.keep(node.pages.ravel())
        self._nodes[key] = node
        if node.parent is not None:
            self._nodes[node.parent].num_children += 1

    def _evict(self, key: Key) -> int:
        node = self._nodes.pop(key)
        if node.parent is not None:
            self._nodes[node.parent].num_children -= 1
        self.num_evictions += 1
        return self._pool.drop(node.pages.ravel())

    def _touch_path(self, leaf: Key) -> list[Key]:
        """The keys from `leaf` up to its root, now the most recently used."""
        path: list[Key] = []
        key: Key | None = leaf
        while key is not None:
            self._nodes.move_to_end(key)
            path.append(key)
            key = self._nodes[key].parent
        return path


def _check_ascending(offer: Sequence[tuple[int, str]]) -> None:
    previous = 0
    for num_tokens, _ in offer:
        if num_tokens <= previous:
            raise SequenceError(
                f"prefix offer goes from {previous} to {num_tokens} tokens",
                code="bad_prefix_offer",
                hint="offer entries in ascending order of tokens, none of them empty",
            )
        previous = num_tokens

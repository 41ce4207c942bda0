"""What is kept between the turns of a chat: KV caches on the edge, and what each cloud still holds.

Token ids are the key: a request reuses the longest beginning it shares with something kept.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from isthmus.protocol.prefix import PAGE, is_offered


class Cache(Protocol):
    """The part of a KV cache the pool needs (splitter.cache.KVCache has it)."""

    @property
    def length(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def truncate(self, to: int) -> None: ...
    def close(self) -> None: ...


C = TypeVar("C", bound=Cache)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading ids that are equal."""
    limit = min(len(a), len(b))
    if tuple(a[:limit]) == tuple(b[:limit]):  # the usual case, at C speed
        return limit
    return next(i for i in range(limit) if a[i] != b[i])


@dataclass
class _Kept(Generic[C]):
    split: int
    ids: tuple[int, ...]
    cache: C


class CachePool(Generic[C]):
    """Caches of finished requests, by the token ids whose rows they hold; least recently used go first.

    A cache taken out belongs to the taker alone until it is put back. A kept cache is taken only if at
    least half of it stays of use: truncating a long conversation to a shared system prompt would cost
    its owner more than it saves the taker.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kept: list[_Kept[C]] = []  # least recently used first

    @property
    def nbytes(self) -> int:
        """Bytes of all kept caches."""
        return sum(kept.cache.nbytes for kept in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, split: int, prompt: Sequence[int]) -> C | None:
        """The kept cache of this depth that saves most, truncated to what it shares with the prompt.

        At least the prompt's last token is left to compute, since its row makes the first output."""
        best: _Kept[C] | None = None
        best_length = 0
        for kept in self._kept:
            if kept.split == split and (shared := _of_use(kept.ids, prompt)) > best_length:
                best, best_length = kept, shared
        if best is None:
            return None
        self._kept.remove(best)
        best.cache.truncate(best_length)
        return best.cache

    def put(self, split: int, ids: Sequence[int], cache: C) -> None:
        """Keep a cache that holds the rows of exactly `ids`; evicts until it fits, or closes it."""
        if cache.length != len(ids):
            raise ValueError(f"the cache holds {cache.length} rows, {len(ids)} ids were given")
        if not ids or cache.nbytes > self.max_bytes:
            cache.close()
            return
        self._kept.append(_Kept(split, tuple(ids), cache))
        self.evict(self.max_bytes)

    def shared(self, prompt: Sequence[int]) -> dict[int, int]:
        """How many rows of the prompt `take` would find, by depth. From any thread; nothing is taken."""
        found: dict[int, int] = {}
        for kept in list(self._kept):
            rows = _of_use(kept.ids, prompt)
            if rows > found.get(kept.split, 0):
                found[kept.split] = rows
        return found

    def evict(self, to_bytes: int, *, keep: Callable[[int], bool] = lambda split: False) -> None:
        """Close the least recently used until at most `to_bytes` are kept; spares depths `keep` names."""
        total = self.nbytes
        for kept in list(self._kept):
            if total <= to_bytes:
                return
            if not keep(kept.split):
                total -= kept.cache.nbytes
                self._kept.remove(kept)
                kept.cache.close()

    def clear(self) -> None:
        """Close everything."""
        self.evict(-1)


def _of_use(kept: Sequence[int], prompt: Sequence[int]) -> int:
    """Rows of a kept cache that serve the prompt; 0 where that is less than half of them."""
    shared = min(common_prefix(kept, prompt), len(prompt) - 1)
    return shared if 2 * shared >= len(kept) else 0


class CloudMemory:
    """Which token sequences a cloud was left holding, so that a next turn offers exactly their lengths.

    Keyed by (cloud, K, row format): KV made from one is of no use to another. Nothing here promises
    that the cloud still has it; it answers with `cached_rows`.
    """

    def __init__(self, max_entries: int = 64) -> None:
        self._max_entries = max_entries
        self._held: OrderedDict[tuple[str, int, str, tuple[int, ...]], None] = OrderedDict()

    def remember(self, cloud: str, split: int, row_format: str, ids: Sequence[int]) -> None:
        """The cloud holds the rows of exactly `ids`."""
        if len(ids) < 1:
            return
        key = (cloud, split, row_format, tuple(ids))
        self._held[key] = None
        self._held.move_to_end(key)
        while len(self._held) > self._max_entries:
            self._held.popitem(last=False)

    def forget(self, cloud: str) -> None:
        """The cloud was restarted or lost: nothing it held is worth an offer."""
        for key in [k for k in self._held if k[0] == cloud]:
            del self._held[key]

    def offer_lengths(
        self, cloud: str, split: int, row_format: str, prompt: Sequence[int]
    ) -> tuple[int, tuple[int, ...]]:
        """(how much of the prompt to offer, exact lengths to offer besides the multiples of a page).

        (0, ()) where nothing kept shares a whole page or an exact length with the prompt: then an offer
        would cost a round trip for nothing. Never offers the last token (its row makes the output)."""
        upto, exact = 0, set()
        for held_cloud, held_split, held_format, ids in self._held:
            if (held_cloud, held_split, held_format) != (cloud, split, row_format):
                continue
            rows = _offered(ids, prompt)
            if rows == len(ids):
                exact.add(rows)
            upto = max(upto, rows)
        return upto, tuple(sorted(exact))

    def shared(self, cloud: str, row_formats: Collection[str], prompt: Sequence[int]) -> dict[int, int]:
        """How many rows of the prompt this cloud may still hold, by K."""
        found: dict[int, int] = {}
        for held_cloud, split, held_format, ids in self._held:
            if held_cloud == cloud and held_format in row_formats:
                rows = _offered(ids, prompt)
                if rows > found.get(split, 0):
                    found[split] = rows
        return found


def _offered(held: Sequence[int], prompt: Sequence[int]) -> int:
    """How much of the prompt an offer can cover where a cloud holds the rows of `held`."""
    shared = min(common_prefix(held, prompt), len(prompt) - 1)
    return shared if shared == len(held) else _offered_below(shared)


def _offered_below(length: int) -> int:
    """The longest length up to `length` at which a chain publishes its digest; 0 if there is none."""
    length -= length % PAGE
    while length and not is_offered(length):
        length -= PAGE
    return length


W = TypeVar("W")


class LastWays(Generic[W]):
    """Which way each conversation took last, by its tokens; the newest `max_entries` are remembered."""

    def __init__(self, max_entries: int = 64) -> None:
        self._ways: deque[tuple[tuple[int, ...], W]] = deque(maxlen=max_entries)

    def remember(self, ids: Sequence[int], way: W) -> None:
        """The conversation so far, prompt and answer, went by `way`."""
        self._ways.append((tuple(ids), way))

    def of(self, prompt: Sequence[int]) -> W | None:
        """The way of the conversation that `prompt` goes on with: the newest of which it holds nearly all
        tokens (a template may write the end of an answer otherwise than the model did)."""
        for ids, way in reversed(self._ways):
            if 10 * common_prefix(ids, prompt) >= 9 * len(ids):
                return way
        return None

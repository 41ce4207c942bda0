"""Reuse between turns: longest common beginning, exclusive ownership, LRU by bytes, exact offers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge.conversation import CachePool, CloudMemory, common_prefix


class Rows:
    """A cache of `length` rows, 10 bytes each; it knows whether it was closed."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.closed = False

    @property
    def nbytes(self) -> int:
        return 10 * self.length

    def truncate(self, to: int) -> None:
        assert to <= self.length
        self.length = to

    def close(self) -> None:
        assert not self.closed
        self.closed = True


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix_is_what_zip_finds(a: list[int], b: list[int]) -> None:
    expected = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        expected += 1
    assert common_prefix(a, b) == expected


def test_next_turn_takes_its_conversation_and_leaves_one_token() -> None:
    pool: CachePool[Rows] = CachePool(10_000)
    pool.put(4, range(20), Rows(20))
    taken = pool.take(4, [*range(20), 99])
    assert taken is not None
    assert taken.length == 20
    assert len(pool) == 0
    pool.put(4, range(20), taken)
    again = pool.take(4, list(range(20)))  # the same prompt again: its last row must be computed
    assert again is not None
    assert again.length == 19


def test_other_depth_or_other_beginning_takes_nothing() -> None:
    pool: CachePool[Rows] = CachePool(10_000)
    pool.put(4, range(20), Rows(20))
    assert pool.take(5, [*range(20), 99]) is None
    assert pool.take(4, [7, *range(20)]) is None
    assert len(pool) == 1


def test_a_long_conversation_is_not_cut_down_to_a_shared_system_prompt() -> None:
    pool: CachePool[Rows] = CachePool(10_000)
    pool.put(4, range(20), Rows(20))
    assert pool.take(4, [*range(9), 99, 98]) is None
    taken = pool.take(4, [*range(10), 99, 98])
    assert taken is not None
    assert taken.length == 10


def test_the_best_of_several_is_taken() -> None:
    pool: CachePool[Rows] = CachePool(10_000)
    short, long = Rows(10), Rows(15)
    pool.put(4, range(10), short)
    pool.put(4, range(15), long)
    assert pool.take(4, range(30)) is long
    assert pool.take(4, range(30)) is short


def test_least_recently_used_goes_first_and_is_closed() -> None:
    pool: CachePool[Rows] = CachePool(250)
    first, second, third = Rows(10), Rows(10), Rows(10)
    pool.put(1, range(10), first)
    pool.put(2, range(10), second)
    taken = pool.take(1, range(11))
    assert taken is first
    pool.put(1, range(10), first)
    pool.put(3, range(10), third)
    assert (first.closed, second.closed, third.closed) == (False, True, False)
    assert pool.nbytes == 200
    huge = Rows(26)
    pool.put(1, range(26), huge)
    assert huge.closed
    assert len(pool) == 2
    pool.clear()
    assert first.closed
    assert third.closed
    assert len(pool) == 0


def test_a_cache_that_disagrees_with_its_ids_is_refused() -> None:
    pool: CachePool[Rows] = CachePool(1000)
    with pytest.raises(ValueError, match="holds 3 rows, 4 ids"):
        pool.put(1, range(4), Rows(3))


def test_offers_name_the_exact_length_and_whole_pages() -> None:
    memory = CloudMemory()
    memory.remember("ws://a", 4, "f32", range(37))
    assert memory.offer_lengths("ws://a", 4, "f32", [*range(37), 1, 2]) == (37, (37,))
    assert memory.offer_lengths("ws://a", 4, "f32", [*range(35), 1, 2]) == (32, ())
    assert memory.offer_lengths("ws://a", 4, "f32", [*range(15), 1, 2]) == (0, ())
    assert memory.offer_lengths("ws://b", 4, "f32", [*range(37), 1]) == (0, ())
    assert memory.offer_lengths("ws://a", 5, "f32", [*range(37), 1]) == (0, ())
    assert memory.offer_lengths("ws://a", 4, "bf16", [*range(37), 1]) == (0, ())
    assert memory.offer_lengths("ws://a", 4, "f32", range(37)) == (32, ())  # the last row is never offered
    memory.forget("ws://a")
    assert memory.offer_lengths("ws://a", 4, "f32", [*range(37), 1, 2]) == (0, ())


def test_memory_is_bounded() -> None:
    memory = CloudMemory(max_entries=2)
    for start in (0, 100, 200):
        memory.remember("c", 1, "f32", range(start, start + 20))
    assert memory.offer_lengths("c", 1, "f32", range(30)) == (0, ())
    assert memory.offer_lengths("c", 1, "f32", range(100, 130)) == (20, (20,))

"""Page accounting: who owns which pages, what a step allocates, and that nothing is counted twice."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.cloud.kv import PAGE_TOKENS, BlockTable, PagePool, columns_for
from isthmus.cloud.prefix_cache import PrefixMatch
from isthmus.protocol.errors import IsthmusError, OverloadedError, SequenceError

NUM_LAYERS = 6


def grow(table: BlockTable, num_tokens: int) -> None:
    table.ensure(table.length + num_tokens)
    table.advance(num_tokens)


def test_a_session_owns_pages_from_its_entry_layer_on_only() -> None:
    pool = PagePool(100)
    for first_layer, tokens in ((0, 17), (4, 17), (5, 1), (2, 16)):
        table = BlockTable(pool, first_layer=first_layer, num_layers=NUM_LAYERS)
        before = pool.num_used
        grow(table, tokens)
        expected = (NUM_LAYERS - first_layer) * columns_for(tokens)
        assert table.num_pages == expected == pool.num_used - before
        assert table.pages.shape == (NUM_LAYERS - first_layer, columns_for(tokens))
    assert pool.num_used == 6 * 2 + 2 * 2 + 1 + 4
    pool.check()


def test_pages_are_distinct_and_all_come_back() -> None:
    pool = PagePool(24)
    tables = [BlockTable(pool, first_layer=k, num_layers=4) for k in (0, 1, 3)]
    for table in tables:
        grow(table, 33)
    pages = np.concatenate([table.pages.ravel() for table in tables])
    assert len(set(pages.tolist())) == len(pages) == 24
    assert pool.num_free == 0
    assert [table.free_all() for table in tables] == [12, 9, 3]
    assert (pool.num_free, pool.num_used, pool.num_cached) == (24, 0, 0)
    pool.check()


def test_ensure_allocates_only_at_page_borders_and_says_so_beforehand() -> None:
    pool = PagePool(100)
    table = BlockTable(pool, first_layer=2, num_layers=NUM_LAYERS)
    for length in range(40):
        needed = table.pages_needed(length + 1)
        assert needed == (table.depth if length % PAGE_TOKENS == 0 else 0)
        free = pool.num_free
        assert len(table.ensure(length + 1)) == 0
        assert free - pool.num_free == needed
        table.advance(1)


def test_every_allocated_page_is_reported_for_zeroing() -> None:
    zeroed: list[int] = []
    pool = PagePool(12, on_alloc=lambda pages: zeroed.extend(pages.tolist()))
    table = BlockTable(pool, first_layer=0, num_layers=3)
    grow(table, 32)
    assert sorted(zeroed) == sorted(table.pages.ravel().tolist())
    zeroed.clear()
    table.truncate(16)
    grow(table, 1)
    assert sorted(zeroed) == sorted(table.pages[:, 1].tolist())


def test_exhaustion_is_typed_and_changes_nothing() -> None:
    pool = PagePool(8)
    table = BlockTable(pool, first_layer=0, num_layers=3)
    grow(table, 30)
    with pytest.raises(OverloadedError, match="3 KV pages asked, 2 of 8") as caught:
        table.ensure(33)
    assert caught.value.code == "kv_pool_exhausted"
    assert (table.length, table.num_columns, pool.num_free) == (30, 2, 2)
    table.ensure(32)
    pool.check()


def test_truncate_frees_whole_columns_and_refuses_to_go_forward() -> None:
    pool = PagePool(100)
    table = BlockTable(pool, first_layer=3, num_layers=NUM_LAYERS)
    grow(table, 50)
    kept = table.pages[:, :2].copy()
    assert table.truncate(17) == 2 * 3
    assert table.length == 17
    assert (table.pages == kept).all()
    with pytest.raises(SequenceError, match="truncate to 18: the session holds 17") as caught:
        table.truncate(18)
    assert caught.value.code == "truncate_past_end"
    with pytest.raises(SequenceError):
        table.truncate(-1)
    pool.check()


def test_reserved_but_unused_columns_go_with_truncate() -> None:
    pool = PagePool(100)
    table = BlockTable(pool, first_layer=0, num_layers=2)
    grow(table, 5)
    table.ensure(40)
    assert table.truncate(5) == 4
    assert table.num_columns == 1


def test_a_fork_shares_pages_until_one_side_writes() -> None:
    pool = PagePool(100)
    table = BlockTable(pool, first_layer=1, num_layers=4)
    grow(table, 20)
    twin = table.fork()
    assert pool.num_used == table.num_pages == 6
    assert table.pages_needed(21) == 3
    before = table.pages.copy()
    copies = table.ensure(21)
    assert copies.src.tolist() == before[:, 1].tolist() == twin.pages[:, 1].tolist()
    assert copies.dst.tolist() == table.pages[:, 1].tolist()
    assert (table.pages[:, 0] == twin.pages[:, 0]).all()
    table.advance(1)
    assert len(twin.ensure(21)) == 0, "the last holder writes in place"
    table.free_all()
    assert pool.num_used == twin.num_pages
    twin.free_all()
    assert pool.num_free == 100
    pool.check()


def test_writing_after_a_cut_into_shared_pages_copies_only_what_is_written() -> None:
    pool = PagePool(100)
    table = BlockTable(pool, first_layer=0, num_layers=2)
    grow(table, 48)
    twin = table.fork()
    twin.truncate(20)
    copies = twin.ensure(40)
    assert len(copies) == 2, "column 1 in two layers; column 0 stays shared, column 2 is new"
    assert (twin.pages[:, 0] == table.pages[:, 0]).all()
    pool.check()


def test_misuse_is_caught() -> None:
    pool = PagePool(10)
    pages = pool.alloc(2)
    pool.release(pages)
    with pytest.raises(IsthmusError, match="released more often"):
        pool.release(pages)
    with pytest.raises(IsthmusError, match="free page was held"):
        pool.hold(pages)
    with pytest.raises(IsthmusError, match="free page was kept"):
        pool.keep(pages)
    with pytest.raises(IsthmusError, match="dropped more often"):
        pool.drop(pages)
    table = BlockTable(pool, first_layer=0, num_layers=1)
    with pytest.raises(IsthmusError, match="exceed the capacity of 0"):
        table.advance(1)
    with pytest.raises(IsthmusError, match="entry layer 4"):
        BlockTable(pool, first_layer=4, num_layers=4)
    pool.check()


def test_check_finds_a_leak() -> None:
    pool = PagePool(4)
    pages = pool.alloc(2)
    pool._held[pages] = 0
    with pytest.raises(IsthmusError, match="0 pages in use, 2 of 4 free"):
        pool.check()


def test_check_finds_a_page_that_is_free_twice() -> None:
    pool = PagePool(4)
    pool._stack[0] = pool._stack[1]
    with pytest.raises(IsthmusError, match="free stack twice"):
        pool.check()


def test_check_finds_a_free_page_that_is_referred_to() -> None:
    pool = PagePool(4)
    pool._held[pool._stack[0]] = 1
    with pytest.raises(IsthmusError, match="a free page is referred to"):
        pool.check()


def test_check_finds_a_wrong_count_of_cached_pages() -> None:
    pool = PagePool(4)
    pages = pool.alloc(1)
    pool.keep(pages)
    pool.check()
    pool.num_cached += 1
    with pytest.raises(IsthmusError, match="count of cached pages"):
        pool.check()


def test_a_reclaimer_that_frees_too_little_is_caught() -> None:
    pool = PagePool(4)
    pages = pool.alloc(4)
    pool.keep(pages)
    pool.release(pages)
    pool.set_reclaimer(lambda _num: 0)
    with pytest.raises(IsthmusError, match="1 pages asked, 0 free after reclaiming") as caught:
        pool.alloc(1)
    assert caught.value.code == "kv_invariant"


def test_only_an_empty_table_of_the_right_depth_adopts_a_prefix() -> None:
    pool = PagePool(10)
    table = BlockTable(pool, first_layer=0, num_layers=2)
    match = PrefixMatch(16, np.zeros((3, 1), np.int32))
    with pytest.raises(IsthmusError, match="3 layers, table of 2"):
        table.adopt(match)
    grow(table, 1)
    with pytest.raises(IsthmusError, match="only an empty block table"):
        table.adopt(match)


def test_a_table_grows_beyond_its_first_room() -> None:
    pool = PagePool(400)
    table = BlockTable(pool, first_layer=0, num_layers=2)
    for _ in range(100):
        before = table.pages.copy()
        grow(table, PAGE_TOKENS)
        assert np.array_equal(table.pages[:, :-1], before)
    assert table.num_pages == 200
    pool.check()

"""Cached prefixes: what is found, what is copied, what is given up first; and a state machine over it all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from isthmus.cloud.kv import PAGE_TOKENS, BlockTable, PageArray, PageCopies, PagePool, columns_for
from isthmus.cloud.prefix_cache import PrefixCache
from isthmus.protocol.errors import OverloadedError, SequenceError

NUM_LAYERS = 3


def offer_for(tokens: Sequence[int], *extra: int, every: int = PAGE_TOKENS) -> list[tuple[int, str]]:
    """Entries at multiples of 16 (or fewer) and at `extra` lengths, as an edge makes them."""
    lengths = {*range(every, len(tokens) + 1, every), *(n for n in extra if n)}
    return [(n, hashlib.sha256(bytes(tokens[:n])).hexdigest()[:32]) for n in sorted(lengths)]


def filled(pool: PagePool, num_tokens: int, first_layer: int = 0) -> BlockTable:
    table = BlockTable(pool, first_layer=first_layer, num_layers=NUM_LAYERS)
    table.ensure(num_tokens)
    table.advance(num_tokens)
    return table


@pytest.fixture
def pool() -> PagePool:
    return PagePool(60)


@pytest.fixture
def cache(pool: PagePool) -> PrefixCache:
    return PrefixCache(pool)


def test_a_finished_session_is_found_again_with_its_partial_tail(pool: PagePool, cache: PrefixCache) -> None:
    tokens = list(range(100))
    table = filled(pool, 37)
    pages = table.pages.copy()
    assert cache.register("a", offer_for(tokens[:37], 37), table) == 37
    table.free_all()
    assert (pool.num_used, pool.num_cached) == (0, 9)

    match = cache.lookup("a", offer_for(tokens, 37), first_layer=0, max_tokens=99)
    assert match is not None
    assert match.num_tokens == 37
    assert (match.pages == pages).all()
    again = BlockTable(pool, first_layer=0, num_layers=NUM_LAYERS)
    again.adopt(match)
    assert (pool.num_used, pool.num_cached) == (9, 0)
    copies = again.ensure(40)
    assert copies.src.tolist() == pages[:, 2].tolist(), "the tail page is copied, the full ones are shared"
    assert (again.pages[:, :2] == pages[:, :2]).all()
    again.advance(3)
    again.free_all()
    cache.check()
    pool.check()


def test_a_branch_finds_the_common_part_only(pool: PagePool, cache: PrefixCache) -> None:
    first = list(range(48))
    table = filled(pool, 48)
    cache.register("a", offer_for(first, 40), table)
    table.free_all()
    branch = first[:32] + [200] * 30
    match = cache.lookup("a", offer_for(branch, 40, 62), first_layer=0, max_tokens=61)
    assert match is not None
    assert match.num_tokens == 32
    cache.discard(match)
    assert pool.num_used == 0


def test_nothing_matches_across_tenants_or_entry_layers(pool: PagePool, cache: PrefixCache) -> None:
    tokens = list(range(32))
    table = filled(pool, 32, first_layer=1)
    cache.register("a", offer_for(tokens), table)
    table.free_all()
    assert cache.lookup("b", offer_for(tokens), first_layer=1, max_tokens=31) is None
    assert cache.lookup("a", offer_for(tokens), first_layer=0, max_tokens=31) is None
    match = cache.lookup("a", offer_for(tokens), first_layer=1, max_tokens=31)
    assert match is not None
    assert match.pages.shape == (2, 2)
    assert (cache.num_hits, cache.num_misses, cache.num_hit_tokens) == (1, 2, 31)
    cache.discard(match)


def test_a_match_is_cut_to_leave_a_row_to_compute(pool: PagePool, cache: PrefixCache) -> None:
    tokens = list(range(32))
    table = filled(pool, 32)
    cache.register("a", offer_for(tokens), table)
    table.free_all()
    match = cache.lookup("a", offer_for(tokens), first_layer=0, max_tokens=16)
    assert match is not None
    assert (match.num_tokens, match.pages.shape) == (16, (3, 1))
    cache.discard(match)
    assert cache.lookup("a", offer_for(tokens), first_layer=0, max_tokens=0) is None


def test_the_same_prefix_registered_twice_is_kept_once(pool: PagePool, cache: PrefixCache) -> None:
    tokens = list(range(40))
    for length in (33, 40):
        table = filled(pool, length)
        cache.register("a", offer_for(tokens[:length], length), table)
        table.free_all()
    # columns 0 and 1 of the first session, and both sessions' third columns (33 and 40 tokens)
    assert cache.num_entries == 4
    assert pool.num_cached == 4 * NUM_LAYERS
    cache.check()


def test_offers_may_leave_out_multiples_and_still_meet(pool: PagePool, cache: PrefixCache) -> None:
    """Long offers are sparse; two offers of one prefix need not be sparse alike."""
    tokens = list(range(60))
    for missing in ((32,), (16, 48), ()):
        table = filled(pool, 60)
        offer = [entry for entry in offer_for(tokens, 60) if entry[0] not in missing]
        assert cache.register("a", offer, table) == 60
        table.free_all()
        cache.check()
    for length in (16, 32, 48, 60):
        match = cache.lookup("a", offer_for(tokens[:length], length), first_layer=0, max_tokens=100)
        assert match is not None
        assert (match.num_tokens, match.pages.shape[1]) == (length, columns_for(length))
        cache.discard(match)
        cache.check()


def test_entries_past_the_length_are_ignored_and_payloads_come_back(
    pool: PagePool, cache: PrefixCache
) -> None:
    tokens = list(range(64))
    table = filled(pool, 40)
    assert cache.register("a", offer_for(tokens, 40), table, lambda start, stop: tokens[start:stop]) == 40
    table.free_all()
    match = cache.lookup("a", offer_for(tokens, 40), first_layer=0, max_tokens=63)
    assert match is not None
    assert [token for piece in match.payloads for token in piece] == tokens[:40]
    cache.discard(match)


def test_descending_offers_are_refused(pool: PagePool, cache: PrefixCache) -> None:
    table = filled(pool, 40)
    for offer in ([(32, "aa"), (16, "bb")], [(0, "aa")], [(16, "aa"), (16, "bb")]):
        with pytest.raises(SequenceError) as caught:
            cache.register("a", offer, table)
        assert caught.value.code == "bad_prefix_offer"
        with pytest.raises(SequenceError):
            cache.lookup("a", offer, first_layer=0, max_tokens=100)


def test_the_least_recently_used_leaves_go_first(pool: PagePool, cache: PrefixCache) -> None:
    conversations = {name: [code] * 32 for code, name in enumerate("xyz")}
    for tokens in conversations.values():
        table = filled(pool, 32)
        cache.register("a", offer_for(tokens), table)
        table.free_all()
    touched = cache.lookup("a", offer_for(conversations["x"]), first_layer=0, max_tokens=31)
    assert touched is not None
    cache.discard(touched)
    assert cache.reclaim(4) == 6, "one leaf column is 3 pages"

    def cached(name: str) -> int:
        match = cache.lookup("a", offer_for(conversations[name]), first_layer=0, max_tokens=31)
        if match is None:
            return 0
        cache.discard(match)
        return match.num_tokens

    assert [cached(name) for name in "xyz"] == [31, 0, 31]
    cache.check()


def test_allocation_reclaims_cached_pages_and_spares_prefixes_in_use(
    pool: PagePool, cache: PrefixCache
) -> None:
    used = [1] * 32
    table = filled(pool, 32)
    cache.register("a", offer_for(used), table)
    for code in range(2, 9):
        old = filled(pool, 32)
        cache.register("a", offer_for([code] * 32), old)
        old.free_all()
    assert (pool.num_free, pool.num_used, pool.num_cached) == (12, 6, 42)
    big = filled(pool, 16 * 17)
    assert pool.num_available == 3
    match = cache.lookup("a", offer_for(used), first_layer=0, max_tokens=31)
    assert match is not None, "the oldest entry was in use"
    cache.discard(match)
    with pytest.raises(OverloadedError):
        filled(pool, 16 * 18)
    big.free_all()
    table.free_all()
    assert cache.clear() == 9
    assert pool.num_free == 60
    cache.check()
    pool.check()


def test_an_idle_parent_is_not_evicted_under_a_child_in_use(pool: PagePool, cache: PrefixCache) -> None:
    tokens = [1] * 33
    twins = [filled(pool, 32), filled(pool, 33)]
    cache.register("a", offer_for(tokens[:32]), twins[0])
    cache.register("a", offer_for(tokens, 33), twins[1])
    twins[0].free_all()
    # Columns 0 and 1 are the first twin's pages, now idle; the tail after them is the second's, in use.
    assert (pool.num_used, pool.num_cached) == (9, 6)
    assert cache.reclaim(1) == 3
    cache.check()
    assert cache.reclaim(100) == 3
    assert (cache.num_entries, pool.num_cached) == (0, 0)


def test_clearing_one_tenant_leaves_the_others(pool: PagePool, cache: PrefixCache) -> None:
    for tenant in ("a", "b"):
        table = filled(pool, 20)
        cache.register(tenant, offer_for(list(range(20)), 20), table)
        table.free_all()
    assert cache.clear("a") == 6
    assert pool.num_cached == 6
    assert cache.num_entries == 2
    cache.check()


class Pages:
    """Stands for the KV store: which (layer, tokens up to here) each slot of each page holds."""

    def __init__(self, num_pages: int) -> None:
        self.slots: list[list[Any]] = [[None] * PAGE_TOKENS for _ in range(num_pages)]

    def zero(self, pages: PageArray) -> None:
        for page in pages.tolist():
            self.slots[page] = [None] * PAGE_TOKENS

    def copy(self, copies: PageCopies) -> None:
        for src, dst in zip(copies.src.tolist(), copies.dst.tolist(), strict=True):
            self.slots[dst] = list(self.slots[src])


class PoolAndCache(RuleBasedStateMachine):
    """Sessions of two tenants come, grow, cut back, fork, leave into the cache and find themselves again; the
    contents of every page must be what its owner wrote."""

    @initialize(num_pages=st.integers(6, 40))
    def start(self, num_pages: int) -> None:
        self.pages = Pages(num_pages)
        self.pool = PagePool(num_pages, on_alloc=self.pages.zero)
        self.cache = PrefixCache(self.pool)
        self.sessions: list[tuple[str, BlockTable, list[int]]] = []

    def write(self, table: BlockTable, tokens: list[int], num_new: int) -> bool:
        """One step: True if the pool had the pages."""
        end = table.length + num_new
        needed, available = table.pages_needed(end), self.pool.num_available
        state = (table.length, table.pages.tolist(), self.pool.num_used)
        try:
            copies = table.ensure(end)
        except OverloadedError:
            assert needed > available
            assert state == (table.length, table.pages.tolist(), self.pool.num_used)
            return False
        assert needed <= available
        self.pages.copy(copies)
        for position in range(table.length, end):
            for layer in range(table.first_layer, NUM_LAYERS):
                page = table.pages[layer - table.first_layer, position // PAGE_TOKENS]
                self.pages.slots[page][position % PAGE_TOKENS] = (layer, tuple(tokens[: position + 1]))
        table.advance(num_new)
        return True

    # Few different tokens and lengths, so that prefixes meet.
    @rule(
        tenant=st.sampled_from("ab"),
        first_layer=st.integers(0, NUM_LAYERS - 1),
        parts=st.lists(st.sampled_from([(0, 16), (1, 16), (0, 5), (1, 11), (0, 33)]), min_size=1, max_size=4),
    )
    def open(self, tenant: str, first_layer: int, parts: list[tuple[int, int]]) -> None:
        tokens = [token for token, count in parts for _ in range(count)]
        table = BlockTable(self.pool, first_layer=first_layer, num_layers=NUM_LAYERS)
        extra = [n for n in (5, 11, 21, 27, 33, 38) if n < len(tokens)]
        match = self.cache.lookup(
            tenant, offer_for(tokens, *extra), first_layer=first_layer, max_tokens=len(tokens) - 1
        )
        if match is not None:
            assert 0 < match.num_tokens < len(tokens)
            table.adopt(match)
        if self.write(table, tokens, len(tokens) - table.length):
            self.sessions.append((tenant, table, tokens))
        else:
            table.free_all()

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), token=st.integers(0, 1), num_new=st.integers(1, 20))
    def extend(self, data: st.DataObject, token: int, num_new: int) -> None:
        _, table, tokens = data.draw(st.sampled_from(self.sessions))
        tokens.extend([token] * num_new)
        if not self.write(table, tokens, num_new):
            del tokens[-num_new:]

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        _, table, tokens = data.draw(st.sampled_from(self.sessions))
        to = data.draw(st.integers(1, len(tokens)))
        table.truncate(to)
        del tokens[to:]

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        tenant, table, tokens = data.draw(st.sampled_from(self.sessions))
        self.sessions.append((tenant, table.fork(), list(tokens)))

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), keep=st.booleans(), every=st.sampled_from([16, 32, 48]))
    def close(self, data: st.DataObject, keep: bool, every: int) -> None:
        tenant, table, tokens = self.sessions.pop(data.draw(st.integers(0, len(self.sessions) - 1)))
        if keep:
            offer = offer_for(tokens, len(tokens), every=every)
            assert self.cache.register(tenant, offer, table) == len(tokens)
        table.free_all()

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def keep_running(self, data: st.DataObject) -> None:
        tenant, table, tokens = data.draw(st.sampled_from(self.sessions))
        self.cache.register(tenant, offer_for(tokens, len(tokens)), table)

    @rule(num_pages=st.integers(0, 10))
    def reclaim(self, num_pages: int) -> None:
        cached = self.pool.num_cached
        assert self.cache.reclaim(num_pages) >= min(num_pages, cached)

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        self.cache.check()
        held = {page for _, table, _ in self.sessions for page in table.pages.ravel().tolist()}
        assert len(held) == self.pool.num_used
        assert self.pool.num_free + self.pool.num_used + self.pool.num_cached == self.pool.num_pages

    @invariant()
    def contents_are_intact(self) -> None:
        for _, table, tokens in getattr(self, "sessions", []):
            assert table.length == len(tokens)
            assert table.num_columns >= columns_for(table.length)
            for layer in range(table.first_layer, NUM_LAYERS):
                for position in range(table.length):
                    page = table.pages[layer - table.first_layer, position // PAGE_TOKENS]
                    found = self.pages.slots[page][position % PAGE_TOKENS]
                    assert found == (layer, tuple(tokens[: position + 1]))

    def teardown(self) -> None:
        for _, table, _ in getattr(self, "sessions", []):
            table.free_all()
        if hasattr(self, "pool"):
            assert self.pool.num_used == 0
            self.cache.clear()
            assert self.pool.num_free == self.pool.num_pages


PoolAndCache.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPoolAndCache = PoolAndCache.TestCase


def test_offers_are_as_the_edge_makes_them() -> None:
    assert [n for n, _ in offer_for(list(range(40)), 20, 40)] == [16, 20, 32, 40]
    assert np.unique([digest for _, digest in offer_for(list(range(40)), 20, 40)]).size == 4

"""Whose pages a session may take when the pool runs short, cached prefixes and shared pages among them."""

from __future__ import annotations

import pytest

from isthmus.cloud.kv import BlockTable
from isthmus.cloud.prefix_cache import PrefixCache
from isthmus.cloud.scheduler import Pick, SchedulerConfig
from tests.cloud.cloud_scheduling import LAYERS, World, served


def test_of_the_later_sessions_the_lowest_priority_is_preempted_first() -> None:
    world = World(pages=LAYERS * 4)
    world.join(1, 16)
    world.join(2, 16, priority=-1)
    world.join(3, 16, priority=-1)
    world.join(4, 16)
    world.step()
    world.extend(1, 20)
    assert world.step().preempted == (3, 2)


def test_a_priority_preempts_no_earlier_session_at_work() -> None:
    world = World(pages=LAYERS * 2)
    world.join(1, 16)
    world.join(2, 16, priority=9)
    world.step()
    world.extend(2)
    world.extend(1)
    plan = world.step()
    assert plan.preempted == (2,)
    assert served(plan) == {1: 1}


def test_a_starting_session_preempts_none_at_work() -> None:
    world = World(pages=LAYERS * 2, config=SchedulerConfig(idle_preempt_s=0.5))
    world.join(1, 16)
    world.join(2, 10)
    world.step()
    world.extend(2, 7)  # beyond what it announced
    world.now = 1.0
    # Session 1 gave way: long idle, although older. On its return it has to wait for session 2 to go.
    assert world.step().preempted == (1,)
    world.extend(1)
    world.extend(2)
    plan = world.step()
    assert served(plan) == {2: 1}
    assert plan.blocked == (1,)
    world.leave(2)
    assert served(world.step()) == {1: 17}


def test_a_start_that_counted_on_shared_pages_preempts_nobody_for_them() -> None:
    """Session 3 shares its page with session 2 until it writes in the very step in which 1 is to start."""
    world = World(pages=LAYERS * 3)
    world.join(1, prompt_rows=16)
    world.join(2, 20)
    world.step()
    world.join(3, 1, table=world.tables[2].fork(), prompt_rows=5, max_rows=11)
    world.step()
    world.scheduler.truncate(3, 10)
    world.extend(3)
    world.extend(1, 16)
    plan = world.step()
    assert served(plan) == {3: 1}
    assert plan.blocked == (1,)
    assert plan.preempted == ()
    assert world.scheduler.num_waiting == 1


def test_where_all_whose_turn_it_was_are_blocked_another_moves() -> None:
    """Two sessions of high priority take up the budget, need pages and may not take them from the oldest."""
    config = SchedulerConfig(max_rows=2, max_chunk_rows=2)
    world = World(pages=LAYERS * 2 + 1, config=config)
    world.join(1, 10)
    world.join(2, 16, priority=1)
    world.join(3, 16, priority=1, split=3)
    while world.scheduler.has_work:
        world.step()
    for session in (1, 2, 3):
        world.extend(session)
    plan = world.step()
    assert served(plan) == {1: 1}
    assert plan.blocked == (2, 3)
    assert plan.preempted == ()


def cached(world: World, *lengths: int) -> PrefixCache:
    """A prefix cache with the rows of sessions that are gone, of so many each."""
    cache = PrefixCache(world.pool)
    for num_rows in lengths:
        table = BlockTable(world.pool, first_layer=0, num_layers=LAYERS)
        table.ensure(num_rows)
        table.advance(num_rows)
        cache.register("a", [(num_rows, f"the first {num_rows}")], table)
        table.free_all()
    return cache


def adopted(world: World, cache: PrefixCache, num_rows: int) -> BlockTable:
    offer = [(num_rows, f"the first {num_rows}")]
    match = cache.lookup("a", offer, first_layer=0, max_tokens=num_rows)
    assert match is not None
    table = BlockTable(world.pool, first_layer=0, num_layers=LAYERS)
    table.adopt(match)
    return table


def test_a_cached_prefix_makes_no_session_start() -> None:
    """It waits for its admission as others do, and what it holds meanwhile is the first to go."""
    world = World(pages=LAYERS * 5)
    cache = cached(world, 32)
    world.join(1, 40)
    world.step()
    world.join(2, 30, table=adopted(world, cache, 32))
    assert world.scheduler.num_running == 1
    world.extend(1)
    plan = world.step()
    assert served(plan) == {1: 1}
    assert plan.blocked == (2,)
    world.extend(1, 20)
    plan = world.step()
    assert plan.preempted == (2,)
    assert served(plan) == {1: 20}
    world.leave(1)
    assert served(world.step()) == {2: 62}


def test_of_those_not_started_the_newest_loses_its_cached_prefix_first() -> None:
    world = World(pages=LAYERS * 5)
    cache = cached(world, 16, 15)
    world.join(1, 40)
    world.step()
    world.join(2, 40, table=adopted(world, cache, 16))
    world.join(3, 40, table=adopted(world, cache, 15))
    world.extend(1, 10)
    assert world.step().preempted == (3,)


def test_a_cached_prefix_is_taken_over_by_the_session_that_starts_first() -> None:
    world = World(pages=LAYERS * 4)
    cache = cached(world, 32)
    world.join(1, 16, table=adopted(world, cache, 32))
    assert world.pool.num_used == LAYERS * 2
    plan = world.step()
    assert plan.picks == (Pick(1, 32, 16),)


def test_dropped_while_it_had_nothing_to_do_a_cached_prefix_waits_for_the_next_row() -> None:
    world = World(pages=LAYERS * 3)
    cache = cached(world, 32)
    world.join(1, table=adopted(world, cache, 32), prompt_rows=40, max_rows=48)
    world.join(2, 48)
    assert world.step().preempted == (1,)
    assert world.scheduler.num_waiting == 0
    world.leave(2)
    world.extend(1, 8)
    assert served(world.step()) == {1: 40}


@pytest.mark.parametrize("chunked", [True, False])
def test_alone_on_a_pool_full_of_its_own_cached_prefix_a_session_starts_over(chunked: bool) -> None:
    """The last page is shared with the cache: writing to it takes a copy, and no page is left for it."""
    world = World(pages=LAYERS * 2, config=SchedulerConfig(chunked=chunked))
    cache = cached(world, 20)
    world.join(1, 4, table=adopted(world, cache, 20))
    plan = world.step()
    assert plan.preempted == (1,)
    assert plan.picks == (Pick(1, 0, 24),)
    assert plan.blocked == ()
    assert cache.num_entries == 0


def test_alone_beside_its_cached_prefix_a_session_takes_what_fits_or_starts_over() -> None:
    """Copies of the first column and pages for a second are twice what is left."""
    for chunked, preempted, picks in ((True, (), (Pick(1, 1, 1),)), (False, (1,), (Pick(1, 0, 18),))):
        world = World(pages=LAYERS * 2, config=SchedulerConfig(chunked=chunked))
        cache = cached(world, 1)
        world.join(1, 17, table=adopted(world, cache, 1))
        plan = world.step()
        assert (plan.preempted, plan.picks) == (preempted, picks)
        world.step()
        assert world.computed(1) == 18


def test_shared_pages_are_copied_before_they_are_written() -> None:
    world = World()
    world.join(1, 20)
    world.step()
    world.join(2, table=world.tables[1].fork(), max_rows=30)
    world.extend(1)
    world.extend(2, 2)
    world.step()
    assert [len(copies) for copies in world.copies] == [LAYERS]
    assert (world.tables[1].pages[:, 0] == world.tables[2].pages[:, 0]).all()


def test_starting_over_a_running_session_keeps_its_right_to_the_pages_of_later_ones() -> None:
    """Cut back into its cached prefix it must copy the page to write, and the pool is full."""
    world = World(pages=LAYERS * 2, config=SchedulerConfig(chunked=False))
    cache = cached(world, 16)
    world.join(1, 4, table=adopted(world, cache, 16), prompt_rows=10)
    world.step()
    world.scheduler.truncate(1, 10)
    world.join(2, 16)
    world.step()
    world.extend(1, 20)
    world.extend(2)
    plan = world.step()
    assert plan.preempted == (1, 2)
    assert plan.picks == (Pick(1, 0, 30),)


def test_the_time_to_look_again_is_that_of_the_next_session_to_count_as_idle() -> None:
    world = World(pages=LAYERS * 4, config=SchedulerConfig(idle_preempt_s=1.0))
    world.join(1, 16)
    world.step()
    world.now = 0.5
    world.join(2, 48)
    world.step()
    world.now = 1.25
    world.join(3, 64)
    plan = world.step()
    assert (plan.blocked, plan.preempted, plan.retry_in_s) == ((3,), (), 0.25)
    world.now += 0.25
    assert world.step().preempted == (1, 2)

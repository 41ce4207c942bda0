"""The scheduler over the real page pool: budget, fairness, preemption, and that everything finishes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.cloud.scheduler import Pick, Plan, SchedulerConfig
from tests.cloud.cloud_scheduling import LAYERS, World, served


def test_a_prompt_is_computed_in_chunks_up_to_the_session_cap() -> None:
    world = World(config=SchedulerConfig(max_rows=64, max_chunk_rows=40))
    world.join(1, 100)
    assert world.step().picks == (Pick(1, 0, 40),)
    assert world.step().picks == (Pick(1, 40, 40),)
    assert world.step().picks == (Pick(1, 80, 20),)
    assert world.step() == Plan()
    assert not world.scheduler.has_work


def test_single_rows_run_beside_a_prompt_and_the_budget_is_kept() -> None:
    world = World(config=SchedulerConfig(max_rows=32, max_chunk_rows=32))
    world.join(1, 100)
    world.join(2, 1)
    world.join(3, 1, split=2)
    assert served(world.step()) == {1: 30, 2: 1, 3: 1}


def test_prompts_share_the_budget_in_order_of_arrival() -> None:
    world = World(config=SchedulerConfig(max_rows=64, max_chunk_rows=48))
    world.join(7, 100)
    world.join(3, 100)
    world.join(5, 100)
    assert [(p.session_id, p.count) for p in world.step().picks] == [(7, 48), (3, 16)]


def test_more_single_rows_than_budget_take_turns() -> None:
    world = World(config=SchedulerConfig(max_rows=4))
    for session in range(6):
        world.join(session, 1)
    seen: set[int] = set()
    for _ in range(2):
        for pick in world.step().picks:
            seen.add(pick.session_id)
            world.extend(pick.session_id)
    assert seen == set(range(6))


def test_single_rows_cannot_starve_a_prompt() -> None:
    world = World(config=SchedulerConfig(max_rows=8))
    world.join(100, 10)
    for session in range(8):
        world.join(session, 1)
    assert served(world.step())[100] == 2


def test_a_session_without_rows_costs_nothing() -> None:
    world = World()
    world.join(1)
    assert world.step() == Plan()
    assert world.scheduler.num_running == world.scheduler.num_waiting == 0


def test_pages_follow_the_entry_layer() -> None:
    world = World()
    world.join(1, 17, split=3)
    world.join(2, 17)
    world.step()
    assert world.pool.num_used == 2 * 1 + 2 * 4


def test_an_uncommitted_step_is_planned_again() -> None:
    world = World()
    world.join(1, 5)
    first = world.scheduler.plan(now=0.0)
    assert world.scheduler.plan(now=0.0).picks == first.picks == (Pick(1, 0, 5),)


def test_truncate_cuts_known_and_computed_rows() -> None:
    world = World(config=SchedulerConfig(max_rows=64, max_chunk_rows=32))
    world.join(1, 60)
    world.step()
    world.scheduler.truncate(1, 48)
    assert world.step().picks == (Pick(1, 32, 16),)
    world.scheduler.truncate(1, 10)
    assert world.computed(1) == 10
    assert not world.scheduler.has_work
    assert world.tables[1].num_pages == LAYERS


def test_short_of_pages_the_newest_session_is_preempted_and_starts_over() -> None:
    world = World(pages=LAYERS * 4)
    world.join(1, 30)
    world.join(2, 16)
    world.join(3, 16)
    assert len(world.step().picks) == 3
    world.extend(1, 3)
    plan = world.step()
    assert plan.preempted == (3,)
    assert plan.picks == (Pick(1, 30, 3),)
    assert world.computed(3) == 0
    assert world.computed(2) == 16
    assert world.scheduler.entry(3).num_preemptions == world.scheduler.num_preemptions == 1
    # Session 3 had computed all it knew: it waits for its next row before it takes pages again.
    assert not world.scheduler.has_work
    world.leave(1)
    world.extend(3)
    assert world.step().picks == (Pick(3, 0, 17),)


def test_a_newer_session_does_not_take_pages_from_an_older_one_at_work() -> None:
    world = World(pages=LAYERS * 2)
    world.join(1, 17)
    world.step()
    world.extend(1)
    world.join(2, 5)
    plan = world.step()
    assert plan.picks == (Pick(1, 17, 1),)
    assert plan.blocked == (2,)
    assert plan.retry_in_s is None


def test_a_long_idle_older_session_gives_way_and_says_when() -> None:
    world = World(pages=LAYERS * 2, config=SchedulerConfig(idle_preempt_s=2.0))
    world.join(1, 17)
    world.step()
    world.join(2, 5)
    world.now = 0.5
    plan = world.step()
    assert plan.picks == ()
    assert plan.blocked == (2,)
    assert plan.retry_in_s == 1.5
    world.now = 2.0
    plan = world.step()
    assert plan.preempted == (1,)
    assert plan.picks == (Pick(2, 0, 5),)


def test_a_session_starts_only_when_all_it_knows_fits() -> None:
    world = World(pages=LAYERS * 3, config=SchedulerConfig(max_rows=16, max_chunk_rows=16))
    world.join(1, 16)
    world.join(2, 48)
    plan = world.step()
    assert [p.session_id for p in plan.picks] == [1]
    world.leave(1)
    assert world.step().picks == (Pick(2, 0, 16),)


def test_a_started_session_takes_what_fits() -> None:
    world = World(pages=LAYERS * 3, config=SchedulerConfig(max_rows=64, max_chunk_rows=64))
    world.join(1, 16)
    world.join(2, 10)
    world.step()
    world.extend(2, 38)
    assert world.step().picks == (Pick(2, 10, 22),)
    assert world.step().blocked == (2,)


def test_a_session_cannot_join_twice() -> None:
    world = World()
    world.join(1)
    with pytest.raises(ValueError, match="session 1"):
        world.join(1)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_rows", (1,)),
        ("max_chunk_rows", (0,)),
        ("idle_preempt_s", (-1.0, float("nan"))),
        ("length_coverage", (0.0, 1.0, float("nan"))),
        ("aging_s", (0.0, -1.0)),
        ("mlfq_levels", (0, 65)),
        ("mlfq_quantum_s", (0.0, float("inf"))),
        ("policy", ("lifo",)),
        ("reservation", ("worst",)),
    ],
)
def test_limits_out_of_range_are_refused(field: str, values: tuple[object, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"{field}.*{value}"):
            SchedulerConfig(**{field: value})  # type: ignore[arg-type]  # what a settings file may hold


def test_counts_tell_running_waiting_and_ready_sessions_apart() -> None:
    world = World(pages=LAYERS * 2)
    world.join(1, 16)
    world.join(2, 30)
    world.join(3)
    scheduler = world.scheduler
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_ready) == (0, 2, 2)
    world.step()
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_ready) == (1, 1, 1)
    world.extend(1)
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_ready) == (1, 1, 2)


@settings(max_examples=60)
@given(
    sessions=st.lists(
        st.tuples(st.integers(0, LAYERS - 1), st.integers(1, 80), st.integers(0, 20)), min_size=1, max_size=8
    ),
    columns=st.integers(7, 20),
    max_rows=st.integers(2, 64),
    chunk=st.integers(1, 64),
)
def test_every_session_finishes_within_its_pages_and_budget(
    sessions: list[tuple[int, int, int]], columns: int, max_rows: int, chunk: int
) -> None:
    """Sessions of (split, prompt rows, rows that follow one by one) in a pool that fits one at a time."""
    config = SchedulerConfig(max_rows=max_rows, max_chunk_rows=chunk, idle_preempt_s=0.0)
    world = World(pages=columns * LAYERS, config=config)
    goals = {}
    for number, (split, prompt, follow) in enumerate(sessions):
        world.join(number, prompt, split=split)
        goals[number] = prompt + follow
    for _ in range(5000):
        plan = world.step()
        assert sum(pick.count for pick in plan.picks) <= max_rows
        assert all(pick.count <= chunk or pick.count == 1 for pick in plan.picks)
        assert len({pick.session_id for pick in plan.picks}) == len(plan.picks)
        for pick in plan.picks:
            entry = world.scheduler.entry(pick.session_id)
            assert entry.num_computed == pick.start + pick.count
            if entry.num_computed == goals[pick.session_id]:
                world.leave(pick.session_id)
                del goals[pick.session_id]
            elif entry.num_pending == 0:
                world.extend(pick.session_id)
        if not goals:
            break
        assert plan.picks or plan.retry_in_s is not None
        world.now += 1.0
    assert not goals
    assert world.pool.num_free == world.pool.num_pages


# ---- unchunked: whole or not at all ------------------------------------------------------------------


def whole(max_rows: int) -> World:
    return World(config=SchedulerConfig(max_rows=max_rows, max_chunk_rows=4, chunked=False))


def test_unchunked_prompts_are_computed_whole_in_order_and_none_overtakes() -> None:
    world = whole(64)
    world.join(1, 40)
    world.join(2, 30)
    world.join(3, 20)
    world.join(4, 1)
    assert served(world.step()) == {1: 40, 4: 1}
    assert served(world.step()) == {2: 30, 3: 20}


def test_an_unchunked_prompt_beyond_the_budget_runs_alone_and_single_rows_get_every_other_step() -> None:
    world = whole(8)
    world.join(1, 1)
    world.join(2, 50)
    world.join(3, 60)
    assert served(world.step()) == {2: 50}
    assert served(world.step()) == {1: 1}
    assert served(world.step()) == {3: 60}


def test_an_unchunked_prompt_that_only_single_rows_crowd_out_gets_a_step_too() -> None:
    world = whole(8)
    for session in range(4):
        world.join(session, 1)
    world.join(4, 6)
    assert served(world.step()) == {4: 6}
    assert served(world.step()) == {0: 1, 1: 1, 2: 1, 3: 1}


def test_two_unchunked_prompts_beyond_the_budget_need_no_step_between() -> None:
    world = whole(8)
    world.join(1, 9)
    world.join(2, 10)
    assert [served(world.step()) for _ in range(2)] == [{1: 9}, {2: 10}]


def test_a_step_of_single_rows_only_counts_as_theirs() -> None:
    world = whole(8)
    world.join(1, 1)
    world.step()
    world.extend(1)
    world.join(2, 50)
    assert served(world.step()) == {2: 50}
    assert served(world.step()) == {1: 1}
    world.extend(1)
    world.extend(2, 60)
    assert served(world.step()) == {2: 60}


def test_an_unchunked_session_is_not_computed_in_part_for_lack_of_pages() -> None:
    config = SchedulerConfig(chunked=False, idle_preempt_s=5.0)
    world = World(pages=LAYERS * 3, config=config)
    world.join(1, 16)
    world.join(2, 10)
    world.step()
    world.extend(2, 38)
    assert world.step().blocked == (2,)
    world.now = 5.0
    assert served(world.step()) == {2: 38}

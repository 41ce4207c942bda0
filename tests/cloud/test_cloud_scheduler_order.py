"""Whose turn it is: the orders `fcfs` and `mlfq`, priorities, aging, and that nobody starves."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.cloud.kv import BlockTable, PagePool
from isthmus.cloud.queueing import Entry, Fcfs, Mlfq
from isthmus.cloud.reservation import Reservation
from isthmus.cloud.scheduler import Policy, SchedulerConfig
from tests.cloud.cloud_scheduling import LAYERS, World, served

POLICIES: tuple[Policy, ...] = ("fcfs", "mlfq")
QUANTUM_S = 0.125


def entry_of(arrival: int = 1, *, prompt_rows: int = 1, split: int = 0, priority: int = 0) -> Entry:
    return Entry(
        arrival,
        BlockTable(PagePool(100), first_layer=split, num_layers=LAYERS),
        arrival=arrival,
        priority=priority,
        prompt_rows=prompt_rows,
        max_rows=1000,
        num_known=prompt_rows,
        last_active_s=0.0,
        waiting_since_s=0.0,
    )


def mlfq(num_levels: int = 4) -> Mlfq:
    """An order that has learned that a row-layer takes 1/1024 s."""
    order = Mlfq(aging_s=10.0, num_levels=num_levels, quantum_s=QUANTUM_S)
    order.served([(entry_of(), 1024)], 1.0)
    assert order.seconds_per_row_layer == 1 / 1024
    return order


@pytest.mark.parametrize(
    ("prompt_rows", "split", "level"),
    [
        (1, 0, 0),
        (32, 0, 0),  # 32 rows x 4 layers = 0.125 s: just one quantum
        (33, 0, 1),
        (64, 0, 1),
        (65, 0, 2),
        (128, 0, 2),
        (129, 0, 3),
        (10_000, 0, 3),
        (128, 3, 0),  # one layer only
        (129, 3, 1),
    ],
)
def test_a_session_joins_at_the_level_whose_quantum_covers_its_prompt(
    prompt_rows: int, split: int, level: int
) -> None:
    entry = entry_of(prompt_rows=prompt_rows, split=split)
    mlfq().join(entry)
    assert entry.level == level


def test_a_cached_prefix_does_not_count_for_the_level() -> None:
    entry = entry_of(prompt_rows=60)
    entry.table.ensure(40)
    entry.table.advance(40)
    mlfq().join(entry)
    assert entry.level == 0


def test_before_any_step_was_seen_everyone_joins_at_the_top() -> None:
    entry = entry_of(prompt_rows=10_000)
    Mlfq(aging_s=1.0, num_levels=4, quantum_s=QUANTUM_S).join(entry)
    assert entry.level == 0


@pytest.mark.parametrize(
    ("seconds", "level", "left_over"),
    [
        (0.0625, 0, 0.0625),
        (0.125, 1, 0.0),
        (0.25, 1, 0.125),
        (0.375, 2, 0.0),
        (0.875, 3, 0.0),
        (50.0, 3, 49.125),
    ],
)
def test_compute_time_beyond_the_quanta_of_the_levels_sinks_a_session(
    seconds: float, level: int, left_over: float
) -> None:
    whole, parts = entry_of(1), entry_of(2)
    order = mlfq()
    order.served([(whole, 4)], seconds)
    for _ in range(4):
        order.served([(parts, 4)], seconds / 4)
    assert whole.level == parts.level == level
    assert whole.used_s == parts.used_s == left_over


def test_a_step_is_charged_by_row_layers() -> None:
    one, other = entry_of(1), entry_of(2)
    mlfq().served([(one, 30), (other, 10)], 0.08)
    assert one.used_s == pytest.approx(0.06)
    assert other.used_s == pytest.approx(0.02)


def test_steps_of_no_time_or_no_work_teach_and_charge_nothing() -> None:
    order, entry = mlfq(), entry_of()
    order.served([(entry, 5)], 0.0)
    order.served([], 0.5)
    assert order.seconds_per_row_layer == 1 / 1024
    assert entry.used_s == 0.0


def test_the_estimate_is_that_of_large_steps_and_follows_a_change() -> None:
    """A step has a fixed cost: small ones would say that a prompt takes many times longer than it does."""
    order = Mlfq(aging_s=10.0, num_levels=4, quantum_s=QUANTUM_S)
    for _ in range(20):
        order.served([(entry_of(), 4)], 0.004 + 4 * 1e-5)
    order.served([(entry_of(), 10_000)], 0.004 + 0.1)
    assert order.seconds_per_row_layer == pytest.approx(1e-5, rel=0.1)
    for _ in range(2000):
        order.served([(entry_of(), 10_000)], 0.2)
    assert order.seconds_per_row_layer == pytest.approx(2e-5, rel=0.05)


def test_fcfs_has_no_levels() -> None:
    order, entry = Fcfs(aging_s=10.0), entry_of(prompt_rows=10_000)
    order.join(entry)
    order.served([(entry, 100)], 100.0)
    assert entry.level == 0


@dataclass(frozen=True)
class Standing:
    """What decides about a turn. `last_turn` matters for single rows only."""

    arrival: int
    priority: int = 0
    level: int = 0
    last_turn: int = 0
    pending: int = 1
    waits_since: float = 100.0

    def entry(self) -> Entry:
        entry = entry_of(self.arrival, prompt_rows=self.pending, priority=self.priority)
        entry.level, entry.last_turn, entry.waiting_since_s = self.level, self.last_turn, self.waits_since
        return entry


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Standing(1), Standing(2)),
        (Standing(2, priority=1), Standing(1)),
        (Standing(2, priority=1, level=3), Standing(1, level=0)),
        (Standing(2, level=1), Standing(1, level=2)),
        (Standing(2, last_turn=3), Standing(1, last_turn=4)),
        (Standing(1, last_turn=4, pending=2), Standing(2, last_turn=3, pending=2)),
        (Standing(3, priority=-5, level=3, waits_since=90.0), Standing(1, priority=5)),
        (Standing(1, waits_since=50.0, priority=-5, pending=9), Standing(2, waits_since=60.0, pending=9)),
        (Standing(1), Standing(2, waits_since=90.5)),
    ],
)
def test_turns(first: Standing, second: Standing) -> None:
    """At second 100, with an aging of 10 s."""
    for pair in ((first, second), (second, first)):
        turns = Fcfs(aging_s=10.0).turns([one.entry() for one in pair], now=100.0)
        assert [entry.arrival for entry in turns] == [first.arrival, second.arrival]


def test_who_was_passed_over_goes_back_to_the_top_until_it_is_served() -> None:
    config = SchedulerConfig(
        policy="mlfq", max_rows=8, max_chunk_rows=8, aging_s=5.0, mlfq_quantum_s=QUANTUM_S
    )
    world = World(config=config)
    world.join(1, 100)
    world.step(seconds=0.5)
    entry = world.scheduler.entry(1)
    assert entry.level == 2
    for session in range(2, 5):
        world.join(session, 500, priority=1)
    for _ in range(10):
        assert 1 not in served(world.step(seconds=0.5))
    assert served(world.step(seconds=0.0625)) == {1: 8}
    assert (entry.aged, entry.level, entry.used_s) == (False, 0, 0.0625)
    assert 1 not in served(world.step(seconds=0.5))


@pytest.mark.parametrize("policy", POLICIES)
def test_time_spent_waiting_for_the_edge_is_no_waiting(policy: Policy) -> None:
    world = World(config=SchedulerConfig(policy=policy, aging_s=5.0, max_rows=4, max_chunk_rows=4))
    world.join(1, 4, max_rows=100)
    world.step(seconds=0.01)
    level, used_s = world.scheduler.entry(1).level, world.scheduler.entry(1).used_s
    world.now += 1000.0
    world.join(2, 50, priority=1)
    world.extend(1, 4)
    assert 1 not in served(world.step())
    assert not world.scheduler.entry(1).aged
    assert (world.scheduler.entry(1).level, world.scheduler.entry(1).used_s) == (level, used_s)


def test_more_rows_do_not_put_off_the_aging_of_a_session_that_waits() -> None:
    world = World(config=SchedulerConfig(aging_s=5.0, max_rows=4, max_chunk_rows=4))
    world.join(1, 500, priority=1)
    world.join(2, 2, prompt_rows=100)
    for _ in range(5):
        assert 2 not in served(world.step(seconds=1.0))
        world.extend(2)
    assert served(world.step()) == {2: 4}


def test_rows_that_were_taken_back_leave_no_precedence_to_later_ones() -> None:
    world = World(config=SchedulerConfig(aging_s=5.0, max_rows=4, max_chunk_rows=4))
    world.join(1, 500, priority=1)
    world.join(2, 2)
    world.now = 6.0
    world.plan()
    assert world.scheduler.entry(2).aged
    world.scheduler.truncate(2, 0)
    world.step()
    world.extend(2, 2)
    assert 2 not in served(world.step())


@pytest.mark.parametrize("policy", POLICIES)
def test_a_higher_priority_gets_the_rows_and_the_pages_first(policy: Policy) -> None:
    config = SchedulerConfig(policy=policy, max_rows=4, max_chunk_rows=4, reservation="none")
    world = World(pages=LAYERS * 4, config=config)
    world.join(1, 40)
    world.join(2, 40, priority=1)
    world.join(3, 1, priority=-1)
    world.join(4, 1, priority=2)
    plan = world.step()
    assert served(plan) == {4: 1, 2: 2}
    assert plan.blocked == (3,) or plan.blocked == (1, 3)


def test_under_mlfq_a_short_prompt_passes_a_long_one() -> None:
    config = SchedulerConfig(
        policy="mlfq", max_rows=16, max_chunk_rows=16, mlfq_quantum_s=0.01, mlfq_levels=4
    )
    world = World(config=config)
    world.join(0, 100)
    while world.scheduler.has_work:
        world.step(seconds=0.01)  # 64 row-layers
    world.join(1, 500)
    world.join(2, 16)
    assert world.scheduler.entry(1).level == 3
    assert [served(world.step(seconds=0.01)) for _ in range(2)] == [{2: 16}, {1: 16}]


@pytest.mark.parametrize("policy", POLICIES)
def test_single_rows_beyond_the_budget_take_turns_within_their_level(policy: Policy) -> None:
    world = World(config=SchedulerConfig(policy=policy, max_rows=4))
    for session in range(10):
        world.join(session, 1, max_rows=100)
    counts = dict.fromkeys(range(10), 0)
    for _ in range(10):
        for session in served(world.step(seconds=0.001)):
            counts[session] += 1
            world.extend(session)
    assert set(counts.values()) == {4}


@dataclass(frozen=True)
class Request:
    arrival_s: float
    split: int
    prompt: int
    output: int
    priority: int
    edge_s: float
    """Seconds the edge takes from a result to the next row."""


requests = st.builds(
    Request,
    arrival_s=st.integers(0, 40).map(lambda n: n / 4),
    split=st.integers(0, LAYERS - 1),
    prompt=st.integers(1, 90),
    output=st.integers(0, 20),
    priority=st.integers(-1, 1),
    edge_s=st.sampled_from([0.0, 0.0, 0.25, 2.0]),
)


@settings(max_examples=150)
@given(
    arriving=st.lists(requests, min_size=1, max_size=12),
    policy=st.sampled_from(POLICIES),
    reservation=st.sampled_from(["predicted", "worst-case", "none"]),
    chunked=st.booleans(),
    columns=st.integers(7, 24),
    max_rows=st.integers(2, 64),
    chunk=st.integers(1, 64),
    idle_preempt_s=st.sampled_from([0.0, 0.5, 4.0]),
)
def test_every_session_finishes_in_bounded_time(
    arriving: list[Request],
    policy: Policy,
    reservation: Reservation,
    chunked: bool,
    columns: int,
    max_rows: int,
    chunk: int,
    idle_preempt_s: float,
) -> None:
    """Random arrivals to a pool that holds at least one of them. Each needs prompt + output row steps of its
    own and shares the engine with the others; it must be done when all of that, once over for every time
    somebody was preempted, and the waits of its edge are over."""
    config = SchedulerConfig(
        max_rows=max_rows,
        max_chunk_rows=chunk,
        idle_preempt_s=idle_preempt_s,
        policy=policy,
        chunked=chunked,
        reservation=reservation,
        aging_s=1.0,
        mlfq_levels=3,
        mlfq_quantum_s=QUANTUM_S,
    )
    step_s = 0.125
    world = World(pages=columns * LAYERS, config=config)
    joining = sorted(enumerate(arriving), key=lambda one: one[1].arrival_s, reverse=True)
    due: list[tuple[float, int]] = []  # rows on their way from an edge
    running: dict[int, Request] = {}
    spent_s = 0.0
    while joining or running:
        while joining and joining[-1][1].arrival_s <= world.now:
            number, request = joining.pop()
            running[number] = request
            world.join(
                number,
                request.prompt,
                split=request.split,
                max_rows=request.prompt + request.output,
                priority=request.priority,
            )
        for arrival_s, number in [one for one in due if one[0] <= world.now]:
            due.remove((arrival_s, number))
            world.extend(number)
        plan = world.step(seconds=step_s)
        spent_s += step_s
        if not plan.picks:
            # Idle, or blocked until an edge's session may be preempted: time passes.
            assert not plan.blocked or plan.retry_in_s is not None
        for pick in plan.picks:
            entry, request = world.scheduler.entry(pick.session_id), running[pick.session_id]
            if entry.num_computed == request.prompt + request.output:
                world.leave(pick.session_id, finished=True)
                del running[pick.session_id]
            elif entry.num_pending == 0:
                due.append((world.now + request.edge_s, pick.session_id))
        rows = sum(request.prompt + request.output for request in arriving)
        rows += 110 * world.scheduler.num_preemptions
        edges_s = sum(request.output * (request.edge_s + idle_preempt_s + step_s) for request in arriving)
        assert spent_s <= 10.0 + rows * step_s + edges_s + 1.0
    assert world.pool.num_free == world.pool.num_pages
    if reservation == "worst-case" and idle_preempt_s == 4.0:
        assert world.scheduler.num_preemptions == 0

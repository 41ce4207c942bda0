"""Admission: predicted peaks, who may start on them, and that the page pool is used but not overrun."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud.kv import PAGE_TOKENS, columns_for
from isthmus.cloud.reservation import Demand, Forecaster, Reservation, peak_pages
from isthmus.cloud.scheduler import SchedulerConfig
from isthmus.splitter.output_lengths import OutputLengths
from tests.cloud.cloud_scheduling import LAYERS, World, served

RESERVATIONS: tuple[Reservation, ...] = ("predicted", "worst-case", "none")


def demand(depth: int, rows: int, remaining: int, pages: int = 0) -> Demand:
    return Demand(depth, rows, remaining, depth * columns_for(rows + remaining), pages)


def stepped_peak(demands: Sequence[Demand]) -> int:
    """The same by walking through the steps: a session's pages are gone in the step after its last."""
    longest = max(one.remaining for one in demands)
    return max(
        sum(one.depth * columns_for(one.rows + step, PAGE_TOKENS) for one in demands if step <= one.remaining)
        for step in range(longest + 1)
    )


@pytest.mark.parametrize(
    ("demands", "peak"),
    [
        ([demand(4, 16, 0)], 4),
        ([demand(4, 16, 1)], 8),
        ([demand(4, 1, 15)], 4),
        # 2 ends with 32 rows before 1 has 48: at most 3 + 2 columns of one layer.
        ([demand(1, 16, 33), demand(1, 16, 16)], 4),
        # Each as deep as it is.
        ([demand(30, 16, 0), demand(5, 32, 0)], 40),
    ],
)
def test_peaks(demands: list[Demand], peak: int) -> None:
    assert stepped_peak(demands) == peak
    slack = sum(one.depth for one in demands)
    assert peak <= peak_pages(demands, num_used=0, page_tokens=PAGE_TOKENS) < peak + slack


@given(
    st.lists(
        st.builds(demand, st.integers(1, 30), st.integers(1, 200), st.integers(0, 200)),
        min_size=1,
        max_size=8,
    )
)
def test_a_peak_is_never_too_small_and_at_most_a_page_per_layer_and_session_too_large(
    demands: list[Demand],
) -> None:
    found = peak_pages(demands, num_used=0, page_tokens=PAGE_TOKENS)
    peak = stepped_peak(demands)
    assert peak <= found < peak + sum(one.depth for one in demands)
    assert found <= sum(one.end_pages for one in demands)


def test_pages_that_sessions_share_are_counted_once() -> None:
    """Three sessions that began with the same 64 rows: 4 columns, which only one of them brought."""
    demands = [demand(2, 80, 0, pages=10)] * 3
    assert peak_pages(demands, num_used=30, page_tokens=PAGE_TOKENS) == 30
    assert peak_pages(demands, num_used=14, page_tokens=PAGE_TOKENS) == 14
    longer = [*demands, demand(2, 16, 0)]
    assert peak_pages(longer, num_used=14, page_tokens=PAGE_TOKENS) == 16


def world_of(reservation: Reservation, columns: int, **options: float) -> World:
    return World(
        pages=columns * LAYERS,
        config=SchedulerConfig(reservation=reservation, **options),  # type: ignore[arg-type]  # forwarded
    )


def learned(world: World, lengths: Sequence[int]) -> None:
    """Sessions of so many rows of output have finished."""
    for length in lengths:
        world.join(-1, 1, max_rows=10_000)
        world.scheduler.entry(-1).num_known += length
        world.leave(-1, finished=True)


@pytest.mark.parametrize(("reservation", "num_started"), [("predicted", 3), ("worst-case", 1), ("none", 6)])
def test_how_many_start_on_six_columns(reservation: Reservation, num_started: int) -> None:
    """Prompts of one column, outputs of 16 rows as far as is known, of 64 at most."""
    world = world_of(reservation, columns=6)
    learned(world, [16] * 20)
    for session in range(8):
        world.join(session, 16, max_rows=80)
    plan = world.step()
    assert list(served(plan)) == list(range(num_started))
    assert plan.blocked == tuple(range(num_started, 8))


def test_before_enough_sessions_finished_the_worst_case_is_assumed() -> None:
    world = world_of("predicted", columns=6)
    learned(world, [16] * 15)
    world.join(1, 16, max_rows=64)
    world.join(2, 16, max_rows=64)
    assert served(world.step()) == {1: 16}
    learned(world, [16])
    assert served(world.step()) == {2: 16}


@pytest.mark.parametrize(
    ("reservation", "rows", "remaining"),
    [
        ("none", [10, 40, 49, 60, 130], [0, 0, 0, 0, 0]),
        ("worst-case", [40, 40, 49, 60, 130], [80, 80, 71, 60, 0]),
        # Most end after 8 rows, all others after 50: who has produced 8 is expected to go on to 50, and of
        # those that had more nobody is known.
        ("predicted", [40, 40, 49, 60, 130], [8, 8, 41, 30, 0]),
    ],
)
def test_what_a_session_is_foretold_as_it_goes_on(
    reservation: Reservation, rows: list[int], remaining: list[int]
) -> None:
    """A prompt of 40 rows, of which 10 have come at first; 120 rows at most, in the end it has more."""
    lengths = OutputLengths()
    for length in [*[8] * 90, *[50] * 10]:
        lengths.observe(length)
    forecaster = Forecaster(reservation, lengths, PAGE_TOKENS)
    world = World()
    table = world.join(1, 10, prompt_rows=40, max_rows=120, split=1)
    table.ensure(10)
    demands = []
    for known in (10, 40, 49, 60, 130):
        world.scheduler.entry(1).num_known = known
        demands.append(forecaster.demand(world.scheduler.entry(1)))
    assert [one.rows for one in demands] == rows
    assert [one.remaining for one in demands] == remaining
    for one in demands:
        assert (one.depth, one.pages) == (LAYERS - 1, LAYERS - 1)
        assert one.end_pages == (LAYERS - 1) * columns_for(one.rows + one.remaining)


def test_sessions_that_end_early_leave_room_for_the_rest_of_long_ones() -> None:
    """All final sizes together are 9 columns, but the short one is gone when the long one needs its sixth."""
    world = world_of("predicted", columns=8)
    world.join(1, 16, max_rows=96)
    world.step()
    world.join(2, 33, max_rows=40)
    assert served(world.step()) == {2: 33}
    world = world_of("worst-case", columns=8)
    world.join(1, 16, max_rows=96)
    world.step()
    world.join(2, 33, max_rows=40)
    assert world.step().blocked == (2,)


def test_nobody_overtakes_the_first_that_does_not_fit() -> None:
    world = world_of("none", columns=4)
    world.join(1, 32)
    world.step()
    world.join(2, 40)
    world.join(3, 1)
    assert world.step().blocked == (2, 3)
    world.leave(1)
    assert served(world.step()) == {2: 40, 3: 1}


def test_the_first_starts_where_nobody_runs_whatever_is_predicted() -> None:
    world = world_of("worst-case", columns=4)
    world.join(1, 16, max_rows=10_000)
    world.join(2, 16, max_rows=10_000)
    assert served(world.step()) == {1: 16}


@pytest.mark.parametrize(
    ("reservation", "blocked"), [("predicted", (2,)), ("worst-case", (2,)), ("none", ())]
)
def test_the_announced_rest_of_a_prompt_is_reserved_where_anything_is(
    reservation: Reservation, blocked: tuple[int, ...]
) -> None:
    world = world_of(reservation, columns=4)
    world.join(1, 8, prompt_rows=60)
    world.step()
    world.join(2, 16)
    assert world.step().blocked == blocked


def test_as_many_idle_sessions_give_way_as_a_start_needs_longest_idle_first() -> None:
    world = world_of("worst-case", columns=4, idle_preempt_s=1.0)
    for session in range(4):
        world.join(session, 16)
    world.step()
    for session in (1, 0, 3):
        world.now += 0.25
        world.extend(session, 0)
    world.now = 1.5
    world.join(4, 17)
    assert world.step().preempted == (2, 1)


def test_what_one_start_was_given_is_not_given_to_the_next() -> None:
    world = world_of("worst-case", columns=4, idle_preempt_s=1.0)
    for session in range(4):
        world.join(session, 16)
    world.step()
    world.now = 1.0
    world.join(4, 16)
    world.join(5, 16)
    plan = world.step()
    assert plan.preempted == (0, 1)
    assert served(plan) == {4: 16, 5: 16}


def test_prompts_of_a_single_row_are_admitted_like_others() -> None:
    world = world_of("worst-case", columns=4)
    for session in range(3):
        world.join(session, 1, max_rows=32)
    plan = world.step()
    assert served(plan) == {0: 1, 1: 1}
    assert plan.blocked == (2,)


def test_only_finished_sessions_are_samples() -> None:
    world = World()
    for finished in (True, False):
        world.join(1, 10, max_rows=100)
        world.extend(1, 7)
        world.leave(1, finished=finished)
    assert len(world.scheduler.lengths) == 1
    for _ in range(15):
        world.join(1, 10)
        world.scheduler.truncate(1, 3)
        world.leave(1, finished=True)
    assert world.scheduler.lengths.quantile(-1, 50) == 0, "cut back into its prompt, it produced nothing"


def test_idle_sessions_are_spared_where_preempting_them_would_not_suffice() -> None:
    world = world_of("worst-case", columns=4, idle_preempt_s=1.0)
    world.join(1, 16)
    world.join(2, 32, max_rows=48)
    world.step()
    world.now = 2.0
    world.extend(2)
    world.join(3, 32)
    plan = world.step()
    assert plan.preempted == ()
    assert plan.blocked == (3,)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("reservation", RESERVATIONS)
def test_reservations_under_pressure(reservation: Reservation, seed: int) -> None:
    """Forty sessions through a pool of five or so: worst-case never preempts, the others may."""
    draw = random.Random(seed)
    world = world_of(reservation, columns=20, max_rows=32, max_chunk_rows=16)
    waiting = [(draw.randint(1, 60), draw.randint(0, 60), draw.randrange(LAYERS)) for _ in range(40)]
    goals: dict[int, int] = {}
    num_running: list[int] = []
    for number in range(2000):
        if waiting and draw.random() < 0.5:
            prompt, output, split = waiting.pop()
            world.join(number, prompt, split=split, max_rows=prompt + 60)
            goals[number] = prompt + output
        plan = world.step(seconds=0.01)
        num_running.append(world.scheduler.num_running)
        for session in served(plan):
            entry = world.scheduler.entry(session)
            if entry.num_computed == goals[session]:
                world.leave(session, finished=True)
                del goals[session]
            elif not entry.num_pending:
                world.extend(session)
        if not waiting and not goals:
            break
    assert not goals
    assert world.pool.num_free == world.pool.num_pages
    assert max(num_running) > 2
    if reservation == "worst-case":
        assert world.scheduler.num_preemptions == 0


def test_a_prediction_lets_more_sessions_run_than_the_worst_case_and_preempts_less_than_none() -> None:
    """The same load, outputs of 10 rows on average and 200 at most."""
    steps: dict[Reservation, int] = {}
    preemptions: dict[Reservation, int] = {}
    for reservation in RESERVATIONS:
        draw = random.Random(7)
        world = world_of(reservation, columns=32, max_rows=64)
        goals = {}
        for number in range(150):
            prompt, output = draw.randint(1, 40), min(200, int(draw.expovariate(0.1)))
            world.join(number, prompt, max_rows=prompt + 200)
            goals[number] = prompt + output
        steps[reservation] = 0
        while goals:
            steps[reservation] += 1
            for session in served(world.step(seconds=0.01)):
                entry = world.scheduler.entry(session)
                if entry.num_computed == goals[session]:
                    world.leave(session, finished=True)
                    del goals[session]
                elif not entry.num_pending:
                    world.extend(session)
        preemptions[reservation] = world.scheduler.num_preemptions
    assert steps["predicted"] * 1.5 < steps["worst-case"]
    assert preemptions["worst-case"] == 0
    assert preemptions["predicted"] * 4 < preemptions["none"]

"""The batch window: it waits where that pays, by its own model of the edges, and never for nobody."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud.batch_window import BatchWindow

WAIT_S = 0.002


@dataclass(frozen=True)
class Served:
    rows_per_s: float
    latency_s: float
    """Mean time from a row's arrival to its result."""
    rows_per_step: float
    waited_s: float


def serve(
    num_edges: int,
    *,
    edge_s: float,
    step_s: float,
    row_s: float = 0.0,
    spread: float = 0.3,
    num_steps: int = 1500,
    window: BatchWindow | None = None,
) -> Served:
    """Edges that send a row `edge_s` (log-normal) after each result, steps of step_s + rows * row_s."""
    draw = random.Random(num_edges)
    coming = [(draw.uniform(0, edge_s), edge) for edge in range(num_edges)]
    heapq.heapify(coming)
    pending: list[tuple[float, int]] = []
    now = latency_s = waited_s = 0.0
    num_rows = 0
    for _ in range(num_steps):
        now = now if pending else max(now, coming[0][0])
        while True:
            while coming and coming[0][0] <= now:
                pending.append(heapq.heappop(coming))
                if window is not None:
                    window.note_arrivals(1, now=pending[-1][0])
            if not pending:
                now = coming[0][0]
                continue
            wait_s = window.wait_s(len(pending), now=now) if window is not None else 0.0
            if wait_s == 0.0:
                break
            until = min(now + wait_s, coming[0][0]) if coming else now + wait_s
            waited_s += until - now
            now = until
        seconds = step_s + len(pending) * row_s
        now += seconds
        if window is not None:
            window.note_step(seconds)
        num_rows += len(pending)
        for arrived_s, edge in pending:
            latency_s += now - arrived_s
            heapq.heappush(coming, (now + edge_s * draw.lognormvariate(0, spread), edge))
        pending = []
    return Served(num_rows / now, latency_s / num_rows, num_rows / num_steps, waited_s)


@pytest.mark.parametrize(
    ("num_edges", "edge_s", "step_s", "row_s", "gain"),
    [
        # Near edges: without a window two groups take turns and share no step.
        (8, 0.0005, 0.020, 0.0, 1.7),
        (2, 0.001, 0.012, 0.001, 1.5),
        (8, 0.0005, 0.012, 0.001, 1.3),
        # Far edges: nothing to gain, so nothing to lose.
        (8, 0.020, 0.015, 0.0, 0.99),
        (32, 0.020, 0.015, 0.0, 0.99),
        (32, 0.050, 0.005, 0.0, 0.99),
        (8, 0.020, 0.005, 0.001, 0.99),
        (8, 0.050, 0.003, 0.0, 0.99),
    ],
)
def test_waiting_makes_steps_fuller_and_never_serves_less(
    num_edges: int, edge_s: float, step_s: float, row_s: float, gain: float
) -> None:
    plain = serve(num_edges, edge_s=edge_s, step_s=step_s, row_s=row_s)
    held = serve(num_edges, edge_s=edge_s, step_s=step_s, row_s=row_s, window=BatchWindow())
    assert held.rows_per_s >= gain * plain.rows_per_s
    assert held.latency_s <= 1.02 * plain.latency_s
    assert held.rows_per_step >= plain.rows_per_step * 0.99


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from([0.001, 0.02, 0.3, 5.0]),  # the step
            st.sampled_from([0.0, 0.0001, 0.001, 0.05, 2.0]),  # until the edge's next row
            st.integers(0, 2),  # steps for others or for a prompt before it
        ),
        max_size=60,
    )
)
def test_one_session_never_waits(steps: list[tuple[float, float, int]]) -> None:
    window, now = BatchWindow(), 0.0
    for step_s, edge_s, others in steps:
        for _ in range(others):
            assert window.wait_s(1, now=now) == 0.0
            now += step_s
            window.note_step(step_s)
        now += edge_s
        window.note_arrivals(1, now=now)
        assert window.wait_s(1, now=now) == 0.0
        now += step_s
        window.note_step(step_s)


def busy() -> tuple[BatchWindow, float]:
    """A window that has seen eight rows come together, 0.4 ms in all, before each of a hundred steps of
    20 ms; and the time."""
    window, now = BatchWindow(), 0.0
    for _ in range(100):
        for row in range(8):
            window.note_arrivals(1, now=now)
            window.wait_s(row + 1, now=now)
            now += 0.00005
        now += 0.020
        window.note_step(0.020)
    return window, now


def test_it_waits_for_the_rows_that_use_to_come_and_no_longer() -> None:
    window, now = busy()
    window.note_arrivals(1, now=now)
    assert window.wait_s(1, now=now) == pytest.approx(WAIT_S)
    now += 0.0005
    window.note_arrivals(3, now=now)
    assert window.wait_s(4, now=now) == pytest.approx(WAIT_S - 0.0005)
    window.note_arrivals(4, now=now)
    assert window.wait_s(8, now=now) == 0.0, "all are here"


def test_all_waits_before_a_step_add_up_to_the_limit() -> None:
    window, now = busy()
    window.note_arrivals(1, now=now)
    assert window.wait_s(1, now=now) == pytest.approx(WAIT_S)
    assert window.wait_s(1, now=now + WAIT_S / 2) == pytest.approx(WAIT_S / 2)
    assert window.wait_s(1, now=now + WAIT_S) == 0.0
    assert window.wait_s(1, now=now + 1.0) == 0.0
    window.note_step(0.02)
    assert window.wait_s(1, now=now + 1.0) > 0.0


def test_many_pending_rows_do_not_wait_for_a_few() -> None:
    window, now = busy()
    assert window.wait_s(60, now=now) > 0.0  # seven steps of 20 ms against 67 waits of 2 ms
    window, now = busy()
    assert window.wait_s(70, now=now) == 0.0


def test_short_steps_are_not_worth_a_wait() -> None:
    window, now = busy()
    for _ in range(100):
        window.note_step(0.001)
    assert window.wait_s(1, now=now) == 0.0


def test_after_a_silence_nobody_is_expected() -> None:
    window, now = busy()
    now += 1.5
    window.note_arrivals(1, now=now)
    assert window.wait_s(1, now=now) == 0.0


def test_edges_that_stop_one_by_one_are_soon_not_waited_for() -> None:
    window, now = busy()
    waited = 0
    for _ in range(40):
        window.note_arrivals(1, now=now)
        waited += window.wait_s(1, now=now) > 0.0
        now += 0.020
        window.note_step(0.020)
    assert 0 < waited < 40
    assert window.wait_s(1, now=now) == 0.0


def test_no_rows_no_wait_and_a_limit_of_zero_switches_it_off() -> None:
    window, now = busy()
    assert window.wait_s(0, now=now) == 0.0
    held = serve(8, edge_s=0.0005, step_s=0.02, window=BatchWindow(max_wait_s=0.0), num_steps=100)
    assert held.waited_s == 0.0
    with pytest.raises(ValueError, match="must not be negative"):
        BatchWindow(max_wait_s=-0.001)


def test_rows_that_came_before_the_step_could_begin_are_not_expected_after_it() -> None:
    """They arrive while the step before runs, as far edges' rows do."""
    window, now = BatchWindow(), 0.0
    for _ in range(100):
        window.wait_s(8, now=now)
        for row in range(8):
            window.note_arrivals(1, now=now + 0.003 + 0.001 * row)
        now += 0.020
        window.note_step(0.020)
    assert window.wait_s(1, now=now) == 0.0

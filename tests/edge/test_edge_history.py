"""The rows that were sent: kept by position, bounded over all requests, zeroed when let go."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge.history import SEGMENT_ROWS, HistoryBudget, Raw, SentRows

BYTES = 4
PLENTY = 1 << 20
SEGMENT = SEGMENT_ROWS * BYTES


def raw(start: int, count: int, generation: int = 0) -> Raw:
    """Rows that say which position and which writing they are of."""
    rows = np.empty((count, BYTES), np.uint8)
    for i in range(count):
        rows[i] = ((start + i) & 255, (start + i) >> 8, generation & 255, 7)
    return rows


def test_rows_come_back_as_they_were_put() -> None:
    rows = SentRows(HistoryBudget(PLENTY), BYTES)
    for start in range(0, 300, 50):
        rows.put(start, raw(start, 50))
    assert (rows.start, rows.stop, len(rows)) == (0, 300, 300)
    assert (rows.rows(37, 271) == raw(37, 234)).all()


def test_a_history_may_begin_behind_a_cached_prefix() -> None:
    rows = SentRows(HistoryBudget(PLENTY), BYTES)
    rows.put(100, raw(100, 10))
    assert (rows.start, rows.stop) == (100, 110)
    with pytest.raises(IndexError, match=r"rows 99\.\.105"):
        rows.rows(99, 105)


def test_rows_put_in_the_middle_forget_what_was_behind() -> None:
    rows = SentRows(HistoryBudget(PLENTY), BYTES)
    rows.put(0, raw(0, 200))
    rows.put(70, raw(70, 5, generation=1))
    assert rows.stop == 75
    assert (rows.rows(60, 75) == np.concatenate([raw(60, 10), raw(70, 5, generation=1)])).all()


def test_rows_that_do_not_join_replace_all() -> None:
    rows = SentRows(HistoryBudget(PLENTY), BYTES)
    rows.put(10, raw(10, 20))
    rows.put(50, raw(50, 3))
    assert (rows.start, rows.stop) == (50, 53)
    rows.put(4, raw(4, 3))
    assert (rows.start, rows.stop) == (4, 7)


def test_the_budget_takes_the_rows_that_were_sent_first() -> None:
    budget = HistoryBudget(3 * SEGMENT)
    first, second = SentRows(budget, BYTES), SentRows(budget, BYTES)
    first.put(0, raw(0, 2 * SEGMENT_ROWS))
    second.put(0, raw(0, SEGMENT_ROWS))
    second.put(SEGMENT_ROWS, raw(SEGMENT_ROWS, 1))
    assert (first.start, first.stop) == (SEGMENT_ROWS, 2 * SEGMENT_ROWS)
    assert (second.start, second.stop) == (0, SEGMENT_ROWS + 1)
    assert budget.nbytes == 3 * SEGMENT
    assert (first.rows(SEGMENT_ROWS, 2 * SEGMENT_ROWS) == raw(SEGMENT_ROWS, SEGMENT_ROWS)).all()


def test_a_budget_for_nothing_keeps_nothing() -> None:
    budget = HistoryBudget(0)
    rows = SentRows(budget, BYTES)
    rows.put(0, raw(0, 10))
    rows.put(10, raw(10, 1))
    assert len(rows) == 0
    assert budget.nbytes == 0


def test_what_is_let_go_is_zeroed() -> None:
    budget = HistoryBudget(PLENTY)
    rows = SentRows(budget, BYTES)
    rows.put(0, raw(0, SEGMENT_ROWS + 10))
    held = dict(rows._segments)
    rows.truncate(SEGMENT_ROWS + 4)
    assert not held[1][4:].any()
    assert held[1][:4].any()
    rows.close()
    assert not any(segment.any() for segment in held.values())
    assert budget.nbytes == 0
    assert not budget._segments


@given(st.data())
def test_it_is_a_list_of_rows_with_a_bounded_memory(data: st.DataObject) -> None:
    """Against the plain model: a list by position, of which the beginning may be missing."""
    budget = HistoryBudget(data.draw(st.integers(0, 6)) * SEGMENT)
    histories = [SentRows(budget, BYTES) for _ in range(2)]
    models: list[list[Raw]] = [[], []]
    for step in range(data.draw(st.integers(1, 12))):
        which = data.draw(st.integers(0, 1))
        history, model = histories[which], models[which]
        cuts = data.draw(st.booleans())
        if model and cuts:
            to = data.draw(st.integers(0, len(model)))
            history.truncate(to)
            del model[max(to, history.start) :]
        else:
            count = data.draw(st.integers(1, 150))
            start = len(model)
            rows = raw(start, count, step)
            history.put(start, rows)
            model += list(rows)
        for one, expected in zip(histories, models, strict=True):
            if len(one):
                assert one.stop == len(expected)
                assert (one.rows(one.start, one.stop) == np.array(expected[one.start :])).all()
        assert budget.nbytes <= max(budget.max_bytes, 0)
        assert budget.nbytes == sum(s.nbytes for one in histories for s in one._segments.values())

"""The tables: closed, reachable, and silent about what nothing may do; and the outbox."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.protocol.errors import SequenceError
from isthmus.protocol.outbox import Outbox
from isthmus.protocol.states import (
    CLOUD_TABLE,
    CONNECTION_TABLE,
    EDGE_TABLE,
    CloudInput,
    CloudState,
    ConnectionInput,
    ConnectionState,
    EdgeInput,
    EdgeState,
    advance,
)

TABLES: list[tuple[Mapping[Any, Any], type[StrEnum], type[StrEnum], StrEnum, set[StrEnum]]] = [
    (EDGE_TABLE, EdgeState, EdgeInput, EdgeState.IDLE, {EdgeState.CLOSED}),
    (CLOUD_TABLE, CloudState, CloudInput, CloudState.NEW, {CloudState.CLOSED, CloudState.EVICTED}),
    (
        CONNECTION_TABLE,
        ConnectionState,
        ConnectionInput,
        ConnectionState.IDLE,
        {ConnectionState.CLOSED},
    ),
]


@pytest.mark.parametrize(
    ("table", "states", "inputs", "first", "ends"), TABLES, ids=["edge", "cloud", "link"]
)
def test_every_state_is_reached_and_leads_to_an_end(
    table: Mapping[Any, Any],
    states: type[StrEnum],
    inputs: type[StrEnum],
    first: StrEnum,
    ends: set[StrEnum],
) -> None:
    assert {state for state, _ in table} | set(table.values()) == set(states)
    assert {happened for _, happened in table} == set(inputs)
    reached = {first}
    while grown := {after for (before, _), after in table.items() if before in reached} - reached:
        reached |= grown
    assert reached == set(states)
    ending = set(ends)
    while grown := {before for (before, _), after in table.items() if after in ending} - ending:
        ending |= grown
    assert ending == set(states)
    assert all(after in ends for (before, _), after in table.items() if before in ends)


@pytest.mark.parametrize(
    ("table", "states", "inputs", "first", "ends"), TABLES, ids=["edge", "cloud", "link"]
)
def test_advance_is_the_table_and_nothing_else(
    table: Mapping[Any, Any],
    states: type[StrEnum],
    inputs: type[StrEnum],
    first: StrEnum,
    ends: set[StrEnum],
) -> None:
    del first, ends
    for state in states:
        for happened in inputs:
            if (state, happened) in table:
                assert advance(table, state, happened) is table[state, happened]
            else:
                with pytest.raises(SequenceError, match=state) as caught:
                    advance(table, state, happened)
                assert caught.value.code == "wrong_state"


def test_a_loss_leads_back_or_to_an_end_and_nowhere_else() -> None:
    from_suspended = {after for (before, _), after in EDGE_TABLE.items() if before is EdgeState.SUSPENDED}
    assert from_suspended == {EdgeState.RESUMING, EdgeState.CLOSED}
    before_suspended = {old for (old, _), new in EDGE_TABLE.items() if new is EdgeState.SUSPENDED}
    assert before_suspended == {EdgeState.PREFILL, EdgeState.DECODE, EdgeState.RESUMING}
    from_detached = {after for (before, _), after in CLOUD_TABLE.items() if before is CloudState.DETACHED}
    assert from_detached == {CloudState.DETACHED, CloudState.ACTIVE, CloudState.EVICTED}
    assert [old for (old, _), new in CLOUD_TABLE.items() if new is CloudState.EVICTED] == [
        CloudState.DETACHED
    ]


def test_every_live_state_ends_on_error_and_loss() -> None:
    for edge_state in set(EdgeState) - {EdgeState.IDLE, EdgeState.SUSPENDED, EdgeState.CLOSED}:
        for edge_input in (EdgeInput.ERROR, EdgeInput.LOST):
            assert EDGE_TABLE[edge_state, edge_input] is EdgeState.CLOSED
    for cloud_state in (CloudState.OPENING, CloudState.ACTIVE, CloudState.CLOSING):
        for cloud_input in (CloudInput.ERROR, CloudInput.LOST):
            assert CLOUD_TABLE[cloud_state, cloud_input] is CloudState.CLOSED


# ---- outbox


def test_streams_take_turns_and_urgent_messages_pass() -> None:
    box = Outbox()
    for message in (b"1a", b"1b", b"1c"):
        box.push(1, message)
    box.push(2, b"2a")
    box.push(2, b"2b")
    box.push_latest("PONG", b"old")
    box.push_latest("PONG", b"pong")
    box.push_urgent(b"hello")
    assert box.nbytes == 5 + 4 + 10
    assert box.take() == [b"hello", b"pong", b"1a", b"2a", b"1b", b"2b", b"1c"]
    assert (box.nbytes, bool(box)) == (0, False)


def test_take_gives_at_least_one_message_and_no_more_than_asked() -> None:
    box = Outbox()
    box.push(1, b"x" * 10)
    box.push(2, b"y" * 3)
    box.push(1, b"z" * 3)
    assert box.take(1) == [b"x" * 10]
    box.push_urgent(b"!")
    assert box.take(4) == [b"!", b"yyy"]
    assert box.nbytes == 3
    box.clear()
    assert box.take() == []


def test_drop_forgets_only_what_may_be_dropped() -> None:
    box = Outbox()
    box.push(1, b"open")
    box.push(1, b"step", droppable=True)
    box.push(2, b"rows", droppable=True)
    box.drop(1)
    box.drop(2)
    box.drop(3)
    assert box.nbytes == 4
    assert box.take() == [b"open"]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.integers(1, 3), st.booleans()),
            st.tuples(st.just("urgent"), st.just(0), st.just(False)),
            st.tuples(st.just("latest"), st.just(0), st.just(False)),
            st.tuples(st.just("drop"), st.integers(1, 3), st.just(False)),
            st.tuples(st.just("take"), st.integers(0, 9), st.just(False)),
        ),
        max_size=60,
    )
)
def test_outbox_keeps_order_within_a_stream_and_counts_its_bytes(
    script: list[tuple[str, int, bool]],
) -> None:
    box = Outbox()
    taken: list[bytes] = []
    for number, (what, arg, droppable) in enumerate(script):
        data = b"%d:%d" % (arg, number)
        match what:
            case "push":
                box.push(arg, data, droppable=droppable)
            case "urgent":
                box.push_urgent(data)
            case "latest":
                box.push_latest("key", data)
            case "drop":
                box.drop(arg)
            case _:
                taken += box.take(arg)
    rest = box.take()
    assert box.nbytes == 0
    assert not box
    assert len(set(taken + rest)) == len(taken + rest)
    for stream in (1, 2, 3):
        order = [int(m.split(b":")[1]) for m in taken + rest if m.startswith(b"%d:" % stream)]
        assert order == sorted(order)

"""PROTOCOL.md rule by rule, both ends paired: 1, 2, 4 (epochs), 6 (heartbeat), 7. Names tell the rule."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.protocol.errors import CloudLostError, IsthmusError
from isthmus.protocol.events import (
    ConnectionFailed,
    ResultTokens,
    RttMeasured,
    SessionFailed,
    SessionOpened,
    SessionOpenRequested,
    StepReceived,
    StreamTokens,
)
from isthmus.protocol.frames import Flag, MsgType, json_frame, parse_json
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import Cancel, ErrorBody
from tests.protocol.pairing import (
    SESSION_ID,
    connected,
    encoded,
    last_step,
    make_open,
    opened,
    parse,
)
from tests.protocol.transcript_lines import tensor

# ---- rule 1: a step is executed once, in order, at its place


def test_rule_1_steps_run_in_order_and_seq_and_kv_advance_together() -> None:
    pair = connected()
    session = opened(pair)
    session.step_rows(encoded(3), 0, 3, final=False)
    session.step_rows(encoded(1, 3), 3, 1, final=True)
    steps = [e for e in pair.up() if isinstance(e, StepReceived)]
    assert [(e.seq, e.pos, e.n_tok, e.final) for e in steps] == [(1, 0, 3, False), (2, 3, 1, True)]
    cloud = pair.cloud.sessions[1]
    assert (cloud.last_seq, cloud.kv_len) == (2, 4)


def test_rule_1_a_refused_step_advances_neither() -> None:
    pair = connected()
    session = opened(pair)
    session.step_rows(encoded(3), 0, 3, final=False)
    pair.up()
    cloud = pair.cloud.sessions[1]
    (failed,) = pair.inject_up(last_step(pair), seq=2, pos=7)
    assert isinstance(failed, SessionFailed)
    assert (cloud.last_seq, cloud.kv_len, cloud.rows_received) == (1, 3, 3)


def test_rule_1_truncate_cuts_to_pos_under_the_same_seq() -> None:
    pair = connected()
    session = opened(pair, shape="u")
    session.step_rows(encoded(6), 0, 6, final=False)
    session.step_rows(encoded(1, 2), 2, 1, final=True, truncate=True)
    step = pair.up()[-1]
    assert isinstance(step, StepReceived)
    assert (step.seq, step.pos, step.truncate) == (2, 2, True)
    assert pair.cloud.sessions[1].kv_len == session.kv_len == 3


def test_rule_1_truncate_at_the_end_cuts_nothing_and_past_it_is_refused() -> None:
    pair = connected()
    session = opened(pair)
    session.step_rows(encoded(2), 0, 2, final=False)
    session.step_rows(encoded(1, 2), 2, 1, final=False, truncate=True)
    assert len([e for e in pair.up() if isinstance(e, StepReceived)]) == 2
    (failed,) = pair.inject_up(last_step(pair), seq=3, pos=4)
    assert isinstance(failed, SessionFailed)
    assert failed.error.code == "bad_position"


def test_rule_1_the_last_step_again_gets_the_cached_result_and_is_not_computed() -> None:
    pair = connected()
    session = opened(pair)
    session.step_rows(encoded(4), 0, 4, final=True)
    pair.up()
    step = last_step(pair)
    assert pair.inject_up(step) == []  # still computing: the RESULT will come
    assert not pair.cloud.has_data
    pair.cloud.result_tokens(1, [9], kv_len=4)
    pair.down()
    (result,) = pair.sent_down
    assert pair.inject_up(step) == []
    assert [parse(m) for m in pair.cloud.data_to_send()] == [result]
    session.step_rows(encoded(1, 4), 4, 1, final=True)
    pair.up()
    assert pair.inject_up(last_step(pair)) == []  # step 2 is computing: step 1's RESULT is not its answer
    assert not pair.cloud.has_data


def test_rule_1_the_last_step_again_with_another_payload_is_an_error() -> None:
    changes: list[dict[str, Any]] = [
        {"body": encoded(4, 1).body},
        {"flags": Flag.NONE},
        {"pos": 1},
        {"flags": Flag.FINAL | Flag.TRUNCATE},
    ]
    for change in changes:
        pair = connected()
        opened(pair).step_rows(encoded(4), 0, 4, final=True)
        pair.up()
        (failed,) = pair.inject_up(last_step(pair), **change)
        assert isinstance(failed, SessionFailed)
        assert failed.error.code == "duplicate_seq_payload"


def test_rule_1_a_gap_is_answered_with_what_was_expected() -> None:
    pair = connected()
    session = opened(pair)
    session.step_rows(encoded(2), 0, 2, final=False)
    pair.up()
    pair.inject_up(last_step(pair), seq=3, pos=2)
    (event,) = pair.down()
    assert isinstance(event, SessionFailed)
    assert event.error.code == "sequence_gap"
    assert "step 3 came, step 2 was expected" in event.error.message
    body = parse_json(pair.sent_down[-1], ErrorBody)
    assert (body.expected_seq, body.expected_pos) == (2, 2)


def test_rule_1_older_steps_are_dropped() -> None:
    pair = connected()
    session = opened(pair)
    session.step_rows(encoded(1), 0, 1, final=False)
    pair.up()
    old = last_step(pair)
    session.step_rows(encoded(1, 1), 1, 1, final=False)
    pair.up()
    assert pair.inject_up(old) == []
    assert pair.inject_up(old, body=encoded(1, 50).body) == []
    assert not pair.cloud.has_data


# ---- rule 2: each token index is emitted once


def test_rule_2_repeated_results_emit_nothing() -> None:
    pair = connected()
    session = opened(pair)
    emitted: list[int] = []
    pos = 4
    session.step_rows(encoded(4), 0, 4, final=True)
    for index in range(5):
        pair.up()
        pair.cloud.result_tokens(1, [index + 10], kv_len=pos)
        pair.down()
        result = pair.sent_down[-1]
        assert pair.inject_down(result) == []
        emitted += [e.first_index for e in pair.edge_events if isinstance(e, ResultTokens)]
        pair.edge_events.clear()
        session.step_rows(encoded(1, pos), pos, 1, final=True)
        assert pair.inject_down(result) == []
        pos += 1
    assert emitted == [0, 1, 2, 3, 4]


def test_rule_2_the_cloud_is_told_position_not_history() -> None:
    """next_index needs no field: it follows from pos, n_tok and prompt_tokens on both sides."""
    pair = connected()
    session = opened(pair, prompt_tokens=2, max_tokens=8)
    # A session begun in mid-generation (another route before): 2 prompt rows and 3 emitted tokens as rows.
    session.step_rows(encoded(5), 0, 5, final=True)
    (step,) = pair.up()
    assert isinstance(step, StepReceived)
    assert step.next_index == session.next_index == 3
    pair.cloud.result_tokens(1, [9], kv_len=5)
    assert pair.down() == [ResultTokens(1, 1, 5, 3, (9,))]


# ---- rule 4: epochs


@pytest.mark.parametrize("epoch", [0, 2])
def test_rule_4_frames_of_another_epoch_are_never_executed(epoch: int) -> None:
    pair = connected()
    session = opened(pair, split=0)
    session.step_ids([1, 2], 0, final=False)
    pair.up()
    cloud = pair.cloud.sessions[1]
    for frame in (last_step(pair), json_frame(MsgType.CANCEL, Cancel(), stream=1)):
        events = pair.inject_up(frame, epoch=epoch, seq=2 if frame.type is MsgType.STEP else 0, pos=0)
        if epoch == 0:
            assert events == []
            assert not pair.cloud.has_data
        else:
            assert [type(e) for e in events] == [SessionFailed] or 1 not in pair.cloud.sessions
    assert (cloud.last_seq, cloud.kv_len) == (1, 2)


# ---- rule 6: liveness (detection; reconnecting is issue C)


def test_rule_6_heartbeat_finds_a_dead_cloud_within_3_s_while_compute_goes_on() -> None:
    pair = connected()
    opened(pair).step_rows(encoded(4), 0, 4, final=True)
    for _ in range(200):  # 20 s of compute: pongs come all the same
        pair.now += 0.1
        assert pair.edge.on_tick(pair.now) == []
        assert pair.cloud.on_tick(pair.now) == []
        pair.pump()
    assert 1 in pair.edge.sessions
    assert RttMeasured(0.0) in pair.edge_events
    died = pair.now
    events: list[Any] = []
    while not events:
        pair.now += 0.1
        events = pair.edge.on_tick(pair.now)
        pair.edge.data_to_send()
    assert pair.now - died <= 3.0
    assert isinstance(events[-1], ConnectionFailed)
    assert isinstance(events[-1].error, CloudLostError)


# ---- rule 7: one decode step in flight, prefill under credits


def test_rule_7_one_unacknowledged_decode_step_on_either_side() -> None:
    pair = connected()
    session = opened(pair)
    session.step_rows(encoded(4), 0, 4, final=True)
    assert not session.can_send(1)
    with pytest.raises(IsthmusError, match="step 2 while step 1 is unanswered"):
        session.step_rows(encoded(1, 4), 4, 1, final=True)
    pair.up()
    (failed,) = pair.inject_up(tensor(MsgType.STEP, encoded(1), 1, seq=2, pos=4, flags=Flag.FINAL))
    assert isinstance(failed, SessionFailed)
    assert failed.error.code == "step_pending"


def test_rule_7_prefill_spends_credits_and_both_ends_count_alike() -> None:
    limits = Limits(initial_credits_rows=5)
    pair = connected(limits=limits)
    session = opened(pair, prompt_tokens=20, max_tokens=2)
    session.step_rows(encoded(5), 0, 5, final=False)
    assert (session.credits, session.can_send(1)) == (0, False)
    with pytest.raises(IsthmusError, match="has 1 rows, 0 are credited"):
        session.step_rows(encoded(1, 5), 5, 1, final=False)
    pair.up()
    assert pair.cloud.sessions[1].credits == 0
    pair.cloud.credit(1, 2)
    pair.down()
    assert session.credits == pair.cloud.sessions[1].credits == 2
    (failed,) = pair.inject_up(tensor(MsgType.STEP, encoded(3), 3, seq=2, pos=5))
    assert isinstance(failed, SessionFailed)
    assert failed.error.code == "no_credit"


def test_rule_7_a_result_returns_all_credits_without_a_credit_frame() -> None:
    pair = connected(limits=Limits(initial_credits_rows=5))
    session = opened(pair)
    session.step_rows(encoded(4), 0, 4, final=True)
    pair.up()
    pair.cloud.result_tokens(1, [1], kv_len=4)
    pair.down()
    assert session.credits == pair.cloud.sessions[1].credits == 5
    assert [f.type for f in pair.sent_down] == [MsgType.RESULT]


def test_rule_7_credits_granted_in_opened_stay_the_window() -> None:
    pair = connected(limits=Limits(initial_credits_rows=5))
    session = pair.edge.open(make_open())
    session.step_rows(encoded(4), 0, 4, final=True)
    pair.up()
    pair.cloud.opened(1, session_id=SESSION_ID, credits=9)
    pair.down()
    assert session.credits == pair.cloud.sessions[1].credits == 5
    pair.cloud.result_tokens(1, [1], kv_len=4)
    pair.down()
    assert session.credits == pair.cloud.sessions[1].credits == 9


def test_rule_7_pipelined_start_costs_one_round_trip_to_the_first_token() -> None:
    pair = connected()
    session = pair.edge.open(make_open())
    session.step_rows(encoded(4), 0, 4, final=True)
    first, second = pair.up()
    assert isinstance(first, SessionOpenRequested)
    assert isinstance(second, StepReceived)
    pair.cloud.opened(1, session_id=SESSION_ID)
    pair.cloud.result_tokens(1, [5], kv_len=4)
    assert [type(e) for e in pair.down()] == [SessionOpened, ResultTokens]


def test_rule_7_offload_streams_within_its_window_for_one_round_trip() -> None:
    pair = connected(limits=Limits(stream_window_tokens=4))
    session = pair.edge.open(make_open(split=0, max_tokens=40))
    session.step_ids([1, 2, 3, 4], 0, final=True)
    pair.up()
    pair.cloud.opened(1, session_id=SESSION_ID)
    pair.cloud.result_tokens(1, [0], kv_len=4)
    for index in range(1, 40):  # the engine runs ahead of the acknowledgements
        pair.cloud.stream_tokens(1, [index], finish="length" if index == 39 else None)
    seen = 0
    while pair.cloud.has_data:
        in_flight = [e for e in pair.down() if isinstance(e, StreamTokens)]
        assert sum(len(e.tokens) for e in in_flight) <= 4
        seen += len(in_flight)
        pair.up()
    assert seen == 39
    assert session.next_index == 40
    assert session.kv_len == pair.cloud.sessions[1].kv_len == 43
    acks = [f for f in pair.sent_up if f.type is MsgType.CREDIT]
    assert len(acks) <= 39 / 2 + 1  # twice per window, not once per token

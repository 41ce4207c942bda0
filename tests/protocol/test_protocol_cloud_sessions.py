"""The cloud's sessions: steps, the engine's answers, streaming under a window, and how a session ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from isthmus.protocol.activations import Encoded, RowCodec, RowFormat
from isthmus.protocol.errors import (
    CodecError,
    ProtocolError,
    SequenceError,
)
from isthmus.protocol.events import (
    CancelRequested,
    CloseRequested,
    ConnectionFailed,
    SessionFailed,
    StepReceived,
    StreamWindow,
)
from isthmus.protocol.frames import (
    Codec,
    Dtype,
    Flag,
    Frame,
    MsgType,
    parse_json,
)
from isthmus.protocol.limits import Limits, TenantUsage
from isthmus.protocol.messages import (
    Credit,
    ErrorBody,
    Load,
)
from isthmus.protocol.states import CloudState
from tests.protocol.cloud_side import (
    ack,
    active,
    bodies,
    failure,
    feed,
    generating,
    greeted,
    open_frame,
    sent,
    step,
)
from tests.protocol.pairing import (
    LIMITS,
    SESSION_ID,
    encoded,
    rows,
)
from tests.protocol.transcript_lines import CANCEL_LINE, control, ids, tensor

# ---- steps


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (step(1, seq=3, pos=2), "sequence_gap"),
        (step(1, seq=0, pos=2), "sequence_gap"),
        (step(1, seq=2**64 - 1, pos=2), "sequence_gap"),
        (step(1, seq=2, pos=3), "bad_position"),
        (step(1, seq=2, pos=1), "bad_position"),
        (step(1, seq=2, pos=3, flags=Flag.TRUNCATE), "bad_position"),
        (step(1, seq=2, pos=2, flags=Flag.FINAL), "bad_output_index"),
        (step(2, seq=2, pos=2, flags=Flag.ALL_ROWS), "all_rows_in_prefix_shape"),
        (step(9, seq=2, pos=2), "too_many_rows"),
        (tensor(MsgType.STEP, ids([1]), 1, seq=2, pos=2), "bad_dtype"),
        (tensor(MsgType.STEP, encoded(1, 0, RowFormat.BF16), 1, seq=2, pos=2), "bad_dtype"),
        (
            tensor(MsgType.STEP, Encoded(b"\0" * 28, Dtype.F32, Codec.NONE, 28), 1, seq=2, pos=2),
            "bad_length",
        ),
        (replace(step(1, seq=2, pos=2), epoch=2), "epoch_ahead"),
    ],
)
def test_wrong_step_fails_its_session_and_tells_what_was_expected(frame: Frame, code: str) -> None:
    usage = TenantUsage.from_limits(LIMITS)
    cloud = greeted(Limits(max_rows_per_step=8), usage=usage)
    active(cloud, 1)
    active(cloud, 2)
    assert isinstance(feed(cloud, step(2, seq=1, pos=0))[0], StepReceived)
    assert failure(feed(cloud, frame)).error.code == code
    (answer,) = sent(cloud)
    body = parse_json(answer, ErrorBody)
    assert (answer.stream, body.code, body.expected_seq, body.expected_pos) == (1, code, 2, 2)
    assert usage.num_sessions == 1
    assert isinstance(feed(cloud, step(4, seq=1, pos=0, flags=Flag.FINAL, stream=2))[0], StepReceived)


def test_context_and_token_budget_are_bounds() -> None:
    cloud = greeted()
    active(cloud, max_context=12)
    assert failure(feed(cloud, step(13, seq=1, pos=0))).error.code == "context_full"
    active(cloud, 2, max_context=20)
    late = step(13, seq=1, pos=0, flags=Flag.FINAL, stream=2)  # would be token 9 of 8
    assert failure(feed(cloud, late)).error.code == "bad_output_index"


def test_split_0_takes_ids_only() -> None:
    cloud = greeted()
    active(cloud, split=0)
    assert failure(feed(cloud, step(1, seq=1, pos=0))).error.code == "bad_dtype"


def test_old_and_stale_steps_are_dropped_without_a_word() -> None:
    cloud = greeted()
    active(cloud)
    feed(cloud, step(1, seq=1, pos=0))
    feed(cloud, step(1, seq=2, pos=1))
    assert feed(cloud, step(1, seq=1, pos=0)) == []
    assert feed(cloud, step(1, seq=3, pos=2), epoch=0) == []
    assert cloud.sessions[1].last_seq == 2
    assert not cloud.has_data


def test_unknown_stream_is_told_and_harms_nobody() -> None:
    cloud = greeted()
    active(cloud)
    for frame in (step(1, seq=1, pos=0, stream=9), control(MsgType.CLOSE, "{}", stream=9)):
        assert feed(cloud, frame) == []
        (answer,) = sent(cloud)
        assert (answer.stream, parse_json(answer, ErrorBody).code) == (9, "unknown_stream")
    assert isinstance(feed(cloud, step(1, seq=1, pos=0))[0], StepReceived)


# ---- the engine's answers


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.result_tokens(1, [5], kv_len=3),
        lambda c: c.result_tokens(1, [5, 6], kv_len=4),
        lambda c: c.result_tokens(1, [], kv_len=4),
        lambda c: c.result_rows(1, encoded(1), 1, kv_len=4),
        lambda c: c.stream_tokens(1, [5]),
        lambda c: c.closed(1),
    ],
)
def test_engine_that_contradicts_the_session_is_a_bug_here(call: Any) -> None:
    cloud = greeted()
    active(cloud)
    feed(cloud, step(4, seq=1, pos=0, flags=Flag.FINAL))
    with pytest.raises(SequenceError):
        call(cloud)
    cloud.result_tokens(1, [5], kv_len=4)
    assert [f.type for f in sent(cloud)] == [MsgType.RESULT]
    with pytest.raises(SequenceError):
        cloud.result_tokens(1, [5], kv_len=4)  # once


def test_u_shape_answers_rows_in_the_agreed_format_only() -> None:
    cloud = greeted()
    active(cloud, shape="u", row_format="int8o", outliers=(1, 3))
    codec = RowCodec(RowFormat.INT8, 8, (1, 3))
    prompt = tensor(MsgType.STEP, codec.encode(rows(4)), 4, seq=1, pos=0, flags=Flag.FINAL)
    assert isinstance(feed(cloud, prompt)[0], StepReceived)
    with pytest.raises(CodecError):
        cloud.result_rows(1, encoded(1), 1, kv_len=4)
    cloud.result_rows(1, encoded(1, 0, RowFormat.BF16), 1, kv_len=4)
    assert [f.dtype for f in sent(cloud)] == [Dtype.BF16]


def test_answers_for_a_stream_that_is_gone_or_closing_are_dropped() -> None:
    cloud = greeted()
    active(cloud, split=0)
    prompt = tensor(MsgType.STEP, ids([1, 2, 3, 4]), 4, seq=1, pos=0, flags=Flag.FINAL)
    feed(cloud, prompt)
    feed(cloud, CANCEL_LINE.frame)
    for _ in range(2):
        cloud.result_tokens(1, [5], kv_len=4)
        cloud.stream_tokens(1, [6])
        cloud.result_rows(1, encoded(1), 1, kv_len=4)
        cloud.credit(1, 4)
        cloud.opened(1, session_id=SESSION_ID)
        if cloud.sessions:
            assert not cloud.has_data
            cloud.closed(1)
            assert [f.type for f in sent(cloud)] == [MsgType.CLOSED]
    cloud.closed(1)
    assert cloud.stream_room(1) == 0
    assert not cloud.has_data


def test_credit_is_never_more_than_was_received() -> None:
    cloud = greeted()
    active(cloud)
    feed(cloud, step(3, seq=1, pos=0))
    cloud.credit(1, 2)
    cloud.credit(1, 50)
    cloud.credit(1, 1)
    assert [parse_json(f, Credit).rows for f in sent(cloud)] == [2050, 2051]
    assert cloud.sessions[1].credits == 2048


# ---- streaming


def test_stream_stays_within_the_window_and_goes_on_when_acknowledged() -> None:
    cloud = generating(4)
    assert cloud.stream_room(1) == 4
    cloud.stream_tokens(1, [11, 12, 13])
    cloud.stream_tokens(1, [14, 15], logprobs=[-1.0, -2.0])
    cloud.stream_tokens(1, [16])
    cloud.stream_tokens(1, [17], finish="length")
    assert cloud.stream_room(1) == 0
    assert bodies(cloud) == [(1, (11, 12, 13), None), (4, (14,), None)]
    assert feed(cloud, ack(1)) == [StreamWindow(1, 0)]
    assert bodies(cloud) == []
    assert [b.first_index for b in cloud.sessions[1].unacked] == [1, 4]
    assert feed(cloud, ack(4)) == [StreamWindow(1, 0)]
    assert bodies(cloud) == [(5, (15,), None), (6, (16,), None), (7, (17,), "length")]
    assert [b.first_index for b in cloud.sessions[1].unacked] == [4, 5, 6, 7]
    assert feed(cloud, ack(8)) == [StreamWindow(1, 4)]
    assert feed(cloud, ack(4)) == [StreamWindow(1, 4)]  # an older acknowledgement takes nothing back
    assert not cloud.sessions[1].unacked
    assert cloud.sessions[1].kv_len == 11


def test_window_zero_pauses_and_a_large_one_is_cut_to_the_limit() -> None:
    cloud = generating(4)
    feed(cloud, ack(1, window=0))
    cloud.stream_tokens(1, [11])
    assert bodies(cloud) == []
    feed(cloud, ack(1, window=100))
    assert bodies(cloud) == [(1, (11,), None)]
    assert cloud.stream_room(1) == 3


@pytest.mark.parametrize(
    ("frame", "code"),
    [(ack(3), "ack_ahead"), (tensor(MsgType.STEP, ids([7]), 1, seq=2, pos=4), "step_pending")],
)
def test_impossible_messages_while_generating(frame: Frame, code: str) -> None:
    cloud = generating()
    cloud.stream_tokens(1, [11])
    assert failure(feed(cloud, frame)).error.code == code


def test_credit_from_the_edge_belongs_to_streams() -> None:
    cloud = greeted()
    active(cloud)
    assert failure(feed(cloud, ack(0))).error.code == "unexpected_credit"


def test_engine_may_not_stream_past_max_tokens_or_after_the_end() -> None:
    cloud = generating(100)
    with pytest.raises(SequenceError, match="up to token 9 of 8"):
        cloud.stream_tokens(1, [1] * 8)
    cloud.stream_tokens(1, [1] * 7, finish="length")
    with pytest.raises(SequenceError):
        cloud.stream_tokens(1, [1])


def test_first_token_may_be_the_last() -> None:
    cloud = greeted()
    active(cloud, split=0)
    feed(cloud, tensor(MsgType.STEP, ids([1, 2, 3, 4]), 4, seq=1, pos=0, flags=Flag.FINAL))
    cloud.result_tokens(1, [10], kv_len=4, finish="stop")
    with pytest.raises(SequenceError):
        cloud.stream_tokens(1, [11])


# ---- ending


def test_cancel_and_close_are_idempotent() -> None:
    cloud = greeted()
    active(cloud)
    feed(cloud, step(3, seq=1, pos=0))
    close = control(MsgType.CLOSE, f'{{"offer":{{"entries":[[3,"{3:032x}"]]}}}}')
    (event,) = feed(cloud, close)
    assert isinstance(event, CloseRequested)
    assert feed(cloud, close) == []
    assert feed(cloud, CANCEL_LINE.frame) == []
    assert feed(cloud, step(1, seq=2, pos=3)) == []
    assert feed(cloud, ack(9)) == []
    cloud.closed(1, pages_freed=2, kv_len=3, cached=True)
    assert [f.type for f in sent(cloud)] == [MsgType.CLOSED]
    for frame in (CANCEL_LINE.frame, close, step(1, seq=2, pos=3)):
        assert feed(cloud, frame) == []
    assert not cloud.has_data


def test_close_cannot_offer_rows_that_were_never_sent() -> None:
    cloud = greeted()
    active(cloud)
    feed(cloud, step(3, seq=1, pos=0))
    close = control(MsgType.CLOSE, f'{{"offer":{{"entries":[[4,"{4:032x}"]]}}}}')
    assert failure(feed(cloud, close)).error.code == "bad_offer"


def test_cancel_before_the_engine_answered() -> None:
    cloud = greeted()
    feed(cloud, open_frame())
    assert feed(cloud, CANCEL_LINE.frame) == [CancelRequested(1)]
    cloud.opened(1, session_id=SESSION_ID)
    assert cloud.sessions[1].state is CloudState.CLOSING
    assert not cloud.has_data


def test_lost_connection_ends_each_session_and_returns_its_quota() -> None:
    usage = TenantUsage.from_limits(LIMITS)
    cloud = greeted(usage=usage)
    active(cloud, 1)
    active(cloud, 2)
    events = cloud.lost()
    assert [type(e) for e in events] == [SessionFailed, SessionFailed, ConnectionFailed]
    assert (usage.num_sessions, usage.kv_bytes) == (0, 0)
    assert cloud.lost() == []
    assert cloud.fail_connection(ProtocolError("late")) == []
    cloud.status(Load())
    cloud.go_away(1.0)
    cloud.canary_result(1, 1, ok=True, error=0.0, tolerance=0.1)
    assert not cloud.has_data


def test_fatal_error_from_the_edge_ends_everything() -> None:
    cloud = greeted()
    active(cloud)
    text = '{"kind":"protocol","code":"c","message":"m","fatal":true}'
    events = feed(cloud, control(MsgType.ERROR, text, stream=0, epoch=0))
    assert [type(e) for e in events] == [SessionFailed, ConnectionFailed]
    assert not cloud.has_data

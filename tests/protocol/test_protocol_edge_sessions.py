"""The edge's sessions: what it believes of a cloud, what it refuses, and how a session ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from isthmus.protocol.activations import RowFormat
from isthmus.protocol.errors import (
    CloudLostError,
    OverloadedError,
    RequestError,
    SequenceError,
)
from isthmus.protocol.events import (
    ConnectionFailed,
    CreditGranted,
    ResultTokens,
    SessionClosed,
    SessionFailed,
    StreamTokens,
)
from isthmus.protocol.frames import Frame, MsgType
from isthmus.protocol.states import EdgeState
from tests.protocol.edge_side import feed, offloaded, result, sent, started, stream, welcomed
from tests.protocol.pairing import (
    encoded,
    make_open,
    offer,
)
from tests.protocol.transcript_lines import (
    CLOSED_LINE,
    ERROR_DOWN,
    ERROR_UP,
    OPENED_LINE,
    WRONG_RESULT,
    control,
    tensor,
)

# ---- receiving in a session


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (result(0, 5, seq=2, pos=4), "unexpected_result"),
        (result(0, 5, seq=1, pos=3), "bad_kv_len"),
        (result(1, 5, seq=1, pos=4), "bad_output_index"),
        (result(0, 100, seq=1, pos=4), "bad_token_id"),
        (control(MsgType.RESULT, '{"first_index":0,"tokens":[5,6]}', seq=1, pos=4), "bad_output_index"),
        (control(MsgType.RESULT, '{"first_index":0,"tokens":[]}', seq=1, pos=4), "bad_output_index"),
        (tensor(MsgType.RESULT, encoded(1), 1, seq=1, pos=4), "bad_dtype"),
        (control(MsgType.STREAM, '{"first_index":0,"tokens":[5]}'), "wrong_state"),
        (control(MsgType.CLOSED, "{}"), "wrong_state"),
        (control(MsgType.CREDIT, '{"tokens":1}'), "bad_message"),
        (OPENED_LINE.frame, "wrong_state"),
        (control(MsgType.OPEN, "{}"), "unexpected_message"),
        (control(MsgType.RESUMED, "{}"), "bad_message"),
        (control(MsgType.CLOSE, "{}"), "unexpected_message"),
        (replace(result(0, 5, seq=1, pos=4), epoch=2), "epoch_ahead"),
    ],
)
def test_wrong_message_fails_only_its_session(frame: Frame, code: str) -> None:
    edge = welcomed()
    session = started(edge)
    other = started(edge)
    session.step_rows(encoded(4), 0, 4, final=True)
    other.step_rows(encoded(4), 0, 4, final=True)
    edge.data_to_send()
    (event,) = feed(edge, frame)
    assert isinstance(event, SessionFailed)
    assert (event.stream, event.error.code) == (1, code)
    assert session.state is EdgeState.CLOSED
    (error,) = sent(edge)
    assert (error.type, error.stream) == (MsgType.ERROR, 1)
    assert feed(edge, result(0, 5, seq=1, pos=4)) == []  # late frames of the dead session
    assert feed(edge, result(0, 5, seq=1, pos=4, stream=2)) == [ResultTokens(2, 1, 4, 0, (5,))]


def test_error_frames_are_golden_in_both_directions() -> None:
    edge = welcomed()
    session = edge.open(make_open())
    edge.data_to_send()
    (event,) = feed(edge, ERROR_DOWN)
    assert isinstance(event, SessionFailed)
    assert isinstance(event.error, OverloadedError)
    assert (event.error.code, event.error.message, event.error.hint) == ("kv_full", "no page free", "later")
    assert event.error.retry_after_s == 2.0
    assert session.state is EdgeState.CLOSED
    assert not edge.has_data  # the cloud knows

    edge = welcomed()
    started(edge)
    feed(edge, WRONG_RESULT)
    assert sent(edge) == [ERROR_UP]


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (tensor(MsgType.RESULT, encoded(2), 2, seq=1, pos=4), "bad_output_rows"),
        (tensor(MsgType.RESULT, encoded(1, 0, RowFormat.BF16), 1, seq=1, pos=4), "bad_dtype"),
        (result(0, 5, seq=1, pos=4), "bad_dtype"),
    ],
)
def test_wrong_rows_in_the_u_shape(frame: Frame, code: str) -> None:
    edge = welcomed()
    session = started(edge, make_open(shape="u"))
    session.step_rows(encoded(4), 0, 4, final=True)
    (event,) = feed(edge, frame)
    assert isinstance(event, SessionFailed)
    assert event.error.code == code


def test_wrong_hidden_size_in_the_u_shape() -> None:
    edge = welcomed()
    started(edge, make_open(shape="u")).step_rows(encoded(4), 0, 4, final=True)
    frame = tensor(MsgType.RESULT, encoded(1), 1, seq=1, pos=4)
    (event,) = feed(edge, frame, raw_len=28, body=frame.body[:28])
    assert isinstance(event, SessionFailed)
    assert event.error.code == "bad_length"


def test_repeated_result_is_reported_once() -> None:
    edge = welcomed()
    session = started(edge)
    session.step_rows(encoded(4), 0, 4, final=True)
    assert feed(edge, result(0, 5, seq=1, pos=4)) == [ResultTokens(1, 1, 4, 0, (5,))]
    assert feed(edge, result(0, 5, seq=1, pos=4)) == []
    session.step_rows(encoded(1, 4), 4, 1, final=True)
    assert feed(edge, result(0, 5, seq=1, pos=4)) == []
    assert session.awaiting_result
    assert feed(edge, result(1, 6, seq=2, pos=5)) == [ResultTokens(1, 2, 5, 1, (6,))]


def test_stale_epoch_is_dropped_and_says_nothing() -> None:
    edge = welcomed()
    session = started(edge)
    session.step_rows(encoded(4), 0, 4, final=True)
    edge.data_to_send()
    assert feed(edge, result(0, 5, seq=1, pos=4), epoch=0) == []
    assert session.awaiting_result
    assert not edge.has_data


def test_unknown_stream_is_answered_and_harms_nobody() -> None:
    edge = welcomed()
    session = started(edge)
    assert feed(edge, result(0, 5, seq=1, pos=4, stream=7)) == []
    (error,) = sent(edge)
    assert (error.type, error.stream) == (MsgType.ERROR, 7)
    assert session.can_send(1)


def test_stream_reports_each_index_once_whatever_is_repeated() -> None:
    edge, session = offloaded()
    assert feed(edge, stream(1, [11, 12], pos=6)) == [StreamTokens(1, 1, (11, 12))]
    assert feed(edge, stream(1, [11, 12], pos=6)) == []
    assert feed(edge, stream(2, [12, 13], pos=7)) == [StreamTokens(1, 3, (13,))]
    assert session.next_index == 4
    assert session.kv_len == 7
    assert not session.can_send(1)
    assert feed(edge, stream(4, [], pos=7, finish='"length"')) == [StreamTokens(1, 4, (), finish="length")]
    assert feed(edge, stream(4, [], pos=7, finish='"length"')) == []
    assert not session.awaiting_result


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (stream(2, [12], pos=6), "token_gap"),
        (stream(1, [11], pos=6), "bad_kv_len"),
        (stream(1, [11] * 8, pos=12), "bad_kv_len"),
        (stream(1, [100], pos=5), "bad_token_id"),
        (result(1, 11, seq=2, pos=5), "unexpected_result"),
    ],
)
def test_wrong_stream_fails_the_session(frame: Frame, code: str) -> None:
    edge, session = offloaded()
    (event,) = feed(edge, frame)
    assert isinstance(event, SessionFailed)
    assert event.error.code == code
    assert session.state is EdgeState.CLOSED


def test_stream_after_the_end_is_an_error() -> None:
    edge, _ = offloaded()
    feed(edge, stream(1, [11], pos=5, finish='"stop"'))
    (event,) = feed(edge, stream(2, [12], pos=6))
    assert isinstance(event, SessionFailed)
    assert event.error.code == "unexpected_stream"


def test_credit_is_cumulative() -> None:
    edge = welcomed()
    session = started(edge)
    session.step_rows(encoded(3), 0, 3, final=False)
    assert session.credits == 2045
    credit = control(MsgType.CREDIT, '{"rows":2050}')
    assert feed(edge, credit) == [CreditGranted(1, 2047)]
    assert feed(edge, credit) == [CreditGranted(1, 2047)]
    assert feed(edge, control(MsgType.CREDIT, '{"rows":2049}')) == [CreditGranted(1, 2047)]


# ---- ending


def test_cancel_drops_unsent_steps_and_crossed_results() -> None:
    edge = welcomed()
    session = started(edge)
    session.step_rows(encoded(3), 0, 3, final=False)
    edge.data_to_send()
    session.step_rows(encoded(1, 3), 3, 1, final=True)
    session.cancel()
    session.cancel()
    session.close(offer(2))
    assert [f.type for f in sent(edge)] == [MsgType.CANCEL]
    with pytest.raises(SequenceError):
        session.step_rows(encoded(1, 4), 4, 1, final=True)
    assert not session.can_send(1)
    for crossed in (result(0, 5, seq=2, pos=4), control(MsgType.CREDIT, '{"rows":2050}')):
        assert feed(edge, crossed) == []
    (event,) = feed(edge, CLOSED_LINE.frame)
    assert isinstance(event, SessionClosed)
    assert edge.sessions == {}
    session.cancel()
    session.close()
    assert not edge.has_data


def test_cancel_before_opened_drops_the_opened_that_crosses() -> None:
    edge = welcomed()
    session = edge.open(make_open())
    session.step_rows(encoded(4), 0, 4, final=True)
    session.cancel()
    assert [f.type for f in sent(edge)] == [MsgType.OPEN, MsgType.CANCEL]
    assert feed(edge, OPENED_LINE.frame) == []
    assert session.state is EdgeState.CLOSING


def test_close_keeps_queued_steps_and_checks_its_offer() -> None:
    edge = welcomed()
    session = started(edge)
    session.step_rows(encoded(3), 0, 3, final=False)
    with pytest.raises(RequestError, match="names 4 rows, the cloud holds 3"):
        session.close(offer(4))
    session.close(offer(3), "done")
    session.cancel()
    assert [f.type for f in sent(edge)] == [MsgType.STEP, MsgType.CLOSE]


def test_malformed_closed_fails_the_session() -> None:
    edge = welcomed()
    started(edge).cancel()
    (event,) = feed(edge, control(MsgType.CLOSED, '{"pages":1}'))
    assert isinstance(event, SessionFailed)
    assert edge.sessions == {}


def test_fatal_error_from_the_cloud_ends_everything_without_an_answer() -> None:
    edge = welcomed()
    started(edge)
    started(edge)
    text = '{"kind":"protocol","code":"edge_silent","message":"m","fatal":true}'
    events = feed(edge, control(MsgType.ERROR, text, stream=0, epoch=0))
    assert [type(e) for e in events] == [SessionFailed, SessionFailed, ConnectionFailed]
    assert edge.is_closed
    assert not edge.has_data
    with pytest.raises(SequenceError, match="is closed, not open"):
        edge.open(make_open())


def test_wrong_type_on_stream_0_ends_everything() -> None:
    for frame in (Frame(MsgType.PING), control(MsgType.HELLO, "{}", stream=0, epoch=0)):
        edge = welcomed()
        events = feed(edge, frame)
        assert isinstance(events[-1], ConnectionFailed)


def test_lost_socket_fails_each_session_once() -> None:
    edge = welcomed()
    session = started(edge)
    events = edge.lost()
    assert [type(e) for e in events] == [SessionFailed, ConnectionFailed]
    assert isinstance(events[0], SessionFailed)
    assert isinstance(events[0].error, CloudLostError)
    assert session.state is EdgeState.CLOSED
    assert edge.lost(CloudLostError("again")) == []

    edge = welcomed()
    session = started(edge)
    edge.close()
    assert session.state is EdgeState.CLOSED
    assert edge.is_closed
    assert edge.fail_connection(SequenceError("late")) == []

"""The edge's end alone: golden transcripts played from the cloud's side, handshake, opening, sending."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from isthmus.protocol.activations import RowFormat
from isthmus.protocol.edge_connection import EdgeConnection
from isthmus.protocol.errors import (
    CodecError,
    FrameError,
    IsthmusError,
    OverloadedError,
    RejectedError,
    RequestError,
    SequenceError,
)
from isthmus.protocol.events import (
    CanaryDone,
    ConnectionFailed,
    Rejected,
    SessionFailed,
)
from isthmus.protocol.frames import HEADER_BYTES, Frame, MsgType, encode_frame, json_frame
from isthmus.protocol.handshake import answer_hello
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import Load, Open, Reject, Welcome
from isthmus.protocol.states import EdgeState
from tests.protocol.edge_side import feed, play, result, sent, started, welcomed
from tests.protocol.pairing import (
    HELLO,
    HIDDEN,
    INFO,
    LIMITS,
    OTHER_WEIGHTS,
    SESSION_ID,
    encoded,
    make_open,
    offer,
    rows,
)
from tests.protocol.transcript_lines import OPENED_LINE, Transcript, control
from tests.protocol.transcripts import TRANSCRIPTS

# ---- golden transcripts


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda t: t.name)
def test_transcript(transcript: Transcript) -> None:
    edge = play(transcript)
    assert not edge.has_data
    assert not edge.is_closed


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda t: t.name)
def test_transcript_with_trailing_data_or_cut_short(transcript: Transcript) -> None:
    """Each message in its place, with a byte too many, a byte too few, and as text: the connection ends."""
    for number, line in enumerate(transcript.lines):
        if line.sender != "cloud":
            continue
        message = encode_frame(line.frame)
        for broken in (
            message + b"\0",
            message[:-1],
            message[: HEADER_BYTES - 1],
            b"",
            message.decode("latin1"),
        ):
            edge = play(transcript, number)
            live = list(edge.sessions)
            *failed, last = edge.receive(broken, 1.0)
            assert isinstance(last, ConnectionFailed)
            assert isinstance(last.error, FrameError)
            assert failed == [SessionFailed(stream, last.error) for stream in live]
            assert [f.type for f in sent(edge)] == [MsgType.ERROR]
            assert edge.is_closed
            assert edge.receive(message, 1.0) == []


# ---- handshake


def test_messages_before_welcome_end_the_connection() -> None:
    for frame in (OPENED_LINE.frame, control(MsgType.STATUS, "{}", stream=0, epoch=0), Frame(MsgType.PONG)):
        edge = EdgeConnection(HELLO)
        edge.start(0.0)
        (event,) = feed(edge, frame)
        assert isinstance(event, ConnectionFailed)
        assert event.error.code == "wrong_state"


def test_start_twice_and_use_before_welcome_are_refused() -> None:
    edge = EdgeConnection(HELLO)
    for call in (lambda: edge.open(make_open()), lambda: edge.canary(1, rows(1))):
        with pytest.raises(SequenceError, match="is idle, not open"):
            call()
    edge.start(0.0)
    with pytest.raises(SequenceError):
        edge.start(0.0)


def test_welcome_twice_ends_the_connection() -> None:
    edge = welcomed()
    assert edge.welcome is not None
    (event,) = feed(edge, json_frame(MsgType.WELCOME, edge.welcome))
    assert isinstance(event, ConnectionFailed)


def test_reject_is_reported_and_final() -> None:
    edge = EdgeConnection(HELLO)
    edge.start(0.0)
    reject = Reject(code="model_mismatch", message="other", hint="same", retry_after_s=3.0)
    (event,) = feed(edge, json_frame(MsgType.REJECT, reject))
    assert isinstance(event, Rejected)
    assert (event.error.code, event.error.retry_after_s) == ("model_mismatch", 3.0)
    assert edge.is_closed
    assert edge.on_tick(9.0) == []
    assert edge.lost() == []


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"version": 2}, "version 2, this edge speaks 1"),
        ({"match": "canary"}, "calls the models canary, they are equal"),
        ({"identity": OTHER_WEIGHTS}, "equal, they are canary: weights_hash"),
        ({"row_formats": ("f32", "fp4")}, "did not offer: fp4"),
    ],
)
def test_welcome_that_contradicts_hello_is_refused(changes: dict[str, Any], match: str) -> None:
    edge = EdgeConnection(HELLO)
    edge.start(0.0)
    good = answer_hello(HELLO, INFO, LIMITS, Load(), ())
    welcome = Welcome.model_validate(dict(good) | changes)
    (event,) = feed(edge, json_frame(MsgType.WELCOME, welcome))
    assert isinstance(event, ConnectionFailed)
    assert isinstance(event.error, RejectedError)
    assert match in str(event.error)


# ---- opening


@pytest.mark.parametrize(
    ("changes", "error", "code"),
    [
        ({"split": 4}, RequestError, "bad_split"),
        ({"row_format": "fp4"}, RequestError, "bad_row_format"),
        ({"split": 0, "outliers": (1,)}, CodecError, "bad_outliers"),
        ({"row_format": "int8o", "outliers": (8,)}, CodecError, "bad_outliers"),
        ({"row_format": "int8o", "outliers": (1, 1)}, CodecError, "bad_outliers"),
        ({"max_context": 513}, RequestError, "too_many_tokens"),
        ({"max_tokens": 61}, RequestError, "too_many_tokens"),
        ({"offer": offer(5)}, RequestError, "bad_offer"),
        ({"end_ids": (100,)}, RequestError, "bad_token_id"),
    ],
)
def test_open_is_checked_before_anything_is_sent(
    changes: dict[str, Any], error: type[IsthmusError], code: str
) -> None:
    edge = welcomed()
    with pytest.raises(error) as caught:
        edge.open(make_open(**changes))
    assert caught.value.code == code
    assert not edge.has_data
    assert edge.open(make_open()).stream == 1


def test_open_respects_session_limit_message_size_and_drain() -> None:
    edge = welcomed(Limits(max_sessions=1, max_control_bytes=1500))
    with pytest.raises(RequestError, match="the cloud takes 1500") as caught:
        edge.open(make_open(request_id="r" * 256, end_ids=(99,) * 256, offer=offer(*range(1, 5))))
    assert caught.value.code == "too_large"
    edge.open(make_open())
    with pytest.raises(OverloadedError, match="1 sessions are open, the cloud allows 1"):
        edge.open(make_open())
    feed(edge, control(MsgType.GOAWAY, '{"deadline_s":1.0}', stream=0, epoch=0))
    with pytest.raises(OverloadedError) as draining:
        edge.open(make_open())
    assert draining.value.code == "draining"


def test_stream_ids_count_upwards_and_run_out() -> None:
    edge = welcomed()
    assert [edge.open(make_open()).stream for _ in range(3)] == [1, 2, 3]
    edge._next_stream = 2**32 - 1
    assert edge.open(make_open()).stream == 2**32 - 1
    with pytest.raises(OverloadedError) as caught:
        edge.open(make_open())
    assert caught.value.code == "streams_used_up"


@pytest.mark.parametrize(
    ("request_", "body", "code"),
    [
        (make_open(), '"cached_rows":1,"credits":2048', "bad_cached_rows"),
        (make_open(offer=offer(2)), '"cached_rows":3,"credits":2048', "bad_cached_rows"),
        (make_open(offer=offer(4)), '"cached_rows":4,"credits":2048', "bad_cached_rows"),
        (make_open(), '"credits":2047', "bad_credits"),
        (make_open(), '"credits":0', "bad_message"),
    ],
)
def test_impossible_opened_fails_the_session(request_: Open, body: str, code: str) -> None:
    edge = welcomed()
    session = edge.open(request_)
    edge.data_to_send()
    (event,) = feed(edge, control(MsgType.OPENED, f'{{"session_id":"{SESSION_ID}",{body},"chunk_rows":512}}'))
    assert isinstance(event, SessionFailed)
    assert event.error.code == code
    assert session.state is EdgeState.CLOSED
    assert [f.type for f in sent(edge)] == [MsgType.ERROR]
    assert not edge.is_closed


# ---- sending steps


def test_offer_holds_steps_back_until_opened() -> None:
    edge = welcomed()
    session = edge.open(make_open(offer=offer(3)))
    assert (session.credits, session.can_send(1)) == (0, False)
    with pytest.raises(SequenceError):
        session.step_rows(encoded(1), 0, 1, final=False)
    feed(edge, OPENED_LINE.frame)
    assert (session.kv_len, session.can_send(4)) == (0, True)


@pytest.mark.parametrize(
    ("call", "error", "code"),
    [
        (lambda s: s.step_ids([1], 0, final=False), SequenceError, "bad_dtype"),
        (lambda s: s.step_rows(encoded(1), 1, 1, final=False), SequenceError, "bad_position"),
        (lambda s: s.step_rows(encoded(1), 1, 1, final=False, truncate=True), SequenceError, "bad_position"),
        (lambda s: s.step_rows(encoded(2), 0, 1, final=False), CodecError, "bad_length"),
        (lambda s: s.step_rows(encoded(1, 0, RowFormat.BF16), 0, 1, final=False), CodecError, "bad_dtype"),
        (lambda s: s.step_rows(encoded(9), 0, 9, final=False), FrameError, "too_many_rows"),
        (lambda s: s.step_rows(encoded(3), 0, 3, final=True), SequenceError, "bad_output_index"),
        (lambda s: s.step_rows(encoded(4), 0, 4, final=True, all_rows=True), SequenceError, None),
    ],
)
def test_wrong_step_raises_and_sends_nothing(call: Any, error: type[IsthmusError], code: str | None) -> None:
    edge = welcomed(Limits(max_rows_per_step=8))
    session = edge.open(make_open())
    edge.data_to_send()
    with pytest.raises(error) as caught:
        call(session)
    assert caught.value.code == (code or "all_rows_in_prefix_shape")
    assert not edge.has_data
    assert session.step_rows(encoded(4), 0, 4, final=True) == 1


def test_rows_at_split_0_and_context_overflow_are_refused() -> None:
    edge = welcomed()
    session = edge.open(make_open(split=0, shape="u", max_context=12, max_tokens=8))
    with pytest.raises(SequenceError, match="takes token ids"):
        session.step_rows(encoded(1), 0, 1, final=False)
    session.step_ids([1] * 10, 0, final=False)
    with pytest.raises(SequenceError, match="ends at row 13, the session was opened for 12") as caught:
        session.step_ids([1] * 3, 10, final=False)
    assert caught.value.code == "context_full"
    assert session.chunk_rows == 512


def test_a_step_larger_than_the_clouds_message_limit_is_refused_with_the_rows_that_fit() -> None:
    limits = Limits(max_message_bytes=4096, max_control_bytes=4000)
    edge = welcomed(limits)
    session = edge.open(make_open(max_tokens=1, prompt_tokens=200, max_context=300))
    fits = (4096 - HEADER_BYTES) // (4 * HIDDEN)
    assert session.chunk_rows == fits
    assert not session.can_send(fits + 1)
    with pytest.raises(FrameError, match=f"send at most {fits} rows"):
        session.step_rows(encoded(fits + 1), 0, fits + 1, final=False)
    assert session.step_rows(encoded(fits), 0, fits, final=False) == 1


def test_opened_may_ask_for_smaller_chunks() -> None:
    edge = welcomed()
    session = edge.open(make_open())
    feed(
        edge,
        control(MsgType.OPENED, f'{{"session_id":"{SESSION_ID}","credits":4096,"chunk_rows":7}}'),
    )
    assert (session.chunk_rows, session.credits) == (7, 4096)
    assert not session.can_send(8)
    assert not session.can_send(0)


def test_truncating_below_an_emitted_token_cannot_ask_for_it_again() -> None:
    edge = welcomed()
    session = started(edge)
    session.step_rows(encoded(4), 0, 4, final=True)
    feed(edge, result(0, 5, seq=1, pos=4))
    with pytest.raises(SequenceError, match="token 0 again; the next one is 1") as caught:
        session.step_rows(encoded(1, 3), 3, 1, final=True, truncate=True)
    assert caught.value.code == "index_emitted"
    session.step_rows(encoded(1, 3), 3, 1, final=False, truncate=True)
    assert session.step_rows(encoded(1, 4), 4, 1, final=True) == 3
    assert session.next_index == 1


# ---- canary


def test_canary_gates_splits_of_other_weights() -> None:
    hello = HELLO.model_copy(update={"identity": OTHER_WEIGHTS})
    edge = welcomed(hello=hello, passed=(3,))
    assert [edge.needs_canary(k) for k in (0, 1, 2, 3)] == [False, True, True, False]
    with pytest.raises(RejectedError, match="split 1 needs a canary"):
        edge.open(make_open(split=1))
    edge.open(make_open(split=0))
    edge.open(make_open(split=3))
    edge.canary(1, rows(4))
    edge.canary(2, rows(4))
    for seq, (split, ok) in enumerate(((1, "true"), (2, "false")), 1):
        text = f'{{"split":{split},"ok":{ok},"error":0.0,"tolerance":0.1}}'
        (event,) = feed(edge, control(MsgType.CANARY_RESULT, text, stream=0, epoch=0, seq=seq))
        assert isinstance(event, CanaryDone)
        assert event.result.split == split
    assert [edge.needs_canary(k) for k in (1, 2)] == [False, True]
    assert edge.open(make_open(split=1)).stream == 3


@pytest.mark.parametrize("seq", [0, 2, 3])
def test_canary_result_out_of_turn_ends_the_connection(seq: int) -> None:
    edge = welcomed()
    edge.canary(1, rows(4))
    text = '{"split":1,"ok":true,"error":0.0,"tolerance":0.1}'
    (event,) = feed(edge, control(MsgType.CANARY_RESULT, text, stream=0, epoch=0, seq=seq))
    assert isinstance(event, ConnectionFailed)
    assert event.error.code == "unexpected_canary_result"


def test_canaries_are_few_and_well_shaped() -> None:
    edge = welcomed()
    with pytest.raises(CodecError):
        edge.canary(1, np.zeros((2, HIDDEN + 1), np.float32))
    for _ in range(8):
        edge.canary(1, rows(2))
    with pytest.raises(OverloadedError) as caught:
        edge.canary(1, rows(2))
    assert caught.value.code == "canaries_pending"

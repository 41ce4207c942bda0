"""The cloud's end alone: golden transcripts played from the edge's side, handshake, opening, canary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from isthmus.protocol.activations import RowFormat
from isthmus.protocol.cloud_connection import CanaryCache, CloudConnection
from isthmus.protocol.errors import (
    CodecError,
    FrameError,
    OverloadedError,
    RejectedError,
    RequestError,
    SequenceError,
)
from isthmus.protocol.events import (
    CanaryRequested,
    ConnectionFailed,
    SessionDetached,
    SessionFailed,
    SessionOpenRequested,
    StepReceived,
)
from isthmus.protocol.frames import (
    HEADER_BYTES,
    Flag,
    Frame,
    MsgType,
    encode_frame,
    json_frame,
    parse_json,
)
from isthmus.protocol.limits import TenantUsage
from isthmus.protocol.messages import (
    ErrorBody,
    Hello,
    Load,
    Reject,
    Welcome,
)
from isthmus.protocol.states import CloudState
from tests.protocol.cloud_side import (
    active,
    failure,
    feed,
    fresh,
    greeted,
    open_frame,
    play,
    sent,
    step,
)
from tests.protocol.pairing import (
    HELLO,
    IDENTITY,
    INFO,
    LIMITS,
    OTHER_WEIGHTS,
    SESSION_ID,
    encoded,
    offer,
)
from tests.protocol.transcript_lines import (
    BUSY,
    CANCEL_LINE,
    ERROR_DOWN,
    ERROR_UP,
    Transcript,
    control,
    tensor,
)
from tests.protocol.transcripts import TRANSCRIPTS

# ---- golden transcripts


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda t: t.name)
def test_transcript(transcript: Transcript) -> None:
    cloud = play(transcript)
    assert not cloud.has_data
    assert not cloud.is_closed


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda t: t.name)
def test_transcript_with_trailing_data_or_cut_short(transcript: Transcript) -> None:
    for number, line in enumerate(transcript.lines):
        if line.sender != "edge":
            continue
        message = encode_frame(line.frame)
        text = message.decode("latin1")
        for broken in (message + b"\0", message[:-1], message[: HEADER_BYTES - 1], b"", text):
            cloud = play(transcript, number)
            live = dict(cloud.sessions)
            *ended, last = cloud.receive(broken, 1.0)
            assert isinstance(last, ConnectionFailed)
            assert isinstance(last.error, FrameError)
            assert ended == [
                SessionDetached(stream, session)
                if session.state is CloudState.DETACHED
                else SessionFailed(stream, last.error)
                for stream, session in live.items()
            ]
            (error,) = sent(cloud)
            assert parse_json(error, ErrorBody).fatal
            assert cloud.is_closed
            assert cloud.receive(message, 1.0) == []


def test_error_frames_are_golden_in_both_directions() -> None:
    cloud = greeted()
    feed(cloud, open_frame())
    cloud.fail(1, BUSY)
    assert sent(cloud) == [ERROR_DOWN]
    cloud.fail(1, BUSY)
    assert not cloud.has_data

    cloud = greeted()
    active(cloud)
    event = failure(feed(cloud, ERROR_UP))
    assert isinstance(event.error, SequenceError)
    assert event.error.code == "unexpected_result"
    assert cloud.sessions == {}
    assert not cloud.has_data
    assert feed(cloud, ERROR_UP) == []


# ---- handshake


@pytest.mark.parametrize(
    ("hello", "code", "match"),
    [
        (HELLO.model_copy(update={"versions": (2, 3)}), "version_mismatch", "versions 2, 3, this cloud 1"),
        (
            HELLO.model_copy(
                update={"identity": IDENTITY.model_copy(update={"architecture": {"hidden": 9}})}
            ),
            "model_mismatch",
            "architecture.hidden",
        ),
        (HELLO.model_copy(update={"row_formats": ("fp4",)}), "no_row_format", "fp4 offered"),
        (HELLO.model_copy(update={"row_formats": ()}), "no_row_format", "none offered"),
    ],
)
def test_hello_that_cannot_be_met_is_rejected_with_its_reason(hello: Hello, code: str, match: str) -> None:
    cloud = fresh()
    (event,) = feed(cloud, json_frame(MsgType.HELLO, hello))
    assert isinstance(event, ConnectionFailed)
    assert isinstance(event.error, RejectedError)
    assert event.error.code == code
    (frame,) = sent(cloud)
    reject = parse_json(frame, Reject)
    assert (reject.code, match in reject.message) == (code, True)
    assert cloud.is_closed
    assert cloud.on_tick(99.0) == []


def test_a_server_that_is_full_or_drains_answers_hello_with_its_refusal() -> None:
    full = RejectedError("full", code="capacity", retry_after_s=7.0)
    cloud = fresh(refusal=full)
    assert feed(cloud, json_frame(MsgType.HELLO, HELLO)) == [ConnectionFailed(full)]
    assert parse_json(sent(cloud)[0], Reject).retry_after_s == 7.0


def test_welcome_tells_the_common_formats_and_the_load() -> None:
    cloud = fresh(load=Load(queue=3))
    feed(cloud, json_frame(MsgType.HELLO, HELLO.model_copy(update={"row_formats": ("bf16", "f32", "x")})))
    welcome = parse_json(sent(cloud)[0], Welcome)
    assert welcome.row_formats == ("f32", "bf16")
    assert welcome.load.queue == 3


@pytest.mark.parametrize(
    "frame",
    [open_frame(), step(1, seq=1, pos=0), Frame(MsgType.PING, seq=1), CANCEL_LINE.frame],
    ids=lambda f: f.type.name,
)
def test_anything_before_hello_ends_the_connection(frame: Frame) -> None:
    cloud = fresh()
    (event,) = feed(cloud, frame)
    assert isinstance(event, ConnectionFailed)
    assert isinstance(event.error, SequenceError)
    assert [f.type for f in sent(cloud)] == [MsgType.ERROR]


def test_hello_twice_ends_the_connection() -> None:
    cloud = greeted()
    active(cloud)
    *_, event = feed(cloud, json_frame(MsgType.HELLO, HELLO))
    assert isinstance(event, ConnectionFailed)
    assert event.error.code == "hello_twice"


def test_malformed_hello_ends_the_connection() -> None:
    cloud = fresh()
    (event,) = feed(cloud, control(MsgType.HELLO, '{"versions":[1]}', stream=0, epoch=0))
    assert isinstance(event, ConnectionFailed)
    assert event.error.code == "bad_message"


def test_hello_must_come_in_time() -> None:
    cloud = CloudConnection(INFO, LIMITS, tenant="t", now=100.0)
    assert cloud.on_tick(104.9) == []
    (event,) = cloud.on_tick(105.0)
    assert isinstance(event, ConnectionFailed)
    assert event.error.code == "hello_timeout"
    assert parse_json(sent(cloud)[0], Reject).code == "hello_timeout"


def test_messages_for_the_other_side_end_the_connection_or_the_session() -> None:
    cloud = greeted()
    active(cloud)
    for msg_type in (MsgType.OPENED, MsgType.RESULT, MsgType.STREAM, MsgType.CLOSED, MsgType.RESUMED):
        cloud = greeted()
        active(cloud)
        assert failure(feed(cloud, control(msg_type, "{}"))).error.code == "unexpected_message"
        assert not cloud.is_closed
    for frame in (Frame(MsgType.PONG), control(MsgType.WELCOME, "{}", stream=0, epoch=0)):
        cloud = greeted()
        assert isinstance(feed(cloud, frame)[-1], ConnectionFailed)


# ---- opening


@pytest.mark.parametrize(
    ("changes", "error", "code"),
    [
        ({"split": 4}, RequestError, "bad_split"),
        ({"row_format": "fp4"}, RequestError, "bad_row_format"),
        ({"row_format": "int8o", "outliers": (8,)}, CodecError, "bad_outliers"),
        ({"max_context": 513}, RequestError, "too_many_tokens"),
        ({"max_tokens": 61}, RequestError, "too_many_tokens"),
        ({"offer": offer(5)}, RequestError, "bad_offer"),
    ],
)
def test_refused_open_leaves_nothing_behind(changes: dict[str, Any], error: type, code: str) -> None:
    usage = TenantUsage.from_limits(LIMITS)
    cloud = greeted(usage=usage)
    assert feed(cloud, open_frame(**changes)) == []
    assert feed(cloud, step(4, seq=1, pos=0, flags=Flag.FINAL)) == []  # was pipelined behind it
    (answer,) = sent(cloud)
    refusal = parse_json(answer, ErrorBody).to_error()
    assert isinstance(refusal, error)
    assert refusal.code == code
    assert (usage.num_sessions, usage.kv_bytes, cloud.sessions) == (0, 0, {})
    active(cloud, 2)


def test_malformed_open_and_wrong_epoch_fail_only_that_stream() -> None:
    cloud = greeted()
    active(cloud)
    assert feed(cloud, control(MsgType.OPEN, '{"split":"one"}', stream=2)) == []
    assert feed(cloud, open_frame(3), epoch=2) == []
    assert [(f.type, f.stream) for f in sent(cloud)] == [(MsgType.ERROR, 2), (MsgType.ERROR, 3)]
    assert list(cloud.sessions) == [1]


def test_stream_ids_are_never_reused() -> None:
    cloud = greeted()
    active(cloud, 5)
    feed(cloud, CANCEL_LINE.frame, stream=5)
    cloud.closed(5)
    sent(cloud)
    for stream in (5, 3):
        assert feed(cloud, open_frame(stream)) == []
        assert parse_json(sent(cloud)[0], ErrorBody).code == "stream_reused"
    active(cloud, 6)
    assert failure(feed(cloud, open_frame(6))).error.code == "stream_reused"


def test_engine_may_refuse_and_pipelined_steps_are_dropped() -> None:
    cloud = greeted()
    feed(cloud, open_frame())
    assert isinstance(feed(cloud, step(3, seq=1, pos=0))[0], StepReceived)
    cloud.fail(1, OverloadedError("no pages", code="kv_full"))
    assert feed(cloud, step(1, seq=2, pos=3, flags=Flag.FINAL)) == []
    cloud.opened(1, session_id=SESSION_ID)
    cloud.credit(1, 3)
    assert [f.type for f in sent(cloud)] == [MsgType.ERROR]


@pytest.mark.parametrize(
    "answer",
    [{"cached_rows": 1}, {"credits": 5}],
)
def test_engine_that_claims_what_was_not_offered_is_a_bug_here(answer: dict[str, Any]) -> None:
    cloud = greeted()
    feed(cloud, open_frame())
    with pytest.raises(SequenceError) as caught:
        cloud.opened(1, session_id=SESSION_ID, **answer)
    assert caught.value.code == "bad_opened"


def test_step_before_opened_needs_an_empty_offer() -> None:
    cloud = greeted()
    feed(cloud, open_frame(offer=offer(2)))
    assert failure(feed(cloud, step(4, seq=1, pos=0))).error.code == "offer_pending"


# ---- canary


def test_canary_is_asked_once_per_weights_and_split() -> None:
    cache: CanaryCache = {}
    hello = HELLO.model_copy(update={"identity": OTHER_WEIGHTS})
    cloud = greeted(hello=hello, canaries=cache)
    assert feed(cloud, open_frame(1)) == []
    assert parse_json(sent(cloud)[0], ErrorBody).code == "canary_required"
    assert isinstance(feed(cloud, open_frame(2, split=0))[0], SessionOpenRequested)
    frame = tensor(MsgType.CANARY, encoded(4), 4, seq=1, pos=1, stream=0)
    assert feed(cloud, frame) == [CanaryRequested(1, 1, frame)]
    with pytest.raises(SequenceError):
        cloud.canary_result(1, 2, ok=True, error=0.0, tolerance=0.1)
    cloud.canary_result(1, 1, ok=True, error=0.01, tolerance=0.1)
    assert isinstance(feed(cloud, open_frame(3))[0], SessionOpenRequested)
    feed(cloud, replace(frame, seq=2, pos=2))
    cloud.canary_result(2, 2, ok=False, error=0.5, tolerance=0.1)
    assert feed(cloud, open_frame(4, split=2)) == []

    again = fresh(canaries=cache)
    feed(again, json_frame(MsgType.HELLO, hello))
    assert parse_json(sent(again)[0], Welcome).canary_passed == (1,)
    assert isinstance(feed(again, open_frame(1))[0], SessionOpenRequested)


@pytest.mark.parametrize(
    "frame",
    [
        tensor(MsgType.CANARY, encoded(4), 4, seq=1, pos=0, stream=0),
        tensor(MsgType.CANARY, encoded(4), 4, seq=1, pos=4, stream=0),
        tensor(MsgType.CANARY, encoded(65), 65, seq=1, pos=1, stream=0),
        tensor(MsgType.CANARY, encoded(4), 4, seq=2, pos=1, stream=0),
        tensor(MsgType.CANARY, encoded(4, 0, RowFormat.BF16), 4, seq=1, pos=1, stream=0),
    ],
)
def test_bad_canary_ends_the_connection(frame: Frame) -> None:
    (event,) = feed(greeted(), frame)
    assert isinstance(event, ConnectionFailed)


def test_canary_flood_ends_the_connection() -> None:
    cloud = greeted()
    for seq in range(1, 9):
        assert feed(cloud, tensor(MsgType.CANARY, encoded(1), 1, seq=seq, pos=1, stream=0))
    (event,) = feed(cloud, tensor(MsgType.CANARY, encoded(1), 1, seq=9, pos=1, stream=0))
    assert isinstance(event, ConnectionFailed)
    assert event.error.code == "bad_canary"

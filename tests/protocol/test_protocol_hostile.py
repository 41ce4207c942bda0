"""How far an error reaches, and that whatever arrives becomes events: never an exception."""

from __future__ import annotations

import zlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.protocol.events import (
    CancelRequested,
    CloudEvent,
    ConnectionFailed,
    ResultTokens,
    SessionClosed,
    SessionFailed,
)
from isthmus.protocol.frames import (
    HEADER,
    Flag,
    Frame,
    MsgType,
    encode_frame,
)
from isthmus.protocol.limits import Limits, TenantUsage
from isthmus.protocol.messages import (
    Cancel,
    Load,
    Open,
)
from isthmus.protocol.sampling import SamplingParams
from isthmus.protocol.states import EdgeState
from isthmus.protocol.wire_types import Message
from tests.protocol.cloud_side import (
    active,
    feed,
    greeted,
    sent,
    step,
)
from tests.protocol.pairing import (
    LIMITS,
    connected,
    encoded,
    last_step,
    make_open,
    offer,
    opened,
    parse,
)
from tests.protocol.transcript_lines import control
from tests.protocol.transcripts import TRANSCRIPTS

# ---- scope of errors


def test_a_sessions_error_leaves_the_others_alone() -> None:
    pair = connected()
    sessions = [opened(pair) for _ in range(3)]
    for session in sessions:
        session.step_rows(encoded(4), 0, 4, final=True)
    pair.up()
    step = last_step(pair)
    (failed,) = pair.inject_up(replace(step, stream=2, seq=9))
    assert isinstance(failed, SessionFailed)
    pair.down()
    for stream in (1, 3):
        pair.cloud.result_tokens(stream, [stream], kv_len=4)
    assert [e.tokens for e in pair.down() if isinstance(e, ResultTokens)] == [(1,), (3,)]
    assert [s.state for s in sessions] == [EdgeState.DECODE, EdgeState.CLOSED, EdgeState.DECODE]


def test_a_connections_error_ends_all_of_it_on_both_ends() -> None:
    usage = TenantUsage.from_limits(LIMITS)
    pair = connected(usage=usage)
    opened(pair)
    opened(pair)
    events = pair.cloud.receive(b"garbage", 0.0)
    assert [type(e) for e in events] == [SessionFailed, SessionFailed, ConnectionFailed]
    events_down = pair.down()
    assert [type(e) for e in events_down] == [SessionFailed, SessionFailed, ConnectionFailed]
    assert (usage.num_sessions, pair.edge.has_data) == (0, False)


def test_cancel_races_result() -> None:
    pair = connected()
    session = opened(pair)
    session.step_rows(encoded(4), 0, 4, final=True)
    pair.up()
    pair.cloud.result_tokens(1, [1], kv_len=4)  # on its way down …
    session.cancel()  # … when the user gives up
    assert pair.up() == [CancelRequested(1)]
    assert pair.down() == []
    pair.cloud.closed(1, pages_freed=9)
    (closed,) = pair.down()
    assert isinstance(closed, SessionClosed)
    assert closed.closed.pages_freed == 9


# ---- whatever arrives: events, never an exception, and a connection that is open or closed for good

_MESSAGES = tuple(line.frame for transcript in TRANSCRIPTS for line in transcript.lines)
_FRAMES = st.builds(
    lambda frame, changes: replace(frame, **changes),
    st.sampled_from(_MESSAGES),
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(MsgType),
            "stream": st.integers(0, 3),
            "epoch": st.integers(0, 2),
            "seq": st.one_of(st.integers(0, 4), st.just(2**64 - 1)),
            "pos": st.one_of(st.integers(0, 8), st.just(2**32 - 1)),
            "n_tok": st.integers(0, 5),
            "flags": st.sampled_from([Flag.NONE, Flag.FINAL, Flag.ALL_ROWS, Flag.TRUNCATE]),
        },
    ),
)


def message_of(frame: Frame) -> bytes:
    """The frame with a right length and checksum, even where encode_frame would refuse to send it."""
    fields = (frame.type, frame.flags, frame.stream, frame.epoch, frame.seq, frame.pos, frame.n_tok)
    tail = (frame.dtype, frame.codec, frame.raw_len, len(frame.body), zlib.crc32(frame.body))
    return HEADER.pack(b"IS", 1, *fields, *tail) + frame.body


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(_FRAMES.map(message_of), st.binary(max_size=80), st.text(max_size=3)), max_size=12))
def test_hostile_messages_become_events_on_either_end(messages: list[bytes | str]) -> None:
    usage = TenantUsage.from_limits(LIMITS)
    pair = connected(usage=usage)
    session = opened(pair)
    session.step_rows(encoded(4), 0, 4, final=True)
    pair.edge.data_to_send()
    for end in (pair.edge, pair.cloud):
        for message in messages:
            before = end.is_closed
            events = end.receive(message, 0.0)
            assert isinstance(events, list)
            assert not before or events == []
            for reply in end.data_to_send():
                parse(reply)
        assert end.is_closed or end.on_tick(0.1) == []
    assert usage.num_sessions == len(pair.cloud.sessions)
    pair.cloud.lost()
    assert (usage.num_sessions, usage.kv_bytes) == (0, 0)


# ---- bounded under abuse


def test_ping_flood_is_answered_by_one_pong() -> None:
    cloud = greeted()
    for seq in range(10_000):
        feed(cloud, Frame(MsgType.PING, seq=seq))
    assert [(f.type, f.seq) for f in sent(cloud)] == [(MsgType.PONG, 9_999)]
    cloud.status(Load(queue=1))
    cloud.status(Load(queue=2))
    (status,) = sent(cloud)
    assert b'"queue":2' in status.body
    assert b'"echo":9999' in status.body


def test_edge_that_never_reads_is_given_up() -> None:
    cloud = greeted(Limits(max_outbox_bytes=10_000))
    now = 0.0
    for stream in range(1, 200):
        feed(cloud, step(1, seq=1, pos=0, stream=stream + 1000), now)
    (event,) = cloud.on_tick(0.1)
    assert isinstance(event, ConnectionFailed)
    assert event.error.code == "edge_not_reading"
    assert len(cloud.data_to_send()) == 1


def test_silent_edge_is_given_up() -> None:
    cloud = greeted()
    active(cloud)
    quiet: list[CloudEvent] = []
    now = 0.0
    while now < 14.5:
        now += 0.5
        quiet += cloud.on_tick(now)
    assert quiet == []
    feed(cloud, Frame(MsgType.PING, seq=1), now)
    assert cloud.on_tick(now + 0.5) == []
    events: list[CloudEvent] = []
    while not events:
        now += 0.5
        events = cloud.on_tick(now)
    assert now == pytest.approx(29.5)
    assert isinstance(events[-1], ConnectionFailed)
    assert events[-1].error.code == "edge_silent"


def test_oversized_messages_are_refused_before_they_are_parsed() -> None:
    cloud = greeted(Limits(max_message_bytes=2000, max_control_bytes=1000))
    (event,) = feed(cloud, control(MsgType.OPEN, '{"request_id":"' + "x" * 1000 + '"}'))
    assert isinstance(event, ConnectionFailed)
    assert event.error.code == "too_large"
    cloud = greeted(Limits(max_message_bytes=2000, max_control_bytes=1000))
    (event,) = cloud.receive(encode_frame(step(100, seq=1, pos=0)) + b"\0" * 4000, 0.0)
    assert isinstance(event, ConnectionFailed)


def test_every_control_body_is_small_enough_for_the_default_limit() -> None:
    longest = make_open(
        max_context=8192,
        prompt_tokens=8000,
        max_tokens=192,
        offer=offer(*range(16, 8000, 16)),
        context_ids=(99_999,) * 8000,
        sampling=SamplingParams(repetition_penalty=1.1),
        end_ids=(99_999,) * 256,
        request_id="r" * 256,
    )
    assert isinstance(longest, Open)
    for message in (longest, Cancel()):
        assert isinstance(message, Message)
        assert len(message.model_dump_json()) < LIMITS.max_control_bytes

"""The edge's heartbeat, driven by a clock of the test's own: round trips, dead peers, slow ones, sleep."""

from __future__ import annotations

import pytest

from isthmus.protocol.edge_connection import EdgeConnection
from isthmus.protocol.errors import (
    CloudTimeoutError,
)
from isthmus.protocol.events import (
    ConnectionFailed,
    EdgeEvent,
    RttMeasured,
    SessionFailed,
    SessionOpened,
)
from isthmus.protocol.frames import Frame, MsgType
from isthmus.protocol.pings import MAX_PINGS
from isthmus.protocol.states import EdgeState
from tests.protocol.edge_side import feed, sent, started, ticks, welcomed
from tests.protocol.pairing import (
    HELLO,
    encoded,
    make_open,
)
from tests.protocol.transcript_lines import OPENED_LINE, control

# ---- heartbeat


def test_silent_handshake_times_out() -> None:
    edge = EdgeConnection(HELLO)
    assert edge.on_tick(0.0) == []
    edge.start(10.0)
    assert edge.on_tick(14.9) == []
    (event,) = edge.on_tick(15.0)
    assert isinstance(event, ConnectionFailed)
    assert isinstance(event.error, CloudTimeoutError)
    assert event.error.code == "welcome_timeout"


def test_pings_every_second_and_measures_the_round_trip() -> None:
    edge = welcomed()
    pings = []
    for tenth in range(101):
        assert edge.on_tick(tenth / 10) == []
        for ping in sent(edge):
            pings.append(ping.seq)
            (measured,) = feed(edge, Frame(MsgType.PONG, seq=ping.seq), tenth / 10 + 0.02)
            assert isinstance(measured, RttMeasured)
            assert measured.seconds == pytest.approx(0.02)
    assert pings in (list(range(1, 11)), list(range(1, 12)))
    assert feed(edge, Frame(MsgType.PONG, seq=pings[-1]), 99.0) == []  # an old answer measures nothing


def test_one_pong_answers_all_older_pings() -> None:
    edge = welcomed()
    for now in (1.0, 2.0, 3.0):
        edge.ping(now)
    assert [f.seq for f in sent(edge)] == [3]  # newer pings replace unsent ones
    assert feed(edge, Frame(MsgType.PONG, seq=2), 3.0) == [RttMeasured(1.0)]
    assert feed(edge, Frame(MsgType.PONG, seq=1), 4.0) == []
    assert feed(edge, Frame(MsgType.PONG, seq=3), 4.0) == [RttMeasured(1.0)]


def test_unanswered_pings_are_not_kept_for_ever() -> None:
    edge = welcomed()
    for number in range(1000):
        edge.ping(float(number))
    assert feed(edge, Frame(MsgType.PONG, seq=1000 - MAX_PINGS), 1000.0) == []
    assert feed(edge, Frame(MsgType.PONG, seq=1000 - MAX_PINGS + 1), 1000.0) == [RttMeasured(MAX_PINGS)]


def test_dead_cloud_is_found_within_three_seconds_of_its_last_byte() -> None:
    edge = welcomed()
    session = started(edge)
    assert ticks(edge, 0.0, 5.0, answer=True) == []
    heard = edge.last_heard
    events: list[EdgeEvent] = []
    now = 5.0
    while not events:
        now = round(now + 0.1, 1)
        events = edge.on_tick(now)
    assert now - heard <= 3.0
    assert [type(e) for e in events] == [SessionFailed, ConnectionFailed]
    assert isinstance(events[0], SessionFailed)
    assert events[0].error.code == "cloud_silent"
    assert session.state is EdgeState.CLOSED
    assert edge.on_tick(now + 1) == []


def test_any_message_is_a_sign_of_life_and_so_is_progress_of_a_slow_link() -> None:
    edge = welcomed()
    started(edge)
    ticks(edge, 0.0, 2.0)
    feed(edge, control(MsgType.CREDIT, '{"rows":2050}'), 2.0)
    assert ticks(edge, 2.1, 4.0) == []
    edge.progress(4.0)
    edge.progress(1.0)
    assert ticks(edge, 4.1, 6.2) == []
    assert isinstance(ticks(edge, 6.3, 6.3)[-1], ConnectionFailed)


def status(received: int) -> Frame:
    return control(MsgType.STATUS, f'{{"load":{{}},"received":{received}}}', stream=0, epoch=0)


def test_a_cloud_that_talks_and_gets_nothing_is_behind_a_dead_link() -> None:
    """Half a link: STATUS comes, no PING arrives there. Within 3 s of the last byte that did, it counts as
    dead."""
    edge = welcomed()
    started(edge)
    assert ticks(edge, 0.0, 2.0, answer=True) == []
    feed(edge, status(900), 2.0)  # bytes that were on their way at the cut
    events: list[EdgeEvent] = []
    now = 2.0
    while not events and now < 9:
        now = round(now + 0.1, 1)
        if not round(now * 10) % 5:
            feed(edge, status(900), now)
        events = edge.on_tick(now)
    assert isinstance(events[-1], ConnectionFailed)
    assert events[-1].error.code == "cloud_silent"
    assert now - 2.0 <= 2.5


def test_bytes_that_arrive_there_show_a_slow_link_that_lives() -> None:
    """A long upload fills every buffer: no PONG for a minute, but what has come in keeps growing."""
    edge = welcomed()
    started(edge)
    for half_seconds in range(1, 120):
        now = half_seconds / 2
        feed(edge, status(1000 * half_seconds), now)
        assert ticks(edge, now, now + 0.4) == []


def test_a_sleep_of_this_side_proves_nothing_against_the_cloud() -> None:
    edge = welcomed()
    assert ticks(edge, 0.0, 1.0, answer=True) == []
    assert ticks(edge, 3600.0, 3601.0) == []  # the lid was closed; the PONG may wait in the socket
    assert isinstance(ticks(edge, 3601.1, 3603.5)[-1], ConnectionFailed)


def test_session_events_keep_their_order_across_streams() -> None:
    edge = welcomed()
    first, second = edge.open(make_open()), edge.open(make_open(split=2))
    for session in (first, second):
        session.step_rows(encoded(4), 0, 4, final=True)
    assert [(f.type, f.stream) for f in sent(edge)] == [
        (MsgType.OPEN, 1),
        (MsgType.OPEN, 2),
        (MsgType.STEP, 1),
        (MsgType.STEP, 2),
    ]
    assert [type(e) for e in feed(edge, OPENED_LINE.frame, stream=2)] == [SessionOpened]
    assert first.opened is None

"""An edge alone: what its tests need to bring it into a state and to speak as the cloud."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from isthmus.protocol.cloud_connection import ServerInfo
from isthmus.protocol.edge_connection import EdgeConnection
from isthmus.protocol.edge_session import EdgeSession
from isthmus.protocol.events import (
    EdgeEvent,
    RttMeasured,
    Welcomed,
)
from isthmus.protocol.frames import Frame, MsgType, encode_frame, json_frame
from isthmus.protocol.handshake import answer_hello
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import Hello, Load, Open
from tests.protocol.pairing import (
    HELLO,
    INFO,
    LIMITS,
    make_open,
    parse,
)
from tests.protocol.transcript_lines import OPENED_LINE, Transcript, control


def welcomed(
    limits: Limits = LIMITS, hello: Hello = HELLO, info: ServerInfo = INFO, passed: tuple[int, ...] = ()
) -> EdgeConnection:
    edge = EdgeConnection(hello, limits)
    edge.start(0.0)
    assert [parse(m).type for m in edge.data_to_send()] == [MsgType.HELLO]
    welcome = answer_hello(hello, info, limits, Load(), passed)
    assert edge.receive(encode_frame(json_frame(MsgType.WELCOME, welcome)), 0.0) == [Welcomed(welcome)]
    return edge


def feed(edge: EdgeConnection, frame: Frame, now: float = 0.0, **changes: Any) -> list[EdgeEvent]:
    return edge.receive(encode_frame(replace(frame, **changes)), now)


def sent(edge: EdgeConnection) -> list[Frame]:
    return [parse(message) for message in edge.data_to_send()]


def started(edge: EdgeConnection, request: Open | None = None) -> EdgeSession:
    """A session in PREFILL."""
    session = edge.open(request or make_open())
    feed(edge, OPENED_LINE.frame, stream=session.stream)
    edge.data_to_send()
    return session


def play(transcript: Transcript, upto: int | None = None) -> EdgeConnection:
    """An edge that has lived through the first lines of a transcript."""
    edge = welcomed(transcript.limits)
    for line in transcript.lines[:upto]:
        if line.sender == "cloud":
            assert feed(edge, line.frame) == list(line.events)
        else:
            if line.edge is not None:
                line.edge(edge)
            assert sent(edge) == [line.frame]
    return edge


def result(index: int, token: int, *, seq: int, pos: int, finish: str = "null", stream: int = 1) -> Frame:
    text = f'{{"first_index":{index},"tokens":[{token}],"finish":{finish}}}'
    return control(MsgType.RESULT, text, seq=seq, pos=pos, stream=stream)


def stream(index: int, tokens: list[int], *, pos: int, finish: str = "null") -> Frame:
    return control(
        MsgType.STREAM, f'{{"first_index":{index},"tokens":{tokens},"finish":{finish}}}', seq=1, pos=pos
    )


def offloaded(window: int = 4) -> tuple[EdgeConnection, EdgeSession]:
    """Generating since token 0."""
    edge = welcomed(Limits(stream_window_tokens=window))
    session = started(edge, make_open(split=0))
    session.step_ids([1, 2, 3, 4], 0, final=True)
    feed(edge, result(0, 10, seq=1, pos=4))
    edge.data_to_send()
    return edge, session


def ticks(edge: EdgeConnection, start: float, stop: float, *, answer: bool = False) -> list[EdgeEvent]:
    """Call on_tick every 0.1 s; with `answer` the cloud's PONG comes 0.02 s later, and its round trip is
    left out of the events."""
    events: list[EdgeEvent] = []
    for tenth in range(round(start * 10), round(stop * 10) + 1):
        now = tenth / 10
        events += edge.on_tick(now)
        for frame in sent(edge):
            if answer and frame.type is MsgType.PING:
                (measured,) = feed(edge, Frame(MsgType.PONG, seq=frame.seq), now + 0.02)
                assert isinstance(measured, RttMeasured)
    return events

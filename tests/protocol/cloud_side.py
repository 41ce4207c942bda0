"""A cloud alone: what its tests need to bring it into a state and to speak as the edge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from isthmus.protocol.cloud_connection import CloudConnection
from isthmus.protocol.events import (
    CloudEvent,
    HelloAccepted,
    SessionFailed,
    SessionOpenRequested,
)
from isthmus.protocol.frames import (
    Flag,
    Frame,
    MsgType,
    encode_frame,
    json_frame,
    parse_json,
)
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import (
    Credit,
    Hello,
    StreamBody,
)
from tests.protocol.pairing import (
    HELLO,
    INFO,
    LIMITS,
    SESSION_ID,
    encoded,
    make_open,
    parse,
)
from tests.protocol.transcript_lines import Transcript, ids, tensor


def fresh(limits: Limits = LIMITS, **settings: Any) -> CloudConnection:
    return CloudConnection(INFO, limits, tenant="tenant", now=0.0, **settings)


def feed(cloud: CloudConnection, frame: Frame, now: float = 0.0, **changes: Any) -> list[CloudEvent]:
    return cloud.receive(encode_frame(replace(frame, **changes)), now)


def sent(cloud: CloudConnection) -> list[Frame]:
    return [parse(message) for message in cloud.data_to_send()]


def greeted(limits: Limits = LIMITS, hello: Hello = HELLO, **settings: Any) -> CloudConnection:
    cloud = fresh(limits, **settings)
    (event,) = feed(cloud, json_frame(MsgType.HELLO, hello))
    assert isinstance(event, HelloAccepted)
    assert [f.type for f in sent(cloud)] == [MsgType.WELCOME]
    return cloud


def open_frame(stream: int = 1, **changes: Any) -> Frame:
    return json_frame(MsgType.OPEN, make_open(**changes), stream=stream, epoch=1)


def active(cloud: CloudConnection, stream: int = 1, **changes: Any) -> None:
    """A session the engine has accepted."""
    assert isinstance(feed(cloud, open_frame(stream, **changes))[0], SessionOpenRequested)
    cloud.opened(stream, session_id=SESSION_ID)
    cloud.data_to_send()


def step(n: int, *, seq: int, pos: int, flags: Flag = Flag.NONE, stream: int = 1) -> Frame:
    return tensor(MsgType.STEP, encoded(n, pos), n, seq=seq, pos=pos, flags=flags, stream=stream)


def failure(events: list[CloudEvent]) -> SessionFailed:
    (event,) = events
    assert isinstance(event, SessionFailed)
    return event


def play(transcript: Transcript, upto: int | None = None) -> CloudConnection:
    cloud = greeted(transcript.limits)
    for line in transcript.lines[:upto]:
        if line.sender == "edge":
            assert feed(cloud, line.frame) == list(line.events)
        else:
            if line.cloud is not None:
                line.cloud(cloud)
            assert sent(cloud) == [line.frame]
    return cloud


def generating(window: int = 4, **changes: Any) -> CloudConnection:
    """Offload, token 0 answered."""
    cloud = greeted(Limits(stream_window_tokens=window))
    active(cloud, split=0, **changes)
    feed(cloud, tensor(MsgType.STEP, ids([1, 2, 3, 4]), 4, seq=1, pos=0, flags=Flag.FINAL))
    cloud.result_tokens(1, [10], kv_len=4)
    sent(cloud)
    return cloud


def ack(index: int, window: int = 4) -> Frame:
    return json_frame(MsgType.CREDIT, Credit(ack_index=index, window=window), stream=1, epoch=1)


def bodies(cloud: CloudConnection) -> list[tuple[int, tuple[int, ...], str | None]]:
    found = [parse_json(f, StreamBody) for f in sent(cloud)]
    return [(body.first_index, body.tokens, body.finish) for body in found]

"""An edge whose connections are lost: what the tests of its resume share."""

from __future__ import annotations

from typing import Any

from isthmus.protocol.digests import RowDigests
from isthmus.protocol.edge_connection import EdgeConnection
from isthmus.protocol.edge_session import EdgeSession
from isthmus.protocol.events import (
    EdgeEvent,
    Replay,
    SessionFailed,
    SessionResumed,
)
from isthmus.protocol.frames import MsgType, json_frame, parse_json
from isthmus.protocol.messages import Opened, Resume, Resumed
from isthmus.protocol.states import EdgeState
from tests.protocol.conversation import CODEC
from tests.protocol.edge_side import feed, result, sent, welcomed
from tests.protocol.pairing import SESSION_ID, encoded, make_open, rows
from tests.protocol.transcript_lines import tensor

OPENED = Opened(session_id=SESSION_ID, resume_token="t", credits=2048, chunk_rows=512)


def started(edge: EdgeConnection, **changes: Any) -> EdgeSession:
    session = edge.open(make_open(**changes))
    feed(edge, json_frame(MsgType.OPENED, OPENED, stream=session.stream, epoch=1))
    edge.data_to_send()
    return session


def send(session: EdgeSession, n: int, pos: int, *, drafts: tuple[int, ...] = (), **flags: bool) -> None:
    """A step as its owner sends it, with its digests."""
    raw = CODEC.encode_raw(rows(n, pos))
    if drafts:
        session.verify_rows(drafts, CODEC.pack(raw), pos, **flags)
    else:
        session.step_rows(CODEC.pack(raw), pos, n, **({"final": False} | flags))
    session.digests.truncate(pos)
    session.digests.append(raw)


def chain_of(n: int) -> RowDigests:
    """What a cloud that took rows 0 to n has."""
    digests = RowDigests()
    if n:
        digests.append(CODEC.encode_raw(rows(n)))
    return digests


def again(session: EdgeSession, *, stream: int = 1) -> tuple[EdgeConnection, Resume]:
    """The session's RESUME on a new connection."""
    edge = welcomed()
    edge.resume(session)
    assert session.state is EdgeState.RESUMING
    (frame,) = sent(edge)
    assert (frame.type, frame.stream) == (MsgType.RESUME, stream)
    return edge, parse_json(frame, Resume)


def resumed(edge: EdgeConnection, seq: int, kv_len: int, action: str, **changes: Any) -> list[EdgeEvent]:
    """The cloud's answer, from one that holds the rows 0 to kv_len."""
    count, digest = chain_of(kv_len).state
    values: dict[str, Any] = {
        "epoch": 2,
        "seq": seq,
        "kv_len": kv_len,
        "rows": count,
        "digest": digest,
        "action": action,
        "credits": 100,
        "chunk_rows": 64,
        "resume_token": "fresh",
    }
    header = changes.pop("header", None)
    body = Resumed(**(values | changes))
    return feed(edge, json_frame(MsgType.RESUMED, body, stream=1, epoch=header or body.epoch))


def replay(events: list[EdgeEvent], action: str = "replay") -> Replay:
    (event,) = events
    assert isinstance(event, SessionResumed)
    assert event.action == action
    assert event.replay is not None
    return event.replay


def code(events: list[EdgeEvent]) -> str:
    (event,) = events
    assert isinstance(event, SessionFailed)
    return event.error.code


class Owner:
    """Of a session whose four rows were answered, with token 0 in the prefix shape; it loses connections."""

    def __init__(self, shape: str = "prefix") -> None:
        self.edge = welcomed()
        self.session = started(self.edge, shape=shape)
        send(self.session, 4, 0, final=True)
        if shape == "prefix":
            feed(self.edge, result(0, 9, seq=1, pos=4))
        else:
            feed(self.edge, tensor(MsgType.RESULT, encoded(1), 1, seq=1, pos=4))
        self.edge.data_to_send()

    def send(self, n: int, pos: int, *, drafts: tuple[int, ...] = (), **flags: bool) -> None:
        send(self.session, n, pos, drafts=drafts, **flags)

    def lose(self) -> EdgeConnection:
        """The connection; RESUME is sent on the next one."""
        self.edge.lost()
        self.edge, _ = again(self.session)
        return self.edge

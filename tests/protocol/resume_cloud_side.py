"""A cloud whose connections are lost: what the tests of its resume share."""

from __future__ import annotations

from typing import Any

from isthmus.protocol.cloud_connection import CloudConnection
from isthmus.protocol.cloud_session import CloudSession
from isthmus.protocol.events import (
    ResumeRequested,
    SessionDetached,
    StepReceived,
)
from isthmus.protocol.frames import Flag, Frame, MsgType, json_frame, parse_json
from isthmus.protocol.limits import Limits, TenantUsage
from isthmus.protocol.messages import Resume, Resumed
from tests.protocol.cloud_side import feed, greeted, open_frame, sent
from tests.protocol.conversation import CODEC
from tests.protocol.pairing import SESSION_ID
from tests.protocol.transcript_lines import ids, tensor

TOKEN = "a token"


class Side:
    """A cloud of one tenant: its connections, and one session on the first of them."""

    def __init__(self, limits: Limits | None = None, **changes: Any) -> None:
        self.limits = limits or Limits(initial_credits_rows=8)
        self.usage = TenantUsage.from_limits(self.limits)
        self.cloud = self.connect()
        feed(self.cloud, open_frame(**changes))
        self.session: CloudSession = self.cloud.sessions[1]
        self.cloud.opened(1, session_id=SESSION_ID, resume_token=TOKEN)
        self.cloud.data_to_send()

    def connect(self) -> CloudConnection:
        return greeted(self.limits, usage=self.usage)

    def take(self, frame: Frame) -> None:
        """A step that is taken, decoded and digested."""
        (event,) = feed(self.cloud, frame)
        assert isinstance(event, StepReceived)
        self.session.digests.truncate(event.pos)
        if self.session.open.split == 0:
            self.session.digests.append(event.frame.body)
        else:
            self.session.digests.append(CODEC.unpack(event.frame, max_raw=1 << 20))

    def detach(self) -> None:
        assert self.cloud.lost()[:-1] == [SessionDetached(1, self.session)]

    def resume(self, stream: int = 1, **changes: Any) -> tuple[CloudConnection, list[Frame]]:
        """On a new connection; what it sends."""
        cloud = self.connect()
        body = self.claim(**changes)
        assert feed(cloud, resume_frame(body, stream)) == [ResumeRequested(stream, body)]
        assert cloud.resumed(stream, self.session, body, resume_token="fresh", chunk_rows=5)
        return cloud, sent(cloud)

    def claim(self, **changes: Any) -> Resume:
        """What an edge says that has sent just what came, and got just what is left to say."""
        count, digest = self.session.digests.state
        values: dict[str, Any] = {
            "session_id": SESSION_ID,
            "resume_token": TOKEN,
            "attempt": self.session.attempt + 1,
            "next_index": 0,
            "last_seq": self.session.last_seq,
            "rows": count,
            "digest": digest,
        }
        return Resume(**(values | changes))


def resume_frame(body: Resume, stream: int = 1, epoch: int = 1) -> Frame:
    return json_frame(MsgType.RESUME, body, stream=stream, epoch=epoch)


def resumed(frame: Frame) -> Resumed:
    assert frame.type is MsgType.RESUMED
    return parse_json(frame, Resumed)


def kinds(frames: list[Frame]) -> list[str]:
    return [frame.type.name for frame in frames]


def offloaded(**limits: Any) -> Side:
    side = Side(Limits(**limits), split=0)
    side.take(tensor(MsgType.STEP, ids([1, 2, 3, 4]), 4, seq=1, pos=0, flags=Flag.FINAL))
    assert len(side.session.digests) == 4
    return side

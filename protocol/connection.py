"""What both ends of a connection share: framing, the outbox, liveness, and the scope of an error.

A bad message in a session fails that session; a message that can't be trusted at all (header, checksum,
wrong type on stream 0) fails the connection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Generic, TypeVar

from pydantic import BaseModel

from isthmus.protocol.errors import FrameError, IsthmusError, SequenceError
from isthmus.protocol.frames import HEADER_BYTES, Frame, MsgType, decode_frame, encode_frame, json_frame
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import ErrorBody
from isthmus.protocol.outbox import Outbox
from isthmus.protocol.states import CONNECTION_TABLE, ConnectionInput, ConnectionState, advance

FIRST_EPOCH = 1

EventT = TypeVar("EventT")


class Connection(ABC, Generic[EventT]):
    """Messages in → events and messages out. No socket, no clock: `now` is any monotonic time in seconds."""

    def __init__(self, limits: Limits, state: ConnectionState) -> None:
        self.limits = limits
        self._state = state
        self._outbox = Outbox()
        self._last_heard = self._heard_before = 0.0
        self._last_tick: float | None = None

    # ---- for the owner

    @property
    def is_closed(self) -> bool:
        """Nothing more will be received; what data_to_send() still has should be flushed."""
        return self._state is ConnectionState.CLOSED

    @property
    def has_data(self) -> bool:
        return bool(self._outbox)

    def data_to_send(self, max_bytes: int | None = None) -> list[bytes]:
        """Websocket messages to write now, urgent ones first, streams in turn. With `max_bytes` at least
        one message and then as many as fit: an adapter on a slow link takes little at a time, so that a
        PING or a CANCEL overtakes queued rows."""
        return self._outbox.take(max_bytes)

    def receive(self, data: bytes | bytearray | memoryview | str, now: float) -> list[EventT]:
        """One whole websocket message. Never raises for what a peer sent: it becomes an event."""
        if self.is_closed:
            return []
        self._heard_before, self._last_heard = self._last_heard, now
        try:
            frame = decode_frame(
                data,
                max_body=self.limits.max_message_bytes - HEADER_BYTES,
                max_control=self.limits.max_control_bytes,
            )
            if frame.type not in (MsgType.HELLO, MsgType.WELCOME, MsgType.REJECT, MsgType.ERROR):
                self._move(ConnectionInput.MESSAGE)
            if frame.stream == 0:
                return self._on_connection_frame(frame, now)
        except IsthmusError as error:
            return self.fail_connection(error)
        try:
            return self._on_session_frame(frame)
        except IsthmusError as error:
            return self._fail_stream(frame.stream, error)

    def progress(self, now: float) -> None:
        """The transport moved bytes, in or out: the link is slow, not dead. Counts as a sign of life."""
        self._last_heard = max(self._last_heard, now)

    @property
    def last_heard(self) -> float:
        """When the peer last gave a sign of life."""
        return self._last_heard

    @abstractmethod
    def fail_connection(self, error: IsthmusError) -> list[EventT]:
        """End everything with a fatal ERROR."""

    # ---- for the two ends

    @abstractmethod
    def _on_connection_frame(self, frame: Frame, now: float) -> list[EventT]: ...

    @abstractmethod
    def _on_session_frame(self, frame: Frame) -> list[EventT]: ...

    @abstractmethod
    def _fail_stream(self, stream: int, error: IsthmusError) -> list[EventT]: ...

    def _move(self, happened: ConnectionInput) -> None:
        self._state = advance(CONNECTION_TABLE, self._state, happened)

    def _send(self, frame: Frame, *, droppable: bool = False) -> None:
        self._outbox.push(frame.stream, encode_frame(frame), droppable=droppable)

    def _send_urgent(self, msg_type: MsgType, body: BaseModel, *, seq: int = 0) -> None:
        self._outbox.push_urgent(encode_frame(json_frame(msg_type, body, seq=seq)))

    def _send_latest(self, frame: Frame) -> None:
        self._outbox.push_latest(frame.type.name, encode_frame(frame))

    def _send_error(self, stream: int, epoch: int, body: ErrorBody) -> None:
        self._send(json_frame(MsgType.ERROR, body, stream=stream, epoch=epoch))

    def _silence_s(self, now: float) -> float:
        """How long the peer has been silent while this side was listening.

        A tick that comes late means that this side slept (suspend, a stalled loop, a clock jump): messages
        may wait unread in the socket, so that time proves nothing against the peer.
        """
        if self._last_tick is not None:
            overslept = now - self._last_tick - self.limits.heartbeat_s
            if overslept > 0:
                self._last_heard += overslept
        self._last_tick = now
        return now - self._last_heard


def unexpected(frame: Frame) -> FrameError:
    return FrameError(
        f"{frame.type.name} is not for this side, or not spoken in this version", code="unexpected_message"
    )


def is_stale(frame: Frame, epoch: int) -> bool:
    """Rule 4: a frame of an older epoch is neither executed nor acknowledged; a newer one is an error.
    ERROR about a stream its sender does not know carries epoch 0."""
    if frame.epoch > epoch:
        raise SequenceError(
            f"{frame.type.name} of epoch {frame.epoch}, the session is in epoch {epoch}", code="epoch_ahead"
        )
    return frame.epoch < epoch and not (frame.type is MsgType.ERROR and frame.epoch == 0)


def with_pos(frame: Frame, pos: int) -> Frame:
    """A control frame that also tells a row position (RESULT, STREAM: kv_len)."""
    return replace(frame, pos=pos)

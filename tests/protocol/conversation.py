"""One conversation of the paired state machine: what the test knows of it, and what its cloud draws."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from isthmus.protocol.activations import RowCodec, RowFormat
from isthmus.protocol.cloud_session import CloudSession
from isthmus.protocol.edge_session import EdgeSession
from isthmus.protocol.events import CancelRequested, CloseRequested, Replay, StepReceived
from isthmus.protocol.frames import MsgType
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import Finish
from tests.protocol.pairing import HIDDEN, VOCAB

LIMITS = Limits(
    initial_credits_rows=6,
    max_rows_per_step=4,
    stream_window_tokens=3,
    max_sessions=4,
    dead_after_s=1e9,
    idle_after_s=1e9,
)
MAX_TOKENS, MAX_CONTEXT = 6, 20
CODEC = RowCodec(RowFormat.F32, HIDDEN)
# These begin a stream; everything after may be repeated without harm.
NEVER_REPEATED = {MsgType.OPEN, MsgType.OPENED, MsgType.RESUME, MsgType.RESUMED}


def token_of(number: int, index: int) -> int:
    return (31 * number + 7 * index) % VOCAB


def content_of_cache(row: int) -> int:
    """What the cloud kept from an earlier turn."""
    return 50 + row


@dataclass
class Conversation:
    """What the test knows of one session on both sides. `number` is its own whatever connection it is on."""

    number: int
    core: EdgeSession
    kind: str
    prompt: int
    edge_rows: list[int] = field(default_factory=list)  # contents the edge believes the KV to have
    edge_tokens: list[int] = field(default_factory=list)
    due_index: int = 0  # of the token that must come next
    work: deque[StepReceived | CloseRequested | CancelRequested | str] = field(default_factory=deque)
    cloud_rows: list[int] = field(default_factory=list)  # contents of the engine's KV
    last_seq: int = 0
    num_generated: int = 0
    closing: bool = False
    closed: bool = False
    expected_rows: deque[list[int]] = field(default_factory=deque)
    replay: Replay | None = None  # what the edge is to send again
    failed: bool = False  # over on the edge without CLOSED
    session: CloudSession | None = None  # the cloud's half, while there is one
    evicted: bool = False

    @property
    def stream(self) -> int:
        return self.core.stream

    @property
    def session_id(self) -> str:
        return f"{self.number:032x}"

    @property
    def first_pos(self) -> int:
        """The first position from which a draft chain may start: its token was not emitted yet."""
        return 0 if self.kind == "u" else self.prompt - 1 + self.core.next_index

    @property
    def last_pos(self) -> int:
        """One beyond the last such position."""
        return MAX_CONTEXT if self.kind == "u" else self.prompt - 1 + MAX_TOKENS


def drawn_along(number: int, index: int, drafts: Sequence[int]) -> list[int]:
    """The tokens of a draft chain up to the first that differs, or the answer's end."""
    tokens: list[int] = []
    for at in range(len(drafts)):
        tokens.append(token_of(number, index + at))
        if finish_at(index + at) or tokens[-1] != (*drafts[1:], None)[at]:
            break
    return tokens


def finish_at(index: int) -> Finish | None:
    return "length" if index + 1 == MAX_TOKENS else None

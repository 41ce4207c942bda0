"""One connection of the paired machines: both ends, and what is on its way between them."""

from __future__ import annotations

from collections import deque

from isthmus.protocol.events import CloudEvent, EdgeEvent
from isthmus.protocol.frames import MsgType
from isthmus.protocol.limits import TenantUsage
from isthmus.protocol.messages import Resume
from tests.protocol.conversation import LIMITS, NEVER_REPEATED, Conversation
from tests.protocol.pairing import Pair, connected, parse


class Link:
    """Any order between streams, in order within one. `is_cut`: nothing arrives any more, but for messages
    upwards that were on their way, and each end notices when it notices."""

    def __init__(self, usage: TenantUsage) -> None:
        self.pair: Pair = connected(limits=LIMITS, usage=usage)
        self.talks: dict[int, Conversation] = {}  # by stream
        self.ways: dict[str, dict[int, deque[bytes]]] = {"up": {}, "down": {}}
        self.history: dict[str, list[bytes]] = {"up": [], "down": []}
        self.resumes: deque[tuple[int, Resume]] = deque()
        self.is_cut = False

    def collect(self) -> None:
        for way, end in (("up", self.pair.edge), ("down", self.pair.cloud)):
            for message in end.data_to_send():
                if not self.is_cut:
                    self.ways[way].setdefault(parse(message).stream, deque()).append(message)

    def cut(self, *, keep_up: bool) -> None:
        self.collect()
        self.is_cut = True
        self.ways["down"].clear()
        if not keep_up:
            self.ways["up"].clear()
        self.history = {"up": [], "down": []}

    def take(self, way: str, stream: int) -> bytes:
        queue = self.ways[way][stream]
        message = queue.popleft()
        if not queue:
            del self.ways[way][stream]
        if parse(message).type not in NEVER_REPEATED:
            self.history[way].append(message)
        return message

    def up(self, message: bytes) -> list[CloudEvent]:
        return self.pair.cloud.receive(message, self.pair.now)

    def down(self, message: bytes) -> list[EdgeEvent]:
        return self.pair.edge.receive(message, self.pair.now)

    def deliverable(self, way: str) -> list[int]:
        """Streams whose next message may come next. Those that begin a stream come in the order of their
        ids, which ascend."""
        begins = [
            stream
            for stream, queue in self.ways[way].items()
            if parse(queue[0]).type in (MsgType.OPEN, MsgType.RESUME)
        ]
        return sorted(s for s in self.ways[way] if s not in begins or s == min(begins))

    def in_flight(self, stream: int) -> bool:
        return any(stream in streams for streams in self.ways.values())

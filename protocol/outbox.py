"""Messages waiting for the socket: urgent ones first, then the streams in turn, order kept within a stream.

Taking turns is what lets another session's decode row pass a long prompt's upload on a slow link.
"""

from __future__ import annotations

from collections import OrderedDict, deque


class Outbox:
    """`nbytes` is all that waits. Streams are served round-robin, one message each."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._urgent: deque[bytes] = deque()
        # Newest wins: a flood of pings must not grow a queue of pongs.
        self._latest: OrderedDict[str, bytes] = OrderedDict()
        self._streams: OrderedDict[int, deque[tuple[bytes, bool]]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._urgent or self._latest or self._streams)

    def push_urgent(self, data: bytes) -> None:
        self._urgent.append(data)
        self.nbytes += len(data)

    def push_latest(self, key: str, data: bytes) -> None:
        """Replaces what waits under `key`."""
        self.nbytes += len(data) - len(self._latest.get(key, b""))
        self._latest[key] = data

    def push(self, stream: int, data: bytes, *, droppable: bool = False) -> None:
        self._streams.setdefault(stream, deque()).append((data, droppable))
        self.nbytes += len(data)

    def drop(self, stream: int) -> None:
        """Forget what is droppable on `stream` and has not been taken."""
        waiting = self._streams.pop(stream, deque())
        kept = deque(entry for entry in waiting if not entry[1])
        self.nbytes -= sum(len(data) for data, droppable in waiting if droppable)
        if kept:
            self._streams[stream] = kept

    def clear(self) -> None:
        self._urgent.clear()
        self._latest.clear()
        self._streams.clear()
        self.nbytes = 0

    def take(self, max_bytes: int | None = None) -> list[bytes]:
        """The next messages to write: all, or at least one and then as many as `max_bytes` holds."""
        taken: list[bytes] = []
        size = 0
        while self:
            data = self._peek()
            if taken and max_bytes is not None and size + len(data) > max_bytes:
                break
            self._pop()
            taken.append(data)
            size += len(data)
        self.nbytes -= size
        return taken

    def _peek(self) -> bytes:
        if self._urgent:
            return self._urgent[0]
        if self._latest:
            return next(iter(self._latest.values()))
        return next(iter(self._streams.values()))[0][0]

    def _pop(self) -> None:
        if self._urgent:
            self._urgent.popleft()
        elif self._latest:
            self._latest.popitem(last=False)
        else:
            stream, queue = next(iter(self._streams.items()))
            queue.popleft()
            if queue:
                self._streams.move_to_end(stream)
            else:
                del self._streams[stream]

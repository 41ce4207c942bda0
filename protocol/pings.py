"""The edge's PINGs and PROBEs that have no answer yet, and what their answers tell about the link.

Three measurements, none of which needs the other side's clock:

* The answer to a PING that had the link to itself: a round trip.
* A PING right behind a chunk of rows is a *marker*: its PONG comes a return trip after the chunk has arrived.
  While chunks follow each other without a pause, the time between two such PONGs is what the bytes between
  the two markers took.
* The answer to a PROBE comes later than a round trip by what its padding took.
"""

from __future__ import annotations

from math import inf
from typing import Final, NamedTuple

from isthmus.protocol.errors import FrameError
from isthmus.protocol.events import ChunkArrived, ProbeDone, RttMeasured
from isthmus.protocol.frames import Frame, MsgType, encode_frame

# Unanswered ones kept, for a peer that talks but never answers.
MAX_PINGS: Final = 64
# A smaller message is over sooner than a round trip is known, and is not marked.
MARKED_BYTES: Final = 4096
_TYPE_AT, _ROWS_AT = 3, slice(26, 28)  # of the header, see frames.py


class _Ping(NamedTuple):
    sent: float
    alone: bool  # nothing larger than a row was under way
    begin: int = 0  # of a marker: the bytes that had left before its chunk
    end: int = 0  # … and with it


class Pings:
    """Those of one connection. `now` is any monotonic time in seconds."""

    def __init__(self) -> None:
        self.unanswered: dict[int, _Ping] = {}
        self.last_sent: float | None = None  # the newest PING that is no marker
        self._probes: dict[int, tuple[float, int, int]] = {}  # seq → time sent, bytes up, bytes down
        self._num_pings = 0
        self._num_probes = 0
        self._left = 0  # bytes given to the transport
        self._arrived = 0  # of these, up to the newest marker answered
        self._arrived_at = -inf

    @property
    def is_link_free(self) -> bool:
        """Nothing larger than a row is on its way up, and no probe either way."""
        return not self._probes and not any(ping.end for ping in self.unanswered.values())

    def ping(self, now: float) -> Frame:
        """The next PING, which is to overtake what waits."""
        self.last_sent = now
        return self._next(_Ping(now, self.is_link_free))

    def with_markers(self, messages: list[bytes], now: float) -> list[bytes]:
        """The messages that leave now, with a PING behind each large one."""
        out: list[bytes] = []
        for message in messages:
            out.append(message)
            begin, self._left = self._left, self._left + len(message)
            if _is_marked(message):
                out.append(encode_frame(self._next(_Ping(now, False, begin, self._left))))
                self._left += len(out[-1])
        return out

    def _next(self, ping: _Ping) -> Frame:
        self._num_pings += 1
        self.unanswered[self._num_pings] = ping
        self.unanswered.pop(self._num_pings - MAX_PINGS, None)
        return Frame(MsgType.PING, seq=self._num_pings)

    def answered(self, seq: int, now: float) -> RttMeasured | ChunkArrived | None:
        """PONG `seq`. The cloud answers the newest of several PINGs, so all before it are answered too."""
        ping = self.unanswered.get(seq)
        if ping is None:
            return None
        done = [self.unanswered.pop(other) for other in list(self.unanswered) if other <= seq]
        markers = [one for one in done if one.end]
        before, before_at = self._arrived, self._arrived_at
        if markers:
            self._arrived, self._arrived_at = markers[-1].end, now
        if ping.end:
            first = markers[0]
            return ChunkArrived(ping.end - first.begin, now - first.sent, ping.end - before, now - before_at)
        return RttMeasured(now - ping.sent) if ping.alone else None

    # ---- probes

    def probe(self, up_bytes: int, down_bytes: int, now: float) -> int:
        """Note that a PROBE leaves; its seq."""
        self._num_probes += 1
        self._probes[self._num_probes] = (now, up_bytes, down_bytes)
        self._probes.pop(self._num_probes - MAX_PINGS, None)
        return self._num_probes

    def replied(self, frame: Frame, now: float) -> ProbeDone | None:
        """PROBE_REPLY; None for one that was given up. FrameError if it brings neither what was asked nor
        nothing."""
        if frame.seq not in self._probes:
            return None
        sent, up_bytes, down_bytes = self._probes.pop(frame.seq)
        size = len(frame.body)
        if size not in (0, down_bytes):
            raise FrameError(
                f"the reply to probe {frame.seq} brings {size} bytes, {down_bytes} were asked for",
                code="bad_probe_reply",
            )
        return ProbeDone(frame.seq, up_bytes, size, now - sent)


def _is_marked(message: bytes) -> bool:
    """A single row is answered by its RESULT, and a PROBE by its reply."""
    one_row = int.from_bytes(message[_ROWS_AT], "little") == 1
    return len(message) >= MARKED_BYTES and not one_row and message[_TYPE_AT] != MsgType.PROBE

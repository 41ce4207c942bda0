"""What a request sent: its boundary rows as they were encoded, kept so that another machine can go on from
them.

Token ids are the truth, these rows the shortcut: whatever is missing here is computed again from the ids. The
memory of all requests together is bounded; beyond it the rows that were sent first go first.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np
from numpy.typing import NDArray

Raw = NDArray[np.uint8]  # [n, row_bytes], as RowCodec.encode_raw gives them

# Rows are kept in segments of this many, which come and go whole.
SEGMENT_ROWS: Final = 64


class HistoryBudget:
    """Bytes that the histories of one agent may hold together. Used on the event loop only."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._segments: deque[tuple[SentRows, int]] = deque()  # oldest first; entries may be gone already

    def take(self, owner: SentRows, number: int, nbytes: int) -> None:
        """Account for a new segment; the oldest ones make room."""
        self.nbytes += nbytes
        self._segments.append((owner, number))
        while self.nbytes > self.max_bytes and self._segments:
            oldest, segment = self._segments.popleft()
            oldest.drop(segment)

    def give(self, owner: SentRows, nbytes: int, *, closed: bool) -> None:
        """A segment is gone; `closed`: its owner is, too."""
        self.nbytes -= nbytes
        if closed:
            self._segments = deque(entry for entry in self._segments if entry[0] is not owner)


class SentRows:
    """The rows [`start`, `stop`) of one request at one boundary. Zeroed when it lets go of them."""

    def __init__(self, budget: HistoryBudget, row_bytes: int) -> None:
        self.start = self.stop = 0
        self._budget = budget
        self._row_bytes = row_bytes
        self._segments: dict[int, Raw] = {}

    def __len__(self) -> int:
        return self.stop - self.start

    def put(self, pos: int, raw: Raw) -> None:
        """Keep `raw` uint8[n, row_bytes] as the rows from `pos` on; what was there and behind is forgotten.
        Rows that do not join those held replace them all."""
        if not self.start <= pos <= self.stop:
            self._clear()
        if pos < self.stop:
            self.truncate(pos)
        if self.start == self.stop:
            self.start = self.stop = pos
        at = 0
        while at < len(raw):
            number, offset = divmod(pos + at, SEGMENT_ROWS)
            count = min(SEGMENT_ROWS - offset, len(raw) - at)
            segment = self._segments.get(number)
            if segment is None:
                segment = np.zeros((SEGMENT_ROWS, self._row_bytes), np.uint8)
                self._segments[number] = segment
                self._budget.take(self, number, segment.nbytes)
            segment[offset : offset + count] = raw[at : at + count]
            at += count
            self.stop = pos + at
            if number not in self._segments:  # the budget holds less than this one segment
                self.start = self.stop

    def rows(self, start: int, stop: int) -> Raw:
        """A copy of the rows [start, stop), which must be held."""
        if not self.start <= start <= stop <= self.stop:
            raise IndexError(f"rows {start}..{stop} asked, {self.start}..{self.stop} are held")
        out = np.empty((stop - start, self._row_bytes), np.uint8)
        at = start
        while at < stop:
            number, offset = divmod(at, SEGMENT_ROWS)
            count = min(SEGMENT_ROWS - offset, stop - at)
            out[at - start : at - start + count] = self._segments[number][offset : offset + count]
            at += count
        return out

    def truncate(self, to: int) -> None:
        """Forget the rows from `to` on."""
        if to >= self.stop:
            return
        keep, offset = divmod(max(to, self.start), SEGMENT_ROWS)
        for number in [
            number for number in self._segments if number > keep or (number == keep and not offset)
        ]:
            self._remove(number)
        if keep in self._segments:
            self._segments[keep][offset:] = 0
        self.stop = max(to, self.start)

    def drop(self, number: int) -> None:
        """The budget takes back segment `number`, this history's oldest, if it is still there."""
        if number in self._segments:
            self._remove(number)
            self.start = max(self.start, min(self.stop, (number + 1) * SEGMENT_ROWS))

    def close(self) -> None:
        """Zero and forget everything."""
        self._clear(closed=True)

    def _clear(self, *, closed: bool = False) -> None:
        for number in list(self._segments):
            self._remove(number, closed=closed)
        self.start = self.stop = 0

    def _remove(self, number: int, *, closed: bool = False) -> None:
        segment = self._segments.pop(number)
        segment.fill(0)
        self._budget.give(self, segment.nbytes, closed=closed)

"""Stop strings across token borders: text that may still become a stop string is held back."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Feed text increments; get back what is certain not to belong to a stop string.

    The text ends before the earliest stop string; of two that start at the same place it makes no
    difference which one matched, since the text is cut before both.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text released by this increment. After a match `stopped` is True and nothing more comes."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            released, self._held = self._held[: min(found)], ""
            return released
        keep = max(overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released

    def flush(self) -> str:
        """The end of the text is reached: what was held back after all. "" after a match."""
        released, self._held = self._held, ""
        return released


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0

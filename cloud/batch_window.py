"""How long to hold a step back for further edges' rows. Pure: the caller passes the time.

A step costs much the same for one row as for several, and a row that just misses one waits for all of it.
Edges that got their results together send their next rows together, so the mean rate says little about the
next few milliseconds: the rows that come within `max_wait_s` are counted instead, from the moment a step
could have begun, whether it was held back or not (for independent arrivals that is rate times window).

With p rows pending, m more expected in the w seconds left, and steps of s seconds, holding back costs all
p + m rows up to w and saves the m a step: it pays while m * s > (p + m) * w.
"""

from __future__ import annotations

from typing import Final

_SMOOTHING: Final = 1 / 8  # means over the last eight steps or so
_SILENCE_S: Final = 1.0


class BatchWindow:
    """Learns how many rows come soon after a step could begin, and how long steps take.

    A session alone never waits: it sends nothing before it has its result. Nor does the first one after a
    silence of a second.
    """

    def __init__(self, *, max_wait_s: float = 0.002) -> None:
        """`max_wait_s`: the most that one step is held back; 0 switches the window off."""
        if not max_wait_s >= 0:
            raise ValueError(f"max_wait_s {max_wait_s} must not be negative")
        self.max_wait_s = max_wait_s
        self._step_s: float | None = None
        self._expected = 0.0  # rows that come in a window
        self._came = 0  # rows that came in this one
        self._opened_s = self._closes_s = self._asked_s = float("-inf")
        self._step_ended = True
        self._last_arrival_s: float | None = None

    def note_arrivals(self, num_rows: int, *, now: float) -> None:
        """`num_rows` rows that edges sent one by one (decode steps) arrived at `now`, in seconds of any
        monotonic clock; it may lie before the last step's end, but must be told before `wait_s` is asked
        again. A prompt's chunks do not count: each fills a step by itself."""
        if self._last_arrival_s is not None and now - self._last_arrival_s > _SILENCE_S:
            self._expected, self._came = 0.0, 0
        if self._opened_s <= now < self._closes_s:
            self._came += num_rows
        self._last_arrival_s = now

    def note_step(self, seconds: float) -> None:
        """A step ended that took `seconds`. It began when `wait_s` was asked last; what arrived after its end
        may be the answer to it, and could not have been waited for."""
        if self._step_s is None:
            self._step_s = seconds
        self._step_s += _SMOOTHING * (seconds - self._step_s)
        self._closes_s = min(self._closes_s, self._asked_s + seconds)
        self._step_ended = True

    def wait_s(self, num_pending: int, *, now: float) -> float:
        """Seconds to wait for further rows before a step over `num_pending` rows; 0.0: step now.

        To be asked before every step, and again after an arrival: all waits before one step add up to
        `max_wait_s` at most.
        """
        if num_pending <= 0:
            return 0.0
        self._asked_s = now
        if self._step_ended:
            self._expected += _SMOOTHING * (self._came - self._expected)
            self._came = 0
            self._opened_s, self._closes_s = now, now + self.max_wait_s
            self._step_ended = False
        left_s = self._closes_s - now
        missing = self._expected - self._came
        saved_s = missing * (self._step_s or 0.0)
        return left_s if left_s > 0 and saved_s > (num_pending + missing) * left_s else 0.0

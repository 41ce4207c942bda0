"""A line of a simulated link, for many messages at once: one that a trace paces, and a steady one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from isthmus.relay.trace import PACKET_BYTES

Vector = NDArray[np.float64]
Indices = NDArray[np.int64]


class Line(Protocol):
    """One direction. `lanes` [n]: which request each message belongs to. Times in seconds."""

    steady: bool
    """Whether a message takes as long whenever it is sent."""

    def pass_on(
        self, lanes: Indices, at_s: Vector, num_bytes: Vector, behind: Vector
    ) -> tuple[Vector, Vector]:
        """(when the last byte of each message has passed, the place behind it): messages sent at `at_s` [n]
        wait for those before them, of which `behind` [n] is the place; 0 where there are none."""

    def step(self, lanes: Indices, at_s: Vector, num_bytes: Vector) -> Vector:
        """When a message on an empty line has passed."""

    def only(self, which: Indices) -> Line:
        """The line of some of the requests, which are counted anew."""


class TraceLine:
    """As `relay.trace.TracePacer`, in whole packets: each message takes the next free opportunities, and what
    it leaves of its last one is lost."""

    steady = False

    def __init__(self, times_ms: Sequence[int], origin_s: float) -> None:
        """`origin_s`: the second of the trace at which the world's time begins."""
        self._times = np.array(times_ms, np.int64)
        self._period = int(self._times[-1])
        self._origin_ms = 1000.0 * origin_s
        self._first = np.searchsorted(self._times, np.arange(self._period), side="left")

    def pass_on(
        self, lanes: Indices, at_s: Vector, num_bytes: Vector, behind: Vector
    ) -> tuple[Vector, Vector]:
        packets = np.ceil(num_bytes / PACKET_BYTES).astype(np.int64)
        first = np.maximum(self._next(at_s), behind.astype(np.int64))
        last = first + np.maximum(packets, 1) - 1
        return self._second(last), (last + 1).astype(np.float64)

    def step(self, lanes: Indices, at_s: Vector, num_bytes: Vector) -> Vector:
        packets = np.ceil(num_bytes / PACKET_BYTES).astype(np.int64)
        return self._second(self._next(at_s) + packets - 1)

    def only(self, which: Indices) -> TraceLine:
        return self

    def around(self, at_s: Vector, window_s: float) -> tuple[Vector, Vector]:
        """(bytes per second, mean seconds to the next opportunity) over `window_s` about `at_s` [n]."""
        offsets = np.linspace(-window_s / 2, window_s / 2, 41)
        when = at_s[:, None] + offsets
        waits = self._second(self._next(when)) - when
        passed = self._next(when[:, -1]) - self._next(when[:, 0])
        return np.maximum(passed, 0.5) * PACKET_BYTES / window_s, waits.mean(axis=1)

    def _next(self, at_s: Vector) -> Indices:
        """The first opportunity that is not before."""
        at_ms = np.ceil(at_s * 1000.0 + (self._origin_ms - 1e-6)).astype(np.int64)
        rounds, rest = np.divmod(at_ms, self._period)
        return np.asarray(rounds * len(self._times) + self._first[rest], np.int64)

    def _second(self, opportunity: Indices) -> Vector:
        rounds, place = np.divmod(opportunity, len(self._times))
        return np.asarray((rounds * self._period + self._times[place] - self._origin_ms) / 1000.0)


class SteadyLine:
    """A line of known state: what a message waits for its turn, and the bytes per second behind that, by
    request."""

    steady = True

    def __init__(self, bytes_per_s: Vector, wait_s: Vector) -> None:
        self._bytes_per_s, self._wait_s = bytes_per_s, wait_s

    def pass_on(
        self, lanes: Indices, at_s: Vector, num_bytes: Vector, behind: Vector
    ) -> tuple[Vector, Vector]:
        done = np.maximum(at_s, behind) + np.maximum(
            num_bytes / self._bytes_per_s[lanes], self._wait_s[lanes]
        )
        return done, done

    def step(self, lanes: Indices, at_s: Vector, num_bytes: Vector) -> Vector:
        return np.asarray(at_s + self._wait_s[lanes])

    def only(self, which: Indices) -> SteadyLine:
        return SteadyLine(self._bytes_per_s[which], self._wait_s[which])

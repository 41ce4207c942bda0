"""Recorded links: Mahimahi's trace format, and when bytes pass on such a link.

A trace is a text file with one whole number per line: the millisecond at which one packet of 1500 bytes may
pass. Numbers never fall, equal ones mean several packets at once, and after the last the trace begins again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from isthmus.protocol.errors import ConfigError

PACKET_BYTES: Final = 1500
MAX_TRACE_BYTES: Final = 64 * 1024 * 1024
# A day. Far beyond any recording, and it keeps every later sum small.
MAX_TIME_MS: Final = 86_400_000


class Pacer(Protocol):
    """Says when the bytes of one direction leave the line."""

    def pass_on(self, now: float, size: int) -> list[tuple[float, int]]:
        """`size` bytes arrive at `now` (s): how many of them have passed at which second, in order."""


class RatePacer:
    """A line as fast as `mbps` (Mbit/s) says when bytes arrive; 0 = no limit."""

    def __init__(self, mbps: Callable[[], float]) -> None:
        self._mbps = mbps
        self._free_at = 0.0

    def pass_on(self, now: float, size: int) -> list[tuple[float, int]]:
        bytes_per_s = self._mbps() * 125_000
        self._free_at = max(now, self._free_at) + (size / bytes_per_s if bytes_per_s else 0.0)
        return [(self._free_at, size)]


class TracePacer:
    """A line that passes 1500 bytes at each time of a trace that began at `origin` (s). What finds nothing
    to carry is lost, as on the air."""

    def __init__(self, times_ms: tuple[int, ...], origin: float) -> None:
        self._times = times_ms
        self._origin = origin
        self._next = 0  # the opportunity being filled, counted from the trace's very first
        self._left = PACKET_BYTES

    def pass_on(self, now: float, size: int) -> list[tuple[float, int]]:
        if self._at(self._next) < now:
            rounds, rest = divmod((now - self._origin) * 1000, self._times[-1])
            self._next = int(rounds) * len(self._times) + bisect_left(self._times, rest)
            self._left = PACKET_BYTES
        passed: list[tuple[float, int]] = []
        while size > 0:
            taken = min(size, self._left)
            due = self._at(self._next)
            if passed and passed[-1][0] == due:
                passed[-1] = (due, passed[-1][1] + taken)
            else:
                passed.append((due, taken))
            size -= taken
            self._left -= taken
            if self._left == 0:
                self._next += 1
                self._left = PACKET_BYTES
        return passed

    def _at(self, opportunity: int) -> float:
        rounds, place = divmod(opportunity, len(self._times))
        return self._origin + (rounds * self._times[-1] + self._times[place]) / 1000


@dataclass(frozen=True)
class Trace:
    """A recorded link: the delivery opportunities of each direction, in ms."""

    up: tuple[int, ...]
    down: tuple[int, ...]

    @classmethod
    def load(cls, prefix: str | Path) -> Trace:
        """Reads PREFIX.up and PREFIX.down. ConfigError `bad_trace` names the file and the line."""
        return cls(read_times(Path(f"{prefix}.up")), read_times(Path(f"{prefix}.down")))


def read_times(path: Path) -> tuple[int, ...]:
    """The times of one trace file, in ms. ConfigError `bad_trace` for anything else than a trace."""
    try:
        if path.stat().st_size > MAX_TRACE_BYTES:
            raise _bad(f"{path} has {path.stat().st_size} bytes, at most {MAX_TRACE_BYTES} are read")
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(
            f"cannot read the trace {path}: {error.strerror or error}",
            code="bad_trace",
            hint="--trace takes the part of the name that NAME.up and NAME.down share",
        ) from error
    times: list[int] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        if not text.isdigit() or len(text) > 9 or int(text) > MAX_TIME_MS:
            raise _bad(f"{path} line {number}: {text[:40]!r} is not a time in ms (0 to {MAX_TIME_MS})")
        if times and int(text) < times[-1]:
            raise _bad(f"{path} line {number}: {int(text)} ms comes after {times[-1]} ms")
        times.append(int(text))
    if not times or times[-1] == 0:
        raise _bad(f"{path} ends at {times[-1] if times else 'no'} ms: such a trace cannot repeat")
    return tuple(times)


def _bad(message: str) -> ConfigError:
    return ConfigError(
        message, code="bad_trace", hint="Mahimahi's format: one whole number of milliseconds per line"
    )

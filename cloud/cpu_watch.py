"""Whether other processes took the cores while something was timed.

Compute threads wait for each other hundreds of times in a step. Where another process wants a core, each wait
costs a time slice, and no repetition gets around it: a step of 8 ms takes 160. Timings like that are no use.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Final

import psutil

TOLERATED: Final = 0.25
"""Cores' worth of other work that timings bear."""

_LOOK_S: Final = 0.2
_TICK_S: Final = 0.01
"""The system counts a core's work in steps of this."""


@dataclass(frozen=True)
class CpuSample:
    """Seconds since any fixed points: of the clock, of work on all cores, of this process' work."""

    wall_s: float
    busy_s: float
    own_s: float

    @classmethod
    def now(cls) -> CpuSample:
        times = psutil.cpu_times()
        # Guests count as user time already.
        rest = sum(getattr(times, name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
        return cls(time.monotonic(), sum(times) - rest, time.process_time())


def missing_cores(begun: CpuSample, ended: CpuSample, *, threads: int, cores: int) -> float:
    """How many of the cores that `threads` wanted others held on average. Pure."""
    wall_s = max(ended.wall_s - begun.wall_s, _TICK_S)
    others_s = ended.busy_s - begun.busy_s - (ended.own_s - begun.own_s) - cores * _TICK_S
    return max(0.0, others_s / wall_s - max(0, cores - threads))


class CpuWatch:
    """Watches from its creation on."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._begun = CpuSample.now()

    def disturbed(self) -> bool:
        """Whether timings since then are spoilt."""
        cores = os.cpu_count() or 1
        missing = missing_cores(self._begun, CpuSample.now(), threads=self._threads, cores=cores)
        return missing > TOLERATED


def too_busy_to_time(threads: int) -> bool:
    """A look of a fifth of a second, which saves timing in vain."""
    watch = CpuWatch(threads)
    time.sleep(_LOOK_S)
    return watch.disturbed()

"""How long a decode step may take before its cloud counts as failed: learnt from the steps before."""

from __future__ import annotations

from collections import deque
from typing import Final

SHORTEST_S: Final = 2.0
LONGEST_S: Final = 30.0
_FACTOR: Final = 4.0
_QUANTILE: Final = 0.99
_KEPT: Final = 256
# Below this many samples a 99th percentile means nothing.
_ENOUGH: Final = 20


class StepDeadline:
    """clamp(4 × p99 of the newest steps, 2–30 s), in seconds; 30 s until enough steps were seen."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_KEPT)

    def note(self, seconds: float) -> None:
        """A step took `seconds` from its wait's beginning to its result."""
        self._seconds.append(seconds)

    @property
    def seconds(self) -> float:
        if len(self._seconds) < _ENOUGH:
            return LONGEST_S
        ordered = sorted(self._seconds)
        p99 = ordered[min(len(ordered) - 1, int(_QUANTILE * len(ordered)))]
        return min(LONGEST_S, max(SHORTEST_S, _FACTOR * p99))

"""A circuit breaker per cloud: after failures it is left alone for a while, then one request tries it again.

Pure: `now` is any monotonic time in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

State = Literal["closed", "open", "half-open"]

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 30.0


@dataclass
class CircuitBreaker:
    """closed: all may try. open: nobody, until the pause is over. half-open: one probe is on its way.

    The first failure opens it: a cloud that just refused a connection is asked again by a probe, not by
    everybody. Each further failure doubles the pause, from `first_pause_s` up to `longest_pause_s`; one
    success closes it.
    """

    first_pause_s: float = FIRST_PAUSE_S
    longest_pause_s: float = LONGEST_PAUSE_S
    failures: int = 0
    _opened_at: float = 0.0
    _probe_at: float | None = None

    @property
    def pause_s(self) -> float:
        """How long the newest failure keeps it open."""
        if not self.failures:
            return 0.0
        return min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(self.failures - 1, 32))

    def state(self, now: float) -> State:
        """As it is now. A probe that never told its end counts as lost after a pause of its own."""
        if not self.failures:
            return "closed"
        if self._probe_at is not None and now - self._probe_at < self.longest_pause_s:
            return "half-open"
        return "open"

    def may_try(self, now: float) -> bool:
        """Whether a request may try the cloud now, without trying."""
        state = self.state(now)
        return state == "closed" or (state == "open" and now - self._opened_at >= self.pause_s)

    def retry_in_s(self, now: float) -> float:
        """Seconds until `may_try` can be true; 0 if it is."""
        if self.may_try(now):
            return 0.0
        since, pause = self._opened_at, self.pause_s
        if self.state(now) == "half-open" and self._probe_at is not None:
            since, pause = self._probe_at, self.longest_pause_s
        return max(0.0, since + pause - now)

    def trying(self, now: float) -> None:
        """An attempt begins: in an open circuit it is the probe."""
        if self.failures:
            self._probe_at = now

    def succeeded(self) -> None:
        self.failures = 0
        self._probe_at = None

    def failed(self, now: float) -> None:
        self.failures += 1
        self._opened_at = now
        self._probe_at = None

"""How long steps take at present, and how long somebody new would wait for the first of them. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from isthmus.cloud.engine_core import StepRecord

IDLE_S: Final = 5.0
"""After so long without a step, what was learned from those before says nothing any more."""

_SMOOTHING: Final = 1 / 8  # means over the last eight steps or so


class LoadMeter:
    """Learns from every step. Times are on the engine's clock. Read from any thread: each figure is one
    attribute, set at once."""

    def __init__(self) -> None:
        self._decode: tuple[float, float] | None = None
        """(seconds of a decode-only step, when the last one ended)."""
        self._any: tuple[float, float, float] | None = None
        """(rows of a step, its seconds, when the last one ended)."""

    def note_step(self, record: StepRecord) -> None:
        """A step that computed one row of each of its sessions is a decode-only one."""
        rows, seconds, now = float(record.num_rows), record.seconds, record.ended_s
        before = self._any
        if before is not None and now - before[2] <= IDLE_S:
            rows, seconds = _mean(before[0], rows), _mean(before[1], seconds)
        self._any = rows, seconds, now
        if record.num_rows == record.num_sessions:
            mean = self.step_s(now)
            self._decode = (_mean(mean, record.seconds) if mean else record.seconds), now

    def step_s(self, now: float) -> float:
        """Mean seconds of the recent steps that only decoded, whatever the number of sessions in them; 0.0
        where there was none in the last IDLE_S."""
        decode = self._decode
        return decode[0] if decode is not None and now - decode[1] <= IDLE_S else 0.0

    def queue_s(self, num_rows_ahead: int) -> float:
        """Seconds before the step that computes the first row of a session that comes now is over, as far as
        others cause them: the rest of the step under way (half a recent one), then `num_rows_ahead` rows at
        the recent rate. 0.0 if there are none, or the rate is not known."""
        known = self._any
        if not num_rows_ahead or known is None:
            return 0.0
        rows, seconds, _ = known
        return seconds / 2 + num_rows_ahead * seconds / rows


def _mean(before: float, now: float) -> float:
    return before + _SMOOTHING * (now - before)

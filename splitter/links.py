"""What is known about a network link: estimates with their spread and age."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Estimate:
    """A smoothed measurement. `deviation`: of one sample, in the unit of `value`. `source`: "passive" from
    what was sent anyway, "probe", or "given" by the user (then it has no age)."""

    value: float
    deviation: float = 0.0
    age_s: float = 0.0
    num_samples: int = 0
    source: Literal["passive", "probe", "given"] = "given"


@dataclass(frozen=True, slots=True)
class LinkView:
    """A link as it is known now: round trip in seconds, bandwidths in bytes per second. None: unmeasured."""

    rtt: Estimate | None = None
    up: Estimate | None = None
    down: Estimate | None = None

    @classmethod
    def given(cls, *, rtt_s: float, up_bytes_per_s: float = 0.0, down_bytes_per_s: float = 0.0) -> LinkView:
        """As a user states it; a bandwidth of 0 means no limit."""
        return cls(
            Estimate(rtt_s),
            Estimate(up_bytes_per_s or float("inf")),
            Estimate(down_bytes_per_s or float("inf")),
        )

"""What the edge's radio takes, by kind of network: joules per byte, and watts while it is awake.

Power grows linearly with throughput (1 mW per Mbit/s = 8e-9 J per byte) from that of a radio that is awake,
as a measurement study of phones found: Huang et al., "A Close Examination of Performance and Power
Characteristics of 4G LTE Networks", MobiSys 2012, table 4. The tail after the last byte is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from isthmus.splitter.situation import Radio

_J_PER_BYTE: Final = 8e-9  # per mW/(Mbit/s)

_KINDS: Final[Mapping[str, tuple[float, float, float]]] = {
    "none": (0.0, 0.0, 0.0),
    "wifi": (283.17, 137.01, 132.86),
    "lte": (438.39, 51.97, 1288.04),
}
"""Up and down, in mW per Mbit/s, and awake, in mW."""


def radio(kind: str, *, usd_per_gb: float = 0.0) -> Radio:
    """A radio of this kind ("none": a cable, or nobody counts), on which a gigabyte costs `usd_per_gb`."""
    up, down, awake = _KINDS[kind]
    return Radio(up * _J_PER_BYTE, down * _J_PER_BYTE, usd_per_gb / 1e9, awake / 1e3)

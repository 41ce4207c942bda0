"""The link emulator: a TCP relay with delay, jitter, bandwidth or a recorded trace, and faults.

It emulates a link for trying and testing; it does not measure one.
"""

from isthmus.relay.faults import (
    Cut,
    Fault,
    Faults,
    HalfOpen,
    Happened,
    Hold,
    Refuse,
    Slice,
    Stall,
)
from isthmus.relay.script import FaultScript
from isthmus.relay.server import Relay
from isthmus.relay.shape import LinkShape, parse_address
from isthmus.relay.trace import Trace

__all__ = [
    "Cut",
    "Fault",
    "FaultScript",
    "Faults",
    "HalfOpen",
    "Happened",
    "Hold",
    "LinkShape",
    "Refuse",
    "Relay",
    "Slice",
    "Stall",
    "Trace",
    "parse_address",
]

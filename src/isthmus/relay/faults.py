"""What can go wrong with a link, at once or when a byte or a message is about to pass.

Tests drive it from Python (`relay.faults`); `isthmus.relay.script` reads the same from a file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

Direction = Literal["up", "down"]
"""Up is towards the relay's target, the cloud."""
Side = Literal["up", "down", "both"]
Scope = Literal["up", "down", "both", "total"]
"""Whose bytes count: a direction of one connection, one connection, or all connections together."""

DIRECTIONS: Final[tuple[Direction, Direction]] = ("up", "down")


@dataclass(frozen=True)
class Cut:
    """The connection is reset (RST to both ends); what is on its way is lost."""


@dataclass(frozen=True)
class Stall:
    """No byte passes for `seconds`, on any connection; afterwards all do, in order."""

    seconds: float
    side: Side = "both"


@dataclass(frozen=True)
class HalfOpen:
    """What the connection carries in this direction is swallowed for good, its end included: TCP stays up."""

    side: Side = "both"


@dataclass(frozen=True)
class Slice:
    """From now on every write to a socket has at most `size` bytes; 0 ends it."""

    size: int


@dataclass(frozen=True)
class Refuse:
    """New connections are refused for `seconds`; those that stand are not touched."""

    seconds: float


class Hold:
    """The bytes of one direction of a connection are kept back until `release()` or a cut."""

    def __init__(self, direction: Direction) -> None:
        self.direction = direction
        self.reached = asyncio.Event()
        """Set once bytes are kept back."""
        self.released = asyncio.Event()

    def release(self) -> None:
        self.released.set()


Fault = Cut | Stall | HalfOpen | Slice | Refuse | Hold


@dataclass(frozen=True)
class Happened:
    """One fault that was done: seconds since the relay's start, the connection's number (None: all)."""

    at_s: float
    fault: Fault
    connection: int | None


@dataclass(eq=False)
class Line:
    """One connection through the relay, numbered from 1 in the order of arrival."""

    number: int
    abort: Callable[[], None]
    bytes: dict[Direction, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    messages: dict[Direction, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    swallowed: set[Direction] = field(default_factory=set)
    holds: dict[Direction, Hold] = field(default_factory=dict)
    is_cut: bool = False


@dataclass(eq=False)
class _Trigger:
    """A fault that waits for a byte or a message. `connection` None: whichever comes there first."""

    number: int
    scope: Scope
    of_messages: bool
    fault: Fault
    connection: int | None


class Faults:
    """The faults of one relay: done now, or armed for a byte or message. Each armed fault happens once."""

    def __init__(self, refuse: Callable[[float], None]) -> None:
        self.lines: dict[int, Line] = {}
        """The connections that stand, by number."""
        self.num_lines = 0
        self.total_bytes = 0
        self.happened: list[Happened] = []
        self.on_fault: Callable[[Happened], None] | None = None
        self.slice_bytes = 0
        self.origin_s = 0.0
        """When the relay started, on the event loop's clock."""
        self._refuse = refuse
        self._armed: list[_Trigger] = []
        self._stalled_until: dict[Direction, float] = {"up": 0.0, "down": 0.0}

    # ---- at once ---------------------------------------------------------------------------------

    def do(self, fault: Fault, connection: int | None = None) -> None:
        """Let it happen now, to one connection or (None) to all that stand."""
        lines = list(self.lines.values()) if connection is None else [self.lines[connection]]
        match fault:
            case Cut():
                for line in lines:
                    line.is_cut = True
                    line.abort()
            case HalfOpen(side):
                for line in lines:
                    line.swallowed.update(_directions(side))
            case Hold():
                for line in lines:
                    line.holds[fault.direction] = fault
            case Stall(seconds, side):
                until = asyncio.get_running_loop().time() + seconds
                for direction in _directions(side):
                    self._stalled_until[direction] = max(self._stalled_until[direction], until)
            case Slice(size):
                self.slice_bytes = size
            case Refuse(seconds):
                self._refuse(seconds)
        happened = Happened(asyncio.get_running_loop().time() - self.origin_s, fault, connection)
        self.happened.append(happened)
        if self.on_fault is not None:
            self.on_fault(happened)

    def cut(self) -> None:
        """Reset all connections."""
        self.do(Cut())

    # ---- armed -----------------------------------------------------------------------------------

    def at_byte(self, number: int, scope: Scope, fault: Fault, *, connection: int | None = None) -> None:
        """`fault` once `number` bytes have passed, and not one more."""
        self._armed.append(_Trigger(number, scope, False, fault, connection))

    def at_message(
        self, number: int, direction: Direction, fault: Fault, *, connection: int | None = None
    ) -> None:
        """`fault` before the first byte of websocket message `number` (from 1) of a connection passes."""
        self._armed.append(_Trigger(number, direction, True, fault, connection))

    def hold(
        self, direction: Direction, *, message: int | None = None, connection: int | None = None
    ) -> Hold:
        """Keep back everything from that message on (None: from the next byte on, of the connections that
        stand)."""
        hold = Hold(direction)
        if message is None:
            self.do(hold, connection)
        else:
            self.at_message(message, direction, hold, connection=connection)
        return hold

    # ---- for the pipes ---------------------------------------------------------------------------

    def fire(self, line: Line, direction: Direction, message: int | None) -> None:
        """Do what is armed for the place where `line` stands; `message`: the one about to begin."""
        for trigger in [one for one in self._armed if self._concerns(one, line, direction)]:
            due = message == trigger.number if trigger.of_messages else self._left(trigger, line) <= 0
            if due and trigger in self._armed:
                self._armed.remove(trigger)
                self.do(trigger.fault, line.number)

    def room(self, line: Line, direction: Direction, starts: list[int], at: int, size: int) -> int:
        """How many of the bytes [at, size) may pass before something armed has to be looked at;
        `starts`: where messages begin in them."""
        stop = size
        for trigger in self._armed:
            if not self._concerns(trigger, line, direction):
                continue
            if trigger.of_messages:
                stop = min([stop, *(start for start in starts if start > at)])
            else:
                stop = min(stop, at + self._left(trigger, line))
        return stop - at

    async def wait(self, line: Line, direction: Direction) -> bool:
        """Wait as long as the direction is stalled or held; whether there was anything to wait for."""
        loop = asyncio.get_running_loop()
        waited = False
        while (left := self._stalled_until[direction] - loop.time()) > 0:
            waited = True
            await asyncio.sleep(left)
        if (hold := line.holds.get(direction)) is not None:
            waited = True
            hold.reached.set()
            await hold.released.wait()
            line.holds.pop(direction, None)
        return waited

    def count(self, line: Line, direction: Direction, size: int, messages: int) -> None:
        """`size` bytes pass now, among them the beginnings of so many messages."""
        line.bytes[direction] += size
        line.messages[direction] += messages
        self.total_bytes += size

    def _left(self, trigger: _Trigger, line: Line) -> int:
        match trigger.scope:
            case "total":
                passed = self.total_bytes
            case "both":
                passed = line.bytes["up"] + line.bytes["down"]
            case "up" | "down" as direction:
                passed = line.bytes[direction]
        return trigger.number - passed

    @staticmethod
    def _concerns(trigger: _Trigger, line: Line, direction: Direction) -> bool:
        return trigger.connection in (None, line.number) and trigger.scope in (direction, "both", "total")


def _directions(side: Side) -> tuple[Direction, ...]:
    return DIRECTIONS if side == "both" else (side,)

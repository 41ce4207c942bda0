"""Fault scripts: a text file that says what goes wrong with a link, and when.

One fault per line, `TRIGGER: FAULT`; empty lines and what follows `#` are ignored. Times are seconds.

    after 2.5: stall 1.5                           2.5 s after the start, for 1.5 s
    after 0: slice 1                               every write has one byte
    every 3..8: one of cut, stall 1.5, half-open   again and again, 3 to 8 s apart, one of the three
    at byte 5000 up: cut                           when 5,000 bytes have gone up on a connection
    at byte 100..900 total: cut                    one place, drawn from the seed; all connections together
    at message 7 down of connection 2: stall 2     before message 7 comes down on the second connection

Triggers:  after TIME · every TIME · at byte NUMBER up|down|both|total · at message NUMBER up|down
           the last two also with `of connection NUMBER`, else the first to get there has it; once each.
           `both` counts both directions of a connection, `total` all connections; messages are websocket's.
Faults:    cut · stall TIME [up|down] · half-open [up|down] · slice BYTES (0 ends it) · refuse TIME
           `one of FAULT, FAULT, …` draws one each time. `after` and `every` mean all connections that stand.
Every number may be a range `LOW..HIGH`: then it is drawn anew each time, from the seed.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from isthmus.protocol.errors import ConfigError
from isthmus.relay.faults import Cut, Direction, Fault, Faults, HalfOpen, Refuse, Scope, Side, Slice, Stall

MAX_SCRIPT_BYTES: Final = 1024 * 1024
MAX_SECONDS: Final = 86_400.0
MAX_COUNT: Final = 10**15
# Faults closer together than this would be a busy loop, not a bad link.
MIN_INTERVAL_S: Final = 0.01

_TIME: Final = r"(\d{1,9}(?:\.\d{1,9})?(?:\.\.\d{1,9}(?:\.\d{1,9})?)?)(?: ?s)?"
_COUNT: Final = r"(\d{1,15}(?:\.\.\d{1,15})?)"
_SIDE: Final = r"(?: (up|down|both))?"
_OF: Final = r"(?: of connection (\d{1,9}))?"


@dataclass(frozen=True)
class Amount:
    """A number, or a range from which one is drawn."""

    low: float
    high: float

    def draw(self, rng: random.Random) -> float:
        return self.low if self.low == self.high else rng.uniform(self.low, self.high)

    def draw_whole(self, rng: random.Random) -> int:
        return rng.randint(int(self.low), int(self.high))


Maker = Callable[[random.Random], Fault]


@dataclass(frozen=True)
class Rule:
    """One line. `at` is "after" or "every" (`amount` in seconds), "byte" or "message" (a count)."""

    at: str
    amount: Amount
    faults: tuple[Maker, ...]
    scope: Scope = "total"
    connection: int | None = None

    def make(self, rng: random.Random) -> Fault:
        return rng.choice(self.faults)(rng)


@dataclass(frozen=True)
class FaultScript:
    """The rules of one file, in its order."""

    rules: tuple[Rule, ...]

    @classmethod
    def load(cls, path: str | Path) -> FaultScript:
        """Reads a script. ConfigError `bad_faults` names the file and the line."""
        try:
            with Path(path).open("rb") as file:
                raw = file.read(MAX_SCRIPT_BYTES + 1)
            text = raw.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the fault script {path}: {error}", code="bad_faults") from error
        if len(raw) > MAX_SCRIPT_BYTES:
            raise ConfigError(
                f"the fault script {path} is longer than {MAX_SCRIPT_BYTES} bytes", code="bad_faults"
            )
        return cls.parse(text, name=str(path))

    @classmethod
    def parse(cls, text: str, *, name: str = "script") -> FaultScript:
        """The script in `text`. ConfigError `bad_faults` names the line of `name`."""
        rules = []
        for number, line in enumerate(text.split("\n"), start=1):
            bare = " ".join(line.partition("#")[0].split())
            if bare:
                rules.append(_rule(bare, f"{name} line {number}"))
        return cls(tuple(rules))

    async def play(self, faults: Faults, seed: int) -> None:
        """Arm what waits for bytes and messages, then do the rest in its time; `every` never ends. Each rule
        has its own random numbers, so that none changes what another draws."""
        async with asyncio.TaskGroup() as timers:
            for index, rule in enumerate(self.rules):
                rng = random.Random(f"{seed}/{index}")
                if rule.at == "byte":
                    number = rule.amount.draw_whole(rng)
                    faults.at_byte(number, rule.scope, rule.make(rng), connection=rule.connection)
                elif rule.at == "message":
                    number = rule.amount.draw_whole(rng)
                    direction = cast(Direction, rule.scope)
                    faults.at_message(number, direction, rule.make(rng), connection=rule.connection)
                else:
                    timers.create_task(_timed(rule, faults, rng))


async def _timed(rule: Rule, faults: Faults, rng: random.Random) -> None:
    while True:
        await asyncio.sleep(rule.amount.draw(rng))
        faults.do(rule.make(rng))
        if rule.at == "after":
            return


def _rule(line: str, where: str) -> Rule:
    trigger, colon, what = (part.strip() for part in line.partition(":"))
    if not colon:
        raise _bad(where, f"{line[:60]!r} has no colon between trigger and fault", "after 2.5: cut")
    choices = what.removeprefix("one of ").split(",") if what.startswith("one of ") else [what]
    makers = tuple(_fault(choice.strip(), where) for choice in choices)
    if found := re.fullmatch(rf"(after|every) {_TIME}", trigger):
        amount = _amount(found[2], where, MAX_SECONDS)
        if found[1] == "every" and amount.low < MIN_INTERVAL_S:
            raise _bad(where, f"every {amount.low} s is under {MIN_INTERVAL_S} s", "every 3..8: cut")
        return Rule(found[1], amount, makers)
    if found := re.fullmatch(rf"at byte {_COUNT} (up|down|both|total){_OF}", trigger):
        return Rule("byte", _amount(found[1], where, MAX_COUNT), makers, cast(Scope, found[2]), _of(found[3]))
    if found := re.fullmatch(rf"at message {_COUNT} (up|down){_OF}", trigger):
        amount = _amount(found[1], where, MAX_COUNT)
        if amount.low < 1:
            raise _bad(where, f"message {amount.low:.0f}: the first is message 1", "at message 1 up: cut")
        return Rule("message", amount, makers, cast(Scope, found[2]), _of(found[3]))
    raise _bad(where, f"{trigger[:60]!r} is no trigger", "after 2.5 · every 3..8 · at byte 5000 up")


def _fault(text: str, where: str) -> Maker:
    if text == "cut":
        return lambda _rng: Cut()
    if found := re.fullmatch(rf"stall {_TIME}{_SIDE}", text):
        stalled, side = _amount(found[1], where, MAX_SECONDS), cast(Side, found[2] or "both")
        return lambda rng: Stall(stalled.draw(rng), side)
    if found := re.fullmatch(rf"half-open{_SIDE}", text):
        half = cast(Side, found[1] or "both")
        return lambda _rng: HalfOpen(half)
    if found := re.fullmatch(rf"slice {_COUNT}", text):
        size = _amount(found[1], where, MAX_COUNT)
        return lambda rng: Slice(size.draw_whole(rng))
    if found := re.fullmatch(rf"refuse {_TIME}", text):
        refused = _amount(found[1], where, MAX_SECONDS)
        return lambda rng: Refuse(refused.draw(rng))
    raise _bad(where, f"{text[:60]!r} is no fault", "cut · stall 1.5 up · half-open · slice 1 · refuse 2")


def _amount(text: str, where: str, most: float) -> Amount:
    low, dots, high = text.partition("..")
    amount = Amount(float(low), float(high if dots else low))
    if not amount.low <= amount.high <= most:
        raise _bad(where, f"{text} does not rise from a lower to a higher number up to {most:.0f}", "3..8")
    return amount


def _of(text: str | None) -> int | None:
    return None if text is None else int(text)


def _bad(where: str, message: str, example: str) -> ConfigError:
    return ConfigError(f"{where}: {message}", code="bad_faults", hint=f"for example: {example}")

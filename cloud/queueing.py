"""Whose turn it is: sessions as the scheduler sees them, and the orders `fcfs` and `mlfq` over them.

An order decides who gets a step's rows and who starts first. It does not decide who loses pages: see
`isthmus.cloud.scheduler`. In both orders a higher priority goes first, and nobody starves: a session that
had rows to compute and was not served for `aging_s` goes before all others, whatever its priority, until it
is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from isthmus.cloud.kv import BlockTable

_FORGETTING: Final = 0.998  # weight of a step in the next one's estimate: the last five hundred count


@dataclass(slots=True, eq=False)
class Entry:
    """One session. Its rows are `num_computed` in the KV of `num_known` received or sampled."""

    session_id: int
    table: BlockTable
    arrival: int
    """Number in the order of joining: while it works, nobody with a greater one preempts it."""
    priority: int
    prompt_rows: int
    max_rows: int
    num_known: int
    last_active_s: float
    """When it last got rows or had some computed."""
    waiting_since_s: float
    """While it has rows to compute: since when none of them was."""
    last_step: int = 0
    """Number of the step that last computed rows of it."""
    last_turn: int = 0
    """Number of its last share in a budget that not all could have."""
    num_preemptions: int = 0
    running: bool = False
    """Admitted, and holding pages. A session that has not started may hold pages of a cached prefix."""
    parked: bool = False
    """Preempted while it had nothing to do: not computed again before its next row comes."""
    aged: bool = False
    """Waited so long that it goes first."""
    level: int = 0
    used_s: float = 0.0
    """Compute time used at this level."""

    @property
    def num_computed(self) -> int:
        return self.table.length

    @property
    def num_pending(self) -> int:
        return 0 if self.parked else self.num_known - self.table.length


class Fcfs:
    """First come, first served."""

    def __init__(self, *, aging_s: float) -> None:
        self.aging_s = aging_s

    def join(self, entry: Entry) -> None:
        """A session is new."""

    def served(self, shares: Sequence[tuple[Entry, int]], seconds: float) -> None:
        """A step of `seconds` computed for each entry that many row-layers (rows times layers run)."""

    def turns(self, ready: Sequence[Entry], *, now: float) -> list[Entry]:
        """`ready`, all of which have rows to compute, in the order of their turns. Those passed over for
        `aging_s` come first. Single rows of equal standing take turns: least recently served first."""
        for entry in ready:
            if now - entry.waiting_since_s >= self.aging_s and not entry.aged:
                entry.aged = True
                entry.level, entry.used_s = 0, 0.0
        return sorted(ready, key=_turn)


def before_newcomer(entry: Entry) -> bool:
    """Whether the turn of `entry` comes before that of a session of priority 0 that would join now, with a
    prompt short enough for the first level."""
    return _turn(entry) < (1, 0, 0, 0, entry.arrival + 1)


def _turn(entry: Entry) -> tuple[int, int, int, int, int]:
    last_turn = entry.last_turn if entry.num_pending == 1 else 0
    if entry.aged:
        return (0, 0, 0, last_turn, entry.arrival)
    return (1, -entry.priority, entry.level, last_turn, entry.arrival)


class Mlfq(Fcfs):
    """A skip-join multi-level feedback queue after FastServe (arXiv 2305.05920): short work first, without
    knowing what is short.

    Level i grants `quantum_s * 2**i` seconds of compute, then the session sinks to level i + 1; the last
    level grants any amount. A session joins at the first level whose quantum covers its prompt (rows times
    layers, by the learned seconds per row-layer), so that a long prompt does not pass through levels it must
    leave anyway. A step's seconds are shared out by row-layers, so waiting for the edge uses up nothing.
    """

    def __init__(self, *, aging_s: float, num_levels: int, quantum_s: float) -> None:
        super().__init__(aging_s=aging_s)
        self.num_levels = num_levels
        self.quantum_s = quantum_s
        # Least squares through the origin: steps with many rows, which a prompt's are, weigh most.
        self._seconds_by_work = 0.0
        self._work_squared = 0.0

    @property
    def seconds_per_row_layer(self) -> float:
        """0.0 until a step was seen: then everyone joins at the top."""
        return self._seconds_by_work / self._work_squared if self._work_squared else 0.0

    def join(self, entry: Entry) -> None:
        row_layers = (entry.prompt_rows - entry.num_computed) * entry.table.depth
        seconds = row_layers * self.seconds_per_row_layer
        while entry.level < self.num_levels - 1 and seconds > self._quantum(entry.level):
            entry.level += 1

    def served(self, shares: Sequence[tuple[Entry, int]], seconds: float) -> None:
        total = sum(row_layers for _, row_layers in shares)
        if seconds <= 0 or not total:
            return
        self._seconds_by_work = _FORGETTING * self._seconds_by_work + seconds * total
        self._work_squared = _FORGETTING * self._work_squared + total * total
        for entry, row_layers in shares:
            entry.used_s += seconds * row_layers / total
            while entry.level < self.num_levels - 1 and entry.used_s >= self._quantum(entry.level):
                entry.used_s -= self._quantum(entry.level)
                entry.level += 1

    def _quantum(self, level: int) -> float:
        return self.quantum_s * 2.0**level

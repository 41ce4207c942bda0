"""Whose pages a session may take for its next rows when the pool runs short. Pure: no torch, no clock.

A preempted session loses its KV only; its input rows are kept, and computing them again makes the same KV (a
row is far smaller than its keys and values). Victims follow the order of arrival, whatever the policy and
the priorities:

- A running session takes pages from those that have not started (cached prefixes), then preempts running ones
  that arrived later, of those the lowest priority first and among equals the newest, then earlier ones that
  have been waiting for their edge for `idle_preempt_s`, longest idle first.
- A starting session preempts none that has work; it may take the pages of the first and the last kind.

So the running session that arrived first always moves, the relation never turns round, and a change of level
or priority makes nobody compute twice.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from isthmus.cloud.kv import PageArray, PagePool, columns_for
from isthmus.cloud.queueing import Entry


@dataclass(slots=True)
class Pager:
    """Finds room in one pool for the sessions of one scheduler. Allocating is the caller's.

    `entries` are all its sessions by id, in order of arrival.
    """

    pool: PagePool
    entries: Mapping[int, Entry]
    idle_preempt_s: float
    num_preemptions: int = 0
    preempted: list[int] = field(default_factory=list)
    """Sessions preempted in the plan under way; whoever plans empties it."""

    def writable(self, running: Sequence[Entry], shares: Mapping[int, int]) -> set[int]:
        """Those that hold all pages for their share of rows, none of them shared with anyone.

        They are most, and this one look at all of them saves each its own. No plan makes a page more shared.
        """
        size = self.pool.page_tokens
        found: set[int] = set()
        windows: list[PageArray] = []
        for entry in running:
            start = entry.num_computed
            stop = start + shares[entry.session_id]
            if stop <= entry.table.capacity:
                found.add(entry.session_id)
                windows.append(entry.table.pages[:, start // size : columns_for(stop, size)])
        if not windows or self.pool.shared(np.concatenate(windows, axis=None)).any():
            return set()
        return found

    def make_room(self, entry: Entry, rows: int, picked: Container[int], *, whole: bool, now: float) -> int:
        """How many of the next `rows` have or can get pages, preempting for them if that suffices for all.
        `whole`: all or none. Sessions in `picked` are spared."""
        goal = entry.num_computed + rows
        if self._has_room(entry, goal):
            return rows
        victims = self._victims(entry, picked, now)
        in_reach = self.pool.num_available + sum(victim.table.num_pages for victim in victims)
        if entry.table.pages_needed(goal) <= in_reach:
            for victim in victims:
                self.preempt(victim)
                if self._has_room(entry, goal):
                    return rows
        return 0 if whole else self._rows_that_fit(entry, rows)

    def _has_room(self, entry: Entry, goal: int) -> bool:
        table, size = entry.table, self.pool.page_tokens
        at_most = table.depth * (columns_for(goal, size) - table.length // size)  # if all of them were shared
        return at_most <= self.pool.num_available or table.pages_needed(goal) <= self.pool.num_available

    def _rows_that_fit(self, entry: Entry, rows: int) -> int:
        """The most of `rows` that the available pages hold."""
        columns = self.pool.num_available // entry.table.depth
        rows = min(rows, entry.table.capacity + columns * self.pool.page_tokens - entry.num_computed)
        while rows > 0 and entry.table.pages_needed(entry.num_computed + rows) > self.pool.num_available:
            rows -= self.pool.page_tokens  # a shared last page takes pages for its copy too
        return max(0, rows)

    def _victims(self, entry: Entry, picked: Container[int], now: float) -> list[Entry]:
        """Whose pages `entry` may take, in this order.

        A session that merely waits for its edge's next row is spared for a while by those that arrived
        later: taking its pages between two rows would make the two of them recompute in turns.
        """
        not_started: list[Entry] = []
        later: list[Entry] = []
        idle: list[Entry] = []
        for other in self.entries.values():
            if other is entry or not other.table.num_pages or other.session_id in picked:
                continue
            if not other.running:
                not_started.append(other)
            elif entry.running and other.arrival > entry.arrival:
                later.append(other)
            elif self._is_idle(other, now):
                idle.append(other)
        not_started.reverse()
        later.sort(key=lambda other: (other.priority, -other.arrival))
        return not_started + later + _by_last_active(idle)

    def by_idleness(self, *, now: float) -> tuple[list[Entry], list[Entry]]:
        """The running sessions: those at work, and those that have waited for their edge long enough to be
        preempted, longest first."""
        at_work: list[Entry] = []
        idle: list[Entry] = []
        for entry in self.entries.values():
            if entry.running:
                (idle if self._is_idle(entry, now) else at_work).append(entry)
        return at_work, _by_last_active(idle)

    def _is_idle(self, entry: Entry, now: float) -> bool:
        return entry.num_pending == 0 and now >= entry.last_active_s + self.idle_preempt_s

    def preempt(self, victim: Entry) -> None:
        """Takes all its pages; it starts over when it is admitted again."""
        victim.parked = victim.num_pending == 0
        victim.running = False
        victim.table.free_all()
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self.preempted.append(victim.session_id)

    def retry_in(self, *, now: float) -> float | None:
        """Seconds until one more session that waits for its edge counts as idle, None if none will."""
        waits = (
            entry.last_active_s + self.idle_preempt_s - now
            for entry in self.entries.values()
            if entry.running and not entry.num_pending
        )
        return min((wait for wait in waits if wait > 0), default=None)


def _by_last_active(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: entry.last_active_s)

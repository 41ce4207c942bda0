"""Which rows run in the next step: continuous batching without phases. Pure: no torch, no clock, no thread.

Each session has `num_known` rows (received or sampled) and `num_computed` of them in the KV; a step lets
the second chase the first. There is no prefill and no decode: a session with one row to go is what others
call decoding, one with many is prefilling in chunks, one waiting for its edge has none and costs nothing.

Pages are handed out strictly in order of arrival, so the oldest session with work always moves: short of
pages, it preempts the newest one. A preempted session loses its KV only; its input rows are kept, and
computing them again makes the same KV (a row is far smaller than its keys and values).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from isthmus.cloud.kv import BlockTable, PageCopies, PagePool


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """`max_rows` is the token budget of one step; `max_chunk_rows` the most one session gets of it."""

    max_rows: int = 512
    max_chunk_rows: int = 256
    idle_preempt_s: float = 1.0

    def __post_init__(self) -> None:
        if self.max_rows < 2 or self.max_chunk_rows < 1 or self.idle_preempt_s < 0:
            raise ValueError(f"scheduler limits out of range: {self}")


@dataclass(slots=True, eq=False)
class Entry:
    """One session as the scheduler sees it."""

    session_id: int
    table: BlockTable
    arrival: int
    num_known: int
    last_active_s: float
    last_step: int = 0
    num_preemptions: int = 0
    parked: bool = False
    """Preempted while it had nothing to do: not computed again before its next row comes."""

    @property
    def num_computed(self) -> int:
        return self.table.length

    @property
    def num_pending(self) -> int:
        return 0 if self.parked else self.num_known - self.num_computed


@dataclass(frozen=True, slots=True)
class Pick:
    """Rows [start, start + count) of one session run in this step; their pages are there."""

    session_id: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. `retry_in_s` is set when nothing can run until an idle session may be preempted."""

    picks: tuple[Pick, ...] = ()
    preempted: tuple[int, ...] = ()
    blocked: tuple[int, ...] = ()
    retry_in_s: float | None = None


@dataclass(slots=True)
class Scheduler:
    """First come, first served, with single rows served ahead of chunks within one step.

    `copy_pages` makes the copies that writing to shared pages needs; it is called right after each
    allocation, because the next one may hand out the source pages.
    """

    pool: PagePool
    copy_pages: Callable[[PageCopies], None]
    config: SchedulerConfig = field(default_factory=SchedulerConfig)
    num_preemptions: int = 0
    _entries: dict[int, Entry] = field(default_factory=dict)
    _arrivals: int = 0
    _step: int = 0

    def add(self, session_id: int, table: BlockTable, *, now: float) -> None:
        """A session joins; rows already in its table (an adopted prefix) count as known and computed."""
        if session_id in self._entries:
            raise ValueError(f"session {session_id} is scheduled already")
        self._arrivals += 1
        self._entries[session_id] = Entry(session_id, table, self._arrivals, table.length, now)

    def remove(self, session_id: int) -> None:
        """The session leaves. Its pages are the caller's to free or to keep."""
        del self._entries[session_id]

    def extend(self, session_id: int, num_rows: int, *, now: float) -> None:
        """`num_rows` more rows of the session are known."""
        entry = self._entries[session_id]
        entry.num_known += num_rows
        entry.last_active_s = now
        entry.parked = False

    def truncate(self, session_id: int, num_rows: int) -> None:
        """Rows from `num_rows` on are forgotten, computed or not."""
        entry = self._entries[session_id]
        entry.num_known = min(entry.num_known, num_rows)
        if num_rows < entry.table.length:
            entry.table.truncate(num_rows)

    def commit(self, picks: Iterable[Pick], *, now: float) -> None:
        """The rows of `picks` are in the KV. Nothing moves before: a failed step can be planned again."""
        for pick in picks:
            entry = self._entries[pick.session_id]
            entry.table.advance(pick.count)
            entry.last_active_s = now
            entry.last_step = self._step

    def entry(self, session_id: int) -> Entry:
        return self._entries[session_id]

    @property
    def num_running(self) -> int:
        """Sessions that hold pages. This and `num_waiting` may be asked from other threads."""
        return sum(1 for entry in tuple(self._entries.values()) if entry.table.num_pages)

    @property
    def num_waiting(self) -> int:
        """Sessions with rows to compute and no page yet."""
        return sum(1 for e in tuple(self._entries.values()) if e.num_pending and not e.table.num_pages)

    @property
    def has_work(self) -> bool:
        return any(entry.num_pending for entry in self._entries.values())

    def plan(self, *, now: float) -> Plan:
        """The next step's rows, with pages allocated for them. `now` in seconds of any monotonic clock."""
        ready = [entry for entry in self._entries.values() if entry.num_pending]
        if not ready:
            return Plan()
        self._step += 1
        wanted = self._share_budget(ready)
        picks: list[Pick] = []
        preempted: list[int] = []
        blocked: list[int] = []
        picked: set[int] = set()
        for entry in sorted(ready, key=_by_arrival):
            rows = wanted.get(entry.session_id, 0)
            if rows == 0:
                continue
            rows = self._make_room(entry, rows, picked, preempted, now)
            if rows == 0:
                blocked.append(entry.session_id)
                continue
            self.copy_pages(entry.table.ensure(entry.num_computed + rows))
            picked.add(entry.session_id)
            picks.append(Pick(entry.session_id, entry.num_computed, rows))
        retry = self._retry_in(now) if blocked and not picks else None
        return Plan(tuple(picks), tuple(preempted), tuple(blocked), retry)

    def _share_budget(self, ready: Sequence[Entry]) -> dict[int, int]:
        """Rows each session may compute in this step: single rows first, what is left to chunks by arrival.

        Chunks keep a quarter of the budget however many single rows there are, and single rows beyond the
        budget take turns, so neither kind can starve the other.
        """
        short = [entry for entry in ready if entry.num_pending == 1]
        long = sorted((entry for entry in ready if entry.num_pending > 1), key=_by_arrival)
        reserved = max(self.config.max_rows // 4, 1) if long else 0
        short = sorted(short, key=lambda e: (e.last_step, e.arrival))[: self.config.max_rows - reserved]
        shares = {entry.session_id: 1 for entry in short}
        budget = self.config.max_rows - len(short)
        for entry in long:
            rows = min(entry.num_pending, self.config.max_chunk_rows, budget)
            if rows == 0:
                break
            shares[entry.session_id] = rows
            budget -= rows
        return shares

    def _make_room(self, entry: Entry, rows: int, picked: set[int], preempted: list[int], now: float) -> int:
        """How many of `rows` have or can get pages, preempting for them if that suffices."""
        # A session without pages starts only when all it is known to need fits: starting it chunk by chunk
        # against the others' growth would preempt and recompute over and over.
        starting = entry.table.num_pages == 0
        goal = entry.num_known if starting else entry.num_computed + rows
        missing = entry.table.pages_needed(goal)
        if missing > self.pool.num_available:
            victims = self._victims(entry, picked, now)
            if missing <= self.pool.num_available + sum(victim.table.num_pages for victim in victims):
                for victim in victims:
                    self._preempt(victim)
                    preempted.append(victim.session_id)
                    missing = entry.table.pages_needed(goal)
                    if missing <= self.pool.num_available:
                        break
        if missing <= self.pool.num_available:
            return rows
        return 0 if starting else self._rows_that_fit(entry, rows)

    def _rows_that_fit(self, entry: Entry, rows: int) -> int:
        """The most of `rows` that the available pages hold."""
        columns = self.pool.num_available // entry.table.depth
        rows = min(rows, entry.table.capacity + columns * self.pool.page_tokens - entry.num_computed)
        while rows > 0 and entry.table.pages_needed(entry.num_computed + rows) > self.pool.num_available:
            rows -= self.pool.page_tokens  # a shared last page takes pages for its copy too
        return max(0, rows)

    def _victims(self, entry: Entry, picked: set[int], now: float) -> list[Entry]:
        """Whom `entry` may preempt: the newest first among those newer, then older ones long idle.

        An older session that merely waits for its edge's next row is spared for `idle_preempt_s`: taking its
        pages between two rows would make the two of them recompute in turns.
        """
        holders = [
            other
            for other in self._entries.values()
            if other.table.num_pages and other is not entry and other.session_id not in picked
        ]
        newer = sorted((o for o in holders if o.arrival > entry.arrival), key=_by_arrival, reverse=True)
        idle = sorted(
            (o for o in holders if o.arrival < entry.arrival and self._is_idle(o, now)),
            key=lambda o: o.last_active_s,
        )
        return newer + idle

    def _is_idle(self, entry: Entry, now: float) -> bool:
        return entry.num_pending == 0 and now - entry.last_active_s >= self.config.idle_preempt_s

    def _preempt(self, victim: Entry) -> None:
        victim.parked = victim.num_pending == 0
        victim.table.free_all()
        victim.num_preemptions += 1
        self.num_preemptions += 1

    def _retry_in(self, now: float) -> float | None:
        """Seconds until some session that waits for its edge counts as idle, None if none will."""
        waits = [
            max(0.0, entry.last_active_s + self.config.idle_preempt_s - now)
            for entry in self._entries.values()
            if entry.table.num_pages and not entry.num_pending
        ]
        return min(waits, default=None)


def _by_arrival(entry: Entry) -> int:
    return entry.arrival

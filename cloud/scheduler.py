"""Which rows run in the next step: continuous batching without phases. Pure: no torch, no clock, no thread.

Each session has `num_known` rows (received or sampled) and `num_computed` of them in the KV; a step lets
the second chase the first. There is no prefill and no decode: a session with one row to go is what others
call decoding, one with many is prefilling in chunks, one waiting for its edge has none and costs nothing.

Two orders are at work: `isthmus.cloud.queueing` says whose turn it is, who gets a step's rows and who of
those not started is next (`isthmus.cloud.reservation` says whether it may start). Pages follow the order of
arrival alone: `isthmus.cloud.paging`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from isthmus.cloud.budget import rows_before, share_budget
from isthmus.cloud.kv import BlockTable, PageCopies, PagePool
from isthmus.cloud.paging import Pager
from isthmus.cloud.queueing import Entry, Fcfs, Mlfq, before_newcomer
from isthmus.cloud.reservation import Admission, Forecaster, Reservation
from isthmus.splitter.output_lengths import OutputLengths

Policy: TypeAlias = Literal["fcfs", "mlfq"]


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """`max_rows` is the row budget of one step, `max_chunk_rows` the most one session gets of it.

    With `chunked` off, all rows a session has are computed in one step, for comparison: `max_chunk_rows` does
    not count, and a session with more than `max_rows` runs alone in its step.
    `length_coverage` is the share of sessions that shall end by their predicted length.
    The defaults are what served a trace best in `bench cloud --simulate` (docs/measurements.md).
    """

    max_rows: int = 256
    max_chunk_rows: int = 128
    idle_preempt_s: float = 1.0
    policy: Policy = "mlfq"
    chunked: bool = True
    reservation: Reservation = "predicted"
    length_coverage: float = 0.8
    aging_s: float = 30.0
    mlfq_levels: int = 8
    mlfq_quantum_s: float = 0.05

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            raise ValueError(f"policy {self.policy!r} is none of {', '.join(get_args(Policy))}")
        if self.reservation not in get_args(Reservation):
            raise ValueError(
                f"reservation {self.reservation!r} is none of {', '.join(get_args(Reservation))}"
            )
        in_range = {
            "max_rows": self.max_rows >= 2,
            "max_chunk_rows": self.max_chunk_rows >= 1,
            "idle_preempt_s": self.idle_preempt_s >= 0,
            "length_coverage": 0 < self.length_coverage < 1,
            "aging_s": self.aging_s > 0,
            "mlfq_levels": 1 <= self.mlfq_levels <= 64,
            "mlfq_quantum_s": 0 < self.mlfq_quantum_s < float("inf"),
        }
        bad = [f"{name} = {getattr(self, name)}" for name, good in in_range.items() if not good]
        if bad:
            raise ValueError(f"scheduler limits out of range: {', '.join(bad)}")


@dataclass(frozen=True, slots=True)
class Pick:
    """Rows [start, start + count) of one session run in this step; their pages are there."""

    session_id: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. `blocked` sessions had their turn but no pages. `retry_in_s` is set when nothing can run
    until an idle session may be preempted."""

    picks: tuple[Pick, ...] = ()
    preempted: tuple[int, ...] = ()
    blocked: tuple[int, ...] = ()
    retry_in_s: float | None = None


@dataclass(slots=True)
class _Step:
    """A plan in the making: its picks by session."""

    now: float
    picks: dict[int, Pick] = field(default_factory=dict)
    blocked: list[int] = field(default_factory=list)


class Scheduler:
    """Plans steps over one page pool."""

    def __init__(
        self,
        pool: PagePool,
        copy_pages: Callable[[PageCopies], None],
        config: SchedulerConfig | None = None,
    ) -> None:
        """`copy_pages` makes the copies that writing to shared pages needs; it is called right after each
        allocation, because the next one may hand out the source pages."""
        self.pool = pool
        self.config = config = config or SchedulerConfig()
        self.lengths = OutputLengths(coverage=config.length_coverage)
        self._copy_pages = copy_pages
        self._entries: dict[int, Entry] = {}  # in order of arrival
        self._pager = Pager(pool, self._entries, config.idle_preempt_s)
        self._forecaster = Forecaster(config.reservation, self.lengths, pool.page_tokens)
        self._order = Fcfs(aging_s=config.aging_s)
        if config.policy == "mlfq":
            self._order = Mlfq(
                aging_s=config.aging_s, num_levels=config.mlfq_levels, quantum_s=config.mlfq_quantum_s
            )
        self._arrivals = 0
        self._steps = 0
        self._turns = 0
        self._was_alone = False

    # ---- sessions ------------------------------------------------------------------------------------

    def add(
        self,
        session_id: int,
        table: BlockTable,
        *,
        now: float,
        prompt_rows: int,
        max_rows: int,
        priority: int = 0,
    ) -> None:
        """A session joins; rows already in its table (an adopted prefix) count as known and computed.

        `prompt_rows` is the length of its prompt, `max_rows` the most rows it may ever hold: what exceeds the
        prompt is output, whose length is predicted. A higher `priority` goes first.
        """
        if session_id in self._entries:
            raise ValueError(f"session {session_id} is scheduled already")
        self._arrivals += 1
        entry = Entry(
            session_id,
            table,
            arrival=self._arrivals,
            priority=priority,
            prompt_rows=prompt_rows,
            max_rows=max_rows,
            num_known=table.length,
            last_active_s=now,
            waiting_since_s=now,
        )
        self._order.join(entry)
        self._entries[session_id] = entry

    def remove(self, session_id: int, *, finished: bool = False) -> None:
        """The session leaves. Its pages are the caller's to free or to keep. If it `finished`, rather than
        failed, its length is a sample for the prediction of others."""
        entry = self._entries.pop(session_id)
        if finished:
            self._forecaster.finished(entry)

    def extend(self, session_id: int, num_rows: int, *, now: float) -> None:
        """`num_rows` more rows of the session are known."""
        entry = self._entries[session_id]
        if not entry.num_pending:
            entry.waiting_since_s = now
            entry.aged = False
        entry.num_known += num_rows
        entry.last_active_s = now
        entry.parked = False

    def truncate(self, session_id: int, num_rows: int) -> None:
        """Rows from `num_rows` on are forgotten, computed or not."""
        entry = self._entries[session_id]
        entry.num_known = min(entry.num_known, num_rows)
        if num_rows < entry.table.length:
            entry.table.truncate(num_rows)
            entry.running &= entry.table.num_pages > 0

    def commit(self, picks: Iterable[Pick], *, now: float, seconds: float = 0.0) -> None:
        """The rows of `picks` are in the KV; computing them took `seconds`. Nothing moves before: a failed
        step can be planned again."""
        self._steps += 1
        shares: list[tuple[Entry, int]] = []
        for pick in picks:
            entry = self._entries[pick.session_id]
            entry.table.advance(pick.count)
            entry.last_active_s = entry.waiting_since_s = now
            entry.last_step = self._steps
            entry.aged = False
            shares.append((entry, pick.count * entry.table.depth))
        self._order.served(shares, seconds)

    def entry(self, session_id: int) -> Entry:
        return self._entries[session_id]

    @property
    def num_preemptions(self) -> int:
        return self._pager.num_preemptions

    @property
    def num_running(self) -> int:
        """Sessions that have started. This and `num_waiting` may be asked from other threads."""
        return sum(1 for entry in tuple(self._entries.values()) if entry.running)

    @property
    def num_waiting(self) -> int:
        """Sessions with rows to compute that have not started."""
        return sum(1 for e in tuple(self._entries.values()) if e.num_pending and not e.running)

    @property
    def num_ready(self) -> int:
        """Sessions with rows to compute."""
        return sum(1 for entry in self._entries.values() if entry.num_pending)

    @property
    def has_work(self) -> bool:
        return any(entry.num_pending for entry in self._entries.values())

    @property
    def num_rows_ahead(self) -> int:
        """Rows of others that would be computed before, or in one step with, the first row of a session that
        came now with a short prompt and no priority; 0 if nothing is to be computed. From any thread."""
        ready = [(entry, rows) for entry in tuple(self._entries.values()) if (rows := entry.num_pending) > 0]
        if not ready:
            return 0
        return rows_before(
            [rows for entry, rows in ready if rows > 1 and before_newcomer(entry)],
            sum(rows == 1 for _, rows in ready),
            max_rows=self.config.max_rows,
            max_chunk_rows=self.config.max_chunk_rows if self.config.chunked else None,
        )

    # ---- one step ------------------------------------------------------------------------------------

    def plan(self, *, now: float) -> Plan:
        """The next step's rows, with pages allocated for them. `now` in seconds of any monotonic clock."""
        ready = [entry for entry in self._entries.values() if entry.num_pending]
        if not ready:
            return Plan()
        step = _Step(now)
        preempted = self._pager.preempted
        preempted.clear()
        shares = self._share(ready, step)
        starts = [entry for entry in map(self.entry, shares) if not entry.running]
        self._pick_running([entry for entry in ready if entry.session_id in shares], shares, step)
        for entry in starts:
            self._pick(entry, shares[entry.session_id], step)
        if not step.picks:
            self._pick_one(ready, shares, step)
        retry = None if step.picks else self._pager.retry_in(now=now)
        if not step.picks and retry is None:
            self._start_over(ready, step)
        blocked = [session_id for session_id in step.blocked if session_id not in step.picks]
        return Plan(tuple(step.picks.values()), tuple(preempted), tuple(blocked), retry)

    def _share(self, ready: Sequence[Entry], step: _Step) -> dict[int, int]:
        """Rows each session may compute in this step, by turn. Those not running yet are admitted."""
        config = self.config
        if len(ready) <= config.max_rows and all(e.running and e.num_pending == 1 for e in ready):
            self._was_alone = False
            return {entry.session_id: 1 for entry in ready}
        admission: Admission | None = None

        def admit(entry: Entry) -> bool:
            nonlocal admission
            if admission is None:
                at_work, idle = self._pager.by_idleness(now=step.now)
                admission = Admission(self.pool, self._forecaster, at_work, idle)
            victims = admission.admit(entry)
            if victims is None:
                step.blocked.append(entry.session_id)
                return False
            for victim in victims:
                self._pager.preempt(victim)
            return True

        shares, self._was_alone = share_budget(
            self._order.turns(ready, now=step.now),
            admit,
            max_rows=config.max_rows,
            max_chunk_rows=config.max_chunk_rows if config.chunked else None,
            may_be_alone=not self._was_alone,
        )
        for session_id in shares:
            self._turns += 1
            self._entries[session_id].last_turn = self._turns
        return shares

    def _pick_running(self, served: Sequence[Entry], shares: Mapping[int, int], step: _Step) -> None:
        """Picks those of `served`, in order of arrival, that run."""
        running = [entry for entry in served if entry.running]
        writable = self._pager.writable(running, shares)
        for entry in running:
            if entry.running:  # none before it in this loop preempted it
                self._pick(entry, shares[entry.session_id], step, writable=entry.session_id in writable)

    def _pick_one(self, ready: Sequence[Entry], shares: Container[int], step: _Step) -> None:
        """All whose turn it was are blocked by pages of others: the first of these that can move does."""
        others = (entry for entry in ready if entry.running and entry.session_id not in shares)
        for entry in others:
            if self._pick(entry, self._most_rows(entry), step):
                return

    def _start_over(self, ready: Sequence[Entry], step: _Step) -> None:
        """Not even the first can move, although nobody's pages are spared: it needs copies of pages that it
        shares with the prefix cache, and there is no room for both. So it lets go of all it has."""
        holders = [entry for entry in ready if entry.table.num_pages]
        for entry in sorted(holders, key=lambda entry: not entry.running)[:1]:
            self._pager.preempt(entry)
            entry.running = True
            entry.running = self._pick(entry, self._most_rows(entry), step)

    def _most_rows(self, entry: Entry) -> int:
        if not self.config.chunked:
            return entry.num_pending
        return min(entry.num_pending, self.config.max_chunk_rows, self.config.max_rows)

    def _pick(self, entry: Entry, rows: int, step: _Step, *, writable: bool = False) -> bool:
        """Picks `rows` of the entry, or as many as it gets pages for; if `writable`, it has them."""
        if not writable:
            whole = not self.config.chunked
            rows = self._pager.make_room(entry, rows, step.picks, whole=whole, now=step.now)
            if rows == 0:
                step.blocked.append(entry.session_id)
                return False
            copies = entry.table.ensure(entry.num_computed + rows)
            if len(copies):
                self._copy_pages(copies)
        entry.running = True
        step.picks[entry.session_id] = Pick(entry.session_id, entry.num_computed, rows)
        return True

"""A scheduler over the real page pool, driven by hand; every step is checked for what must always hold."""

from __future__ import annotations

from dataclasses import dataclass, field

from isthmus.cloud.kv import BlockTable, PageCopies, PagePool, columns_for
from isthmus.cloud.queueing import Entry
from isthmus.cloud.scheduler import Plan, Scheduler, SchedulerConfig

LAYERS = 4


@dataclass
class World:
    """A scheduler, its pool, and a hand-driven clock."""

    pages: int = 1000
    config: SchedulerConfig = field(default_factory=SchedulerConfig)
    now: float = 0.0
    copies: list[PageCopies] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = PagePool(self.pages)
        self.scheduler = Scheduler(self.pool, self.copies.append, self.config)
        self.tables: dict[int, BlockTable] = {}

    def join(
        self,
        session_id: int,
        rows: int = 0,
        *,
        split: int = 0,
        table: BlockTable | None = None,
        prompt_rows: int | None = None,
        max_rows: int | None = None,
        priority: int = 0,
    ) -> BlockTable:
        """A session joins and gets `rows` rows, its whole prompt and all it will hold unless said otherwise;
        `table` may hold rows already."""
        table = table or BlockTable(self.pool, first_layer=split, num_layers=LAYERS)
        self.tables[session_id] = table
        prompt_rows = table.length + rows if prompt_rows is None else prompt_rows
        self.scheduler.add(
            session_id,
            table,
            now=self.now,
            prompt_rows=prompt_rows,
            max_rows=prompt_rows if max_rows is None else max_rows,
            priority=priority,
        )
        if rows:
            self.extend(session_id, rows)
        return table

    def extend(self, session_id: int, rows: int = 1) -> None:
        self.scheduler.extend(session_id, rows, now=self.now)

    def leave(self, session_id: int, *, finished: bool = False) -> None:
        self.scheduler.remove(session_id, finished=finished)
        self.tables.pop(session_id).free_all()

    def step(self, seconds: float = 0.0) -> Plan:
        """Plans, checks and commits a step that takes `seconds`."""
        plan = self.plan()
        self.now += seconds
        self.scheduler.commit(plan.picks, now=self.now, seconds=seconds)
        return plan

    def plan(self) -> Plan:
        scheduler = self.scheduler
        entries = [scheduler.entry(session_id) for session_id in self.tables]
        at_work = [entry for entry in entries if entry.running and entry.num_pending]
        spared = [entry for entry in entries if self.is_spared(entry)]
        preemptions = scheduler.num_preemptions
        plan = scheduler.plan(now=self.now)
        self.check(plan)
        assert scheduler.num_preemptions == preemptions + len(plan.preempted)
        assert (plan.retry_in_s is not None) <= (not plan.picks)
        if scheduler.has_work and not plan.picks:
            # Nothing can run: somebody waits for its edge, and it is known when to look again.
            assert plan.blocked
            times = [e.last_active_s + self.config.idle_preempt_s for e in entries if self.is_spared(e)]
            assert plan.retry_in_s == min(times) - self.now
        if at_work:
            # The first that came of those at work is stopped only by older ones waiting for their edge.
            first = min(at_work, key=lambda entry: entry.arrival)
            assert first.running
            assert first.session_id not in plan.blocked or any(e.arrival < first.arrival for e in spared)
        return plan

    def is_spared(self, entry: Entry) -> bool:
        """Whether it runs, and has not waited for its edge long enough to be preempted by later ones."""
        due = entry.last_active_s + self.config.idle_preempt_s
        return entry.running and not entry.num_pending and self.now < due

    def check(self, plan: Plan) -> None:
        config, pool = self.config, self.pool
        pool.check()
        assert pool.num_free + pool.num_used + pool.num_cached == pool.num_pages
        assert len({pick.session_id for pick in plan.picks}) == len(plan.picks)
        num_rows = sum(pick.count for pick in plan.picks)
        assert num_rows <= config.max_rows or (not config.chunked and len(plan.picks) == 1)
        assert not set(plan.blocked) & {pick.session_id for pick in plan.picks}
        for pick in plan.picks:
            entry = self.scheduler.entry(pick.session_id)
            stop = pick.start + pick.count
            assert entry.running
            assert pick.count >= 1
            assert pick.start == entry.num_computed
            assert stop <= entry.num_known
            assert pick.count <= config.max_chunk_rows or not config.chunked
            table = entry.table
            assert table.capacity >= stop
            first, last = pick.start // pool.page_tokens, columns_for(stop, pool.page_tokens)
            assert not pool.shared(table.pages[:, first:last].ravel()).any()
        for table in self.tables.values():
            assert table.num_pages == 0 or table.num_columns >= columns_for(table.length, pool.page_tokens)

    def computed(self, session_id: int) -> int:
        return self.scheduler.entry(session_id).num_computed


def served(plan: Plan) -> dict[int, int]:
    """Rows by session."""
    return {pick.session_id: pick.count for pick in plan.picks}

"""Any history of joins, rows, cuts, forks, cached prefixes, steps and departures, on too small pools.

What holds after every plan is asserted by `World.plan`.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from isthmus.cloud.kv import PAGE_TOKENS, BlockTable
from isthmus.cloud.prefix_cache import PrefixCache
from isthmus.cloud.scheduler import SchedulerConfig
from tests.cloud.cloud_scheduling import LAYERS, World


class Sessions(RuleBasedStateMachine):
    """No session may ever hold more rows than the pool can: whoever opens one sees to that."""

    @initialize(
        policy=st.sampled_from(["fcfs", "mlfq"]),
        reservation=st.sampled_from(["predicted", "worst-case", "none"]),
        chunked=st.booleans(),
        max_rows=st.integers(2, 40),
        chunk=st.integers(1, 40),
        columns=st.integers(1, 8),
        spare_pages=st.integers(0, LAYERS - 1),
        idle_preempt_s=st.sampled_from([0.0, 1.0, 4.0]),
    )
    def start(
        self,
        policy: str,
        reservation: str,
        chunked: bool,
        max_rows: int,
        chunk: int,
        columns: int,
        spare_pages: int,
        idle_preempt_s: float,
    ) -> None:
        config = SchedulerConfig(
            max_rows=max_rows,
            max_chunk_rows=chunk,
            idle_preempt_s=idle_preempt_s,
            policy=policy,  # type: ignore[arg-type]  # one of them
            chunked=chunked,
            reservation=reservation,  # type: ignore[arg-type]  # one of them
            aging_s=2.0,
            mlfq_levels=3,
            mlfq_quantum_s=0.25,
        )
        self.world = World(pages=columns * LAYERS + spare_pages, config=config)
        self.cache = PrefixCache(self.world.pool)
        self.limit = columns * PAGE_TOKENS
        self.num_joined = 0
        self.offers: list[tuple[int, int, str]] = []  # (entry layer, rows, digest)

    def join(self, table: BlockTable, rows: int, to_come: int, priority: int) -> None:
        self.num_joined += 1
        prompt_rows = min(table.length + rows + to_come // 2, self.limit)
        self.world.join(
            self.num_joined,
            min(rows, self.limit - table.length),
            table=table,
            prompt_rows=prompt_rows,
            max_rows=min(prompt_rows + to_come, self.limit),
            priority=priority,
        )

    def has_seats(self) -> bool:
        return len(self.world.tables) < 8

    def some_session(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.world.tables)))

    @precondition(lambda self: self.has_seats())
    @rule(
        split=st.integers(0, LAYERS - 1),
        rows=st.one_of(st.just(1), st.integers(0, 130)),
        to_come=st.integers(0, 60),
        priority=st.integers(-1, 1),
    )
    def open(self, split: int, rows: int, to_come: int, priority: int) -> None:
        table = BlockTable(self.world.pool, first_layer=split, num_layers=LAYERS)
        self.join(table, rows, to_come, priority)

    @precondition(lambda self: self.offers and self.has_seats())
    @rule(data=st.data(), rows=st.integers(0, 40), to_come=st.integers(0, 60))
    def open_with_a_cached_prefix(self, data: st.DataObject, rows: int, to_come: int) -> None:
        split, num_rows, digest = data.draw(st.sampled_from(self.offers))
        table = BlockTable(self.world.pool, first_layer=split, num_layers=LAYERS)
        match = self.cache.lookup("a", [(num_rows, digest)], first_layer=split, max_tokens=num_rows)
        if match is not None:
            table.adopt(match)
        self.join(table, rows, to_come, 0)

    @precondition(lambda self: self.world.tables and self.has_seats())
    @rule(data=st.data(), to_come=st.integers(0, 60))
    def fork(self, data: st.DataObject, to_come: int) -> None:
        table = self.world.tables[self.some_session(data)]
        self.join(table.fork(), 0, to_come, 0)

    @precondition(lambda self: self.world.tables)
    @rule(data=st.data(), rows=st.one_of(st.just(1), st.integers(1, 50)))
    def extend(self, data: st.DataObject, rows: int) -> None:
        session_id = self.some_session(data)
        rows = min(rows, self.limit - self.world.scheduler.entry(session_id).num_known)
        if rows:
            self.world.extend(session_id, rows)

    @precondition(lambda self: self.world.tables)
    @rule()
    def extend_all(self) -> None:
        for session_id in self.world.tables:
            if self.world.scheduler.entry(session_id).num_known < self.limit:
                self.world.extend(session_id)

    @precondition(lambda self: self.world.tables)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        session_id = self.some_session(data)
        to = data.draw(st.integers(0, self.world.scheduler.entry(session_id).num_known))
        self.world.scheduler.truncate(session_id, to)
        assert self.world.scheduler.entry(session_id).num_known == to

    @precondition(lambda self: self.world.tables)
    @rule(data=st.data(), finished=st.booleans(), keep=st.booleans())
    def leave(self, data: st.DataObject, finished: bool, keep: bool) -> None:
        session_id = self.some_session(data)
        table = self.world.tables[session_id]
        if keep and table.length:
            digest = f"{session_id} {table.length}"
            self.cache.register("a", [(table.length, digest)], table)
            self.offers.append((table.first_layer, table.length, digest))
        self.world.leave(session_id, finished=finished)

    @rule(num_steps=st.integers(1, 6), seconds=st.sampled_from([0.0, 0.125, 1.0]))
    def step(self, num_steps: int, seconds: float) -> None:
        for _ in range(num_steps):
            self.world.step(seconds)

    @rule()
    def plan_a_step_that_fails(self) -> None:
        self.world.plan()

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.world.now += seconds

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        if not hasattr(self, "world"):
            return
        pool = self.world.pool
        pool.check()
        self.cache.check()
        held = {page for table in self.world.tables.values() for page in table.pages.ravel().tolist()}
        assert len(held) == pool.num_used
        assert pool.num_free + pool.num_used + pool.num_cached == pool.num_pages

    @invariant()
    def a_session_runs_if_and_only_if_it_was_admitted_to_its_pages(self) -> None:
        for session_id in getattr(self, "world", World()).tables:
            entry = self.world.scheduler.entry(session_id)
            assert entry.num_computed <= entry.num_known
            assert entry.table.num_pages > 0 or not entry.running
            assert not entry.parked or not entry.running

    def teardown(self) -> None:
        """Whatever has rows to compute gets them computed, and then all pages come back."""
        if not hasattr(self, "world"):
            return
        world = self.world
        for _ in range(3000):
            plan = world.step(seconds=0.125)
            if plan.retry_in_s is not None:
                world.now += plan.retry_in_s
            for session_id in list(world.tables):
                if not world.scheduler.entry(session_id).num_pending:
                    world.leave(session_id, finished=True)
            if not world.tables:
                break
        assert not world.tables
        self.cache.clear()
        assert world.pool.num_free == world.pool.num_pages


Sessions.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSessions = Sessions.TestCase

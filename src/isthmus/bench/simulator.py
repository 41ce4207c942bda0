"""Serving in virtual time: the real scheduler over the real page accounting, with step times from a model.

Nothing is computed, all else is as in the engine: rows arrive between steps, the batch window may hold a step
back for more, the scheduler plans it and allocates its pages, its tokens come at its end; an offloaded
session's next row is there at once, a split session's after its turnaround. Every figure is of simulated
events, so the same requests and step times give the same figures to the last digit. Pure: no clock, no torch.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from isthmus.bench.step_model import StepSpan
from isthmus.bench.workload import Request
from isthmus.cloud.batch_window import BatchWindow
from isthmus.cloud.kv import BlockTable, PageCopies, PagePool, columns_for
from isthmus.cloud.scheduler import Pick, Scheduler, SchedulerConfig
from isthmus.protocol.errors import ConfigError, IsthmusError

StepSeconds = Callable[[Sequence[StepSpan], int], float]

# As in the engine: where nothing can run and no idle session explains it, it looks again after this.
_STALLED_RETRY_S: Final = 0.05
# No thread sleeps for less, and rounding must not make a wait too short to end.
_LEAST_WAIT_S: Final = 1e-5
_MAX_RETRIES: Final = 10_000


@dataclass(frozen=True, slots=True)
class Serving:
    """One way to serve. `static_batches` puts a gate before the scheduler: requests wait until every one of
    the batch before them is finished, and then start together, in order of arrival, as many as fit the pool
    if each takes all that it may."""

    name: str
    scheduler: SchedulerConfig
    static_batches: bool = False


@dataclass(frozen=True, slots=True)
class Cloud:
    """What serves: the model's layers, its KV pool, the bounds every session is opened with. `chunk_rows`:
    how split prompts are cut by their edges."""

    num_layers: int
    num_pages: int
    max_context: int
    max_tokens: int
    chunk_rows: int = 128

    def max_rows(self, request: Request) -> int:
        """The most rows the session may ever hold."""
        return min(self.max_context, request.prompt_rows + self.max_tokens)

    def most_pages(self, request: Request) -> int:
        """KV pages of that many rows."""
        return (self.num_layers - request.split) * columns_for(self.max_rows(request))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of the requests: float64 arrays in their order, in seconds; `tpot_s` (time per output token
    after the first) is NaN where there is one token. Times end where the cloud has the token."""

    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]
    completion_s: NDArray[np.float64]
    itl_s: NDArray[np.float64]
    """Every gap between a token and the next one of the same request."""
    num_tokens: NDArray[np.int64]
    num_steps: int
    num_rows: int
    recomputed_rows: int
    num_preemptions: int
    kv_mean: float
    """Share of the KV pages in use, over the makespan."""
    kv_peak: float
    makespan_s: float
    """From the first arrival to the last token."""


@dataclass(slots=True)
class _Session:
    request: Request
    table: BlockTable
    num_tokens: int = 0
    num_seen: int = 0
    """The most rows that were ever computed: those below it are computed again after a preemption."""
    num_arrived: int = 0
    """Of the prompt's rows."""
    admitted: bool = False
    first_token_s: float = 0.0
    last_token_s: float = 0.0


@dataclass(slots=True)
class _Totals:
    num_steps: int = 0
    num_rows: int = 0
    recomputed_rows: int = 0
    kv_page_s: float = 0.0
    kv_peak: int = 0
    gaps_s: list[float] = field(default_factory=list)


def simulate(
    requests: Sequence[Request], serving: Serving, cloud: Cloud, step_seconds: StepSeconds
) -> Outcome:
    """Serves `requests`, in order of arrival, to the last token. `step_seconds(spans, num_outputs)` is the
    duration of a step.

    Raises:
        ConfigError (`kv_capacity`): a request may take more pages than there are.
        IsthmusError (`simulation_stalled`, `kv_invariant`): the scheduler has a bug.
    """
    return _Simulation(requests, serving, cloud, step_seconds).run()


class _Simulation:
    def __init__(
        self, requests: Sequence[Request], serving: Serving, cloud: Cloud, step_seconds: StepSeconds
    ) -> None:
        for request in requests:
            if cloud.most_pages(request) > cloud.num_pages:
                raise ConfigError(
                    f"a request of up to {cloud.max_rows(request)} rows may take {cloud.most_pages(request)} "
                    f"KV pages, the pool has {cloud.num_pages}",
                    code="kv_capacity",
                    hint="simulate more KV pages, or a smaller bound on the output",
                )
        self.cloud = cloud
        self.serving = serving
        self.pool = PagePool(cloud.num_pages)
        self.scheduler = Scheduler(self.pool, _no_copies, serving.scheduler)
        self.window = BatchWindow()
        self.now = 0.0
        self._step_seconds = step_seconds
        self._sessions = [
            _Session(r, BlockTable(self.pool, first_layer=r.split, num_layers=cloud.num_layers))
            for r in requests
        ]
        # (when, tie-breaker, session, rows): 0 rows = the session is opened
        self._events: list[tuple[float, int, int, int]] = []
        self._num_events = 0
        self._gate: deque[int] = deque()
        self._num_live = 0
        self._totals = _Totals()
        for index, request in enumerate(requests):
            self._at(request.arrival_s, index, 0)
            for when, rows in request.prompt_arrivals(cloud.chunk_rows):
                self._at(when, index, rows)

    def run(self) -> Outcome:
        if self._events:
            self.now = self._events[0][0]
        num_retries = 0
        while self._events or self._num_live or self._gate:
            self._deliver()
            if self._held_back():
                continue
            plan = self.scheduler.plan(now=self.now)
            if plan.picks:
                self._step(plan.picks)
                num_retries = 0
                continue
            until = [event[0] for event in self._events[:1]]
            if plan.blocked:
                num_retries += 1
                retry_s = _STALLED_RETRY_S if plan.retry_in_s is None else plan.retry_in_s
                until.append(self.now + max(retry_s, _LEAST_WAIT_S))
            if not until or num_retries > _MAX_RETRIES:
                raise self._stalled()
            self._pass_time(min(until))
        self.pool.check()
        if self.pool.num_free != self.pool.num_pages:
            raise IsthmusError(f"{self.pool.num_used} KV pages are left over", code="kv_invariant")
        return self._outcome()

    def _at(self, when: float, index: int, rows: int) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (when, self._num_events, index, rows))

    def _deliver(self) -> None:
        """What arrived up to now: sessions to open, and rows."""
        while self._events and self._events[0][0] <= self.now:
            when, _, index, rows = heapq.heappop(self._events)
            session = self._sessions[index]
            if rows == 0 and self.serving.static_batches:
                self._gate.append(index)
            elif rows == 0:
                self._admit(index)
            else:
                self._receive(index, session, rows, when)
        if self._gate and not self._num_live:
            self._open_gate()

    def _receive(self, index: int, session: _Session, rows: int, when: float) -> None:
        if not session.num_tokens:
            session.num_arrived += rows
        if session.num_arrived == session.request.prompt_rows:  # they owe a token, so the edge waits for it
            self.window.note_arrivals(1, now=when)
        if session.admitted:
            self.scheduler.extend(index, rows, now=self.now)

    def _held_back(self) -> bool:
        """Whether the next step waited, a little or until something came, for further edges' rows."""
        wait_s = self.window.wait_s(self.scheduler.num_ready, now=self.now)
        if wait_s <= 0:
            return False
        until = self.now + max(wait_s, _LEAST_WAIT_S)
        self._pass_time(min([until, *(event[0] for event in self._events[:1])]))
        return True

    def _open_gate(self) -> None:
        """Lets in the next static batch."""
        room = self.pool.num_pages
        while self._gate:
            room -= self.cloud.most_pages(self._sessions[self._gate[0]].request)
            if room < 0:
                break
            self._admit(self._gate.popleft())

    def _admit(self, index: int) -> None:
        session = self._sessions[index]
        session.admitted = True
        self._num_live += 1
        self.scheduler.add(
            index,
            session.table,
            now=self.now,
            prompt_rows=session.request.prompt_rows,
            max_rows=self.cloud.max_rows(session.request),
        )
        if session.num_arrived:
            self.scheduler.extend(index, session.num_arrived, now=self.now)

    def _step(self, picks: Sequence[Pick]) -> None:
        """Runs one step; its tokens are there at its end."""
        totals = self._totals
        spans: list[StepSpan] = []
        drawing: list[int] = []
        for pick in picks:
            session = self._sessions[pick.session_id]
            spans.append(StepSpan(session.request.split, pick.start, pick.count))
            stop = pick.start + pick.count
            totals.num_rows += pick.count
            totals.recomputed_rows += max(0, min(stop, session.num_seen) - pick.start)
            session.num_seen = max(session.num_seen, stop)
            # Token i is drawn from row prompt_rows + i - 1. A row computed again owes nothing.
            if stop == session.request.prompt_rows + session.num_tokens:
                drawing.append(pick.session_id)
        totals.num_steps += 1
        seconds = self._step_seconds(spans, len(drawing))
        self._pass_time(self.now + seconds)
        self.scheduler.commit(picks, now=self.now, seconds=seconds)
        self.window.note_step(seconds)
        for index in drawing:
            self._draw(index)

    def _draw(self, index: int) -> None:
        session = self._sessions[index]
        request = session.request
        if session.num_tokens == 0:
            session.first_token_s = self.now
        else:
            self._totals.gaps_s.append(self.now - session.last_token_s)
        session.num_tokens += 1
        session.last_token_s = self.now
        if session.num_tokens == request.output_tokens:
            self.scheduler.remove(index, finished=True)
            session.table.free_all()
            self._num_live -= 1
        elif request.offload:
            self.scheduler.extend(index, 1, now=self.now)
        else:
            self._at(self.now + request.turnaround_s, index, 1)

    def _pass_time(self, to: float) -> None:
        used = self.pool.num_used
        self._totals.kv_page_s += used * (to - self.now)
        self._totals.kv_peak = max(self._totals.kv_peak, used)
        self.now = to

    def _stalled(self) -> IsthmusError:
        waiting = [i for i, s in enumerate(self._sessions) if s.num_tokens < s.request.output_tokens]
        return IsthmusError(
            f"{len(waiting)} requests are not finished and nothing runs, first {waiting[:3]}",
            code="simulation_stalled",
            hint="this is a bug in the scheduler",
        )

    def _outcome(self) -> Outcome:
        sessions, totals = self._sessions, self._totals
        arrived = np.array([s.request.arrival_s for s in sessions])
        first = np.array([s.first_token_s for s in sessions])
        last = np.array([s.last_token_s for s in sessions])
        tokens = np.array([s.num_tokens for s in sessions])
        gaps = np.maximum(tokens - 1, 1)
        makespan_s = float(last.max() - arrived.min())
        return Outcome(
            ttft_s=first - arrived,
            tpot_s=np.where(tokens > 1, (last - first) / gaps, np.nan),
            completion_s=last - arrived,
            itl_s=np.array(totals.gaps_s),
            num_tokens=tokens,
            num_steps=totals.num_steps,
            num_rows=totals.num_rows,
            recomputed_rows=totals.recomputed_rows,
            num_preemptions=self.scheduler.num_preemptions,
            kv_mean=totals.kv_page_s / (self.pool.num_pages * makespan_s) if makespan_s else 0.0,
            kv_peak=totals.kv_peak / self.pool.num_pages,
            makespan_s=makespan_s,
        )


def _no_copies(copies: PageCopies) -> None:
    """Nothing is shared between the sessions of a simulation, so nothing is ever copied."""

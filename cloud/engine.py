"""The engine on a thread of its own: commands in from any thread, steps, outputs back to their sinks.

The public methods queue a command and return. Commands are applied between steps by `step()`, which the
thread calls (`start`), or a test by hand: then every output is returned in order and nothing depends on
time.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from isthmus.cloud.batch_window import BatchWindow
from isthmus.cloud.engine_core import EngineCore, StepRecord
from isthmus.cloud.engine_session import (
    CanaryRows,
    Closed,
    EngineOpen,
    EngineOutput,
    Failed,
    OutputRows,
    as_rows,
)
from isthmus.cloud.forward import MixedForward
from isthmus.cloud.kv import PagePool
from isthmus.cloud.load_meter import LoadMeter
from isthmus.cloud.model import CloudModel
from isthmus.cloud.prefix_cache import PrefixCache
from isthmus.cloud.scheduler import Scheduler, SchedulerConfig

Sink = Callable[[list[EngineOutput]], None]
"""Takes the outputs of one step, on the engine's thread: it must return at once."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of counts; totals count from the start. `step_s`, `queue_s`: see LoadMeter."""

    sessions: int
    running: int
    waiting: int
    pages_total: int
    pages_used: int
    pages_cached: int
    pages_free: int
    rows_computed_total: int
    row_layers_total: int
    tokens_sampled_total: int
    steps_total: int
    preemptions_total: int
    prefix_hits_total: int
    prefix_hit_rows_total: int
    prefix_evictions_total: int
    batch_wait_seconds_total: float
    step_s: float
    queue_s: float


class Engine:
    """Runs sessions over one model and one page pool."""

    def __init__(
        self,
        forward: MixedForward,
        scheduler: Scheduler,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_step: Callable[[StepRecord], None] | None = None,
        on_bug: Callable[[BaseException], None] | None = None,
        window: BatchWindow | None = None,
    ) -> None:
        """`on_bug` hears of exceptions that are no IsthmusError; the sessions concerned fail with one.
        `window` says how long the thread holds a step back for further edges' rows (`step` never does)."""
        self.window = window or BatchWindow()
        self.batch_wait_s = 0.0
        self.meter = meter = LoadMeter()

        def note_step(record: StepRecord) -> None:
            meter.note_step(record)
            if on_step is not None:
                on_step(record)

        self.core = EngineCore(forward, scheduler, clock=clock, on_step=note_step, on_bug=on_bug)
        self._clock = clock
        self._sinks: dict[int, Sink] = {}
        self._numbers = itertools.count(1)
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._retry_in_s: float | None = None

    @classmethod
    def over(
        cls,
        model: CloudModel,
        num_pages: int,
        config: SchedulerConfig | None = None,
        *,
        on_step: Callable[[StepRecord], None] | None = None,
        on_bug: Callable[[BaseException], None] | None = None,
    ) -> Engine:
        """An engine with `num_pages` KV pages of its own."""
        store, pool = model.new_pages(num_pages)
        scheduler = Scheduler(pool, store.copy_pages, config)
        return cls(MixedForward(model, store), scheduler, on_step=on_step, on_bug=on_bug)

    @property
    def pool(self) -> PagePool:
        return self.core.pool

    @property
    def cache(self) -> PrefixCache:
        return self.core.cache

    # ---- commands, from any thread -------------------------------------------------------------------

    def open(self, request: EngineOpen, sink: Sink | None = None) -> int:
        """Starts a session and returns its number; `Opened` or `Failed` follows. Rows may be added at once
        where nothing is offered."""
        number = next(self._numbers)
        self._submit(partial(self.core.open, number, request), number, sink)
        return number

    def add_rows(
        self,
        session_id: int,
        rows: NDArray[np.float32] | Sequence[int],
        *,
        output: OutputRows = "none",
        truncate_to: int | None = None,
        drafts: Sequence[int] | None = None,
    ) -> None:
        """Appends rows at layer K (float32 [n, hidden]) or, at K = 0, token ids; first cuts to
        `truncate_to`. `Progress`, and `Tokens` or `Hidden` where `output` asks for them, follow.

        `drafts` are the ids of the rows of a draft chain (not in offload), every one of which may produce
        output. Prefix shape: `Tokens` has those up to the first that is not the next row's id; the rows
        after it are cut off again. U-shape: `Hidden` has all rows, the ids are not looked at. As behind any
        row that produces output, nothing may be added before the answer (rule 7).
        """
        chain = () if drafts is None else tuple(drafts)
        if drafts is not None:
            if len(chain) != len(rows):
                raise ValueError(f"{len(chain)} draft ids for {len(rows)} rows")
            output = "all"
        apply = partial(self.core.add_rows, session_id, as_rows(rows), output, truncate_to, chain)
        if output == "none":
            self._submit(apply)  # a prompt's chunk fills a step by itself
        else:
            self._submit(partial(self._apply_decode, apply, self._clock()))

    def _apply_decode(self, apply: Callable[[], None], arrived_s: float) -> None:
        self.window.note_arrivals(1, now=arrived_s)
        apply()

    def set_stream_limit(self, session_id: int, limit: int) -> None:
        """Offload: how many tokens may be streamed in total before the session pauses."""
        self._submit(partial(self.core.set_stream_limit, session_id, limit))

    def cancel(self, session_id: int) -> None:
        """Ends the session and frees its pages; `Closed` follows. Unknown sessions are ignored."""
        self._submit(partial(self.core.close, session_id, cancelled=True))

    def close(self, session_id: int, offer: Sequence[tuple[int, str]]) -> None:
        """Ends the session and keeps its KV under `offer` for later sessions; `Closed` follows."""
        self._submit(partial(self.core.close, session_id, tuple(offer)))

    def canary(self, split: int, ids: Sequence[int], sink: Sink | None = None) -> int:
        """Computes the rows of `ids` at the boundary before layer `split`; `CanaryRows` follows."""
        number = next(self._numbers)
        command = partial(self.core.canary, number, split, np.asarray(ids, dtype=np.int64))
        self._submit(command, number, sink)
        return number

    def stats(self) -> EngineStats:
        """Counts of now; from any thread (each is read by itself, so they may be a step apart)."""
        core, pool, cache, scheduler = self.core, self.pool, self.cache, self.core.scheduler
        return EngineStats(
            sessions=len(core.sessions),
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            pages_total=pool.num_pages,
            pages_used=pool.num_used,
            pages_cached=pool.num_cached,
            pages_free=pool.num_free,
            rows_computed_total=core.rows_computed_total,
            row_layers_total=core.row_layers_total,
            tokens_sampled_total=core.tokens_sampled_total,
            steps_total=core.steps_total,
            preemptions_total=scheduler.num_preemptions,
            prefix_hits_total=cache.num_hits,
            prefix_hit_rows_total=cache.num_hit_tokens,
            prefix_evictions_total=cache.num_evictions,
            batch_wait_seconds_total=self.batch_wait_s,
            step_s=self.meter.step_s(self._clock()),
            queue_s=self.meter.queue_s(scheduler.num_rows_ahead),
        )

    def _submit(
        self, command: Callable[[], None], number: int | None = None, sink: Sink | None = None
    ) -> None:
        with self._wake:
            if number is not None and sink is not None:
                self._sinks[number] = sink
            self._commands.append(command)
            self._wake.notify()

    # ---- the thread ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Runs steps on a thread of their own until `stop`."""
        self._thread = threading.Thread(target=self._run, name="isthmus-engine", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the thread after the step under way. Sessions stay as they are."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def stuck_for_s(self) -> float:
        """Seconds without progress although there is something to do; infinite if the thread died."""
        if self._thread is not None and not self._thread.is_alive() and not self._stopping:
            return float("inf")
        since = self.core.busy_since_s
        return 0.0 if since is None else max(0.0, self._clock() - since)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._commands and not self._stopping and not self._can_step():
                    if not self._wake.wait(self._retry_in_s):
                        break  # an idle session may be preempted now
                if self._stopping:
                    return
            try:
                self.core.beat()
                self._hold()
                self.step()
            except Exception as error:
                self._retry_in_s = None
                self.core.fail_all(error)
                self._hand_out(self.core.take_outputs())

    def _hold(self) -> None:
        """Waits for further edges' rows, where the batch window says that it pays."""
        while True:
            self._apply_commands()
            now = self._clock()
            wait_s = self.window.wait_s(self.core.scheduler.num_ready, now=now)
            if wait_s <= 0:
                return
            with self._wake:
                if not self._commands and not self._stopping:
                    self._wake.wait(wait_s)
            self.batch_wait_s += self._clock() - now

    def _can_step(self) -> bool:
        return self._retry_in_s is None and self.core.scheduler.has_work

    def step(self) -> list[EngineOutput]:
        """Applies the queued commands, computes one step, hands out and returns the outputs."""
        self.core.beat()
        self._apply_commands()
        begun, num_steps = self._clock(), self.core.steps_total
        self._retry_in_s = self.core.step()
        if self.core.steps_total > num_steps:
            self.window.note_step(self._clock() - begun)
        outputs = self.core.take_outputs()
        self._hand_out(outputs)
        self.core.busy_since_s = None
        return outputs

    def _apply_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _hand_out(self, outputs: Sequence[EngineOutput]) -> None:
        """One call per sink, which several sessions may share."""
        batches: dict[Sink, list[EngineOutput]] = {}
        for output in outputs:
            sink = self._sinks.get(output.session_id)
            if sink is not None:
                batches.setdefault(sink, []).append(output)
            if isinstance(output, Closed | Failed | CanaryRows):
                self._sinks.pop(output.session_id, None)
        for sink, batch in batches.items():
            sink(batch)

"""The engine's work, single-threaded: sessions, one mixed-depth step, and what each session is owed.

A step takes the rows the scheduler picked, ordered by entry layer K; layer l runs the contiguous prefix of
rows whose K <= l. Offload (K = 0, token ids) is nothing special: its rows pass the embedding first, and the
tokens it samples become its own next rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from isthmus.cloud.engine_session import (
    CanaryRows,
    Closed,
    Due,
    EngineOpen,
    EngineOutput,
    EngineSession,
    Failed,
    Hidden,
    Ids,
    Opened,
    OutputRows,
    Progress,
    Rows,
    Tokens,
)
from isthmus.cloud.forward import MixedForward, Span
from isthmus.cloud.kv import BlockTable, columns_for
from isthmus.cloud.prefix_cache import PrefixCache
from isthmus.cloud.scheduler import Pick, Scheduler
from isthmus.protocol.errors import CloudError, IsthmusError, RejectedError, RequestError

if TYPE_CHECKING:
    from torch import Tensor

# Only a bug leaves work that no plan picks and no idle session explains; look again now and then.
_STALLED_RETRY_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did: `row_layers` counts rows times layers run, `seconds` its duration until `ended_s`,
    on the engine's clock."""

    num_rows: int
    num_sessions: int
    row_layers: int
    seconds: float
    ended_s: float


class EngineCore:
    """Sessions over one model and one page pool. Its outputs are collected by `take_outputs`."""

    def __init__(
        self,
        forward: MixedForward,
        scheduler: Scheduler,
        *,
        clock: Callable[[], float],
        on_step: Callable[[StepRecord], None] | None = None,
        on_bug: Callable[[BaseException], None] | None = None,
    ) -> None:
        """`on_bug` hears of exceptions that are no IsthmusError; the sessions concerned fail with one."""
        self.forward = forward
        self.scheduler = scheduler
        self.pool = scheduler.pool
        self.cache = PrefixCache(self.pool)
        self.sessions: dict[int, EngineSession] = {}
        self.rows_computed_total = 0
        self.row_layers_total = 0
        self.tokens_sampled_total = 0
        self.steps_total = 0
        self.busy_since_s: float | None = None
        """When the step under way began, or last reached a layer; None while idle."""
        self._clock = clock
        self._on_step = on_step
        self._on_bug = on_bug
        self._outputs: list[EngineOutput] = []
        self._canary: tuple[tuple[int, ...], list[Rows]] | None = None

    def take_outputs(self) -> list[EngineOutput]:
        """What happened since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    # ---- one step ------------------------------------------------------------------------------------

    def step(self) -> float | None:
        """Computes the rows of one plan. Returns None, or where all work waits for pages the seconds until
        an idle session may be preempted."""
        plan = self.scheduler.plan(now=self._clock())
        if plan.picks:
            self._compute(plan.picks)
        elif plan.blocked:
            return plan.retry_in_s if plan.retry_in_s is not None else _STALLED_RETRY_S
        return None

    def beat(self) -> None:
        """Notes that the step moves."""
        self.busy_since_s = self._clock()

    def _compute(self, picks: Sequence[Pick]) -> None:
        """Runs `picks`; if the model fails on them, each by itself, so that only the culprit fails."""
        begun = self._clock()
        ordered = sorted(picks, key=lambda pick: self.sessions[pick.session_id].request.split)
        spans = [self._span(pick) for pick in ordered]
        try:
            hidden = self.forward.run(spans, self.beat)
        except Exception as error:
            if len(ordered) > 1:
                for pick in ordered:
                    self._compute([pick])
                return
            self._fail(ordered[0].session_id, self._typed(error))
            return
        now = self._clock()
        self.scheduler.commit(ordered, now=now, seconds=now - begun)
        self.steps_total += 1
        num_rows = len(hidden)
        row_layers = sum(len(span.rows) * span.table.depth for span in spans)
        self.rows_computed_total += num_rows
        self.row_layers_total += row_layers
        self._settle(ordered, hidden)
        if self._on_step is not None:
            ended = self._clock()
            self._on_step(StepRecord(num_rows, len(ordered), row_layers, ended - begun, ended))

    def _span(self, pick: Pick) -> Span:
        session = self.sessions[pick.session_id]
        rows = session.history[pick.start : pick.start + pick.count]
        return Span(session.request.split, rows, pick.start, session.table)

    def _settle(self, picks: Sequence[Pick], hidden: Tensor) -> None:
        """Gives out what the rows of `hidden` [rows, h], in the order of `picks`, owe."""
        drawing: list[tuple[EngineSession, Due, Tensor]] = []
        returning: list[tuple[EngineSession, Due, Tensor]] = []
        first = 0
        for pick in picks:
            session = self.sessions[pick.session_id]
            num_plain, complete = session.settle(pick.start, hidden[first : first + pick.count])
            first += pick.count
            if num_plain:
                self._outputs.append(Progress(pick.session_id, num_plain))
            kind = drawing if session.request.shape == "prefix" else returning
            kind += [(session, due, self.forward.join(parts)) for due, parts in complete]
        if returning:
            self._give_hidden(returning)
        if drawing:
            self._draw(drawing)

    def _give_hidden(self, returning: Sequence[tuple[EngineSession, Due, Tensor]]) -> None:
        """Hands out all of a step's hidden rows with one copy from the device."""
        values = self.forward.to_numpy(self.forward.join([rows for _, _, rows in returning]))
        first = 0
        for session, due, rows in returning:
            mine = values[first : first + len(rows)]
            first += len(rows)
            if np.isfinite(mine).all():
                self._outputs.append(Hidden(session.session_id, due.stop, mine))
            else:
                self._fail(session.session_id, _not_finite())

    def _draw(self, drawing: Sequence[tuple[EngineSession, Due, Tensor]]) -> None:
        """Samples for all of a step's output rows with one pass through the head."""
        try:
            logits = self.forward.logits([rows for _, _, rows in drawing])
        except Exception as error:
            for session, _, _ in drawing:
                self._fail(session.session_id, self._typed(error))
            return
        first = 0
        for session, due, rows in drawing:
            lines = logits[first : first + len(rows)]
            first += len(rows)
            if session.session_id not in self.sessions:
                continue  # another output of the same step failed it
            try:
                sampled, finish = session.draw(lines, due)
            except Exception as error:
                self._fail(session.session_id, self._typed(error))
                continue
            self.tokens_sampled_total += len(sampled)
            index = due.start + 1 - session.request.prompt_tokens
            kept = due.start + len(sampled)
            if kept < due.stop:
                self._truncate(session, kept)  # the rows after a wrong draft, or after the answer's end
            self._outputs.append(Tokens(session.session_id, kept, index, sampled, finish, due.stream))
            session.num_streamed += due.stream
            if session.request.offload and finish is None:
                session.paused_token = sampled[-1].token
                self._continue(session)

    def _continue(self, session: EngineSession) -> None:
        """Offload: makes the last token the next input row, if the edge's window has room for one more."""
        if session.paused_token is None or not session.may_stream():
            return
        session.add_token(session.paused_token)
        session.paused_token = None
        self.scheduler.extend(session.session_id, 1, now=self._clock())

    # ---- commands ------------------------------------------------------------------------------------

    def open(self, session_id: int, request: EngineOpen) -> None:
        """`Opened` or `Failed` follows."""
        try:
            session = self._new_session(session_id, request)
        except IsthmusError as error:
            self._outputs.append(Failed(session_id, error))
            return
        self.sessions[session_id] = session
        self.scheduler.add(
            session_id,
            session.table,
            now=self._clock(),
            prompt_rows=request.prompt_tokens,
            max_rows=request.max_context,
            priority=request.priority,
        )
        self._outputs.append(Opened(session_id, session.table.length))

    def _new_session(self, session_id: int, request: EngineOpen) -> EngineSession:
        spec = self.forward.spec
        if not 0 <= request.split < spec.num_layers:
            raise RequestError(
                f"split {request.split} leaves no layer: the model has {spec.num_layers}", code="bad_split"
            )
        table = BlockTable(self.pool, first_layer=request.split, num_layers=spec.num_layers)
        pages = table.depth * columns_for(request.max_context, self.pool.page_tokens)
        if pages > self.pool.num_pages:
            raise RejectedError(
                f"{request.max_context} tokens need {pages} KV pages, the cloud has {self.pool.num_pages}",
                code="kv_capacity",
                hint="ask for a smaller max_context, or start the cloud with more KV memory",
            )
        session = EngineSession(session_id, request, table, hidden=spec.hidden)
        match = self.cache.lookup(
            request.tenant,
            request.offer,
            first_layer=request.split,
            max_tokens=min(request.prompt_tokens, request.max_context) - 1,
        )
        if match is not None:
            table.adopt(match)
            for rows in match.payloads:
                session.history.append(rows[: match.num_tokens - session.history.length])
        return session

    def add_rows(
        self,
        session_id: int,
        rows: Rows | Ids,
        output: OutputRows,
        truncate_to: int | None,
        drafts: tuple[int, ...] = (),
    ) -> None:
        session = self.sessions.get(session_id)
        if session is None:
            return  # failed or closed while the rows were on their way
        try:
            if truncate_to is not None:
                self._truncate(session, truncate_to)
            session.add_rows(rows, output, drafts)
        except IsthmusError as error:
            self._fail(session_id, error)
            return
        self.scheduler.extend(session_id, len(rows), now=self._clock())

    def _truncate(self, session: EngineSession, to: int) -> None:
        num_dropped = session.truncate(to)
        self.scheduler.truncate(session.session_id, to)
        if num_dropped:
            self._outputs.append(Progress(session.session_id, num_dropped))

    def set_stream_limit(self, session_id: int, limit: int) -> None:
        session = self.sessions.get(session_id)
        if session is not None:
            session.stream_limit = max(session.stream_limit, limit)
            self._continue(session)

    def close(
        self, session_id: int, offer: Sequence[tuple[int, str]] = (), *, cancelled: bool = False
    ) -> None:
        """`Closed` follows. From sessions not `cancelled` the scheduler learns how long answers are."""
        session = self.sessions.get(session_id)
        if session is None:
            return
        kv_len, cached = session.table.length, 0
        try:
            # Rows are kept beside the pages: a session that starts from them can be computed again too.
            cached = self.cache.register(
                session.request.tenant, offer, session.table, lambda a, b: session.history[a:b].copy()
            )
        except IsthmusError as error:
            self._fail(session_id, error)
            return
        freed = self._drop(session, finished=not cancelled)
        self._outputs.append(Closed(session_id, freed, kv_len, cached))

    def canary(self, number: int, split: int, ids: Ids) -> None:
        """`CanaryRows` or `Failed` follows. The rows of all splits are computed once and kept."""
        try:
            key = tuple(ids.tolist())
            if self._canary is None or self._canary[0] != key:
                table = BlockTable(self.pool, first_layer=0, num_layers=self.forward.spec.num_layers)
                try:
                    table.ensure(len(ids))  # nothing is shared, so nothing to copy
                    self._canary = key, self.forward.boundaries(ids, table)
                finally:
                    table.free_all()
            self._outputs.append(CanaryRows(number, split, self._canary[1][split]))
        except Exception as error:
            self._outputs.append(Failed(number, self._typed(error)))

    # ---- endings -------------------------------------------------------------------------------------

    def _drop(self, session: EngineSession, *, finished: bool = False) -> int:
        """Forgets the session and lets go of its pages; returns how many became free."""
        del self.sessions[session.session_id]
        self.scheduler.remove(session.session_id, finished=finished)
        before = self.pool.num_free
        session.table.free_all()
        return self.pool.num_free - before

    def _fail(self, session_id: int, error: IsthmusError) -> None:
        session = self.sessions.get(session_id)
        if session is not None:
            self._drop(session)
            self._outputs.append(Failed(session_id, error))

    def fail_all(self, error: Exception) -> None:
        """After an exception that no session can be blamed for: the engine goes on without them."""
        for session_id in tuple(self.sessions):
            self._fail(session_id, self._typed(error))

    def _typed(self, error: Exception) -> IsthmusError:
        if isinstance(error, IsthmusError):
            return error
        if self._on_bug is not None:
            self._on_bug(error)
        return CloudError(
            f"the cloud's engine failed: {type(error).__name__}",
            code="engine_failed",
            hint="see the cloud's log",
        )


def _not_finite() -> CloudError:
    return CloudError(
        "the hidden rows hold NaN or infinity",
        code="bad_values",
        hint="the model overflowed, or the rows it was given were damaged",
    )

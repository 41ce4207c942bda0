"""Times single steps of the real engine, by hand.

A session's context is not computed but given: its pages are allocated and left zeroed, because attention
takes as long over zeros. All else is the engine's own step: plan, layers, head, sampling, bookkeeping.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from isthmus.cloud.engine_session import EngineOpen
from isthmus.cloud.kv import columns_for
from isthmus.cloud.scheduler import SchedulerConfig
from isthmus.protocol.errors import IsthmusError

if TYPE_CHECKING:
    from isthmus.cloud.engine import Engine

WHOLE_STEPS: Final = SchedulerConfig(max_rows=2**20, max_chunk_rows=2**20, reservation="none")
"""Plans all rows of a step at once, however many: for engines that are timed."""

Span: TypeAlias = tuple[int, int, int]
"""(first layer, tokens of context before, rows) of one session in a step."""


class StepTimer:
    """Of an engine that holds no session and plans all rows of a step at once (`WHOLE_STEPS`)."""

    def __init__(self, engine: Engine, *, seed: int) -> None:
        self.core = engine.core
        self.rng = np.random.default_rng(seed)

    def num_pages(self, span: Span) -> int:
        """KV pages that `span` needs."""
        first_layer, start, num_rows = span
        return (self.core.forward.spec.num_layers - first_layer) * columns_for(start + num_rows)

    def seconds(self, mix: Sequence[Span], *, least: int = 1, most: int = 1, enough_s: float = 0.0) -> float:
        """Seconds of a step that computes `mix`, right after one like it: the fastest of `least` to `most`,
        since other work on the machine only ever adds. After `least` no further one is begun once they took
        `enough_s` together. Every span draws a token. IsthmusError: the engine computed other rows."""
        core = self.core
        inputs: list[Any] = []
        for number, (split, start, num_rows) in enumerate(mix):
            request = EngineOpen(
                split=split,
                shape="prefix",
                prompt_tokens=start + num_rows,
                max_tokens=2,
                max_context=start + num_rows,
                stream_window=0,  # an offloaded session stops after one token
            )
            core.open(number, request)
            inputs.append(self._rows(split, num_rows))
            session = core.sessions[number]
            session.history.append(self._rows(split, start))
            session.table.ensure(start)
            session.table.advance(start)
            core.scheduler.extend(number, start, now=0.0)
        self._step(mix, inputs)
        taken: list[float] = []
        while len(taken) < least or (len(taken) < most and sum(taken) < enough_s):
            taken.append(self._step(mix, inputs))
        for number in range(len(mix)):
            core.close(number, ())
        core.take_outputs()
        return min(taken)

    def _step(self, mix: Sequence[Span], inputs: Sequence[Any]) -> float:
        core = self.core
        for number, ((_, start, _), rows) in enumerate(zip(mix, inputs, strict=True)):
            core.add_rows(number, rows, "last", start)
        before = core.rows_computed_total
        begun = time.perf_counter()
        core.step()
        seconds = time.perf_counter() - begun
        wanted = sum(num_rows for _, _, num_rows in mix)
        if core.rows_computed_total - before != wanted:
            raise IsthmusError(
                f"the step computed {core.rows_computed_total - before} rows, {wanted} were to be timed"
            )
        core.take_outputs()
        return seconds

    def _rows(self, split: int, count: int) -> Any:
        spec = self.core.forward.spec
        if split == 0:
            return self.rng.integers(0, spec.vocab_size, count)
        return self.rng.standard_normal((count, spec.hidden), dtype=np.float32)

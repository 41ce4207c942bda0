"""Measured step times of the real engine: seeded mixes of decodes and chunks at all depths and contexts.

A session's context is not computed but given: its pages are allocated and left zeroed, because attention
takes as long over zeros. All else is the engine's own step: plan, layers, head, sampling, bookkeeping.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from isthmus.bench.step_model import MeasuredStep, StepSpan
from isthmus.cloud.kv import columns_for
from isthmus.protocol.errors import IsthmusError

if TYPE_CHECKING:
    from isthmus.cloud.engine import Engine

ROUNDS: Final = 3
_MAX_CONTEXT: Final = 4096
# Chunks with more rows enter so deep that they cost what so many do over all layers.
_WHOLE_DEPTH_ROWS: Final = 256


class StepProbe:
    """Times single steps of an engine that holds no session."""

    def __init__(self, engine: Engine, *, seed: int) -> None:
        """`engine` must plan all rows of a step at once, however many."""
        self.core = engine.core
        self.num_layers = self.core.forward.spec.num_layers
        self.max_context = min(self.core.forward.spec.context_length, _MAX_CONTEXT)
        self.rng = np.random.default_rng(seed)

    def measure(self, mixes: Sequence[Sequence[StepSpan]]) -> list[MeasuredStep]:
        """Each mix's median step over some rounds through all of them, so that drift hits all alike. Spans
        that do not fit the pool are left out."""
        fitting = [fit for mix in mixes if (fit := self._that_fit(mix))]
        rounds = [[self._once(mix) for mix in fitting] for _ in range(ROUNDS)]
        return [
            MeasuredStep(tuple(mix), len(mix), statistics.median(seconds))
            for mix, *seconds in zip(fitting, *rounds, strict=True)
        ]

    def _once(self, mix: Sequence[StepSpan]) -> float:
        """Seconds of the step that computes `mix`, right after one like it. Every span draws a token."""
        from isthmus.cloud.engine_session import EngineOpen

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
        seconds = self._step(mix, inputs)
        for number in range(len(mix)):
            core.close(number, ())
        core.take_outputs()
        return seconds

    def _step(self, mix: Sequence[StepSpan], inputs: Sequence[Any]) -> float:
        core = self.core
        for number, (span, rows) in enumerate(zip(mix, inputs, strict=True)):
            core.add_rows(number, rows, "last", span.start)
        before = core.rows_computed_total
        begun = time.perf_counter()
        core.step()
        seconds = time.perf_counter() - begun
        wanted = sum(span.num_rows for span in mix)
        if core.rows_computed_total - before != wanted:
            raise IsthmusError(
                f"the step computed {core.rows_computed_total - before} rows, the probe asked for {wanted}"
            )
        core.take_outputs()
        return seconds

    def _rows(self, split: int, count: int) -> Any:
        spec = self.core.forward.spec
        if split == 0:
            return self.rng.integers(0, spec.vocab_size, count)
        return self.rng.standard_normal((count, spec.hidden), dtype=np.float32)

    def _that_fit(self, mix: Sequence[StepSpan]) -> list[StepSpan]:
        fit: list[StepSpan] = []
        room = self.core.pool.num_pages
        for span in mix:
            pages = (self.num_layers - span.first_layer) * columns_for(span.start + span.num_rows)
            if pages <= room:
                room -= pages
                fit.append(span)
        return fit

    # ---- what to measure -----------------------------------------------------------------------------

    def grid(self) -> list[list[StepSpan]]:
        """Decodes and chunks by themselves: what separates the terms of the model."""
        half, last = self.num_layers // 2, self.num_layers - 1
        decodes = [(0, num, 16) for num in (1, 2, 4, 8, 16, 32, 64)]
        decodes += [(half, 1, 16), (half, 8, 16), (last, 1, 16), (last, 32, 16)]
        decodes += [(0, 1, 1024), (0, 8, 1024), (0, 16, 1024), (0, 1, 4000), (0, 4, 4000)]
        chunks = [(rows, 0) for rows in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)]
        chunks += [(rows, context) for rows in (64, 256) for context in (1024, 3000)]
        return [[self._decode(split, context)] * num for split, num, context in decodes] + [
            [StepSpan(self._entry_of(rows), context, rows)]
            for rows, context in chunks
            if context + rows <= self.max_context
        ]

    def mixes(self, num: int) -> list[list[StepSpan]]:
        """Random steps as serving makes them: decodes at all depths, beside them up to two prompt chunks."""
        return [self._mix() for _ in range(num)]

    def _mix(self) -> list[StepSpan]:
        rng = self.rng
        num_decodes = int(2 ** rng.uniform(0, 6))
        mix = [
            self._decode(self._entry(), int(rng.integers(1, max(2, min(2048, self.max_context)))))
            for _ in range(num_decodes)
        ]
        for _ in range(int(rng.integers(0, 3))):
            rows = min(int(2 ** rng.uniform(3, 8)), self.max_context)
            start = int(rng.integers(0, self.max_context - rows + 1)) // 2
            mix.append(StepSpan(self._entry(), start, rows))
        return mix

    def _entry(self) -> int:
        """Half the sessions are offloaded."""
        return int(self.rng.integers(0, self.num_layers)) if self.rng.random() < 0.5 else 0

    def _decode(self, split: int, context: int) -> StepSpan:
        return StepSpan(split, min(context, self.max_context - 1), 1)

    def _entry_of(self, rows: int) -> int:
        return int(self.num_layers * (1 - min(1.0, _WHOLE_DEPTH_ROWS / rows)))

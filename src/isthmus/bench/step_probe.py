"""Measured step times of the real engine: seeded mixes of decodes and chunks at all depths and contexts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from isthmus.bench.step_model import MeasuredStep, StepSpan
from isthmus.cloud.step_timer import StepTimer

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
        self.timer = StepTimer(engine, seed=seed)
        spec = engine.core.forward.spec
        self.num_layers = spec.num_layers
        self.max_context = min(spec.context_length, _MAX_CONTEXT)

    def measure(self, mixes: Sequence[Sequence[StepSpan]]) -> list[MeasuredStep]:
        """Each mix's median step over some rounds through all of them, so that drift hits all alike. Spans
        that do not fit the pool are left out."""
        fitting = [fit for mix in mixes if (fit := self._that_fit(mix))]
        rounds = [[self.timer.seconds(mix) for mix in fitting] for _ in range(ROUNDS)]
        return [
            MeasuredStep(tuple(mix), len(mix), statistics.median(seconds))
            for mix, *seconds in zip(fitting, *rounds, strict=True)
        ]

    def _that_fit(self, mix: Sequence[StepSpan]) -> list[StepSpan]:
        fit: list[StepSpan] = []
        room = self.timer.core.pool.num_pages
        for span in mix:
            pages = self.timer.num_pages(span)
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
        rng = self.timer.rng
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
        return int(self.timer.rng.integers(0, self.num_layers)) if self.timer.rng.random() < 0.5 else 0

    def _decode(self, split: int, context: int) -> StepSpan:
        return StepSpan(split, min(context, self.max_context - 1), 1)

    def _entry_of(self, rows: int) -> int:
        return int(self.num_layers * (1 - min(1.0, _WHOLE_DEPTH_ROWS / rows)))

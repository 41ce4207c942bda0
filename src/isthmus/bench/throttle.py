"""A slower edge than this machine is, emulated: each block's time is stretched by a declared factor."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from isthmus.edge.agent import Agent
from isthmus.protocol.errors import ConfigError
from isthmus.splitter.runner import BlockRunner

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from isthmus.protocol.profiles import DeviceProfile
    from isthmus.splitter.cache import F32, KVCache

LEAST_SLEEP_S: Final = 2e-4
"""Shorter sleeps would mostly be the sleep's own overhead; less than this is owed until more comes."""


class ThrottledRunner(BlockRunner):
    """Takes `factor` times as long as BlockRunner for the embedding, the layers and the head.

    `factor` (≥ 1) may be changed at any time and holds from the next call on. The added time is slept, so
    that the machine's cores stay free for the other processes, as another machine would leave them.
    """

    def __init__(self, *args: Any, factor: float = 1.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.factor = checked(factor)
        self._owed_s = 0.0

    def embed(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> F32:
        started = time.perf_counter()
        rows = super().embed(ids)
        self._stretch(started)
        return rows

    def forward(
        self, cache: KVCache, rows: F32, *, start_layer: int | None = None, stop_layer: int | None = None
    ) -> F32:
        started = time.perf_counter()
        out = super().forward(cache, rows, start_layer=start_layer, stop_layer=stop_layer)
        self._stretch(started)
        return out

    def head(self, rows: F32) -> F32:
        started = time.perf_counter()
        logits = super().head(rows)
        self._stretch(started)
        return logits

    def _stretch(self, started: float) -> None:
        now = time.perf_counter()
        self._owed_s += (now - started) * (self.factor - 1)
        if self._owed_s >= LEAST_SLEEP_S:
            time.sleep(self._owed_s)
            self._owed_s -= time.perf_counter() - now  # a sleep lasts a little longer than asked


class ThrottledAgent(Agent):
    """An agent whose edge computes `factor` times as slowly; `factor` may be changed while it runs."""

    def __init__(self, *args: Any, factor: float = 1.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self._factor = checked(factor)

    @property
    def factor(self) -> float:
        return self._factor

    @factor.setter
    def factor(self, value: float) -> None:
        self._factor = checked(value)
        if isinstance(self._runner, ThrottledRunner):
            self._runner.factor = self._factor

    def _make_runner(self) -> BlockRunner:
        return ThrottledRunner(self.pack, provider=self._provider, threads=self._threads, factor=self._factor)


def throttled(profile: DeviceProfile, factor: float) -> DeviceProfile:
    """The profile of the device with its blocks stretched. Codec and loading are not blocks: they stay."""
    checked(factor)
    return profile.model_copy(
        update={
            "note": f"{profile.note} blocks stretched {factor:g} times (emulated)".strip(),
            "prefill": tuple((rows, s * factor) for rows, s in profile.prefill),
            "decode": tuple((context, s * factor) for context, s in profile.decode),
            "prefill_context_s": profile.prefill_context_s * factor,
            "step_s": profile.step_s * factor,
            "embed_row_s": profile.embed_row_s * factor,
            "head_s": profile.head_s * factor,
        }
    )


def checked(factor: float) -> float:
    """`factor`; ConfigError unless it is a number of at least 1."""
    if not 1 <= factor < float("inf"):
        raise ConfigError(
            f"throttle {factor:g}", code="bad_throttle", hint="a factor of at least 1: nothing is made faster"
        )
    return factor

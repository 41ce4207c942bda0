"""How fast the edge is now, seen without a request: a few layers over one row, timed while nothing runs.

A device slows down and recovers (heat, other programs) also while requests go to the cloud; then no request
would tell.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Final

import numpy as np

from isthmus.splitter.sides import side_of

if TYPE_CHECKING:
    from isthmus.protocol.profiles import DeviceProfile
    from isthmus.splitter.runner import BlockRunner

MOST_LAYERS: Final = 8
NUM_STEPS: Final = 3


def pulse(runner: BlockRunner, profile: DeviceProfile) -> tuple[float, float] | None:
    """Seconds (observed, predicted) of a step over the first layers in memory; None where there is none. In
    the agent's worker."""
    loaded = runner.loaded_layers
    count = next((i for i, layer in enumerate(loaded) if layer != i), len(loaded))
    count = min(count, MOST_LAYERS)
    if count == 0:
        return None
    row = np.zeros((1, runner.spec.hidden), dtype=np.float32)
    cache = runner.new_cache(range(count), capacity=NUM_STEPS + 1)
    try:
        runner.forward(cache, row)  # binds the step
        times = []
        for _ in range(NUM_STEPS):
            started = perf_counter()
            runner.forward(cache, row)
            times.append(perf_counter() - started)
    finally:
        cache.close()
    side = side_of(profile)
    return median(times), profile.step_s + side.layers(0, count) * side.layer_s(0.0)

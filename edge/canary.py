"""Rule 8: other weights than the cloud's are allowed where a fixed sequence, run by both, agrees."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

from isthmus.protocol.errors import RejectedError
from isthmus.protocol.identity import canary_ids

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from isthmus.edge.link import CloudLink
    from isthmus.splitter.runner import BlockRunner


class Canary:
    """Runs the sequence's edge part in `worker`."""

    def __init__(self, runner: BlockRunner, worker: Executor) -> None:
        self._runner = runner
        self._worker = worker

    async def check(self, link: CloudLink, split: int) -> dict[str, Any]:
        """What to tell about other weights at `link`. Offload runs nothing of the edge's, so there it is only
        said; a split needs the cloud's agreement first, or RejectedError `canary_failed`."""
        event: dict[str, Any] = {"event": "other_weights", "split": split}
        if split == 0 or not await link.needs_canary(split):
            return event
        loop = asyncio.get_running_loop()
        rows = await loop.run_in_executor(self._worker, self._rows, split)
        result = await link.canary(split, rows)
        if not result.ok:
            raise RejectedError(
                f"at K = {split} the canary's rows differ by {result.error:.3g} from the cloud's, "
                f"allowed are {result.tolerance:.3g}",
                code="canary_failed",
                hint="edge and cloud hold different weights of this model: build the pack from the cloud's",
            )
        return {**event, "canary_error": result.error, "canary_tolerance": result.tolerance}

    def _rows(self, split: int) -> NDArray[np.float32]:
        spec = self._runner.spec
        ids = canary_ids(spec.vocab_size)
        self._runner.load(range(split), embed=True, head=False)
        cache = self._runner.new_cache(range(split), capacity=len(ids))
        try:
            return self._runner.forward(cache, self._runner.embed(ids), start_layer=0, stop_layer=split)
        finally:
            cache.close()

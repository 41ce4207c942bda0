"""The active measurement of an idle link: a few round trips, then padding up and down, more of it each time.

On a connection that was idle TCP begins slowly, so on a long fast link the figure errs low; what requests
send corrects it.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Final

from isthmus.edge.link_estimate import PROBE_BYTES

if TYPE_CHECKING:
    from isthmus.edge.link_estimate import LinkEstimator
    from isthmus.edge.wire import Wire
    from isthmus.protocol.events import ProbeDone

# Enough for the estimator to believe a round trip that has changed.
_NUM_ROUND_TRIPS: Final = 3


async def probe_link(wire: Wire, estimator: LinkEstimator) -> None:
    """Measure what `estimator` has no figure for. Ends early where a session opens: what is measured beside
    one would be wrong, and in its way. At most 0.7 MiB."""
    for _ in range(_NUM_ROUND_TRIPS):
        if (done := await _probe(wire, 0, 0)) is None:
            return
        estimator.note_probe(done, monotonic())
    if estimator.needs_up(monotonic()):
        await _measure(wire, estimator, up=True)
    if estimator.needs_down(monotonic()):
        await _measure(wire, estimator, up=False)


async def _measure(wire: Wire, estimator: LinkEstimator, *, up: bool) -> None:
    most = wire.core.max_probe_bytes
    size: int | None = min(PROBE_BYTES, most)
    while size:
        done = await _probe(wire, size if up else 0, 0 if up else size)
        if done is None or not done.up_bytes + done.down_bytes:  # the cloud sends nothing back any more
            return
        size = estimator.next_probe(size, estimator.added_s(done), most)
        if size is None:
            estimator.note_probe(done, monotonic())


async def _probe(wire: Wire, up_bytes: int, down_bytes: int) -> ProbeDone | None:
    """None if the link was in use."""
    if wire.sessions:
        return None
    done = await wire.probe(up_bytes, down_bytes)
    return None if wire.sessions else done

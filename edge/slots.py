"""A stated number of requests at once, a bounded queue by priority and arrival, refusal beyond it."""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from time import monotonic

from isthmus.protocol.errors import OverloadedError


class Slots:
    """`parallel` requests run, `queue` wait; the next one gets OverloadedError with an estimated wait."""

    def __init__(self, parallel: int, queue: int) -> None:
        self.parallel = parallel
        self.queue = queue
        self.running = 0
        self.mean_s = 1.0  # of the requests that finished, recent ones weighing more
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []  # with its priority, next one first

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @asynccontextmanager
    async def take(self, priority: int = 0) -> AsyncIterator[None]:
        """Hold a slot for the length of the block. Who waits with a higher priority gets the next one first,
        among equals who came first."""
        await self._acquire(priority)
        since = monotonic()
        try:
            yield
        finally:
            self.mean_s += 0.2 * (monotonic() - since - self.mean_s)
            self._hand_on()

    async def _acquire(self, priority: int) -> None:
        if self.running < self.parallel:
            self.running += 1
            return
        if len(self._waiting) >= self.queue:
            retry_after_s = max(0.1, self.mean_s * (len(self._waiting) + 1) / self.parallel)
            raise OverloadedError(
                f"{self.running} requests run (at most {self.parallel}) and {len(self._waiting)} wait "
                f"(at most {self.queue})",
                hint=f"try again in {retry_after_s:.1f} s",
                retry_after_s=retry_after_s,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        insort(self._waiting, (priority, turn), key=_goes_after)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with suppress(ValueError):  # a slot became free in the same moment, and passed it by
                    self._waiting.remove((priority, turn))
            else:  # the slot was handed over in the same moment
                self._hand_on()
            raise

    def _hand_on(self) -> None:
        """The slot goes to the next in the queue, or becomes free."""
        while self._waiting:
            _, turn = self._waiting.pop(0)
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1


def _goes_after(waiting: tuple[int, asyncio.Future[None]]) -> int:
    return -waiting[0]

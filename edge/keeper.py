"""Keeps known what predictions rest on: the links, connected and measured, and how fast this device is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Final

from isthmus.protocol.errors import IsthmusError

if TYPE_CHECKING:
    from isthmus.edge.clouds import Clouds
    from isthmus.edge.link import CloudLink

LOOK_EVERY_S: Final = 1.0
# Measuring costs bytes: a link that nobody has used for so long may be forgotten.
IN_USE_S: Final = 120.0


class Keeper:
    """Runs from `start` to `aclose`. Predictions need a WELCOME and a measured link; who waits for the first
    request to get them decides blindly."""

    def __init__(
        self, clouds: Clouds, look_here: Callable[[], Awaitable[None]], *, metered: bool = False
    ) -> None:
        """`look_here` measures this device, if it is idle; asked while requests come now and then. `metered`:
        bytes cost money, so a link is probed once, and then known from what requests send."""
        self._clouds = clouds
        self._look_here = look_here
        self._metered = metered
        self._task: asyncio.Task[None] | None = None
        self._used_at = -IN_USE_S

    def start(self) -> None:
        if self._clouds.links and self._task is None:
            self._task = asyncio.create_task(self._keep(), name="isthmus-keeper")

    def in_use(self) -> None:
        """A request came: what is known of the links is to be kept fresh for a while."""
        self._used_at = monotonic()

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def warm(self, timeout_s: float) -> None:
        """Have every link that may be tried connected and measured, or `timeout_s` pass. Never raises for a
        cloud that is not there."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(self._look(link) for link in self._clouds.links))

    async def _keep(self) -> None:
        while True:
            await asyncio.gather(*(self._look(link) for link in self._clouds.links))
            if monotonic() - self._used_at < IN_USE_S:
                with suppress(IsthmusError):  # a block that cannot be loaded: who needs it will be told
                    await self._look_here()
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self, link: CloudLink) -> None:
        with suppress(IsthmusError):  # the link keeps its failure; the router will say so
            if link.state in ("unknown", "down") and link.breaker.may_try(monotonic()):
                await link.connect()
            if link.state == "up" and self._is_due(link):
                await link.probe()

    def _is_due(self, link: CloudLink) -> bool:
        now = monotonic()
        known = link.estimate(now)
        is_new = known.up is None or known.down is None
        again = now - self._used_at < IN_USE_S and not self._metered
        return (is_new or again) and link.needs_probe(now)

"""A request's work in the agent's one worker thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any, TypeVar

from isthmus.protocol.errors import IsthmusError

T = TypeVar("T")


class Jobs:
    """Submits in order, remembers what is not finished."""

    def __init__(self, worker: Executor) -> None:
        self._worker = worker
        self._unfinished: set[asyncio.Future[Any]] = set()

    def submit(self, job: Callable[[], T]) -> asyncio.Future[T]:
        """Run `job` in the worker, after what was submitted before."""
        try:
            future = asyncio.get_running_loop().run_in_executor(self._worker, job)
        except RuntimeError as error:  # the executor was shut down
            raise IsthmusError("the agent was closed while the request ran", code="agent_closed") from error
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        return future

    async def settle(self) -> None:
        """Wait for what runs; what it yields or raises is nobody's any more."""
        while self._unfinished:
            await asyncio.gather(*self._unfinished, return_exceptions=True)

    def end(self, last: Callable[[], None]) -> None:
        """Drop what did not start yet, and run `last` behind the rest without waiting for it."""
        for job in tuple(self._unfinished):
            job.cancel()
        with suppress(RuntimeError):  # the agent was closed before this request; its caches went with it
            self._worker.submit(last)

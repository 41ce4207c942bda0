"""Offload: how far the engine may stream by itself, by the edge's window and by the tenant's rate."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Final

from isthmus.protocol.limits import TenantUsage

# Where there is a rate, the engine goes no further ahead of what was charged; each token raises the limit.
_AHEAD_TOKENS: Final = 4


def first_limit(window: int, *, has_rate: bool) -> int:
    """The engine's limit as a session begins; `window`: the tokens the edge takes before it acknowledges."""
    return min(window, _AHEAD_TOKENS) if has_rate else window


class StreamMeter:
    """Counts what a session has streamed and moves the engine's limit along. On the event loop."""

    def __init__(
        self, usage: TenantUsage, window: int, set_limit: Callable[[int], None], *, has_rate: bool
    ) -> None:
        """`set_limit` tells the engine how many tokens it may stream in total."""
        self._usage = usage
        self._set_limit = set_limit
        self._has_rate = has_rate
        self._num_streamed = 0
        self._wanted = window
        self._limit = first_limit(window, has_rate=has_rate)
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def count(self, num_tokens: int) -> None:
        """The engine has streamed `num_tokens` more."""
        self._num_streamed += num_tokens
        if self._has_rate:
            now = monotonic()
            self._due_s = now + self._usage.reserve_tokens(num_tokens, now)
            self._raise()

    def widen(self, room: int) -> None:
        """The edge takes `room` more tokens from here on."""
        self._wanted = self._num_streamed + room
        self._raise()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _raise(self) -> None:
        if self._timer is not None:
            return
        wait_s = self._due_s - monotonic()
        if wait_s > 0:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._raise_now)
            return
        limit = min(self._wanted, self._num_streamed + _AHEAD_TOKENS) if self._has_rate else self._wanted
        if limit > self._limit:
            self._limit = limit
            self._set_limit(limit)

    def _raise_now(self) -> None:
        self._timer = None
        self._raise()

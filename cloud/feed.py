"""The way of one session's steps into the engine: decoded, in order, and no faster than its tenant may."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.cloud.engine import Engine
from isthmus.protocol.activations import RowCodec, decode_ids
from isthmus.protocol.cloud_session import CloudSession
from isthmus.protocol.errors import CloudError, IsthmusError
from isthmus.protocol.events import StepReceived
from isthmus.protocol.limits import TenantUsage

# Bodies up to here are decoded on the loop (tens of µs); larger ones by a thread.
INLINE_BYTES: Final = 64 * 1024


@dataclass(frozen=True)
class FeedTerms:
    """What all feeds of one cloud share. `max_raw` in bytes; `log` hears of bugs."""

    engine: Engine
    decoders: Executor
    vocab_size: int
    max_raw: int
    log: Any


class Feed:
    """Belongs to the session, not to its connection: what a new connection brings waits behind what an old
    one brought. A small step with nothing before it is handed on at once; others wait here, bounded by the
    session's credits, and hold up nothing else. On the event loop, but `_decode`."""

    def __init__(
        self,
        number: int,
        core: CloudSession,
        codec: RowCodec | None,
        usage: TenantUsage,
        terms: FeedTerms,
        on_error: Callable[[IsthmusError], None],
    ) -> None:
        """`codec` None: the rows are token ids. `on_error` ends the session, whose body did not decode."""
        self.asked_s: float | None = None
        """When the step came whose output is due or was given last, on the monotonic clock; None: none came,
        or the session has changed its connection since."""
        self._number = number
        self._core = core
        self._codec = codec
        self._usage = usage
        self._terms = terms
        self._on_error = on_error
        self._loop = asyncio.get_running_loop()
        self._undecoded: deque[StepReceived | Callable[[], None]] = deque()
        self._decoder: asyncio.Task[None] | None = None
        self._waiting: deque[tuple[float, Callable[[], None]]] = deque()  # with the time when it may go
        self._timer: asyncio.TimerHandle | None = None

    def step(self, step: StepReceived) -> None:
        """Takes a step that the protocol has accepted, at the moment when it arrives."""
        if step.final or step.all_rows:
            self.asked_s = monotonic()
        if self._decoder is None and step.frame.raw_len <= INLINE_BYTES:
            try:
                self._hand_on(step, self._decode(step))
            except Exception as error:
                self._fail(error)
        else:
            self._decode_later(step)

    def after(self, action: Callable[[], None]) -> None:
        """Calls `action` once every step taken so far is with the engine."""
        if self._decoder is not None:
            self._decode_later(action)
        else:
            self._pass_on(action, 0.0)

    @property
    def decoded(self) -> bool:
        """Whether every step taken so far is decoded and in the session's digests."""
        return self._decoder is None

    async def wait_decoded(self) -> None:
        if self._decoder is not None:
            await asyncio.wait({self._decoder})

    def stop(self) -> None:
        """Forgets what has not reached the engine."""
        self._undecoded.clear()
        self._waiting.clear()
        if self._decoder is not None:
            self._decoder.cancel()
        if self._timer is not None:
            self._timer.cancel()

    # ---- decoding

    def _decode_later(self, item: StepReceived | Callable[[], None]) -> None:
        self._undecoded.append(item)
        if self._decoder is None:
            self._decoder = self._loop.create_task(self._decode_all(), name="isthmus-cloud-decode")

    async def _decode_all(self) -> None:
        try:
            while self._undecoded:
                item = self._undecoded.popleft()
                if isinstance(item, StepReceived):
                    decode = partial(self._decode, item)
                    self._hand_on(item, await self._loop.run_in_executor(self._terms.decoders, decode))
                else:
                    self._pass_on(item, 0.0)
        except Exception as error:
            self._fail(error)
        finally:
            self._decoder = None

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, IsthmusError):
            self._terms.log.error("decoder_bug", exc_info=error)
            error = CloudError("the cloud failed to take in a step", code="decoder_failed")
        self._on_error(error)

    def _decode(self, step: StepReceived) -> NDArray[np.float32] | list[int]:
        """Rows or ids of a step, which join the session's digests; on a thread for large bodies, but never
        two of a session at once."""
        digests = self._core.digests
        rows: NDArray[np.float32] | list[int]
        raw: NDArray[np.uint8] | bytes
        if self._codec is None:
            rows = decode_ids(step.frame.body, n_tok=step.n_tok, vocab_size=self._terms.vocab_size)
            raw = step.frame.body
        else:
            raw = self._codec.unpack(step.frame, max_raw=self._terms.max_raw)
            rows = self._codec.decode_raw(raw)
        digests.truncate(step.pos)  # without TRUNCATE this is the chain's end, or lies behind streamed tokens
        digests.append(raw)
        return rows

    # ---- the tenant's rate

    def _hand_on(self, step: StepReceived, rows: NDArray[np.float32] | list[int]) -> None:
        now = monotonic()
        add = partial(
            self._terms.engine.add_rows,
            self._number,
            rows,
            output="all" if step.all_rows else "last" if step.final else "none",
            truncate_to=step.pos if step.truncate else None,
            drafts=step.drafts or None,
        )
        self._pass_on(add, self._usage.reserve_tokens(step.n_tok, now))

    def _pass_on(self, action: Callable[[], None], delay_s: float) -> None:
        if not self._waiting and delay_s <= 0:
            action()
            return
        self._waiting.append((monotonic() + delay_s, action))
        if self._timer is None:
            self._timer = self._loop.call_later(delay_s, self._pass_on_due)

    def _pass_on_due(self) -> None:
        self._timer = None
        while self._waiting:
            due_s, action = self._waiting[0]
            if (wait_s := due_s - monotonic()) > 0:
                self._timer = self._loop.call_later(wait_s, self._pass_on_due)
                return
            self._waiting.popleft()
            action()

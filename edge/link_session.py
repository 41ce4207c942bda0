"""One session on a link. It may outlive the connection it began on: `Wire.resume` gives it another one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from isthmus.protocol.errors import CloudError, CloudLostError, CloudTimeoutError, IsthmusError
from isthmus.protocol.events import (
    EdgeEvent,
    ResultRows,
    ResultTokens,
    SessionFailed,
    SessionOpened,
    SessionResumed,
    SessionSuspended,
    StreamTokens,
)
from isthmus.protocol.frames import HEADER_BYTES
from isthmus.protocol.messages import GoAway, Opened
from isthmus.protocol.prefix import PrefixOffer

if TYPE_CHECKING:
    from isthmus.edge.wire import Wire
    from isthmus.protocol.activations import Encoded
    from isthmus.protocol.edge_session import EdgeSession

Output = ResultTokens | ResultRows | StreamTokens


class _Step(NamedTuple):
    """One row on its way."""

    sent: float
    up_bytes: int
    down_bytes: int  # what the session had received by then
    link_was_free: bool


class LinkSession:
    """Awaiting methods raise what ended the session, CloudLostError where its connection broke.

    `suspended`: the connection broke, and the cloud may still hold the session.

    Where its time went, as far as the cloud tells (not for hidden rows): `first_cloud_s` the cloud's part
    of the first output; `num_steps` rows that were answered one by one, `cloud_s` the cloud's part of them
    and `link_s` the rest, from sending the row to having its answer.
    """

    def __init__(self, wire: Wire, core: EdgeSession) -> None:
        self.core = core
        self.bytes_up = 0
        self.bytes_down = 0
        self.suspended = False
        self.num_steps = 0
        self.cloud_s = 0.0
        self.link_s = 0.0
        self.first_cloud_s: float | None = None
        self._wire = wire
        self._step: _Step | None = None
        self._opened: Opened | None = None
        self._outputs: deque[Output] = deque()
        self._resumed: SessionResumed | None = None
        self._error: IsthmusError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._waiting_since = 0.0
        self._has_output = False

    @property
    def rtt_s(self) -> float | None:
        """The link's smoothed round trip, in seconds."""
        return self._wire.estimator.rtt_s

    @property
    def goaway(self) -> GoAway | None:
        """The cloud's notice that it is going away, once there is one."""
        return self._wire.goaway

    async def opened(self) -> Opened:
        """Wait for the cloud's answer to OPEN."""
        while self._opened is None:
            await self._wait()
        return self._opened

    async def resumed(self) -> SessionResumed:
        """Wait for the cloud's answer to RESUME; raises its refusal."""
        while self._resumed is None:
            await self._wait()
        return self._resumed

    async def room(self, n_tok: int, *, decode: bool = False) -> bool:
        """Wait until a step of `n_tok` rows may go out: the credits cover it and, for a prefill chunk, the
        transport has taken what was queued before (a decode row, and with `decode` a draft chain, overtakes
        other sessions' chunks in the queue). False at once where no step may ever be so large: OPENED may
        lower the limit."""
        while not self.core.can_send(n_tok):
            if n_tok > self.max_rows:
                return False
            await self._wait()
        if n_tok > 1 and not decode:
            await self._wire.drained()
        if self._error is not None:
            raise self._error
        return n_tok <= self.max_rows

    @property
    def max_rows(self) -> int:
        """Most rows one step may carry."""
        window = self.core.opened.credits if self.core.opened else self._wire.initial_credits
        return min(self.core.chunk_rows, window)

    async def send_rows(
        self, encoded: Encoded, pos: int, n_tok: int, *, final: bool, truncate: bool = False
    ) -> None:
        """Send one STEP of boundary rows; there must be `room`."""
        self.core.step_rows(encoded, pos, n_tok, final=final, truncate=truncate)
        if n_tok == 1 and final:
            size = HEADER_BYTES + len(encoded.body)
            self._step = _Step(monotonic(), size, self.bytes_down, self._wire.core.is_link_free)
        await self._wire.send_now()

    async def verify_rows(self, ids: Sequence[int], encoded: Encoded, pos: int, *, truncate: bool) -> None:
        """Send one VERIFY; there must be `room`."""
        self.core.verify_rows(ids, encoded, pos, truncate=truncate)
        await self._wire.send_now()

    def send_ids(self, ids: Sequence[int], pos: int, *, final: bool, truncate: bool = False) -> None:
        """Queue one STEP of token ids (K = 0); there must be `room`."""
        self.core.step_ids(ids, pos, final=final, truncate=truncate)
        self._wire.wake()

    async def next(self) -> Output:
        """The next output of the cloud: tokens or hidden rows."""
        while not self._outputs:
            await self._wait()
        return self._outputs.popleft()

    def cancel(self) -> None:
        """Stop; the cloud keeps nothing. Returns at once; harmless after the end."""
        if self._error is None or self.suspended:
            self.suspended = False
            self.core.cancel()
            self._wire.wake()

    def close(self, offer: PrefixOffer) -> None:
        """Stop; the cloud may keep the KV under `offer`. Returns at once; harmless after the end."""
        if self._error is None:
            self.core.close(offer=offer)
            self._wire.wake()

    def attach(self, wire: Wire) -> None:
        """RESUME is on its way over `wire`."""
        self._wire = wire
        self._step = None
        self._error = None
        self._resumed = None
        self.suspended = False

    def receive(self, event: EdgeEvent) -> None:
        """Take in what the reader got for this stream."""
        if isinstance(event, ResultTokens | ResultRows | StreamTokens):
            if self._waiter is not None and self._has_output:
                self._wire.deadline.note(monotonic() - self._waiting_since)
            if not isinstance(event, ResultRows) and event.cloud_us:
                self._note_times(event.cloud_us / 1e6, monotonic())
            self._step = None
            self._has_output = True
            self._outputs.append(event)
        elif isinstance(event, SessionOpened):
            self._opened = event.opened
        elif isinstance(event, SessionResumed):
            self._resumed = event
        elif isinstance(event, SessionSuspended) and self._error is None:
            self.suspended = True
            self._error = as_lost(event.error)
        elif isinstance(event, SessionFailed) and self._error is None:
            self._error = event.error
        self._wake()

    def _note_times(self, cloud_s: float, now: float) -> None:
        """The cloud took `cloud_s` for the output that has just come."""
        if not self._has_output:
            self.first_cloud_s = cloud_s
        step = self._step
        if step is None:
            return
        took_s = now - step.sent
        self.num_steps += 1
        self.cloud_s += cloud_s
        self.link_s += max(0.0, took_s - cloud_s)
        if step.link_was_free:
            down_bytes = self.bytes_down - step.down_bytes
            self._wire.estimator.note_step(took_s, cloud_s, step.up_bytes, down_bytes, now)

    def check_deadline(self, now: float, first_timeout_s: float, step_timeout_s: float) -> None:
        """Fail a wait in which the cloud, though alive, made no progress for too long. Before the first
        output it may have a prompt to compute and a queue to serve."""
        allowed = step_timeout_s if self._has_output else first_timeout_s
        if self._waiter is not None and now - self._waiting_since > allowed and self._error is None:
            self.cancel()
            waited = now - self._waiting_since
            self._error = CloudTimeoutError(
                f"no progress on the session for {waited:.1f} s, allowed are {allowed:.1f} s",
                hint="the cloud is alive but too busy; try again, or take another route",
            )
            self._wake()

    def excuse(self, seconds: float) -> None:
        """This machine slept: the time counts against nobody."""
        self._waiting_since += seconds

    async def _wait(self) -> None:
        """Wait for any event of this stream."""
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        self._waiting_since = monotonic()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def as_lost(error: IsthmusError) -> CloudError:
    """Whatever ended the connection, for its sessions it was lost."""
    if isinstance(error, CloudError):
        return error
    return CloudLostError(f"the connection to the cloud ended: {error.message}", code=error.code)

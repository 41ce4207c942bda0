"""Every bound of the session protocol, and the ledger that holds a tenant to its quota.

Rule 11: bounds are checked before anything is allocated. Sizes are bytes, times are seconds,
`rows` are positions of the boundary tensor (one per token).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from isthmus.protocol.errors import OverloadedError
from isthmus.protocol.messages import WireLimits

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """What one end accepts. The cloud sends the part the edge must keep to in WELCOME (`wire`)."""

    max_message_bytes: int = 8 * MIB
    max_control_bytes: int = 256 * 1024
    max_rows_per_step: int = 512
    max_tokens_per_session: int = 8192
    max_sessions: int = 256
    max_sessions_per_tenant: int = 64
    max_kv_bytes_per_tenant: int = 16 * 1024 * MIB
    initial_credits_rows: int = 2048
    stream_window_tokens: int = 256
    # What may wait for a peer that does not read before the connection is given up.
    max_outbox_bytes: int = 64 * MIB
    hello_timeout_s: float = 5.0
    heartbeat_s: float = 1.0
    # Counted from the last sign of life, which may be a STATUS half a second late: with that and one tick of
    # the caller a dead link is noticed within 3 s.
    dead_after_s: float = 2.3
    # The cloud's patience with an edge from which not even a ping comes.
    idle_after_s: float = 15.0
    # How long a session whose connection is gone is kept; 0: never.
    detached_s: float = 120.0
    resume_token_s: float = 24 * 3600.0
    # Per tenant; 0: no limit. Tokens are rows fed and tokens streamed.
    max_resumes_per_minute_per_tenant: int = 240
    max_tokens_per_s_per_tenant: float = 0.0
    # Padding of a PROBE and of its reply. The replies of one connection are bounded, for a few bytes ask for
    # many; with the burst an edge measures its link several times over.
    max_probe_bytes: int = 256 * 1024
    probe_reply_bytes_per_s: int = 512 * 1024
    probe_reply_burst_bytes: int = 2 * MIB

    def wire(self) -> WireLimits:
        """The bounds the edge has to know, as WELCOME carries them."""
        return WireLimits(
            max_message_bytes=self.max_message_bytes,
            max_control_bytes=self.max_control_bytes,
            max_rows_per_step=self.max_rows_per_step,
            max_tokens_per_session=self.max_tokens_per_session,
            max_sessions=min(self.max_sessions, self.max_sessions_per_tenant),
            initial_credits_rows=self.initial_credits_rows,
            stream_window_tokens=self.stream_window_tokens,
            heartbeat_s=self.heartbeat_s,
            dead_after_s=self.dead_after_s,
            max_probe_bytes=self.max_probe_bytes,
        )


_TOKEN_BURST_S = 10.0


@dataclass(slots=True)
class TokenBucket:
    """`rate_per_s` on the long run, `burst` at once. A rate of 0 is no limit. `now` is any monotonic time in
    seconds; one that goes backwards refills nothing."""

    rate_per_s: float = 0.0
    burst: float = 0.0
    _level: float = field(init=False)
    _refilled: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._level = self.burst

    def reserve(self, n: float, now: float) -> float:
        """Take `n`, which always succeeds; seconds to wait until they are covered, 0 where they are."""
        if self.rate_per_s <= 0:
            return 0.0
        self._refill(now)
        self._level -= n
        return max(0.0, -self._level / self.rate_per_s)

    def take(self, now: float, n: float = 1.0) -> float:
        """Take `n` if they are there: 0. Else nothing is taken; seconds until they will be there."""
        if self.rate_per_s <= 0:
            return 0.0
        self._refill(now)
        if self._level < n:
            return (n - self._level) / self.rate_per_s
        self._level -= n
        return 0.0

    def _refill(self, now: float) -> None:
        passed = 0.0 if self._refilled is None else max(0.0, now - self._refilled)
        self._level = min(self.burst, self._level + passed * self.rate_per_s)
        self._refilled = now


@dataclass(slots=True)
class TenantUsage:
    """One tenant's sessions, KV bytes, resumes and tokens, shared by all connections of that tenant.

    A session is charged at OPEN with the KV bytes of its whole `max_context`: a right to progress
    bounded by quota, not reserved pages. It stays charged while it is detached. Where a quota is full,
    `make_room` is asked to give a detached one up; it says whether it did.
    """

    max_sessions: int
    max_kv_bytes: int
    num_sessions: int = 0
    kv_bytes: int = 0
    resumes: TokenBucket = field(default_factory=TokenBucket)
    tokens: TokenBucket = field(default_factory=TokenBucket)
    make_room: Callable[[], bool] = lambda: False

    @classmethod
    def from_limits(cls, limits: Limits) -> TenantUsage:
        per_minute = limits.max_resumes_per_minute_per_tenant
        per_s = limits.max_tokens_per_s_per_tenant
        return cls(
            limits.max_sessions_per_tenant,
            limits.max_kv_bytes_per_tenant,
            resumes=TokenBucket(per_minute / 60, per_minute),
            tokens=TokenBucket(per_s, per_s * _TOKEN_BURST_S),
        )

    def admit(self, kv_bytes: int) -> None:
        """Charge one session of `kv_bytes`; OverloadedError (nothing charged) where a quota is full."""
        while (full := self._full_for(kv_bytes)) is not None:
            if not self.make_room():
                raise full
        self.num_sessions += 1
        self.kv_bytes += kv_bytes

    def _full_for(self, kv_bytes: int) -> OverloadedError | None:
        if self.num_sessions >= self.max_sessions:
            return OverloadedError(
                f"the tenant has {self.num_sessions} sessions open, its quota is {self.max_sessions}",
                code="tenant_sessions",
                hint="close a session or try again later",
            )
        if self.kv_bytes + kv_bytes > self.max_kv_bytes:
            return OverloadedError(
                f"the session may grow to {kv_bytes} KV bytes; the tenant holds {self.kv_bytes} of its "
                f"quota of {self.max_kv_bytes}",
                code="tenant_kv_bytes",
                hint="ask for fewer tokens (max_context) or try again later",
            )
        return None

    def release(self, kv_bytes: int) -> None:
        """Give back what `admit(kv_bytes)` charged."""
        self.num_sessions -= 1
        self.kv_bytes -= kv_bytes

    def admit_resume(self, now: float) -> None:
        """Charge one RESUME; OverloadedError `tenant_resumes` (nothing charged) where there were too many."""
        wait_s = self.resumes.take(now)
        if wait_s > 0:
            raise OverloadedError(
                f"the tenant resumes more than {self.resumes.burst:.0f} sessions per minute",
                code="tenant_resumes",
                hint="open the session anew, or wait",
                retry_after_s=wait_s,
            )

    def reserve_tokens(self, n: int, now: float) -> float:
        """Charge `n` tokens; seconds to wait before they are worked on, 0 within the tenant's rate."""
        return self.tokens.reserve(n, now)

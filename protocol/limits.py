"""Every bound of the session protocol, and the ledger that holds a tenant to its quota.

Rule 11: bounds are checked before anything is allocated. Sizes are bytes, times are seconds,
`rows` are positions of the boundary tensor (one per token).
"""

from __future__ import annotations

from dataclasses import dataclass

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
    # Counted from the last byte heard, so 2.5 plus one tick of the caller stays within 3 s.
    dead_after_s: float = 2.5
    # The cloud's patience with an edge from which not even a ping comes.
    idle_after_s: float = 15.0

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
        )


@dataclass(slots=True)
class TenantUsage:
    """One tenant's sessions and KV bytes, shared by all connections of that tenant.

    A session is charged at OPEN with the KV bytes of its whole `max_context`: a right to progress
    bounded by quota, not reserved pages.
    """

    max_sessions: int
    max_kv_bytes: int
    num_sessions: int = 0
    kv_bytes: int = 0

    @classmethod
    def from_limits(cls, limits: Limits) -> TenantUsage:
        return cls(limits.max_sessions_per_tenant, limits.max_kv_bytes_per_tenant)

    def admit(self, kv_bytes: int) -> None:
        """Charge one session of `kv_bytes`; OverloadedError (nothing charged) where a quota is full."""
        if self.num_sessions >= self.max_sessions:
            raise OverloadedError(
                f"the tenant has {self.num_sessions} sessions open, its quota is {self.max_sessions}",
                code="tenant_sessions",
                hint="close a session or try again later",
            )
        if self.kv_bytes + kv_bytes > self.max_kv_bytes:
            raise OverloadedError(
                f"the session may grow to {kv_bytes} KV bytes; the tenant holds {self.kv_bytes} of its "
                f"quota of {self.max_kv_bytes}",
                code="tenant_kv_bytes",
                hint="ask for fewer tokens (max_context) or try again later",
            )
        self.num_sessions += 1
        self.kv_bytes += kv_bytes

    def release(self, kv_bytes: int) -> None:
        """Give back what `admit(kv_bytes)` charged."""
        self.num_sessions -= 1
        self.kv_bytes -= kv_bytes

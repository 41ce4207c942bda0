"""What all connections of one cloud share: the engine, limits, keys, quotas, and the drain."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from isthmus.cloud.auth import KeyFile
from isthmus.cloud.engine import Engine
from isthmus.cloud.telemetry import Telemetry, get_log
from isthmus.protocol.cloud_connection import CanaryCache, ServerInfo
from isthmus.protocol.errors import ConfigError, OverloadedError, RejectedError
from isthmus.protocol.limits import Limits, TenantUsage
from isthmus.protocol.messages import Load

if TYPE_CHECKING:
    from isthmus.cloud.connection import Peer

TICK_S: Final = 0.25
_TICKS_PER_STATUS: Final = 8
_TICKS_PER_KEY_CHECK: Final = 8
# A stuck step turns /readyz to 503 well within 5 s.
STUCK_AFTER_S: Final = 3.0
MAX_CONNECTIONS: Final = 1024


@dataclass(eq=False)
class Hub:
    """One per server. Lives on the event loop, except for what says otherwise."""

    engine: Engine
    info: ServerInfo
    limits: Limits
    telemetry: Telemetry
    keys: KeyFile = field(default_factory=lambda: KeyFile(None))
    chunk_rows: int = 256
    canaries: CanaryCache = field(default_factory=dict)
    peers: set[Peer] = field(default_factory=set)
    log: Any = field(default_factory=get_log)

    def __post_init__(self) -> None:
        # Large bodies are decoded here, so that zstd and int8 never hold up another edge's ping.
        self.decoders = ThreadPoolExecutor(2, thread_name_prefix="isthmus-decode")
        self._usages: dict[str, TenantUsage] = {}
        self._drain_until_s: float | None = None
        self._idle = asyncio.Event()

    # ---- admission

    def usage(self, tenant: str) -> TenantUsage:
        return self._usages.setdefault(tenant, TenantUsage.from_limits(self.limits))

    @property
    def num_sessions(self) -> int:
        return sum(len(peer.core.sessions) for peer in self.peers)

    def check_session(self) -> None:
        """OverloadedError for a session beyond the cloud's own limit, or while it drains."""
        if self.draining:
            raise OverloadedError(
                "the cloud is shutting down", code="draining", hint="use another cloud", retry_after_s=5.0
            )
        if self.num_sessions > self.limits.max_sessions:
            raise OverloadedError(
                f"{self.limits.max_sessions} sessions are open on this cloud, which is its limit",
                code="cloud_full",
                hint="try again later",
            )

    def refusal(self) -> RejectedError | None:
        """Why a new connection gets REJECT, if it does."""
        if self.draining:
            return RejectedError("the cloud is shutting down", code="draining", retry_after_s=5.0)
        return None

    def load(self) -> Load:
        stats = self.engine.stats()
        return Load(
            queue=stats.waiting,
            running=stats.running,
            kv_total_pages=stats.pages_total,
            kv_free_pages=stats.pages_free,
            kv_cached_pages=stats.pages_cached,
            rows_computed=stats.rows_computed_total,
        )

    # ---- health

    def unready_reason(self) -> str | None:
        """Why /readyz answers 503, or None."""
        if self.draining:
            return "draining"
        stuck = self.engine.stuck_for_s()
        if stuck == float("inf"):
            return "the engine's thread died"
        if stuck > STUCK_AFTER_S:
            return f"the engine has made no progress for {stuck:.1f} s"
        return None

    # ---- the clock

    async def run(self) -> None:
        """Ticks until cancelled: deadlines, status, revoked keys."""
        ticks = 0
        while True:
            await asyncio.sleep(TICK_S)
            ticks += 1
            self.tick(monotonic(), status=ticks % _TICKS_PER_STATUS == 0)
            if ticks % _TICKS_PER_KEY_CHECK == 0:
                self._check_keys()

    def tick(self, now: float, *, status: bool) -> None:
        """Passes the time on to every connection; with `status`, the load too."""
        load = self.load() if status else None
        for peer in tuple(self.peers):
            peer.tick(now, load)
        if self.draining:
            self._note_idle()

    def _check_keys(self) -> None:
        before = self.keys.ring
        try:
            after = self.keys.refresh()
        except ConfigError as error:
            self.log.error("key_file_unreadable", error=error.message)
            return
        if after is None:
            return
        self.log.info("keys_reloaded", labels=len(after))
        for peer in self._revoked(tuple(self.peers), before=before, after=after):
            peer.fail(RejectedError("the API key was revoked", code="key_revoked"))

    @staticmethod
    def _revoked(peers: Iterable[Peer], *, before: Any, after: Any) -> list[Peer]:
        return [peer for peer in peers if not before.holds(peer.tenant, after)]

    # ---- drain

    @property
    def draining(self) -> bool:
        return self._drain_until_s is not None

    async def drain(self, deadline_s: float) -> bool:
        """Lets running sessions finish for up to `deadline_s`; new ones are refused from now on.
        Returns whether all of them finished."""
        self._drain_until_s = monotonic() + deadline_s
        self.log.info("draining", sessions=self.num_sessions, deadline_s=deadline_s)
        for peer in tuple(self.peers):
            peer.go_away(deadline_s)
        self._note_idle()
        try:
            await asyncio.wait_for(self._idle.wait(), deadline_s)
        except TimeoutError:
            return False
        return True

    def _note_idle(self) -> None:
        if self.num_sessions == 0:
            self._idle.set()

    def close(self) -> None:
        self.decoders.shutdown(wait=False, cancel_futures=True)

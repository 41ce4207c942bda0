"""What all connections of one cloud share: the engine, its sessions, limits, keys, quotas, and the drain."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from isthmus.cloud.drain import Drain
from isthmus.cloud.engine import Engine
from isthmus.cloud.resume import Resumes
from isthmus.cloud.sessions import Sessions
from isthmus.cloud.telemetry import Telemetry, get_log
from isthmus.protocol.cloud_connection import CanaryCache, ServerInfo
from isthmus.protocol.errors import ConfigError, RejectedError
from isthmus.protocol.keys import KeyFile, KeyRing
from isthmus.protocol.limits import Limits, TenantUsage
from isthmus.protocol.messages import Load

if TYPE_CHECKING:
    from isthmus.cloud.connection import Peer

TICK_S: Final = 0.25
# STATUS tells an edge that uploads, among other things, that its bytes arrive (see messages.Status).
_TICKS_PER_STATUS: Final = 2
_TICKS_PER_IDLE_STATUS: Final = 8
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
        self.drain = Drain()
        self.sessions = Sessions(self)
        self.resumes = Resumes(self)

    def usage(self, tenant: str) -> TenantUsage:
        usage = self._usages.get(tenant)
        if usage is None:
            usage = self._usages[tenant] = TenantUsage.from_limits(self.limits)
            # Sessions that nobody may ever come back for make room for one whose edge is here.
            usage.make_room = partial(self.sessions.evict_oldest_detached, tenant)
        return usage

    def load(self) -> Load:
        stats = self.engine.stats()
        return Load(
            queue=stats.waiting,
            running=stats.running,
            kv_total_pages=stats.pages_total,
            kv_free_pages=stats.pages_free,
            kv_cached_pages=stats.pages_cached,
            rows_computed=stats.rows_computed_total,
            step_s=stats.step_s,
            queue_s=stats.queue_s,
        )

    # ---- health

    def unready_reason(self) -> str | None:
        """Why /readyz answers 503, or None."""
        if self.drain.begun:
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
            self.tick(monotonic(), ticks)
            if ticks % _TICKS_PER_KEY_CHECK == 0:
                self._check_keys()

    def tick(self, now: float, number: int) -> None:
        """Passes the time on to every connection, and every other time the load."""
        load = self.load() if number % _TICKS_PER_STATUS == 0 else None
        for peer in tuple(self.peers):
            peer.tick(now, load, idle_too=number % _TICKS_PER_IDLE_STATUS == 0)
        self.sessions.tick(now)
        self.telemetry.detached.set(self.sessions.num_detached)
        self.drain.note(len(self.sessions), now)

    def _check_keys(self) -> None:
        before = self.keys.ring
        try:
            after = self.keys.refresh()
        except ConfigError as error:
            self.log.error("key_file_unreadable", error=error.message)
            return
        if after is not None:
            self.log.info("keys_reloaded", labels=len(after))
            self._revoke(before, after)

    def _revoke(self, before: KeyRing, after: KeyRing) -> None:
        """Whose key is gone has nothing here any more: neither a connection nor a session to come back to."""
        for peer in tuple(self.peers):
            if not before.holds(peer.tenant, after):
                peer.fail(RejectedError("the API key was revoked", code="key_revoked"))
        self.sessions.evict_detached("key_revoked", lambda live: not before.holds(live.tenant, after))

    # ---- drain

    def start_drain(self, deadline_s: float, alternative: str = "") -> None:
        """Running sessions have `deadline_s` to finish or to move, to `alternative` if it is in their edge's
        list; nothing new is let in. `drain.wait` tells when it is over."""
        now = monotonic()
        if not self.drain.begin(deadline_s, alternative, now=now):
            return
        self.log.info("draining", sessions=len(self.sessions), deadline_s=self.drain.left_s(now))
        for peer in tuple(self.peers):
            self.greet(peer)
        self.sessions.evict_detached("draining")
        self.drain.note(len(self.sessions), now)

    def greet(self, peer: Peer) -> None:
        """Tells an edge that the cloud drains, if it does."""
        if self.drain.begun:
            peer.go_away(self.drain.left_s(monotonic()), self.drain.alternative)

    def close(self) -> None:
        """After the engine's end: what still waits for its edge is forgotten."""
        self.sessions.evict_detached("stopped")
        self.decoders.shutdown(wait=False, cancel_futures=True)

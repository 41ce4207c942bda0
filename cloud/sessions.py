"""All sessions of one cloud: held by a connection or by none, until they end, expire or are resumed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from isthmus.cloud.engine_session import EngineOpen
from isthmus.cloud.feed import Feed, FeedTerms
from isthmus.cloud.outputs import Outputs
from isthmus.cloud.stream_meter import StreamMeter, first_limit
from isthmus.protocol.activations import RowCodec
from isthmus.protocol.admission import result_codec, row_codec
from isthmus.protocol.cloud_session import CloudSession
from isthmus.protocol.errors import IsthmusError, OverloadedError

if TYPE_CHECKING:
    from isthmus.cloud.connection import Peer
    from isthmus.cloud.hub import Hub

# A prefill chunk larger than this would hold up the loop with its checksum.
CHUNK_BYTES: Final = 1024 * 1024
# The edge chose the id of its request: what is no plain name does not get into the log.
_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(slots=True, eq=False)
class LiveSession:
    """A session between the protocol (`core`, which `peer` holds, or nobody) and the engine (`number`)."""

    number: int
    tenant: str
    core: CloudSession
    codec: RowCodec
    result_codec: RowCodec
    meter: StreamMeter
    opened_s: float
    peer: Peer | None
    feed: Feed
    session_id: str = ""
    """32 hex digits, "" until OPENED."""
    detached_s: float | None = None
    """Since when no connection holds it, on the monotonic clock."""
    last_output_s: float | None = None
    num_outputs: int = 0
    """Tokens, or hidden rows in the U-shape, that went to the edge."""

    def told(self) -> dict[str, Any]:
        """What the log says of it; `request_id` is the edge's, and joins both machines' logs."""
        request = self.core.open
        return {
            "request_id": request.request_id if _ID.fullmatch(request.request_id) else "other",
            "tenant": self.tenant,
            "split": request.split,
            "shape": request.shape,
        }


class Sessions:
    """The registry. Quota and pages of a session go back when it leaves here, and only then. On the event
    loop."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._by_number: dict[int, LiveSession] = {}
        self._by_id: dict[str, LiveSession] = {}
        self._terms = FeedTerms(
            hub.engine,
            hub.decoders,
            hub.info.vocab_size,
            hub.limits.max_message_bytes,
            hub.log,
        )
        self._outputs = Outputs(self, hub)

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[LiveSession]:
        return iter(tuple(self._by_number.values()))

    @property
    def num_detached(self) -> int:
        return sum(live.peer is None for live in self._by_number.values())

    def by_number(self, number: int) -> LiveSession | None:
        """From any thread."""
        return self._by_number.get(number)

    def by_id(self, session_id: str) -> LiveSession | None:
        return self._by_id.get(session_id)

    def chunk_rows(self, live: LiveSession) -> int:
        """Rows per step that suit the engine and the loop."""
        return max(1, min(self._hub.chunk_rows, CHUNK_BYTES // live.codec.row_bytes))

    # ---- the life of a session

    def open(self, peer: Peer, core: CloudSession) -> None:
        """Starts in the engine what the protocol has accepted. OverloadedError: full, or draining."""
        hub, request = self._hub, core.open
        hub.drain.check_open()
        if len(self) >= hub.limits.max_sessions and not self.evict_oldest_detached():
            raise OverloadedError(
                f"{hub.limits.max_sessions} sessions are open on this cloud, which is its limit",
                code="cloud_full",
                hint="try again later",
            )
        window = hub.limits.stream_window_tokens
        has_rate = hub.limits.max_tokens_per_s_per_tenant > 0
        number = hub.engine.open(
            EngineOpen(
                split=request.split,
                shape=request.shape,
                prompt_tokens=request.prompt_tokens,
                max_tokens=request.max_tokens,
                max_context=request.max_context,
                sampling=request.sampling,
                end_ids=frozenset(request.end_ids),
                context_ids=request.context_ids,
                offer=tuple(request.offer.entries),
                tenant=peer.tenant,
                stream_window=first_limit(window, has_rate=has_rate),
                priority=request.priority,
            ),
            self._outputs.from_engine,
        )
        usage, hidden = hub.usage(peer.tenant), hub.info.hidden
        codec = row_codec(request, hidden)
        live = LiveSession(
            number,
            peer.tenant,
            core,
            codec,
            result_codec(request, hidden),
            StreamMeter(usage, window, partial(hub.engine.set_stream_limit, number), has_rate=has_rate),
            monotonic(),
            peer,
            Feed(
                number,
                core,
                codec if request.split else None,
                usage,
                self._terms,
                lambda error: self.fail(live, error),
            ),
        )
        self._by_number[number] = live
        peer.hold(live)
        hub.log.info("session_open", **live.told(), prompt_tokens=request.prompt_tokens)

    def name(self, live: LiveSession, session_id: str) -> None:
        """OPENED goes out: from here on the session can be resumed by its id."""
        live.session_id = session_id
        self._by_id[session_id] = live

    def detach(self, live: LiveSession) -> None:
        """Its connection is gone: the session waits for its edge, the engine goes on."""
        self.unhold(live)
        if self._hub.drain.begun or self._hub.limits.detached_s <= 0:
            self.evict(live, "detached")

    def unhold(self, live: LiveSession) -> None:
        """No connection holds the session from now on."""
        if live.peer is not None:
            live.peer.let_go(live)
        live.peer = None
        live.detached_s = monotonic()
        live.feed.asked_s = None  # what a resumed session gives out next has waited for its edge

    def adopt(self, live: LiveSession, peer: Peer) -> None:
        """`peer` holds the session from now on."""
        live.peer = peer
        live.detached_s = None
        peer.hold(live)
        live.meter.widen(live.core.stream_room)

    def fail(self, live: LiveSession, error: IsthmusError) -> None:
        """Ends a session with ERROR, whoever holds it."""
        if self._by_number.get(live.number) is not live:
            return
        if live.peer is None:
            self.evict(live, error.code)
        else:
            live.peer.core.fail(live.core.stream, error)
            live.peer.wake()
            self.drop(live, error.code)

    def evict(self, live: LiveSession, outcome: str) -> None:
        """Ends a session that no connection holds; its quota and pages go back."""
        live.core.evict()
        self._hub.usage(live.tenant).release(live.core.kv_bytes)
        self.drop(live, outcome)

    def drop(self, live: LiveSession, outcome: str) -> None:
        """The protocol is done with this session: the engine frees its pages, its answer goes nowhere."""
        self._hub.engine.cancel(live.number)
        self.forget(live, outcome)

    def forget(self, live: LiveSession, outcome: str) -> None:
        """The engine is done with it too."""
        live.feed.stop()
        live.meter.stop()
        self._by_number.pop(live.number, None)
        self._by_id.pop(live.session_id, None)
        if live.peer is not None:
            live.peer.let_go(live)
        now = monotonic()
        seconds = now - live.opened_s
        self._hub.telemetry.request_s.observe(seconds)
        self._hub.telemetry.sessions_ended.labels(outcome=outcome).inc()
        self._hub.log.info(
            "session_end", **live.told(), outcome=outcome, tokens=live.num_outputs, seconds=round(seconds, 6)
        )
        self._hub.drain.note(len(self), now)

    # ---- what happens to many

    def evict_detached(self, outcome: str, concerned: Callable[[LiveSession], bool] = lambda _: True) -> None:
        for live in self:
            if live.peer is None and concerned(live):
                self.evict(live, outcome)

    def evict_oldest_detached(self, tenant: str | None = None) -> bool:
        """Gives up the session that has waited longest for its edge, of `tenant` or of all. False: none
        does."""
        waiting = [live for live in self if live.peer is None and tenant in (None, live.tenant)]
        if not waiting:
            return False
        self.evict(min(waiting, key=lambda live: live.detached_s or 0.0), "displaced")
        return True

    def tick(self, now: float) -> None:
        """Those that have waited for their edge long enough are given up."""
        self.evict_detached(
            "expired", lambda live: now - (live.detached_s or now) >= self._hub.limits.detached_s
        )

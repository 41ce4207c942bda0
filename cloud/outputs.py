"""What the engine gives out, to the sessions: rows encoded on its thread, the rest on the event loop."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Final

from isthmus.cloud import engine_session as out
from isthmus.protocol.activations import Encoded
from isthmus.protocol.errors import IsthmusError

if TYPE_CHECKING:
    from isthmus.cloud.connection import Peer
    from isthmus.cloud.hub import Hub
    from isthmus.cloud.sessions import LiveSession, Sessions

_MOST_US: Final = 2**32 - 1  # as messages.U32

_Item = tuple[out.EngineOutput, Encoded | IsthmusError | None]


class Outputs:
    """One sink for all sessions, so that a step of the engine costs one switch of threads. An output goes
    into the protocol's session: whoever holds that sends it on, and a detached one keeps it."""

    def __init__(self, sessions: Sessions, hub: Hub) -> None:
        self._sessions = sessions
        self._hub = hub
        self._loop = asyncio.get_running_loop()

    def from_engine(self, outputs: list[out.EngineOutput]) -> None:
        """On the engine's thread."""
        items: list[_Item] = []
        for output in outputs:
            encoded: Encoded | IsthmusError | None = None
            if isinstance(output, out.Hidden) and (live := self._sessions.by_number(output.session_id)):
                try:
                    encoded = live.result_codec.encode(output.rows)
                except IsthmusError as error:
                    encoded = error
            items.append((output, encoded))
        with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._deliver, items)

    def _deliver(self, items: list[_Item]) -> None:
        now = monotonic()
        peers: set[Peer] = set()
        for output, encoded in items:
            live = self._sessions.by_number(output.session_id)
            if live is None:
                continue  # it ended while the engine computed
            if live.peer is not None:
                peers.add(live.peer)
            try:
                self._give(live, output, encoded, now)
            except IsthmusError as error:
                # The engine and the protocol disagree, or rows could not be encoded: this session only.
                self._hub.log.error("session_failed_here", code=error.code)
                self._sessions.fail(live, error)
        for peer in peers:
            peer.wake()

    def _give(
        self, live: LiveSession, output: out.EngineOutput, encoded: Encoded | IsthmusError | None, now: float
    ) -> None:
        match output:
            case out.Tokens():
                self._give_tokens(live, output, now)
                self._observe(live, now, len(output.sampled))
            case out.Hidden(kv_len=kv_len, rows=rows):
                if isinstance(encoded, IsthmusError):
                    raise encoded
                if encoded is not None:
                    live.core.result_rows(encoded, len(rows), kv_len)
                self._observe(live, now, len(rows))
            case out.Progress(num_rows=num_rows):
                live.core.credit(num_rows)
            case out.Opened(cached_rows=cached_rows):
                self._give_opened(live, cached_rows)
            case out.Closed():
                if live.peer is not None:
                    live.peer.core.closed(
                        live.core.stream,
                        pages_freed=output.pages_freed,
                        kv_len=output.kv_len,
                        cached=output.cached_rows > 0,
                    )
                self._sessions.forget(live, "closed")
            case out.Failed(error=error):
                self._sessions.fail(live, error)

    def _give_opened(self, live: LiveSession, cached_rows: int) -> None:
        if live.peer is None:
            return  # no session is kept before its OPENED
        self._sessions.name(live, secrets.token_hex(16))
        live.peer.core.opened(
            live.core.stream,
            session_id=live.session_id,
            cached_rows=cached_rows,
            chunk_rows=self._sessions.chunk_rows(live),
            resume_token=self._hub.resumes.token(live),
        )

    def _give_tokens(self, live: LiveSession, output: out.Tokens, now: float) -> None:
        sampled = output.sampled
        with_logprobs = live.core.open.sampling.logprobs >= 0
        tokens = [one.token for one in sampled]
        logprobs = [one.logprob for one in sampled] if with_logprobs else None
        top = [one.top for one in sampled] if with_logprobs else None
        if output.stream:
            live.meter.count(len(tokens))
            live.core.stream_tokens(tokens, logprobs, top, output.finish, _cloud_us(live, now))
            live.feed.asked_s = None  # of a stream only the first run of tokens is timed
        else:
            live.core.result_tokens(tokens, output.kv_len, logprobs, top, output.finish, _cloud_us(live, now))

    def _observe(self, live: LiveSession, now: float, num_tokens: int) -> None:
        """`num_tokens` (or hidden rows) came at once: each took its share of the time."""
        live.num_outputs += num_tokens
        if live.last_output_s is None:
            self._hub.telemetry.first_token_s.observe(now - live.opened_s)
        else:
            for _ in range(num_tokens):
                self._hub.telemetry.inter_token_s.observe((now - live.last_output_s) / num_tokens)
        live.last_output_s = now


def _cloud_us(live: LiveSession, now: float) -> int:
    """Microseconds since the step came that asked for what is given out at `now`; 0: not known."""
    asked_s = live.feed.asked_s
    return 0 if asked_s is None else min(_MOST_US, max(1, round((now - asked_s) * 1e6)))

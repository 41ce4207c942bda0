"""uvicorn's protocols, hardened: slow headers, pings, fragments and unread replies of a peer are bounded."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

# A message of 8 MiB in 4 KiB fragments has 2,048; far smaller ones are an attack on the per-frame cost.
MAX_FRAGMENTS: Final = 4096
# Websocket pings between two messages; the session protocol has its own heartbeat.
MAX_PINGS: Final = 64
_CLOSE_POLICY: Final = 1008
# For the whole head of the first request; uvicorn itself waits for ever.
HEADER_TIMEOUT_S = 10.0


class BoundedHTTPProtocol(H11Protocol):
    """Cuts a connection that has not sent its first request within HEADER_TIMEOUT_S (slowloris)."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEADER_TIMEOUT_S, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None:
            self._deadline.cancel()

    def handle_websocket_upgrade(self, event: Any) -> None:
        self._deadline.cancel()
        super().handle_websocket_upgrade(event)


class BoundedWebSocketProtocol(WebSocketsSansIOProtocol):
    """What the stock class leaves open for an edge that misbehaves after the upgrade:

    a message in endless empty fragments (the size limit never sees them), a flood of pings whose pongs pile
    up unread, and a peer that neither reads nor closes (`transport.close` waits for the buffer for ever).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_pings = 0
        self._num_received = 0

    def data_received(self, data: bytes) -> None:
        self._num_received += len(data)
        super().data_received(data)

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if hasattr(self, "scope"):  # else the request was refused
            # Of a message under way the application sees nothing; that it is coming shows that its peer
            # lives.
            self.scope["state"]["received_bytes"] = lambda: self._num_received

    def handle_cont(self, event: Any) -> None:
        if len(self.frames) >= MAX_FRAGMENTS:
            self._refuse(f"message in more than {MAX_FRAGMENTS} fragments")
            return
        super().handle_cont(event)

    def handle_ping(self) -> None:
        self._num_pings += 1
        if self._num_pings > MAX_PINGS:
            self._refuse(f"more than {MAX_PINGS} pings without a message")
            return
        super().handle_ping()

    def send_receive_event_to_app(self) -> None:
        self._num_pings = 0
        super().send_receive_event_to_app()

    async def run_asgi(self) -> None:
        try:
            await super().run_asgi()
        finally:
            # The application is done with this peer; what it does not read within the timeout is dropped.
            self.loop.call_later(self.close_timeout, self.transport.abort)

    def _refuse(self, reason: str) -> None:
        if self.close_sent or self.transport.is_closing():
            return
        self.frames = []
        self.conn.fail(_CLOSE_POLICY, reason)
        self.queue.put_nowait({"type": "websocket.disconnect", "code": _CLOSE_POLICY, "reason": reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.transport.close()

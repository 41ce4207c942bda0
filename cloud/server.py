"""The cloud's ASGI application (sessions, health, metrics, drain) and the uvicorn server that runs it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from isthmus.cloud import admin
from isthmus.cloud.connection import Peer
from isthmus.cloud.drain import DrainPolicy
from isthmus.cloud.hub import MAX_CONNECTIONS, Hub
from isthmus.cloud.notice import Notice, wait_for_notice
from isthmus.cloud.pack_files import PackFiles, pack_route
from isthmus.cloud.websocket import BoundedHTTPProtocol, BoundedWebSocketProtocol
from isthmus.protocol.addresses import is_loopback
from isthmus.protocol.errors import ConfigError, IsthmusError, OverloadedError, RejectedError

if TYPE_CHECKING:
    from isthmus.splitter.pack import Pack

SUBPROTOCOL: Final = "isthmus.v1"
SESSION_PATH: Final = "/v1/session"


def make_app(
    hub: Hub,
    *,
    policy: DrainPolicy | None = None,
    only_local_hosts: bool = True,
    pack: Pack | None = None,
) -> Starlette:
    """The application of one cloud. Starts and stops the engine's thread with its lifespan.

    `policy`: how it drains where the request leaves that open.

    `only_local_hosts`: plain requests must name a loopback host (a web page could else reach this port by
    DNS rebinding); for servers bound to loopback. `pack`: what edges without model files may fetch.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        hub.engine.start()
        clock = asyncio.create_task(hub.run(), name="isthmus-cloud-clock")
        try:
            yield
        finally:
            clock.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await clock
            await asyncio.to_thread(hub.engine.stop)
            hub.close()

    def authorised(connection: HTTPConnection) -> str | None:
        return hub.keys.ring.authenticate(connection.headers.get("authorization"))

    def host_error(connection: HTTPConnection) -> IsthmusError | None:
        host = connection.url.hostname or ""
        if only_local_hosts and not is_loopback(host):
            return RejectedError(f"host {host!r} is not this server", code="foreign_host")
        return None

    def not_allowed(request: Request) -> Response | None:
        if (error := host_error(request)) is not None:
            return _refuse(error, 403)
        return _refuse(_unauthorised(), 401) if authorised(request) is None else None

    async def livez(_: Request) -> Response:
        return PlainTextResponse("ok")

    async def readyz(_: Request) -> Response:
        reason = hub.unready_reason()
        if reason is None:
            return JSONResponse({"ready": True})
        return JSONResponse({"ready": False, "reason": reason}, status_code=503)

    async def metrics(request: Request) -> Response:
        if (error := host_error(request)) is not None:
            return _refuse(error, 403)
        return Response(hub.telemetry.render(), media_type="text/plain; version=0.0.4")

    async def stats(request: Request) -> Response:
        if (refusal := not_allowed(request)) is not None:
            return refusal
        answer: dict[str, Any] = asdict(hub.engine.stats())
        answer["connections"] = len(hub.peers)
        answer["detached"] = hub.sessions.num_detached
        answer["precision"] = hub.info.cloud_precision
        return JSONResponse(answer)

    async def drain(request: Request) -> Response:
        if (error := host_error(request)) is not None:
            return _refuse(error, 403)
        return await admin.drain(request, hub, policy or DrainPolicy(), _refuse)

    async def session(scope: Scope, receive: Receive, send: Send) -> None:
        websocket = WebSocket(scope, receive, send)
        tenant = authorised(websocket)
        refusal = _refusal(hub, websocket, tenant)
        if refusal is not None:
            error, status = refusal
            await websocket.send_denial_response(_refuse(error, status))
            return
        assert tenant is not None
        await websocket.accept(subprotocol=SUBPROTOCOL)
        hub.telemetry.connections.inc()
        try:
            await Peer(hub, tenant, scope["state"]["received_bytes"]).run(receive, send)
        finally:
            hub.telemetry.connections.dec()

    routes: list[BaseRoute] = [
        Route("/livez", livez),
        Route("/readyz", readyz),
        Route("/metrics", metrics),
        Route("/v1/stats", stats),
        Route("/admin/drain", drain, methods=["POST"]),
        pack_route(PackFiles(pack, hub.telemetry.registry), not_allowed, _refuse),
        WebSocketRoute(SESSION_PATH, _Endpoint(session)),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


class _Endpoint:
    """A raw ASGI application: Starlette's wrapper would add its checks to every message."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Any]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _refusal(hub: Hub, websocket: WebSocket, tenant: str | None) -> tuple[IsthmusError, int] | None:
    """Why this upgrade is denied, with the HTTP status; decided before anything is allocated."""
    if tenant is None:
        return _unauthorised(), 401
    if "origin" in websocket.headers:
        # Edges send none; a browser always does, and nothing in a browser has business here.
        return RejectedError("web pages may not open sessions", code="foreign_origin"), 403
    if SUBPROTOCOL not in websocket.scope["subprotocols"]:
        return RejectedError(f"the websocket subprotocol must be {SUBPROTOCOL}", code="bad_subprotocol"), 400
    if len(hub.peers) >= MAX_CONNECTIONS:
        return OverloadedError(f"{MAX_CONNECTIONS} edges are connected", code="too_many_connections"), 503
    return None


def _unauthorised() -> RejectedError:
    return RejectedError(
        "no valid API key was given",
        code="unauthorized",
        hint="send `Authorization: Bearer KEY`; the edge takes it from --api-key-file or ISTHMUS_API_KEY",
    )


def _refuse(error: IsthmusError, status: int) -> Response:
    headers = {"www-authenticate": "Bearer"} if status == 401 else None
    return JSONResponse({"error": error.to_dict()}, status_code=status, headers=headers)


def bind(host: str, port: int) -> socket.socket:
    """A listening-to-be socket; port 0 picks a free one. ConfigError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio sets TCP_NODELAY only where it is: without, a small message after
    # another one (a token after a PONG) waited 40 ms for a delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            code="port_unavailable",
            hint="another process may have it; choose another --port, 0 picks a free one",
        ) from error
    return listener


class CloudServer(uvicorn.Server):
    """uvicorn with our endings: a drain, by SIGTERM or else, exits 0 when it is over; a second SIGINT stops
    at once."""

    def __init__(
        self,
        hub: Hub,
        listener: socket.socket,
        *,
        ready: Callable[[str], None] | None = None,
        policy: DrainPolicy | None = None,
        ssl_context: ssl.SSLContext | None = None,
        pack: Pack | None = None,
    ) -> None:
        """`ready` is called with the URL once connections are accepted. `pack`: see `make_app`."""
        host, port = listener.getsockname()[:2]
        self._hub = hub
        self._listener = listener
        self._ready = ready
        self._policy = policy or DrainPolicy()
        self._num_interrupts = 0
        self._tasks: list[asyncio.Task[None]] = []
        shown = f"[{host}]" if ":" in host else host
        self.url = f"{'wss' if ssl_context else 'ws'}://{shown}:{port}"
        config = uvicorn.Config(
            make_app(hub, policy=self._policy, only_local_hosts=is_loopback(host), pack=pack),
            ws=BoundedWebSocketProtocol,
            ws_max_size=hub.limits.max_message_bytes,
            ws_per_message_deflate=False,
            ws_ping_interval=None,  # the session protocol has its own heartbeat
            http=BoundedHTTPProtocol,
            loop="asyncio",
            log_config=None,
            # At debug level uvicorn's loggers show headers, keys among them, and the bytes of messages.
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # who asks for a drain is who opened the connection
            timeout_graceful_shutdown=5,
        )
        config.load()
        config.ssl = ssl_context
        super().__init__(config)

    async def run_until_stopped(self) -> None:
        """Serves until `stop`, or a signal where this is the main thread."""
        await self.serve(sockets=[self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        self._start(self._exit_after_drain())
        if self._policy.notice is not None:
            self._start(self._drain_on_notice(self._policy.notice))
        if self._ready is not None:
            self._ready(self.url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await super().shutdown(sockets)

    def stop(self, *, drain: bool = True) -> None:
        """Begins the end: new sessions are refused, running ones get the policy's time, or none without
        `drain`. On the loop."""
        if drain:
            self._hub.start_drain(self._policy.deadline_s, self._policy.alternative)
        else:
            self.should_exit = True

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    async def _exit_after_drain(self) -> None:
        await self._hub.drain.wait()
        self._hub.log.info("drained", sessions=len(self._hub.sessions))
        self.should_exit = True

    async def _drain_on_notice(self, notice: Notice) -> None:
        await wait_for_notice(notice)
        self._hub.log.warning("preemption_notice")
        self._hub.start_drain(self._policy.notice_deadline_s, self._policy.alternative)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn raises a caught signal again after its shutdown, which would turn our exit 0 into -15."""
        loop = asyncio.get_running_loop()
        handled = (signal.SIGTERM, signal.SIGINT)
        try:
            for number in handled:
                loop.add_signal_handler(number, self.handle_exit, number, None)
        except (ValueError, RuntimeError):  # not the main thread: signals are another's to catch
            yield
            return
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._num_interrupts += sig == signal.SIGINT
        if self._num_interrupts < 2:
            self.stop()
        else:
            self.should_exit = self.force_exit = True

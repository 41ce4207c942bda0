"""Runs the edge's HTTP API: binds, says when it is ready, drains on SIGTERM, stops on a second SIGINT."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

import uvicorn

from isthmus.edge.api import ServedModel, make_app
from isthmus.edge.guard import check_bind, is_loopback
from isthmus.protocol.errors import ConfigError

# How long running requests may go on after SIGTERM before they are cut.
DRAIN_S = 30


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, or a ConfigError that names the address. Port 0 picks a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio sets TCP_NODELAY only where it is: without, a small message after
    # another one (a token after a PONG) waited 40 ms for a delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(256)
    except OSError as error:
        listener.close()
        taken = error.errno == errno.EADDRINUSE
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            code="port_taken" if taken else "cannot_listen",
            hint="choose another --port; 0 picks a free one" if taken else "see --host and --port",
        ) from error
    return listener


async def serve_edge(
    model: ServedModel,
    *,
    host: str,
    port: int,
    ready: Callable[[str], None],
    insecure: bool = False,
    stop: asyncio.Event | None = None,
) -> bool:
    """Start the model's agent and serve it until a signal, or until `stop` is set; then drain and close it.

    False where a second SIGINT cut requests short. `ready` is called with the URL once requests are
    answered. Raises ConfigError where it cannot listen, or would be open to the network and not
    `insecure`, and what the start of the agent raises.
    """
    check_bind(host, insecure=insecure)
    with bind(host, port) as listener:
        bound_host, bound_port = listener.getsockname()[:2]
        shown = f"[{bound_host}]" if ":" in bound_host else bound_host
        config = uvicorn.Config(
            make_app(model, only_local=is_loopback(host)),
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=DRAIN_S,
        )
        server = _Server(config, lambda: ready(f"http://{shown}:{bound_port}"))
        watching = asyncio.create_task(server.stop_when(stop)) if stop else None
        try:
            await model.agent.start()
            await server.serve(sockets=[listener])
            return not server.force_exit
        finally:
            if watching is not None:
                watching.cancel()
            await model.agent.aclose()


class _Server(uvicorn.Server):
    """uvicorn's server, which tells when it has started, and for which a drained end is no failure."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._tell()

    async def stop_when(self, stop: asyncio.Event) -> None:
        """Drain as soon as `stop` is set."""
        await stop.wait()
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """As uvicorn does it, except that the signal is not raised once more after all was drained: the
        process ends with 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

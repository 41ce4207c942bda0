"""Runs the edge's HTTP API: binds, says when it is ready, drains on SIGTERM, stops on a second SIGINT."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from isthmus import __version__
from isthmus.edge.api import ServedModel, make_app
from isthmus.edge.logs import QuietFaults, log, log_stray_faults
from isthmus.edge.tls import check_server_files
from isthmus.protocol.addresses import check_bind, is_loopback
from isthmus.protocol.errors import ConfigError
from isthmus.protocol.keys import KeyFile

# How long running requests may go on after SIGTERM before they are cut.
DRAIN_S = 30


def check_edge(
    host: str, *, key_file: Path | None, tls_cert: Path | None, tls_key: Path | None, insecure: bool
) -> list[str]:
    """May the API be served like this? Quick, so that it can be asked before a model is loaded.

    Returns what to warn of at this start. Raises ConfigError for a key file or certificate that is not
    usable, and for listening beyond loopback without both, unless `insecure`.
    """
    check_server_files(tls_cert, tls_key)
    remarks = KeyFile(key_file).remarks()
    bound = check_bind(
        host,
        keys=key_file is not None,
        tls=tls_cert is not None,
        insecure=insecure,
        key_option="--serve-key-file",
    )
    return [bound, *remarks] if bound else remarks


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
    key_file: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    insecure: bool = False,
    stop: asyncio.Event | None = None,
) -> bool:
    """Start the model's agent and serve it until a signal, or until `stop` is set; then drain and close it.

    False where a second SIGINT cut requests short. `ready` is called with the URL once requests are
    answered. `key_file`: who may use the API; None: everybody who reaches it. Raises ConfigError where it
    cannot listen or `check_edge` refuses, and what the start of the agent raises.
    """
    remarks = check_edge(host, key_file=key_file, tls_cert=tls_cert, tls_key=tls_key, insecure=insecure)
    with bind(host, port) as listener:
        bound_host, bound_port = listener.getsockname()[:2]
        shown = f"[{bound_host}]" if ":" in bound_host else bound_host
        scheme = "https" if tls_cert else "http"
        config = uvicorn.Config(
            QuietFaults(make_app(model, only_local=is_loopback(host), keys=KeyFile(key_file))),
            lifespan="off",
            ws="none",
            log_config=None,
            # At debug level uvicorn's loggers show headers, keys among them.
            log_level="warning",
            access_log=False,
            ssl_certfile=tls_cert,
            ssl_keyfile=tls_key,
            timeout_graceful_shutdown=DRAIN_S,
        )
        for remark in remarks:
            log.warning(remark)
        log_stray_faults(asyncio.get_running_loop())

        def started() -> None:
            url = f"{scheme}://{shown}:{bound_port}"
            log.info("serving", url=url, model=model.name, version=__version__)
            ready(url)

        server = _Server(config, started, model.draining)
        watching = asyncio.create_task(server.stop_when(stop)) if stop else None
        try:
            await model.agent.start()
            await server.serve(sockets=[listener])
            return not server.force_exit
        finally:
            if watching is not None:
                watching.cancel()
            await model.agent.aclose()
            if model.conversations is not None:
                await model.conversations.aclose()
            log.info("stopped")


class _Server(uvicorn.Server):
    """uvicorn's server, which tells when it has started and when it begins to drain, and for which a drained
    end is no failure."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None], draining: asyncio.Event) -> None:
        super().__init__(config)
        self._tell = started
        self._draining = draining

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._tell()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("draining")
        self._draining.set()
        await super().shutdown(sockets)

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

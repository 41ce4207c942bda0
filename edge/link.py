"""The link to one cloud: one warm, authenticated websocket, made anew for the next request when it broke.

Nothing is retried here: a session whose connection dies raises CloudLostError, and `resume` takes it up on a
new one.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, InvalidStatus, InvalidURI
from websockets.typing import Subprotocol

from isthmus.edge.breaker import CircuitBreaker
from isthmus.edge.deadline import StepDeadline
from isthmus.edge.link_estimate import LinkEstimator
from isthmus.edge.link_probe import probe_link
from isthmus.edge.link_session import LinkSession
from isthmus.edge.logs import log, plain_code
from isthmus.edge.tls import tls_error
from isthmus.edge.wire import Wire
from isthmus.protocol.activations import RowFormat
from isthmus.protocol.addresses import is_loopback
from isthmus.protocol.errors import (
    CloudLostError,
    CloudUnreachableError,
    ConfigError,
    IsthmusError,
    RejectedError,
)
from isthmus.protocol.events import SessionResumed
from isthmus.protocol.frames import HEADER_BYTES, VERSION
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import CanaryResult, Hello, Load, Open, Welcome
from isthmus.splitter.links import LinkView

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from isthmus.splitter.pack import Pack

SUBPROTOCOL: Final = Subprotocol("isthmus.v1")
PATH: Final = "/v1/session"
# Unsent bytes the kernel may hold, so that what overtakes in our queue is not stuck in the kernel's.
UNSENT_BYTES: Final = 128 * 1024
PROBE_S: Final = 3.0


# Of no hierarchy, so that no configuration can lower its level: websockets' debug lines hold the API key
# and the rows.
_QUIET: Final = logging.Logger("isthmus.edge.websocket", logging.WARNING)


class NobodyListensError(CloudUnreachableError):
    """The machine is there and nothing listens: the cloud's process, and all it held, is gone."""


class HungUpError(CloudUnreachableError):
    """The connection was made and broke before the cloud had said anything."""


def check_url(url: str, api_key: str | None) -> str:
    """The websocket URL of a cloud; ConfigError for another scheme, or a key over plain ws off loopback."""
    parts = urlsplit(url)
    if parts.scheme not in ("ws", "wss") or not parts.hostname:
        raise ConfigError(f"cloud URL {url!r} is not ws://host:port or wss://…", code="bad_cloud_url")
    if parts.username or parts.password or parts.query:
        raise ConfigError(
            "the cloud URL carries credentials or a query",
            code="bad_cloud_url",
            hint="the key comes from --api-key-file or ISTHMUS_API_KEY",
        )
    if api_key and parts.scheme == "ws" and not is_loopback(parts.hostname):
        raise ConfigError(
            f"the API key would travel unencrypted to {parts.hostname}",
            code="key_in_clear",
            hint="use wss://, or an SSH tunnel to loopback",
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or PATH}"


def hello_of(pack: Pack, client: str) -> Hello:
    """How an edge with `pack` introduces itself to a cloud."""
    return Hello(
        versions=(VERSION,),
        identity=pack.identity,
        edge_precision=pack.scheme,
        row_formats=tuple(form.value for form in RowFormat),
        client=client,
    )


class _Direct(connect):
    """Goes where it was sent: a redirect could take the rows to a host that nobody configured."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


class CloudLink:
    """The link to one cloud. `state` is what the router sees: unknown, up, down or refused."""

    def __init__(
        self,
        url: str,
        hello: Hello,
        *,
        api_key: str | None = None,
        limits: Limits | None = None,
        ssl_context: ssl.SSLContext | None = None,
        connect_timeout_s: float = 5.0,
        first_timeout_s: float = 120.0,
    ) -> None:
        """`first_timeout_s`: how long a session may wait for its first output without any progress."""
        self.url = url
        self._address = check_url(url, api_key)
        self._hello = hello
        self._api_key = api_key
        self._limits = limits or Limits()
        self._ssl = ssl_context
        self._connect_timeout_s = connect_timeout_s
        self._first_timeout_s = first_timeout_s
        self._deadline = StepDeadline()
        self._estimator = LinkEstimator()
        self.breaker = CircuitBreaker()
        self._wire: Wire | None = None
        self._retired: list[Wire] = []  # broken ones, and draining ones whose sessions still run
        self._connecting = asyncio.Lock()
        self._probing = asyncio.Lock()
        self.failure: IsthmusError | None = None  # why the newest attempt to connect failed
        self._past_up = 0
        self._past_down = 0
        self.num_connects = 0
        self.welcome: Welcome | None = None

    @property
    def state(self) -> str:
        """ "up", "unknown" (never tried, or dropped after it worked), "down", "refused" (for good: another
        model, a wrong key)."""
        if self._alive() is not None:
            return "up"
        if self.failure is None:
            return "unknown"
        for_good = isinstance(self.failure, RejectedError) and self.failure.retry_after_s is None
        return "refused" if for_good else "down"

    @property
    def detail(self) -> str:
        """Why the state is "down" or "refused"; else ""."""
        return "" if self.failure is None else self.failure.message

    @property
    def rtt_s(self) -> float | None:
        """Smoothed round trip in seconds; None while not connected or not measured."""
        return None if self._alive() is None else self._estimator.rtt_s

    def estimate(self, now: float) -> LinkView:
        """What is known of the link, on `time.monotonic`'s clock. Outlives connections; then it ages."""
        return self._estimator.view(now)

    def needs_probe(self, now: float) -> bool:
        """Something about the link is not known, or not any more; `probe` would measure it."""
        return self._estimator.needs_probe(now)

    @property
    def load(self) -> Load | None:
        """What the cloud said last about how busy it is; None if it was never heard."""
        return None if self._wire is None else self._wire.load

    @property
    def load_age_s(self) -> float | None:
        """How long ago it said so."""
        return None if self._wire is None else monotonic() - self._wire.load_at

    @property
    def bytes_up(self) -> int:
        """Websocket payload sent since the start, in bytes."""
        return self._past_up + (self._wire.bytes_up if self._wire else 0)

    @property
    def bytes_down(self) -> int:
        """Websocket payload received since the start, in bytes."""
        return self._past_down + (self._wire.bytes_down if self._wire else 0)

    async def connect(self) -> Welcome:
        """Be connected: at once if the connection is warm. CloudUnreachableError or RejectedError if not."""
        async with self._connecting:
            wire = self._alive()
            if wire is None:
                self.breaker.trying(monotonic())
                try:
                    try:
                        wire = await self._establish()
                    except HungUpError:
                        # The link was cut in the handshake. A cloud that does so again means it.
                        wire = await self._establish()
                except IsthmusError as error:
                    if self.failure is None or self.failure.code != error.code:  # not each of many attempts
                        log.info("link_failed", cloud=self.url, code=plain_code(error.code))
                    self.failure = error
                    self.breaker.failed(monotonic())
                    raise
                self.breaker.succeeded()
            self.failure = None
            self.welcome = wire.welcomed.result()
            return self.welcome

    async def open(self, message: Open) -> LinkSession:
        """Start a session (connects if need be). Doesn't wait for OPENED."""
        return (await self._connected()).open(message)

    async def resume(self, session: LinkSession) -> SessionResumed:
        """Take up a suspended session over a connection of now (connects if need be). Raises what `connect`
        does, and the cloud's refusal: then the session is over."""
        (await self._connected()).resume(session)
        return await session.resumed()

    async def canary(self, split: int, rows: NDArray[np.float32]) -> CanaryResult:
        """Have the cloud compare the canary's rows at layer `split` with its own."""
        return await (await self._connected()).canary(split, rows)

    async def needs_canary(self, split: int) -> bool:
        """Does this cloud ask for a canary before a session at `split`?"""
        return (await self._connected()).core.needs_canary(split)

    async def probe(self) -> None:
        """Measure what is not known of the link (connects if need be): up to 3 s and 1 MiB, on a link that no
        request uses. Raises what `connect` does, and CloudLostError if the connection breaks meanwhile."""
        async with self._probing:
            if not self.needs_probe(monotonic()):
                return
            wire = await self._connected()
            with suppress(TimeoutError):
                async with asyncio.timeout(PROBE_S):
                    await probe_link(wire, self._estimator)

    async def aclose(self) -> None:
        """Close the connection. The link may be used again; it then reconnects."""
        self._retire()
        while self._retired:
            await self._retired.pop().aclose()

    def _alive(self) -> Wire | None:
        """The connection, if it stands and was welcomed."""
        wire = self._wire
        if wire is None or wire.error is not None or wire.core.draining or not wire.welcomed.done():
            return None
        return wire

    async def _connected(self) -> Wire:
        await self.connect()
        wire = self._alive()
        if wire is None:  # it broke between the two lines
            raise CloudLostError(f"the connection to {self.url} broke at once")
        return wire

    def _retire(self) -> None:
        if self._wire is not None:
            self._past_up += self._wire.bytes_up
            self._past_down += self._wire.bytes_down
            self._retired.append(self._wire)
            self._wire = None

    async def _establish(self) -> Wire:
        self._retire()
        for old in [wire for wire in self._retired if wire.error is not None]:
            self._retired.remove(old)
            await old.aclose()
        socket_ = await self._upgrade()
        wire = Wire(
            socket_,
            self._hello,
            self._limits,
            self._first_timeout_s,
            self._deadline,
            self._estimator,
            url=self.url,
        )
        try:
            async with asyncio.timeout(self._limits.hello_timeout_s):
                await asyncio.shield(wire.welcomed)
        except TimeoutError:
            await wire.aclose()
            raise CloudUnreachableError(
                f"{self.url} sent no WELCOME within {self._limits.hello_timeout_s:.0f} s",
                code="no_welcome",
                hint="is this an Isthmus cloud?",
            ) from None
        except IsthmusError as error:
            await wire.aclose()
            if isinstance(error, CloudLostError):
                raise HungUpError(f"{self.url} hung up before WELCOME: {error.message}") from error
            raise
        except asyncio.CancelledError:
            await wire.aclose()
            raise
        self._wire = wire
        self.num_connects += 1
        return wire

    async def _upgrade(self) -> ClientConnection:
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        host = urlsplit(self._address).hostname or ""
        tls = self._address.startswith("wss:")
        try:
            socket_ = await _Direct(
                self._address,
                subprotocols=[SUBPROTOCOL],
                additional_headers=headers,
                compression=None,  # rows don't deflate, and deflate is an attack surface
                max_size=self._limits.max_message_bytes + HEADER_BYTES,
                max_queue=64,
                ping_interval=None,  # the session protocol has its own, tied to its deadlines
                open_timeout=self._connect_timeout_s,
                close_timeout=1,
                proxy=None if is_loopback(host) else True,
                logger=_QUIET,
                ssl=(self._ssl or True) if tls else None,
            )
        except InvalidStatus as error:
            status = error.response.status_code
            if status in (401, 403):
                raise RejectedError(
                    f"{self.url} refused the API key (HTTP {status})",
                    code="unauthorized",
                    hint="set ISTHMUS_API_KEY or --api-key-file to a key the cloud knows",
                ) from error
            raise CloudUnreachableError(f"{self.url} answered HTTP {status} to the upgrade") from error
        except (InvalidHandshake, InvalidURI) as error:
            asks = ", and does it ask for a client certificate (--tls-client-cert)" if tls else ""
            raise CloudUnreachableError(
                f"{self.url} does not speak isthmus.v1: {error}", hint=f"is this an Isthmus cloud{asks}?"
            ) from error
        except ssl.SSLError as error:
            raise tls_error(self.url, error) from error
        except TimeoutError as error:
            raise CloudUnreachableError(
                f"{self.url} did not answer within {self._connect_timeout_s:.0f} s",
                hint="is the cloud up, and the port open?",
            ) from error
        except OSError as error:
            kind = NobodyListensError if _is_refusal(error) else CloudUnreachableError
            raise kind(
                f"{self.url} is not reachable: {error}", hint="start it with `isthmus serve cloud`"
            ) from error
        _tune(socket_)
        return socket_


def _is_refusal(error: OSError) -> bool:
    """A name with several addresses gives one error that quotes several."""
    if isinstance(error, ConnectionRefusedError):
        return True
    text = str(error)
    return 0 < text.count("[Errno ") == text.count(f"[Errno {errno.ECONNREFUSED}]")


def _tune(socket_: ClientConnection) -> None:
    raw = socket_.transport.get_extra_info("socket")
    if raw is None:
        return
    with suppress(OSError):  # both are an optimisation
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)

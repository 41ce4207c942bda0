"""What `isthmus doctor` asks a cloud, one step after the other, each with its own timeout."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Final
from urllib.parse import SplitResult, urlsplit

from isthmus.commands.doctor_checks import Check, failed
from isthmus.commands.explain import figure
from isthmus.edge.link import CloudLink, check_url, hello_of
from isthmus.edge.tls import tls_error
from isthmus.protocol.addresses import is_loopback
from isthmus.protocol.errors import CloudError, ConfigError, IsthmusError, RejectedError

if TYPE_CHECKING:
    from isthmus.protocol.messages import Welcome
    from isthmus.splitter.pack import Pack

STEP_S: Final = 5.0
SOON_DAYS: Final = 14
_DAY_S: Final = 86_400

# In the order in which the two ends come to them, with the codes by which each fails.
_STAGES: Final = {
    "cloud_key": ("unauthorized",),
    "cloud_version": ("version_mismatch",),
    "cloud_model": ("model_mismatch",),
}


async def check_cloud(
    url: str, pack: Pack | None, *, api_key: str | None, ssl_context: ssl.SSLContext | None
) -> AsyncIterator[Check]:
    """Address, reachability, TLS, key, version, model and link of one cloud; ends at the first failure.

    Without a pack there is nothing to introduce oneself with, so it ends at TLS."""
    try:
        address = urlsplit(check_url(url, api_key))
        port = address.port or (443 if address.scheme == "wss" else 80)
    except (ConfigError, ValueError) as error:
        said, hint = (error.message, error.hint) if isinstance(error, ConfigError) else (str(error), "")
        hint = hint or "write --cloud as wss://host:port or ws://host:port"
        yield Check("cloud_url", "fail", said, hint, _without_login(url))
        return
    host = address.hostname or ""
    yield Check("cloud_url", "ok", f"host {host}, port {port}", cloud=url)
    if (proxy := _proxy(address, host)) is not None:
        yield Check("cloud_proxy", "ok", f"reached by way of the proxy {proxy}", cloud=url)
    else:
        async for check in _reach(url, address.scheme == "wss", host, port, ssl_context):
            yield check
            if check.status == "fail":
                return
    if pack is None:
        said = "its key, version and model were not looked at: there is no pack to introduce oneself with"
        yield Check("cloud_model", "warn", said, "isthmus build, then once more", cloud=url)
        return
    link = CloudLink(
        url,
        hello_of(pack, "isthmus-doctor"),
        api_key=api_key,
        ssl_context=ssl_context,
        connect_timeout_s=STEP_S,
    )
    try:
        async for check in _introduce(link, pack, has_key=api_key is not None):
            yield check
            if check.status == "fail":
                return
        yield await _measure(link)
    finally:
        await link.aclose()


# ---- on the way ---------------------------------------------------------------------------------------


def _proxy(address: SplitResult, host: str) -> str | None:
    """The proxy that a link to `address` takes, without its login; None: none."""
    from websockets.proxy import get_proxy
    from websockets.uri import parse_uri

    proxy = None if is_loopback(host) else get_proxy(parse_uri(address.geturl()))
    return None if proxy is None else _without_login(proxy)


def _without_login(url: str) -> str:
    scheme, mark, rest = url.rpartition("://")
    place, slash, path = rest.partition("/")
    return f"{scheme}{mark}{place.rpartition('@')[2]}{slash}{path}"


async def _reach(
    url: str, tls: bool, host: str, port: int, ssl_context: ssl.SSLContext | None
) -> AsyncIterator[Check]:
    """Name, port, certificate."""
    try:
        async with asyncio.timeout(STEP_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
        said = f"no address for {host}: {_why(error)}"
        yield Check("cloud_name", "fail", said, "check the spelling of --cloud, and this machine's DNS", url)
        return
    yield Check("cloud_name", "ok", ", ".join(sorted({str(entry[4][0]) for entry in found})), cloud=url)
    try:
        seconds = await _connect(host, port)
    except OSError as error:
        hint = "is `isthmus serve cloud` up there, and the port open in its firewall?"
        yield Check("cloud_tcp", "fail", f"{host}:{port} cannot be reached: {_why(error)}", hint, url)
        return
    yield Check("cloud_tcp", "ok", f"connected in {figure(seconds * 1e3)} ms", cloud=url)
    if tls:
        yield await _certificate(url, host, port, ssl_context or ssl.create_default_context())


async def _connect(host: str, port: int) -> float:
    """Seconds that a TCP connection took. OSError."""
    began = monotonic()
    async with asyncio.timeout(STEP_S):
        _, writer = await asyncio.open_connection(host, port)
    writer.close()
    return monotonic() - began


async def _certificate(url: str, host: str, port: int, context: ssl.SSLContext) -> Check:
    """Is the certificate trusted, of the right name, and for how long yet?"""
    try:
        async with asyncio.timeout(STEP_S):
            _, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=host)
    except ssl.SSLError as error:
        return failed("cloud_tls", tls_error(url, error), cloud=url)
    except OSError as error:
        said = f"the TLS handshake with {host}:{port} failed: {_why(error)}"
        return Check("cloud_tls", "fail", said, "does this port speak TLS? If not, use ws://", url)
    until = str(writer.get_extra_info("peercert")["notAfter"])
    version = writer.get_extra_info("ssl_object").version()
    writer.close()
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(1):
            await writer.wait_closed()
    days = int((ssl.cert_time_to_seconds(until) - time.time()) / _DAY_S)
    said = f"{version}, a certificate for {host}, valid for {days} days (until {until})"
    if days < SOON_DAYS:
        return Check("cloud_tls", "warn", said, "renew the cloud's certificate soon", url)
    return Check("cloud_tls", "ok", said, cloud=url)


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {STEP_S:.0f} s"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno)  # asyncio's own text repeats the address
    return str(getattr(error, "strerror", None) or error)


# ---- the cloud itself ---------------------------------------------------------------------------------


async def _introduce(link: CloudLink, pack: Pack, *, has_key: bool) -> AsyncIterator[Check]:
    """HELLO and WELCOME. Whoever gets as far as a refused model had its key and version accepted."""
    key = "the key was accepted" if has_key else "no key is needed"
    try:
        welcome = await link.connect()
    except (CloudError, RejectedError) as error:
        at = next((name for name, codes in _STAGES.items() if error.code in codes), None)
        if at in ("cloud_version", "cloud_model"):
            yield Check("cloud_key", "ok", key, cloud=link.url)
        if at == "cloud_model":
            yield Check("cloud_version", "ok", "edge and cloud speak one version", cloud=link.url)
        yield failed(at or "cloud_answer", error, cloud=link.url)
        return
    yield Check("cloud_key", "ok", key, cloud=link.url)
    server = f"{welcome.server}, " if welcome.server else ""
    yield Check("cloud_version", "ok", f"{server}protocol version {welcome.version}", cloud=link.url)
    yield _same_model(welcome, pack, link.url)


def _same_model(welcome: Welcome, pack: Pack, url: str) -> Check:
    said = f"identity {welcome.identity.key[:12]} on both sides, {welcome.cloud_precision} there"
    if welcome.match == "equal":
        return Check("cloud_model", "ok", f"{said}, made from the same weights", cloud=url)
    if any(layer in welcome.canary_passed for layer in range(pack.spec.num_layers + 1)):
        return Check(
            "cloud_model", "ok", f"{said}, made from other files; compared before, and alike", cloud=url
        )
    return Check(
        "cloud_model",
        "ok",
        f"{said}, made from other files: each split is compared before its first use",
        cloud=url,
    )


async def _measure(link: CloudLink) -> Check:
    """Round trip and bandwidths."""
    try:
        await link.probe()
    except IsthmusError as error:
        return failed("cloud_link", error, cloud=link.url)
    view = link.estimate(monotonic())
    if view.rtt is None:
        said = "the link could not be measured"
        return Check("cloud_link", "warn", said, "the router learns it from requests", link.url)
    parts = [f"round trip {figure(view.rtt.value * 1e3)} ms"]
    for name, estimate in (("up", view.up), ("down", view.down)):
        if estimate is not None:
            parts.append(f"{figure(estimate.value * 8e-6)} Mbit/s {name}")
    return Check("cloud_link", "ok", ", ".join(parts), cloud=link.url)

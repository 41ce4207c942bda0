"""Keeps strangers off the edge's HTTP port: web pages of other origins, and other machines."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from isthmus.edge.api_errors import error_response
from isthmus.protocol.errors import ConfigError, RequestError


class ForeignError(RequestError):
    """A request that a web page of another origin made the browser send."""

    default_code = "foreign_origin"
    http_status = 403


def is_loopback(host: str) -> bool:
    """True for `localhost` and loopback addresses. Other names count as reachable from outside."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, *, insecure: bool) -> None:
    """ConfigError for listening beyond loopback, as long as the API asks nobody for a key."""
    if not (is_loopback(host) or insecure):
        raise ConfigError(
            f"listening on {host} would open this agent to the network, without key and TLS",
            code="insecure_bind",
            hint="put a proxy that asks for both in front of 127.0.0.1; or --insecure, if all who can "
            "reach this port may use it",
        )


class Guard:
    """ASGI middleware. A request must name a loopback host (`only_local`: else a page whose name was
    rebound to 127.0.0.1 could read the replies), and one sent by a web page must come from our own."""

    def __init__(self, app: ASGIApp, *, only_local: bool) -> None:
        self.app, self.only_local = app, only_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(Headers(scope=scope))) is not None:
            await error_response(error)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refusal(self, headers: Headers) -> ForeignError | None:
        host = headers.get("host", "")
        if self.only_local and not is_loopback(_name_of(f"//{host}")[0]):
            return ForeignError(
                f"the host {host!r} is not this machine", code="foreign_host", hint="call it 127.0.0.1"
            )
        origin = headers.get("origin")
        if origin is not None and _name_of(origin)[1] != host:
            return ForeignError(
                f"the page {origin!r} is not served here",
                hint="pages of other origins may not use this agent",
            )
        return None


def _name_of(url: str) -> tuple[str, str]:
    """(host name, host name with port) of a URL; empty for what is none."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "", ""
    return parts.hostname or "", parts.netloc

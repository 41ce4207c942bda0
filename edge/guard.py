"""Keeps strangers off the edge's HTTP port: web pages of other origins, other machines, who has no key."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from isthmus.edge.api_errors import ForeignError, UnauthorizedError, UnreadError, error_response
from isthmus.edge.logs import log
from isthmus.protocol.addresses import is_loopback
from isthmus.protocol.errors import ConfigError
from isthmus.protocol.keys import KeyFile

# Probes carry no key, and learn nothing but whether requests would be answered. The page is the same for all,
# and asks for the key itself.
OPEN_PATHS: Final = frozenset({"/livez", "/readyz", "/"})
OPEN_PREFIX: Final = "/ui/"


class Guard:
    """ASGI middleware. A request must name a loopback host (`only_local`: else a page whose name was
    rebound to 127.0.0.1 could read the replies), one sent by a web page must come from our own, and all but
    those for OPEN_PATHS and below OPEN_PREFIX need a key of `keys`, if there are any. Whose key it was stands
    in the request's `state.tenant`, "" where none is needed."""

    def __init__(self, app: ASGIApp, *, only_local: bool, keys: KeyFile) -> None:
        self.app, self.only_local, self.keys = app, only_local, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(scope)) is not None:
            await error_response(error)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> UnreadError | None:
        headers = Headers(scope=scope)
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
        path: str = scope["path"]
        if path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            return None
        self._reread_keys()
        ring = self.keys.ring
        tenant = ring.authenticate(headers.get("authorization"))
        scope.setdefault("state", {})["tenant"] = "" if ring.open else tenant
        if tenant is None:
            return UnauthorizedError(
                "no valid API key was given",
                hint="send `Authorization: Bearer KEY`, a key of this agent's --serve-key-file",
            )
        return None

    def _reread_keys(self) -> None:
        """A look at the file's times takes microseconds, so a revoked key is refused from the next request
        on."""
        try:
            if (ring := self.keys.refresh()) is not None:
                log.warning("the key file was read again: %d keys", len(ring))
        except ConfigError as error:
            log.error("the key file is not usable, the old keys stay in force: %s", error)


def _name_of(url: str) -> tuple[str, str]:
    """(host name, host name with port) of a URL; empty for what is none."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "", ""
    return parts.hostname or "", parts.netloc

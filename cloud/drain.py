"""The cloud's way out: since when it drains, until when, whom it recommends, and when it is done."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from isthmus.cloud.notice import Notice
from isthmus.protocol.errors import ConfigError, OverloadedError, RejectedError

_MAX_URL_CHARS: Final = 256  # what GOAWAY carries
_RETRY_AFTER_S: Final = 5.0


def check_alternative(url: str) -> str:
    """`url` as it is: empty, or ws(s)://host[:port][/path] and nothing else, above all no credentials.

    Raises ConfigError `bad_alternative`; the message does not repeat what may hold a secret.
    """
    try:
        parts = urlsplit(url)
        plain = parts.scheme in ("ws", "wss") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        plain = False
    if url and not (plain and url.isascii() and url.isprintable() and len(url) <= _MAX_URL_CHARS):
        raise _bad_alternative("is no ws:// or wss:// URL with a host")
    if any(mark in url for mark in "@?# "):
        raise _bad_alternative("holds more than host, port and path")
    return url


def _bad_alternative(what: str) -> ConfigError:
    return ConfigError(
        f"the alternative {what}", code="bad_alternative", hint="e.g. wss://other.example.org:8078"
    )


@dataclass(frozen=True, kw_only=True)
class DrainPolicy:
    """How a cloud drains where nobody says otherwise: seconds for running sessions, and the URL of another
    cloud ("" = none). `notice`: what tells of the machine's end, which leaves `notice_deadline_s`."""

    deadline_s: float = 30.0
    alternative: str = ""
    notice: Notice | None = None
    notice_deadline_s: float = 25.0


class Drain:
    """The state of one drain. It begins once; later calls can only bring its end nearer."""

    def __init__(self) -> None:
        self.until_s: float | None = None
        """On the monotonic clock; None while the cloud serves."""
        self.alternative = ""
        self._over = asyncio.Event()

    @property
    def begun(self) -> bool:
        return self.until_s is not None

    def begin(self, deadline_s: float, alternative: str, *, now: float) -> bool:
        """Whether that changed anything: the edges are to be told (again)."""
        nearer = self.until_s is None or now + deadline_s < self.until_s
        other = bool(alternative) and alternative != self.alternative
        if nearer:
            self.until_s = now + deadline_s
        if other:
            self.alternative = alternative
        return nearer or other

    def left_s(self, now: float) -> float:
        """Seconds until the deadline."""
        return max(0.0, (self.until_s or now) - now)

    def note(self, num_sessions: int, now: float) -> None:
        """The drain is over once nothing is left or its time is up."""
        if self.begun and (num_sessions == 0 or self.left_s(now) == 0):
            self._over.set()

    async def wait(self) -> None:
        """Until a drain that has begun is over."""
        await self._over.wait()

    def check_open(self) -> None:
        """OverloadedError `draining` for a session that wants in."""
        if self.begun:
            raise OverloadedError(
                "the cloud is shutting down",
                code="draining",
                hint="use another cloud",
                retry_after_s=_RETRY_AFTER_S,
            )

    def refusal(self) -> RejectedError | None:
        """What a new connection is told, if it is turned away."""
        if not self.begun:
            return None
        return RejectedError("the cloud is shutting down", code="draining", retry_after_s=_RETRY_AFTER_S)

"""A spot machine's preemption notice: a file that appears, or a metadata URL that begins to say yes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import urlsplit

from isthmus.protocol.errors import ConfigError

POLL_S: Final = 2.0
_TIMEOUT_S: Final = 1.5
_MAX_ANSWER_BYTES: Final = 4096
# Google's metadata server answers only with this header; the others ignore it.
_HEADERS: Final = {"Metadata-Flavor": "Google"}

Notice: TypeAlias = Callable[[], bool]
"""Whether the machine is about to be taken away. Blocks for up to 1.5 s, never raises."""


def parse_notice(source: str) -> Notice:
    """The check for `source`: a path (the file's existence is the notice) or an http(s) URL (the answer 200
    is, unless its body is FALSE or false; anything else, redirects too, means no notice).

    Raises ConfigError `bad_preemption_notice` for what is neither.
    """
    if "://" not in source:
        return _file_notice(Path(source))
    parts = urlsplit(source)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or "@" in parts.netloc:
        raise ConfigError(
            "the preemption notice is neither a file nor an http(s) URL without credentials",
            code="bad_preemption_notice",
            hint="e.g. http://169.254.169.254/computeMetadata/v1/instance/preempted",
        )
    # http.client neither follows redirects nor asks a proxy: metadata servers are reached directly or not.
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return _url_notice(kind, parts.hostname, port, target)


def _file_notice(path: Path) -> Notice:
    def there() -> bool:
        try:
            return path.exists()
        except OSError:
            return False

    return there


def _url_notice(kind: type[HTTPConnection], host: str, port: int | None, target: str) -> Notice:
    def there() -> bool:
        connection = kind(host, port, timeout=_TIMEOUT_S)
        try:
            connection.request("GET", target, headers=_HEADERS)
            answer = connection.getresponse()
            if answer.status != 200:
                return False
            body = answer.read(_MAX_ANSWER_BYTES)
        except (OSError, HTTPException, ValueError):
            return False
        finally:
            connection.close()
        return body.strip().lower() != b"false"

    return there


async def wait_for_notice(notice: Notice, *, poll_s: float = POLL_S) -> None:
    """Returns once the notice is there. It is asked for on a thread: the loop never waits for it."""
    there = False
    while not there:
        await asyncio.sleep(poll_s)
        there = await asyncio.to_thread(notice)

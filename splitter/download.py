"""HTTP downloads: a file or a span of one, resumable, checked by sha256, visible under its name only when
whole; and small files, into memory."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from isthmus.protocol.addresses import is_loopback
from isthmus.protocol.errors import IsthmusError, ModelFileError, NotFoundError, RejectedError
from isthmus.splitter.atomic import file_errors, sync_directory

Progress = Callable[[str, float], None]
"""Called with what is being done and the share done, 0..1."""

T = TypeVar("T")

_CHUNK_BYTES = 1 << 18
_RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
_MAX_REFUSAL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """`attempts` in a row without a new byte end the download; each waits twice as long as the last. A server
    that says it is busy (429) is waited for up to `busy_s` beside that."""

    attempts: int = 5
    first_wait_s: float = 0.5
    timeout_s: float = 30.0
    busy_s: float = 300.0


DEFAULT_RETRY = RetryPolicy()


@dataclass(frozen=True, slots=True)
class Access:
    """How to ask a server. `headers` may hold a key: redirects are followed only without any."""

    headers: Mapping[str, str] = field(default_factory=dict)
    ssl_context: ssl.SSLContext | None = None

    def open(
        self, url: str, headers: Mapping[str, str], timeout_s: float
    ) -> contextlib.closing[http.client.HTTPResponse]:
        """The response to a GET. Raises what urllib does."""
        if not url.startswith(("http://", "https://")):
            raise _failed(url, "only http and https are supported")
        handlers: list[urllib.request.BaseHandler] = []
        if self.ssl_context is not None:
            handlers.append(urllib.request.HTTPSHandler(context=self.ssl_context))
        if self.headers:
            handlers.append(_NoRedirect())
        if is_loopback(urlsplit(url).hostname or ""):
            handlers.append(urllib.request.ProxyHandler({}))
        asked = {"User-Agent": "isthmus", **self.headers, **headers}
        request = urllib.request.Request(url, headers=asked)
        return contextlib.closing(urllib.request.build_opener(*handlers).open(request, timeout=timeout_s))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Urllib would carry the key to wherever it is sent."""

    def redirect_request(self, *_: Any) -> None:
        return None


ANYONE = Access()


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes of a larger file to fetch, from `start` on; `etag` names the version they must be of."""

    start: int
    etag: str


def download(
    url: str,
    target: Path,
    *,
    sha256: str,
    size: int | None = None,
    span: Span | None = None,
    access: Access = ANYONE,
    label: str = "downloading",
    progress: Progress | None = None,
    retry: RetryPolicy = DEFAULT_RETRY,
) -> Path:
    """Fetches `url` (http or https) into `target` and returns `target`; with `span`, `size` bytes of it.

    What arrived before a cut stays in `<target>.part`, and the next attempt, or the next call, asks for
    the rest only. `target` appears by rename once its sha256 is right. Not for concurrent use on one
    target: hold `atomic.exclusive(target)`.

    Raises `NotFoundError` (the server has no such file), `RejectedError` (an Isthmus server that says why),
    `ModelFileError` with code `download_failed`, `checksum_mismatch` or `disk_full`, `ConfigError` (no
    permission).
    """
    part = target.with_name(target.name + ".part")
    report = progress or (lambda label, share: None)
    with file_errors(str(part)):
        target.parent.mkdir(parents=True, exist_ok=True)
        resumed = part.exists() and part.stat().st_size > 0
    transfer = _Transfer(url, part, size, span, access, lambda share: report(label, share), retry)
    transfer.run()
    found = _sha256(part)
    if found != sha256 and resumed:
        # The first half may stem from another version of the file: once more, from the start.
        part.unlink()
        transfer.run()
        found = _sha256(part)
    if found != sha256:
        part.unlink()
        raise ModelFileError(
            f"{target.name}: sha256 is {found}, expected {sha256}",
            code="checksum_mismatch",
            hint="the file was altered on its way or replaced at its source",
        )
    with file_errors(str(target)):
        os.replace(part, target)
        sync_directory(target.parent)
    report(label, 1.0)
    return target


def fetch(url: str, *, most_bytes: int, access: Access = ANYONE, retry: RetryPolicy = DEFAULT_RETRY) -> bytes:
    """A small file, whole. Raises what `download` does; `download_failed` where it has more than
    `most_bytes`."""

    def attempt() -> bytes | None:
        with access.open(url, {}, retry.timeout_s) as response:
            data: bytes = response.read(most_bytes + 1)
            if len(data) > most_bytes:
                raise _failed(url, f"it has more than {most_bytes} bytes")
            cut = response.length  # what the server announced and did not send
            return data if not cut else None

    return _insist(url, retry, attempt, lambda: 0)


def _insist(url: str, retry: RetryPolicy, attempt: Callable[[], T | None], kept: Callable[[], int]) -> T:
    """Tries until `attempt` gives something; gives up after `retry.attempts` that brought no byte more."""
    fruitless, waited_s = 0, 0.0
    while True:
        before, patience_s = kept(), 0.0
        cause: Exception | None = None
        try:
            done = attempt()
            if done is not None:
                return done
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            refusal, patience_s = _refusal(url, error), _retry_after_s(error)
            reason, cause = f"HTTP {error.code} {error.reason}", error
            error.close()
            if refusal is not None:
                raise refusal from error
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            reason, cause = str(why) or type(error).__name__, error
            if isinstance(why, ssl.SSLCertVerificationError):
                raise _failed(url, reason) from error
        after = kept()
        if patience_s and waited_s + patience_s <= retry.busy_s:
            waited_s += patience_s
            time.sleep(patience_s)
            continue
        fruitless = 0 if after > before else fruitless + 1
        if fruitless >= retry.attempts:
            raise _failed(url, f"{reason}; {after} bytes are kept" if after else reason) from cause
        time.sleep(retry.first_wait_s * 2**fruitless)


def _refusal(url: str, error: urllib.error.HTTPError) -> IsthmusError | None:
    """The server's no as an error, in its own words if it is one of ours; None where asking again may
    help."""
    if error.code in _RETRIED_STATUS:
        return None
    missing = error.code in (404, 410)
    try:
        told = json.loads(error.read(_MAX_REFUSAL_BYTES))["error"]
        code, message, hint = (_printable(str(told[key])[:1000]) for key in ("code", "message", "hint"))
    except (OSError, http.client.HTTPException, ValueError, RecursionError, KeyError, TypeError):
        reason = f"HTTP {error.code} {error.reason}"
        if missing:
            return NotFoundError(f"{_shown(url)}: {reason}", hint="the file is gone from there")
        return _failed(url, reason)
    kind = NotFoundError if missing else RejectedError
    return kind(f"{_shown(url)}: {message}", code=code, hint=hint)


def _printable(text: str) -> str:
    """Without what could steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _retry_after_s(error: urllib.error.HTTPError) -> float:
    said = error.headers.get("Retry-After", "")
    return float(said) if error.code == 429 and said.isdigit() and len(said) < 5 else 0.0


@dataclass(frozen=True, slots=True)
class _Transfer:
    """One file, or a span of one, on its way into `part`."""

    url: str
    part: Path
    size: int | None
    span: Span | None
    access: Access
    report: Callable[[float], None]
    retry: RetryPolicy

    def run(self) -> None:
        """Asks until the file is whole."""
        _insist(self.url, self.retry, lambda: self._rest() or None, self._kept)

    def _kept(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _rest(self) -> bool:
        """One request for what `part` lacks; True when the file is whole, False when it ended early."""
        url, part, size = self.url, self.part, self.size
        with file_errors(str(part)), part.open("ab") as existing:
            have = existing.tell()
        if size is not None and have >= size:
            if have == size:
                return True
            os.truncate(part, 0)  # longer than the file it should become
            have = 0
        try:
            opened = self.access.open(url, self._range(have), self.retry.timeout_s)
        except urllib.error.HTTPError as error:
            if error.code != 416 or self.span is not None:
                raise
            # Nothing beyond what we have. Whole if the server's length says so, else a foreign leftover.
            error.close()
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return True
            os.truncate(part, 0)
            return False
        with opened as response:
            start, total = self._position(response, have)
            with file_errors(str(part)):
                file = part.open("r+b")
            with file:
                with file_errors(str(part)):
                    if file.seek(0, os.SEEK_END) > start:
                        file.truncate(start)
                    file.seek(start)
                done = self._copy(response, file, start, total)
        return total is None or done == total

    def _range(self, have: int) -> dict[str, str]:
        if self.span is None:
            return {"Range": f"bytes={have}-"} if have else {}
        assert self.size is not None, "a span has a size"
        first, last = self.span.start + have, self.span.start + self.size - 1
        return {"Range": f"bytes={first}-{last}", "If-Range": self.span.etag}

    def _position(self, response: http.client.HTTPResponse, have: int) -> tuple[int, int | None]:
        """(where in `part` the body begins, length of what `part` becomes or None): a server may ignore our
        Range and send it all."""
        if response.status == 206:
            said = response.headers.get("Content-Range", "")
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", said)
            begin = have + (self.span.start if self.span else 0)
            if found is None or int(found[1]) != begin:
                raise http.client.HTTPException(f"asked for bytes from {begin}, got {said!r}")
            start, total = have, self.size if self.span else int(found[2])
        elif self.span is not None:
            raise _failed(self.url, "the server's file is another one by now, or it knows no byte ranges")
        else:
            length = response.headers.get("Content-Length", "")
            start, total = 0, int(length) if length.isdigit() else None
        if self.size is not None and total is not None and total != self.size:
            raise _failed(self.url, f"the server's file has {total} bytes, expected {self.size}")
        return start, total

    def _copy(self, response: http.client.HTTPResponse, file: IO[bytes], done: int, total: int | None) -> int:
        """Body into file; the number of bytes it then holds. What arrived is on disk even if this raises."""
        name = str(self.part)
        while chunk := response.read(_CHUNK_BYTES):
            if self.size is not None and done + len(chunk) > self.size:
                raise _failed(self.url, f"more than the expected {self.size} bytes come")
            with file_errors(name):
                file.write(chunk)
                file.flush()
            done += len(chunk)
            if total:
                self.report(min(1.0, done / total))
        with file_errors(name):
            os.fsync(file.fileno())
        return done


def _sha256(path: Path) -> str:
    with file_errors(str(path)), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shown(url: str) -> str:
    """The address without query or credentials: they may hold signatures and keys."""
    return re.sub(r"//[^/@]*@", "//", url.split("?", 1)[0])


def _failed(url: str, reason: str) -> ModelFileError:
    return ModelFileError(
        f"cannot download {_shown(url)}: {reason}",
        code="download_failed",
        hint="check the network and run the command again: it goes on where it stopped",
    )

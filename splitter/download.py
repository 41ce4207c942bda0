"""One HTTP download: resumable, checked by sha256, and visible under its name only when whole."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from isthmus.protocol.errors import ModelFileError, NotFoundError
from isthmus.splitter.atomic import file_errors, sync_directory

Progress = Callable[[str, float], None]
"""Called with what is being done and the share done, 0..1."""

_CHUNK_BYTES = 1 << 18
_RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """`attempts` in a row without a new byte end the download; each waits twice as long as the last."""

    attempts: int = 5
    first_wait_s: float = 0.5
    timeout_s: float = 30.0


DEFAULT_RETRY = RetryPolicy()


def download(
    url: str,
    target: Path,
    *,
    sha256: str,
    size: int | None = None,
    label: str = "downloading",
    progress: Progress | None = None,
    retry: RetryPolicy = DEFAULT_RETRY,
) -> Path:
    """Fetches `url` (http or https) into `target` and returns `target`.

    What arrived before a cut stays in `<target>.part`, and the next attempt, or the next call, asks for
    the rest only. `target` appears by rename once its sha256 is right. Not for concurrent use on one
    target: hold `atomic.exclusive(target)`.

    Raises `NotFoundError` (the server has no such file), `ModelFileError` with code `download_failed`,
    `checksum_mismatch` or `disk_full`, `ConfigError` (no permission).
    """
    part = target.with_name(target.name + ".part")
    report = progress or (lambda label, share: None)
    with file_errors(str(part)):
        target.parent.mkdir(parents=True, exist_ok=True)
        resumed = part.exists() and part.stat().st_size > 0
    _fetch_all(url, part, size, lambda share: report(label, share), retry)
    found = _sha256(part)
    if found != sha256 and resumed:
        # The first half may stem from another version of the file: once more, from the start.
        part.unlink()
        _fetch_all(url, part, size, lambda share: report(label, share), retry)
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


def _fetch_all(
    url: str, part: Path, size: int | None, report: Callable[[float], None], retry: RetryPolicy
) -> None:
    """Asks until the file is whole; gives up after `retry.attempts` that brought nothing."""
    fruitless = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _fetch_rest(url, part, size, report, retry.timeout_s):
                return
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            error.close()
            if error.code in (404, 410):
                raise NotFoundError(f"{_shown(url)}: {reason}", hint="the file is gone from there") from error
            if error.code not in _RETRIED_STATUS:
                raise _failed(url, reason) from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        after = part.stat().st_size if part.exists() else 0
        fruitless = 0 if after > before else fruitless + 1
        if fruitless >= retry.attempts:
            raise _failed(url, f"{reason}; {after} bytes are kept")
        time.sleep(retry.first_wait_s * 2**fruitless)


def _fetch_rest(
    url: str, part: Path, size: int | None, report: Callable[[float], None], timeout_s: float
) -> bool:
    """One request for what `part` lacks; True when the file is whole, False when it ended early."""
    if not url.startswith(("http://", "https://")):
        raise _failed(url, "only http and https are supported")
    with file_errors(str(part)), part.open("ab") as existing:
        have = existing.tell()
    if size is not None and have >= size:
        if have == size:
            return True
        os.truncate(part, 0)  # longer than the file it should become
        have = 0
    request = urllib.request.Request(url, headers={"User-Agent": "isthmus"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # Nothing beyond what we have. Whole if the server's length says so, else a foreign leftover.
        error.close()
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return True
        os.truncate(part, 0)
        return False
    with response:
        start, total = _position(response, have)
        if size is not None and total is not None and total != size:
            raise _failed(url, f"the server's file has {total} bytes, expected {size}")
        with file_errors(str(part)):
            file = part.open("r+b")
        with file:
            with file_errors(str(part)):
                if file.seek(0, os.SEEK_END) > start:
                    file.truncate(start)
                file.seek(start)
            done = _copy(response, file, start, total, report, str(part))
    return total is None or done == total


def _position(response: http.client.HTTPResponse, have: int) -> tuple[int, int | None]:
    """(offset the body begins at, total length or None): a server may ignore our Range and send it all."""
    length = response.headers.get("Content-Length")
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if found and int(found[1]) == have:
            return have, int(found[2])
        raise http.client.HTTPException(
            f"asked for bytes from {have}, got {response.headers.get('Content-Range')}"
        )
    return 0, int(length) if length and length.isdigit() else None


def _copy(
    response: http.client.HTTPResponse,
    file: IO[bytes],
    done: int,
    total: int | None,
    report: Callable[[float], None],
    name: str,
) -> int:
    """Body into file; the number of bytes it then holds. What arrived is on disk even if this raises."""
    while chunk := response.read(_CHUNK_BYTES):
        with file_errors(name):
            file.write(chunk)
            file.flush()
        done += len(chunk)
        if total:
            report(min(1.0, done / total))
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

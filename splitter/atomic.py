"""Makes a directory appear whole or not at all: lock, work directory beside the target, fsync, rename.

Two processes that build the same target wait for each other; a process that dies leaves only a hidden work
directory, which the next one to take the lock removes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from isthmus.protocol.errors import ConfigError, ModelFileError


@contextlib.contextmanager
def file_errors(what: str) -> Iterator[None]:
    """Turns the OS's refusals (disk full, no permission, I/O error) into typed errors that name `what`."""
    try:
        yield
    except OSError as error:
        name = error.filename or what
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelFileError(
                f"the disk is full while writing {what} ({name})",
                code="disk_full",
                hint="free some space, or point ISTHMUS_CACHE or --out at a larger disk",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ConfigError(
                f"no permission to write {what} ({name})",
                code="no_write_permission",
                hint="point ISTHMUS_CACHE or --out at a directory you own",
            ) from error
        raise ModelFileError(
            f"{what}: {error.strerror or error} ({name})", code="io_error", hint="check the disk and the path"
        ) from error


@contextlib.contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Holds the lock of `target` (a file beside it); waits while another thread or process holds it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "a+b") as handle:
        _lock(handle)
        try:
            yield
        finally:
            _unlock(handle)


@contextlib.contextmanager
def work_directory(target: Path) -> Iterator[Path]:
    """A fresh hidden directory beside `target`, on the same file system; removed at the end in any case.

    Call with the lock held: leftovers of builders that died are removed here.
    """
    prefix = f".{target.name}.building-"
    for leftover in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    work = target.parent / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish(built: Path, target: Path, work: Path) -> None:
    """Moves the finished directory `built` to `target`; what was there goes first. Call with the lock held.

    A reader who has the old directory's files open keeps reading them; one who opens now finds the old or the
    new directory, or for an instant none.
    """
    sync_tree(built)
    if target.exists():
        os.rename(target, work / "replaced")
    os.rename(built, target)
    sync_directory(target.parent)


def sync_tree(root: Path) -> None:
    """Flushes every file and directory below `root` to the disk."""
    for folder, _, names in os.walk(root):
        for name in names:
            with open(Path(folder) / name, "r+b") as handle:  # Windows flushes only what it may write
                os.fsync(handle.fileno())
        sync_directory(Path(folder))


def sync_directory(path: Path) -> None:
    """Flushes a directory's entries; not possible on Windows, where renames are journalled anyway."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: IO[bytes]) -> None:
        handle.seek(0)
        while True:
            try:
                msvcrt.locking(handle.fileno(), msvcrt.LK_LOCK, 1)
                return
            except OSError as error:  # LK_LOCK gives up after ten seconds
                if error.errno != errno.EDEADLK:
                    raise

    def _unlock(handle: IO[bytes]) -> None:
        handle.seek(0)
        msvcrt.locking(handle.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(handle: IO[bytes]) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX)

    def _unlock(handle: IO[bytes]) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)

"""Which servers of this user run on this machine: each `serve` notes itself in a file while it is ready.

    <state>/run/<pid>.json   {"kind", "url", "pid", "model", "started", "host", "since_boot_s"}

A file outlives a process that was killed, and its number may then be another's: a file counts only while the
process of that number is the one that began at `since_boot_s`. (Not at a time of day: the clock of a board
without battery jumps by years after the start.)
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

import psutil

from isthmus.commands.output import err
from isthmus.config import state_path

Kind = Literal["edge", "cloud"]

_SAME_START_S: Final = 1.0  # psutil's times of process and boot are read apart


@dataclass(frozen=True, slots=True)
class ServedProcess:
    """One `serve` process. `started`: seconds since the epoch; `host`: the machine, as the folder may be
    shared by several."""

    kind: str
    url: str
    pid: int
    model: str
    started: float
    host: str
    since_boot_s: float


def noted(kind: Kind, model: str, tell: Callable[[str], None]) -> Callable[[str], None]:
    """`tell`, a server's callback for its URL, which also notes this process until it ends.

    A note that cannot be written is said on stderr and stops nobody from serving."""
    file = _folder() / f"{os.getpid()}.json"

    def ready(url: str) -> None:
        try:
            _write(file, kind, url, model)
        except OSError as error:
            text = f"`isthmus ps` will not list this process: cannot write {file}: {error.strerror}"
            err.print(text, markup=False, soft_wrap=True)
        else:
            atexit.register(file.unlink, missing_ok=True)
        tell(url)

    return ready


def served_processes() -> list[ServedProcess]:
    """Those that run now on this machine, the oldest first. Files of processes that ended are removed."""
    found = []
    for file in sorted(_folder().glob("*.json")):
        noted_process = _read(file)
        if noted_process is not None and noted_process.host != platform.node():
            continue
        if noted_process is None or not _is_alive(noted_process):
            with suppress(OSError):
                file.unlink()
        else:
            found.append(noted_process)
    return sorted(found, key=lambda process: process.since_boot_s)


def uptime_s(process: ServedProcess) -> float:
    """Seconds since it started, whatever happened to the clock."""
    return max(0.0, time.time() - float(psutil.boot_time()) - process.since_boot_s)


def _folder() -> Path:
    return state_path() / "run"


def _write(file: Path, kind: Kind, url: str, model: str) -> None:
    this = psutil.Process()
    process = ServedProcess(
        kind, url, this.pid, model, time.time(), platform.node(), this.create_time() - psutil.boot_time()
    )
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = file.with_suffix(".part")
    part.touch(mode=0o600)
    part.write_text(json.dumps(asdict(process)), encoding="utf-8")
    part.replace(file)


def _read(file: Path) -> ServedProcess | None:
    """None for what `_write` did not write."""
    try:
        raw = json.loads(file.read_bytes())
        process = ServedProcess(**raw)
    except (OSError, ValueError, TypeError):
        return None
    kinds = {"pid": int, "since_boot_s": float, "started": float}
    right = all(isinstance(value, kinds.get(name, str)) for name, value in asdict(process).items())
    return process if right and process.url.startswith(("http://", "https://", "ws://", "wss://")) else None


def _is_alive(process: ServedProcess) -> bool:
    try:
        there = psutil.Process(process.pid)
        began_s = float(there.create_time() - psutil.boot_time())
        same = abs(began_s - process.since_boot_s) < _SAME_START_S
        return same and bool(there.status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, ValueError):
        return False

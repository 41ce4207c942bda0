"""The log as a process of ours writes it to stderr, kept for a test to read."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

from isthmus.logs import configure_log


class Stderr(io.StringIO):
    """What was written; a terminal if so wished."""

    def __init__(self, *, terminal: bool = False) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """The lines as objects; with `name`, those of one event."""
        lines: list[dict[str, Any]] = [json.loads(line) for line in self.getvalue().splitlines()]
        return [line for line in lines if name in ("", line["event"])]


@contextmanager
def process_log(format_: str = "json", level: str = "debug", *, terminal: bool = False) -> Iterator[Stderr]:
    """Configured as `isthmus serve` does it, and left as it was before."""
    root, ours = logging.getLogger(), logging.getLogger("isthmus")
    before = root.handlers[:], root.level, ours.level
    stderr = Stderr(terminal=terminal)
    try:
        with redirect_stderr(stderr):
            configure_log(format_, level)
        yield stderr
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        ours.setLevel(before[2])

"""A program on a real terminal (a pty): type, wait for words, press Ctrl-C."""

from __future__ import annotations

import codecs
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Makes the pty the controlling terminal first, so that Ctrl-C becomes a SIGINT.
START = "import os, sys; os.login_tty(0); os.execv(sys.executable, [sys.executable, '-m', *sys.argv[1:]])"


# What moves the cursor or colours the text; the letters it ends with say which.
_CONTROL = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\].*?(?:\x07|\x1b\\)|[^\[\]])|[\r\x07]")
_BEGUN = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*|\][^\x07\x1b]*)?$")

ASK = "\x1b[6n"  # "where is the cursor?", to which a terminal answers


class Terminal:
    """The far end of the pty. `screen` is all that was written so far, without control sequences."""

    def __init__(self, process: subprocess.Popen[bytes], end: int) -> None:
        self.process, self.end = process, end
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.screen = ""
        self.held = ""  # the beginning of a control sequence
        self.read = 0  # how much of it `expect` has gone past

    def type(self, text: str) -> None:
        """Press these keys; a line ends with \\n, Ctrl-C is \\x03, Ctrl-D \\x04."""
        os.write(self.end, text.encode())

    def expect(self, pattern: str, *, timeout_s: float = 60) -> str:
        """Wait for a match; what stood between the one before and this one."""
        deadline = time.monotonic() + timeout_s
        while (match := re.compile(pattern, re.DOTALL).search(self.screen, self.read)) is None:
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.screen[self.read :]!r}"
            if select.select([self.end], [], [], left)[0]:
                self.screen += self._more()
        before = self.screen[self.read : match.start()]
        self.read = match.end()
        return before

    def interrupt(self, pattern: str) -> None:
        """Press Ctrl-C until the program answers with a match. (One press in the microseconds before Python
        begins to wait for a key or a lock is noticed only at the next.)"""
        for _ in range(10):
            self.type("\x03")
            try:
                self.expect(pattern, timeout_s=5)
            except AssertionError:
                continue
            return
        raise AssertionError(f"ten Ctrl-C brought no {pattern!r}: {self.screen[self.read :]!r}")

    def wait(self, timeout_s: float = 30) -> int:
        """The program's exit code; it must end by itself."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.screen[self.read :]
            if select.select([self.end], [], [], 0.05)[0]:
                self.screen += self._more()
        return self.process.returncode

    def _more(self) -> str:
        try:
            text = self.held + self.decoder.decode(os.read(self.end, 65536))
        except OSError:  # Linux: the other end was closed
            self.process.wait(timeout=30)
            return ""
        if ASK in text:
            self.type("\x1b[1;1R")
        begun = _BEGUN.search(text)
        self.held = begun.group() if begun else ""
        return _CONTROL.sub("", text.removesuffix(self.held))


class Window:
    """What a person would see of written text: `rows`, from the first one on, in a window of `height` rows.

    Knows what rich's live displays use: carriage return, cursor up, erase line, colours, cursor on and off.
    Whatever else comes is an error, and so is a change of what has scrolled out of the window.
    """

    def __init__(self, height: int) -> None:
        self.height = height
        self.rows = [""]
        self.row = self.column = 0

    def write(self, text: str) -> None:
        for part in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|\n|\r|[^\x00-\x1f]+", text):
            if part == "\n":
                self.row, self.column = self.row + 1, 0  # the pty adds the carriage return
                if self.row == len(self.rows):
                    self.rows.append("")
            elif part == "\r":
                self.column = 0
            elif not part.startswith("\x1b"):
                row = self.rows[self.row].ljust(self.column)
                self.rows[self.row] = row[: self.column] + part + row[self.column + len(part) :]
                self.column += len(part)
            elif part.endswith("A"):
                self.row -= int(part[2:-1] or 1)
                assert self.row >= max(0, len(self.rows) - self.height), "out of the window"
            elif part == "\x1b[2K":
                self.rows[self.row] = ""
            else:
                assert part[-1] in "mhl", part


@contextmanager
def terminal(*arguments: str, env: dict[str, str]) -> Iterator[Terminal]:
    """`python -m ARGUMENTS` on a terminal; killed at the end if it still runs."""
    end, its_end = pty.openpty()
    termios.tcsetwinsize(end, (24, 100))
    process = subprocess.Popen(
        [sys.executable, "-c", START, *arguments], stdin=its_end, stdout=its_end, stderr=its_end, env=env
    )
    os.close(its_end)
    try:
        yield Terminal(process, end)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(end)

"""A program on a real terminal (a pty): type, wait for words, press Ctrl-C."""

from __future__ import annotations

import codecs
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Makes the pty the controlling terminal first, so that Ctrl-C becomes a SIGINT.
START = "import os, sys; os.login_tty(0); os.execv(sys.executable, [sys.executable, '-m', *sys.argv[1:]])"


class Terminal:
    """The far end of the pty. `screen` is all that was written so far."""

    def __init__(self, process: subprocess.Popen[bytes], end: int) -> None:
        self.process, self.end = process, end
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.screen = ""
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
            return self.decoder.decode(os.read(self.end, 65536)).replace("\r", "")
        except OSError:  # Linux: the other end was closed
            self.process.wait(timeout=30)
            return ""


@contextmanager
def terminal(*arguments: str, env: dict[str, str]) -> Iterator[Terminal]:
    """`python -m ARGUMENTS` on a terminal; killed at the end if it still runs."""
    end, its_end = pty.openpty()
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

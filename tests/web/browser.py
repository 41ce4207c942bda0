"""Chromium for the tests, and a watch over what a page says and whom it asks."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Error, Request, sync_playwright

NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Whatever a page asks of other machines fails at once, also where there is a network.
ARGUMENTS: Final = ("--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")


def find_chromium() -> str | None:
    """The path of an installed Chromium or Chrome."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


@contextmanager
def headless(executable: str) -> Iterator[Browser]:
    """The browser `executable` without a window, closed at the end.

    While it lives, Playwright's event loop counts as running on this thread: no coroutine test can run.
    """
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


class Watch:
    """Collects what no page of ours may do: log warnings and errors, throw, ask other hosts than `host`.

    A message in the console that a scenario has to provoke (Chromium logs every reply of status 401) is
    announced with `expect`; it must come, then.
    """

    def __init__(self, context: BrowserContext, host: str) -> None:
        self.host = host
        self.hosts: set[str] = set()
        self.logged: list[str] = []
        self.thrown: list[str] = []
        self._expected: list[re.Pattern[str]] = []
        context.on("console", self._note_console)
        context.on("weberror", lambda error: self.thrown.append(_told(error.error)))
        context.on("request", self._note_request)

    def expect(self, pattern: str) -> None:
        """A warning or an error that matches `pattern` must come, and is no fault."""
        self._expected.append(re.compile(pattern))

    def check(self) -> None:
        """Fails for everything seen that may not be, and for an expected message that never came."""
        wrong = [f"asked another host: {host}" for host in sorted(self.hosts - {self.host})]
        wrong += [f"thrown: {error}" for error in self.thrown]
        wrong += [
            f"logged: {line}" for line in self.logged if not any(p.search(line) for p in self._expected)
        ]
        for pattern in self._expected:
            if not any(pattern.search(line) for line in self.logged):
                wrong.append(f"never logged: {pattern.pattern}")
        assert not wrong, "\n".join(wrong)

    def _note_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning", "assert"):
            self.logged.append(f"{message.type}: {message.text} ({message.location})")

    def _note_request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob"):
            self.hosts.add(parts.netloc)


def _told(error: Error) -> str:
    return f"{error.message}\n{error.stack}"

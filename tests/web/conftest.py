"""A browser, the services it looks at, and pages that are checked when a test ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, expect

from tests.processes import Service, serve
from tests.web.browser import NAMES, Watch, find_chromium, headless
from tests.web.chat_page import Chat

OpenChat = Callable[..., Chat]
WAIT_MS = 30_000  # for a condition; these machines are shared
expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    """Closed with the last test of this folder: until then no coroutine test can run."""
    executable = find_chromium()
    if executable is None:
        reason = f"no browser: none of {', '.join(NAMES)} is installed (.ci/browser installs Debian's)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with headless(executable) as browser:
        yield browser


def environment(data: Path) -> dict[str, str]:
    """This process's environment, with conversations and state under `data`."""
    return {**os.environ, "ISTHMUS_DATA": str(data), "ISTHMUS_STATE": str(data)}


@pytest.fixture(scope="package")
def cloud() -> Iterator[Service]:
    """A cloud with the real model. The precision is given: else it would measure first which is fastest."""
    with serve("cloud", "--port", "0", "--precision", "bf16") as service:
        yield service


@pytest.fixture(scope="package")
def edge(cloud: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The agent whose page is tried, in front of `cloud`."""
    env = environment(tmp_path_factory.mktemp("data"))
    with serve("edge", "--port", "0", "--cloud", cloud.url, env=env) as service:
        yield service


@pytest.fixture
def open_chat(chromium: Browser) -> Iterator[OpenChat]:
    """`open_chat(service, path="/", width=1280, dark=False, …)`: its page, in a fresh profile.

    More keywords are those of Playwright's `new_context`. When the test ends every page must have kept to its
    own host and have thrown and logged nothing (see Watch).
    """
    watches: list[Watch] = []
    with ExitStack() as contexts:

        def open_page(
            service: Service, path: str = "/", *, width: int = 1280, dark: bool = False, **options: Any
        ) -> Chat:
            context = chromium.new_context(
                viewport={"width": width, "height": 800 if width > 600 else 844},
                color_scheme="dark" if dark else "light",
                **options,
            )
            contexts.callback(context.close)
            context.set_default_timeout(WAIT_MS)
            watch = Watch(context, urlsplit(service.http).netloc)
            watches.append(watch)
            chat = Chat(context.new_page(), service, watch)
            chat.page.goto(service.http + path)
            return chat

        yield open_page
        for watch in watches:
            watch.check()


@pytest.fixture
def no_conversations(edge: Service) -> Service:
    """`edge`, with what earlier tests said deleted."""
    httpx.delete(f"{edge.http}/v1/isthmus/conversations").raise_for_status()
    return edge

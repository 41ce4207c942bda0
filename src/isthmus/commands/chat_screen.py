"""Where a chat is read and written: plain lines, for pipes, --json and dumb terminals, or a real terminal."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from rich.console import RenderableType

from isthmus.commands.chat_commands import Talk
from isthmus.commands.output import err, out, write_text
from isthmus.commands.ps import cloud_state


class Answer(Protocol):
    """One answer while it comes. `feed`: the model's words; `note`: what happened to the request."""

    def feed(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...


class Screen(Protocol):
    """`tell`: words of ours. `read_line`: the next line of input, None at its end; "" if it was discarded by
    Ctrl-C. `answering`: a context that shows an answer."""

    def tell(self, what: RenderableType) -> None: ...
    def read_line(self) -> str | None: ...
    def answering(self) -> AbstractAsyncContextManager[Answer]: ...


def has_terminal() -> bool:
    """Both ends are a terminal that can move its cursor."""
    return sys.stdin.isatty() and out.is_terminal and not out.is_dumb_terminal


class PlainScreen:
    """Words as they come, and nothing else. With `to_stderr` stdout stays free."""

    def __init__(self, *, to_stderr: bool) -> None:
        self._to_stderr = to_stderr
        self._console = err if to_stderr else out
        if sys.stdin.isatty():
            with suppress(ImportError):  # not on every system
                import readline  # noqa: F401 - gives input() editing and a history

    def tell(self, what: RenderableType) -> None:
        self._console.print(what, markup=False, soft_wrap=True)

    def read_line(self) -> str | None:
        prompt = "› " if sys.stdin.isatty() else ""
        if self._to_stderr:  # input() would write it to stdout
            self._console.print(prompt, end="")
            prompt = ""
        try:
            return input(prompt).strip()
        except EOFError:
            if sys.stdin.isatty():
                self.tell("")
            return None
        except KeyboardInterrupt:
            self.tell("\n(/quit or Ctrl-D leaves)")
            return ""

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[Answer]:
        yield _PlainAnswer(self._to_stderr)
        write_text("\n", to_stderr=self._to_stderr)


@dataclass(frozen=True)
class _PlainAnswer:
    to_stderr: bool

    def feed(self, text: str) -> None:
        write_text(text, to_stderr=self.to_stderr)

    def note(self, text: str) -> None:
        """Would stand in the middle of the answer; /stats tells it afterwards."""


def status_line(model: str, talk: Talk, clouds: list[dict[str, Any]]) -> str:
    """The bottom line: model, route asked for and taken last, clouds with their state and round trip."""
    asked = [f"route {talk.flags.get('route') or 'auto'}"]
    if (split := talk.flags.get("split")) is not None:
        asked.append(f"K {split}")
    if talk.privacy != "any":
        asked.append(talk.privacy)
    parts = [model, ", ".join(asked)]
    if talk.last is not None:
        finished = talk.last[1]
        place = {"local": "", "offload": ""}.get(finished.route, f", K {finished.split}")
        parts.append(f"last: {finished.route}{place}, {finished.timings.decode_tokens_per_s:.0f} tok/s")
    parts += [f"{urlsplit(cloud['url']).netloc} {cloud_state(cloud)}" for cloud in clouds]
    return " · ".join(parts)


def event_text(event: dict[str, Any]) -> str:
    """What moved a request, in a person's words; "" for what only figures tell."""
    match event:
        case {"event": "link_lost", "cloud": cloud}:
            return f"the link to {cloud} is lost; looking for a way on"
        case {"event": "resumed", "cloud": cloud}:
            return f"goes on in the cloud {cloud}"
        case {"event": "moved", "route": route, "split": split}:
            return f"goes on by {route}, {split} layers here"
    return ""

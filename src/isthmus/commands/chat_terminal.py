"""A chat on a real terminal: editing with history and completion, a status line, answers as live markdown."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from time import perf_counter
from typing import Final

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import RenderableType

from isthmus.commands.chat_commands import COMMANDS
from isthmus.commands.chat_markdown import MarkdownStream
from isthmus.commands.chat_screen import Answer
from isthmus.commands.output import out
from isthmus.config import state_path

PAINT_S: Final = 1 / 15
# Painting takes at most this share of the event loop's time.
_PAINT_SHARE: Final = 0.2


class TerminalScreen:
    """`status`: the bottom line, asked for once a second while a line is typed."""

    def __init__(self, status: Callable[[], str], *, keep_history: bool) -> None:
        self._session: PromptSession[str] = PromptSession(
            "› ",
            history=_history() if keep_history else InMemoryHistory(),
            completer=CommandCompleter(),
            complete_while_typing=False,
            key_bindings=_keys(),
            prompt_continuation="  ",
            bottom_toolbar=status,
            refresh_interval=1.0,
        )

    def tell(self, what: RenderableType) -> None:
        out.print(what, markup=False, soft_wrap=True)

    def read_line(self) -> str | None:
        try:
            return self._session.prompt().strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            self.tell("(/quit or Ctrl-D leaves)")
            return ""

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[Answer]:
        with _no_echo():
            stream = MarkdownStream(out)
            painting = asyncio.create_task(_paint(stream))
            try:
                yield stream
            finally:
                painting.cancel()
                stream.close()


async def _paint(stream: MarkdownStream) -> None:
    """Until cancelled. A long block takes longer to paint, and is painted less often."""
    while True:
        began = perf_counter()
        stream.paint()
        await asyncio.sleep(max(PAINT_S, (perf_counter() - began) / _PAINT_SHARE))


class CommandCompleter(Completer):
    """Slash commands, the values they take, and for /save the names of files."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        name, space, value = document.text_before_cursor.partition(" ")
        if not name.startswith("/"):
            return
        if not space:
            for command in COMMANDS:
                if command.name.startswith(name):
                    yield Completion(command.name, -len(name), display_meta=command.help)
            return
        if name == "/save":
            yield from self._paths.get_completions(Document(value), complete_event)
        for command in COMMANDS:
            if command.name == name:
                yield from (Completion(one, -len(value)) for one in command.values if one.startswith(value))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")  # what terminals send for Alt-Enter
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """Kept in a file that only its owner may read; in memory where it cannot be written."""
    file = state_path() / "chat-history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError as error:
        out.print(
            f"what is typed is not kept: cannot write {file}: {error.strerror}", style="dim", markup=False
        )
        return InMemoryHistory()
    return FileHistory(str(file))


@contextmanager
def _no_echo() -> Iterator[None]:
    """Keys pressed meanwhile are not shown in the answer but read by the next prompt. Ctrl-C works."""
    if sys.platform == "win32":
        yield
        return
    import termios

    try:
        before = termios.tcgetattr(sys.stdin)
    except termios.error:
        yield
        return
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        with suppress(termios.error):
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)

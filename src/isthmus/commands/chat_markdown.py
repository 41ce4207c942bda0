"""Markdown on a terminal while it comes: finished blocks are printed for good, the open one is live."""

from __future__ import annotations

from typing import Final

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from isthmus.commands.output import drop_controls, plain_text

# HTML is shown as it stands: rich would drop it, and with it what the model said.
_PARSER: Final = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")
# Rows of the window that the open block leaves free.
_FREE_ROWS: Final = 2


def _blocks(source: str) -> list[list[Token]]:
    """The tokens of what stands side by side at the top: a paragraph, a whole list, a fence, a table."""
    blocks: list[list[Token]] = []
    for token in _PARSER.parse(source):
        if token.level == 0 and token.nesting >= 0:
            blocks.append([])
        blocks[-1].append(token)
    return blocks


def finished_length(source: str) -> int:
    """How many characters of `source` are blocks that nothing can change any more: all but the last one."""
    blocks = _blocks(source)
    if len(blocks) < 2 or (lines := blocks[-1][0].map) is None:
        return 0
    return sum(len(line) + 1 for line in source.split("\n")[: lines[0]])


class _Blocks:
    """Markdown, an empty line between its blocks, and before them where they are not the first; of it the
    last `most_rows` rows, if given."""

    def __init__(self, source: str, *, first: bool, most_rows: int | None = None) -> None:
        self._source, self._first, self._most_rows = source, first, most_rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows: list[list[Segment]] = []
        for tokens in _blocks(self._source):
            if rows or not self._first:
                rows.append([])
            block = Markdown("", hyperlinks=False)  # a link's target is to be seen
            block.parsed = tokens
            rows += console.render_lines(block, options.update(height=None), pad=False)
        for row in rows if self._most_rows is None else rows[-self._most_rows :]:
            yield from row
            yield Segment.line()


class MarkdownStream:
    """One answer. `feed` it, `paint` it now and then, `close` it: then all of it stands on the screen, once.

    An open block that is taller than the window shows its last rows until it is finished, since what has
    scrolled out of a window cannot be changed. Not thread-safe.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._open = ""
        self._first = True  # nothing is printed for good yet
        self._is_painted = True
        self._live = Live(
            Text("…", style="dim"),
            console=console,
            auto_refresh=False,
            transient=True,
            vertical_overflow="visible",
        )
        self._live.start(refresh=True)

    def feed(self, text: str) -> None:
        """More of the answer; to be seen at the next `paint`."""
        self._open += drop_controls(text)
        self._is_painted = False

    def note(self, text: str) -> None:
        """A line of ours above what is open."""
        self.paint()
        self._console.print(plain_text(text, "yellow"))

    def paint(self) -> None:
        """Show what was fed."""
        if self._is_painted:
            return
        self._is_painted = True
        length = finished_length(self._open)
        done, self._open = self._open[:length], self._open[length:]
        block, self._first = _Blocks(done, first=self._first), self._first and not done
        with self._console:  # one write, so that nothing flickers
            self._live.update(self._tail(), refresh=True)
            if done:
                self._console.print(block, end="")

    def close(self) -> None:
        """Print the rest for good."""
        self._live.update(Text(""), refresh=True)
        self._live.stop()
        if self._open.strip():
            self._console.print(_Blocks(self._open, first=self._first), end="")
        self._open = ""

    def _tail(self) -> _Blocks:
        rows = max(1, self._console.height - _FREE_ROWS)
        return _Blocks(self._open, first=self._first, most_rows=rows)

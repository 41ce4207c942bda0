"""Markdown that streams onto a terminal: all of it is there in the end, once; nothing steers the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from isthmus.commands.chat_markdown import MarkdownStream, finished_length
from tests.cli.terminal import Window

WIDTH, HEIGHT = 40, 12

ANSWER = """\
# Heading

The first paragraph is long enough to be broken into several rows of the window, with **bold words** and
a [link](https://example.org/).

1. one
2. two

   - nested

```python
for number in range(3):
    print(number)
```

| name | value |
|------|-------|
| a    | 1     |

Use <b>tags</b> as they are.

<div>
html
</div>

The end."""


class Watched:
    """A stream and the window it is written to."""

    def __init__(self) -> None:
        self.file = io.StringIO()
        self.window = Window(HEIGHT)
        self.stream = MarkdownStream(
            Console(file=self.file, force_terminal=True, width=WIDTH, height=HEIGHT, _environ={})
        )

    def show(self) -> str:
        """What the window shows after what was written since the last look."""
        self.window.write(self.file.getvalue())
        self.file.seek(0)
        self.file.truncate()
        return "\n".join(row.rstrip() for row in self.window.rows).rstrip("\n")


def shown(answer: str, step: int) -> str:
    """What stands on the screen after `answer` came in pieces of `step` characters, each painted."""
    watched = Watched()
    for start in range(0, len(answer), step):
        watched.stream.feed(answer[start : start + step])
        watched.stream.paint()
        watched.show()
    watched.stream.close()
    return watched.show()


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_all_of_it_is_there_once_however_it_comes(step: int) -> None:
    text = shown(ANSWER, step)
    for words in (
        "Heading", "bold words", "https://example.org/", "1 one", "nested", "print(number)", "value",
        "<b>tags</b>", "<div>", "html", "The end.",
    ):  # fmt: skip
        assert text.count(words) == 1, text
    assert "**" not in text
    assert "```" not in text


def test_pieces_make_no_difference_to_the_result() -> None:
    assert shown(ANSWER, 1) == shown(ANSWER, len(ANSWER))


def test_an_open_block_taller_than_the_window_shows_its_end_and_loses_nothing() -> None:
    words = [f"word{number:04}" for number in range(300)]
    watched = Watched()
    for word in words:
        watched.stream.feed(word + " ")
        watched.stream.paint()
        assert word in watched.show()  # the newest is always to be seen
    watched.stream.close()
    assert watched.show().split() == words


def test_what_is_finished_is_not_written_again() -> None:
    watched = Watched()
    watched.stream.feed("A paragraph.\n\nAnother")
    watched.stream.paint()
    assert watched.show() == "A paragraph.\n\nAnother"
    watched.stream.feed(" one.")
    watched.stream.paint()
    assert "A paragraph." not in watched.file.getvalue()
    watched.stream.close()
    assert watched.show() == "A paragraph.\n\nAnother one."


def test_a_note_stands_above_what_is_open() -> None:
    watched = Watched()
    watched.stream.feed("An open")
    watched.stream.note("the link to ws://\x1b[2Jcloud is lost")
    watched.stream.feed(" paragraph.")
    watched.stream.close()
    assert watched.show() == "the link to ws:// [2Jcloud is lost\nAn open paragraph."


def test_the_model_does_not_control_the_terminal() -> None:
    evil = "a\x1b[2Jb \x1b]0;title\x07c \x9b31md [x](http://h/\x1b[1A) `\x1b[5A`\n\n```\n\x1b[9A\n```\n"
    watched = Watched()
    watched.stream.feed(evil)
    watched.stream.paint()
    watched.stream.close()
    written = watched.file.getvalue()
    for sequence in ("\x1b[2J", "\x1b]", "\x07", "\x9b", "\x1b[5A", "\x1b[9A"):
        assert sequence not in written
    assert "a[2Jb" in watched.show()


@pytest.mark.parametrize(
    ("source", "finished"),
    [
        ("", ""),
        ("one paragraph", ""),
        ("one\n\ntwo", "one\n\n"),
        ("one\n\n", ""),  # what follows might still belong to it
        ("- a\n\n- b", ""),
        ("- a\n\nb", "- a\n\n"),
        ("```\na\n\nb", ""),
        ("# a\n", ""),
        ("# a\nb", "# a\n"),
        ("a\u2028b\n\nc", "a\u2028b\n\n"),  # no end of a line in markdown
    ],
)
def test_what_counts_as_finished(source: str, finished: str) -> None:
    assert source[: finished_length(source)] == finished

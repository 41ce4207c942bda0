"""How commands speak: results on stdout (one JSON object with --json), progress and logs on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Catalog name, Hugging Face repository, folder, .gguf file or pack folder.",
        metavar="MODEL",
    ),
]

# Called with what is being done and how much of it is done (0 … 1).
ProgressCallback = Callable[[str, float], None]

err = Console(stderr=True, highlight=False, emoji=False)
out = Console(highlight=False, emoji=False)

# Control characters, except tab and newline: on a terminal they could move the cursor or change its title.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def print_json(value: Any) -> None:
    """One JSON object, on one line, on stdout."""
    ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
    sys.stdout.write(json.dumps(value, ensure_ascii=ascii_only) + "\n")
    sys.stdout.flush()


def write_text(text: str, *, to_stderr: bool = False) -> None:
    """A model's words, exactly as they are; on a terminal without control characters."""
    stream = sys.stderr if to_stderr else sys.stdout
    stream.write(drop_controls(text) if stream.isatty() else text)
    stream.flush()


def drop_controls(text: str) -> str:
    """`text` without control characters, except tabs and newlines."""
    return text.translate(_CONTROLS)


def plain_text(words: str, style: str = "") -> Text:
    """Words as they are: no markup, and nothing by which another machine's words could steer the terminal."""
    return Text("".join(c if c.isprintable() else " " for c in words), style=style)


def print_error(error: dict[str, str], *, as_json: bool) -> None:
    """An error as CONTRACT has it: an object with --json, one readable line without."""
    if as_json:
        print_json({"error": error})
        return
    hint = f"\n  {error['hint']}" if error.get("hint") else ""
    err.print(
        f"[bold red]error[/] ({error['code']}): {_plain(error['message'])}{_plain(hint)}", soft_wrap=True
    )


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """A progress bar on stderr, one line per activity; plain lines where stderr is no terminal."""
    if not err.is_terminal:
        seen: set[str] = set()

        def say(label: str, fraction: float) -> None:
            if label not in seen:
                seen.add(label)
                err.print(f"{label} …", markup=False, soft_wrap=True)

        yield say
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=False) as bar:
        tasks: dict[str, TaskID] = {}

        def update(label: str, fraction: float) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(_plain(label), total=1.0)
            bar.update(tasks[label], completed=fraction)

        yield update


def human_bytes(count: float) -> str:
    """1536 → '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")

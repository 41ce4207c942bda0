"""What the commands below `isthmus bench` share: how a report is printed, and what flags may not be given."""

from __future__ import annotations

import typer
from rich.table import Table

from isthmus.bench.report import Report
from isthmus.commands.output import out, print_json
from isthmus.protocol.errors import ConfigError


def print_report(report: Report, *, as_json: bool) -> None:
    """One JSON object, or tables."""
    result = report.to_dict()
    if as_json:
        print_json(result)
        return
    figures = Table("figure", "value", title=f"bench {report.bench}")
    for name, value in result["figures"].items():
        figures.add_row(name, f"{value:g}")
    out.print(figures)
    if report.rows:
        columns = list(dict.fromkeys(key for row in result["rows"] for key in row))
        rows = Table(*columns)
        for row in result["rows"]:
            rows.add_row(
                *(f"{row[c]:g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns)
            )
        out.print(rows)
    for note in report.notes:
        out.print(f"· {note}", markup=False)


def given(context: typer.Context) -> set[str]:
    """The parameters that the command line names."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def refuse(names: set[str], why: str) -> None:
    """What would not be honoured is not taken silently."""
    if names:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))
        raise ConfigError(f"{flags}: no meaning {why}", hint="leave it out")


def numbers(flag: str, text: str, hint: str) -> tuple[float, ...]:
    """Numbers from 0 by commas; ConfigError names the flag."""
    try:
        values = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        values = ()
    if not values or not all(0 <= value < 10_000 for value in values):
        raise ConfigError(f"{flag} {text!r}", hint=hint)
    return values

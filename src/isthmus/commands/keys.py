"""`isthmus key`: a new API key, shown once and kept hashed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isthmus.commands.output import JsonFlag, err, out, print_json
from isthmus.protocol.keys import KeyFile, add_key, hashed_line, make_key


def key(
    label: Annotated[str, typer.Argument(help="Whose key it is; on the cloud, the tenant.", metavar="LABEL")],
    file: Annotated[
        Path | None,
        typer.Option("--file", help="Key file of the server; the hashed key is added to it.", metavar="FILE"),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Make an API key for --api-key-file (cloud) or --serve-key-file (edge). It is shown this once."""
    made = make_key()
    remarks: list[str] = []
    if file is not None:
        add_key(file, label, made)
        remarks = KeyFile(file).remarks()
    line = hashed_line(label, made)
    if json:
        print_json({"label": label, "key": made, "line": line, "file": None if file is None else str(file)})
    else:
        out.print(made, soft_wrap=True)
    told = f"give the server this line: {line}" if file is None else f"its hash is in {file} now"
    for text in (f"this key of {label} is not shown again; {told}", *remarks):
        err.print(text, markup=False, soft_wrap=True)

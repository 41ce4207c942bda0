"""`isthmus config`: what is set, and where it was set."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from isthmus.commands.output import JsonFlag, out, print_json
from isthmus.config import SETTINGS, Settings, config_path, lookup, write_setting

app = typer.Typer(
    help="Show or change settings (flag > ISTHMUS_* > config.toml > default).", no_args_is_help=True
)


@app.command()
def show(json: JsonFlag = False) -> None:
    """Print every setting with its value and origin."""
    settings = Settings()
    values = settings.show()
    if json:
        print_json({"path": str(settings.path), "settings": values})
        return
    table = Table("setting", "value", "from", "what it is")
    for setting in SETTINGS:
        entry = values[setting.name]
        shown = "–" if entry["value"] is None else str(entry["value"])
        table.add_row(setting.name, shown, str(entry["origin"]), setting.help)
    out.print(table)


@app.command(name="set")
def set_(
    name: Annotated[str, typer.Argument(help="Name of the setting.")],
    value: Annotated[str, typer.Argument(help="Its value; several are separated by commas.")],
    json: JsonFlag = False,
) -> None:
    """Store a setting in config.toml."""
    path = config_path()
    stored = lookup(name, "config set").shown(write_setting(path, name, value))
    if json:
        print_json({"path": str(path), "name": name, "value": stored})
    else:
        out.print(f"{name} = {stored} in {path}", markup=False, soft_wrap=True)


@app.command()
def path(json: JsonFlag = False) -> None:
    """Print where config.toml is looked for."""
    where = config_path()
    if json:
        print_json({"path": str(where), "exists": where.exists()})
    else:
        out.print(str(where), soft_wrap=True)

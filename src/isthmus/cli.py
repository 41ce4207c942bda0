"""The `isthmus` program: puts the commands together and turns errors into exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

import isthmus
from isthmus.commands import (
    bench,
    chat,
    configuration,
    doctor,
    generate,
    keys,
    models,
    plan,
    profile,
    ps,
    relay,
    serve,
)
from isthmus.commands.output import print_error
from isthmus.protocol.errors import IsthmusError

# Typer keeps its own copy of click or uses the installed one, by version; this is its UsageError either way.
WrongUsage: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="isthmus",
    help="One language model, two machines: run it here, split it over two, or offload it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

for command in (
    models.pull,
    models.build,
    models.show,
    models.rm,
    generate.run,
    chat.chat,
    keys.key,
    plan.plan,
    profile.profile,
    relay.relay,
    ps.ps,
    doctor.doctor,
):
    app.command()(command)
app.command(name="list")(models.list_)
app.add_typer(serve.app, name="serve")
app.add_typer(bench.app, name="bench")
app.add_typer(configuration.app, name="config")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"isthmus {isthmus.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the program. Exit codes: 0 success, 1 runtime failure, 2 wrong usage, 130 interrupted."""
    as_json = "--json" in sys.argv
    try:
        code = app(standalone_mode=False)
    except IsthmusError as error:
        print_error(error.to_dict(), as_json=as_json)
        sys.exit(error.exit_code)
    except WrongUsage as error:
        _explain_usage(error, as_json=as_json)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (`isthmus list | head -1`): nothing is left to say, and Python
        # must not try to say it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        hint = "this is a fault of Isthmus: please report it with the lines above"
        print_error({"code": "internal_error", "message": message, "hint": hint}, as_json=as_json)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _explain_usage(error: Exception, *, as_json: bool) -> None:
    context = getattr(error, "ctx", None)
    program = context.command_path if context else "isthmus"
    tell = getattr(error, "format_message", None)
    message = str(tell() if tell else error).strip()
    if not message and not as_json:
        return  # no command was given, and the help has been printed
    message = message or "no command was given"
    print_error({"code": "usage", "message": message, "hint": f"see {program} --help"}, as_json=as_json)

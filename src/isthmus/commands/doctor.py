"""`isthmus doctor`: looks at everything that can be wrong, and says what to do about it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.text import Text

from isthmus.commands.options import CLOUD, WAY, Flags, with_flags
from isthmus.commands.output import JsonFlag, out, plain_text, print_json
from isthmus.config import Settings
from isthmus.protocol.errors import ConfigError

if TYPE_CHECKING:
    from isthmus.commands.doctor_checks import Check

_MARKS: Final = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "bold red")}
_SHARED: Final = {
    name: kind
    for name, kind in {**WAY, **CLOUD}.items()
    if name in ("model", "bits", "cloud", "api_key_file", "tls_ca", "tls_client_cert", "tls_client_key")
}


@with_flags(_SHARED)
def doctor(
    flags: Flags,
    provider: Annotated[
        str | None, typer.Option("--provider", help="cpu, cuda, tensorrt, coreml, …", metavar="NAME")
    ] = None,
    serve_key_file: Annotated[
        str | None,
        typer.Option("--serve-key-file", help="Key file of this machine's edge API.", metavar="FILE"),
    ] = None,
    port: Annotated[
        int,
        typer.Option("--port", help="Port that the edge is to serve on.", min=1, max=65535, metavar="PORT"),
    ] = 8077,
    json: JsonFlag = False,
) -> None:
    """Check this machine and the way to every cloud; say what to do where something is wrong.

    Exit code 1 if any check failed.
    """
    flags |= {"provider": provider, "serve_key_file": serve_key_file}
    checks = asyncio.run(_examine(flags, port, say=not json))
    fine = all(check.status != "fail" for check in checks)
    if json:
        print_json({"ok": fine, "checks": [asdict(check) for check in checks]})
    if not fine:
        raise typer.Exit(1)


async def _examine(flags: Flags, port: int, *, say: bool) -> list[Check]:
    checks: list[Check] = []
    async for check in _checks(flags, port):
        if say:
            if check.cloud is not None and (not checks or checks[-1].cloud != check.cloud):
                out.print(plain_text(check.cloud, "bold"), soft_wrap=True)
            _say(check)
        checks.append(check)
    return checks


async def _checks(flags: Flags, port: int) -> AsyncIterator[Check]:
    """All of them, one by one, as they are done."""
    from isthmus.commands import doctor_checks as local
    from isthmus.commands.doctor_cloud import check_cloud
    from isthmus.commands.setup import agent_options

    yield local.check_python()
    yield local.check_packages()
    settings, wrong = _settings(flags)
    yield local.check_config(settings, wrong, os.environ)
    model = settings.text("model") or ""
    found, pack = local.find_pack(model, settings.text("bits") or "auto")
    yield local.check_provider(settings.text("provider") or "cpu", settings.number("threads"))
    yield found
    yield local.check_cache(model, pack)
    for check in local.check_key_files(settings):
        yield check
    yield local.check_energy(settings)
    yield local.check_port(port)
    try:
        options = agent_options(settings)
    except ConfigError:
        return  # told by check_key_files
    for url in options["cloud_urls"]:
        asked = check_cloud(url, pack, api_key=options["api_key"], ssl_context=options["ssl_context"])
        async for check in asked:
            yield check


def _settings(flags: Flags) -> tuple[Settings, ConfigError | None]:
    """The settings; with what is wrong about the file or the environment, which then do not count. Raises
    ConfigError where it is the flags that are wrong."""
    nothing = {"ISTHMUS_CONFIG": os.devnull}
    Settings(flags, nothing)
    try:
        return Settings(flags), None
    except ConfigError as error:
        return Settings(flags, nothing), error


def _say(check: Check) -> None:
    mark, style = _MARKS[check.status]
    name = check.name.removeprefix("cloud_") if check.cloud else check.name
    indent = "  " if check.cloud else ""
    line = Text(f"{indent}{mark} ", style=style)
    line += plain_text(f"{name:<9} ", "bold" if check.status != "ok" else "")
    line += plain_text(check.detail)
    out.print(line, soft_wrap=True)
    if check.hint:
        out.print(plain_text(f"{indent}  → {check.hint}", style.removeprefix("bold ")), soft_wrap=True)

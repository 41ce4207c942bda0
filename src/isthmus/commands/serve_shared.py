"""What the `serve` commands have in common: where they listen, and how they say that they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.commands.output import out, print_json
from isthmus.config import Settings

HostOption = Annotated[str, typer.Option("--host", help="Address to listen on.", metavar="HOST")]
PortOption = Annotated[
    int, typer.Option("--port", help="0 picks a free one.", min=0, max=65535, metavar="PORT")
]
ParallelOption = Annotated[
    int | None, typer.Option("--parallel", help="Requests served at once.", min=1, metavar="N")
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", help="Compute threads.", min=1, metavar="N")]
TlsCertOption = Annotated[
    Path | None, typer.Option("--tls-cert", help="Certificate chain of this server, PEM.", metavar="FILE")
]
TlsKeyOption = Annotated[
    Path | None, typer.Option("--tls-key", help="Key of that certificate, PEM.", metavar="FILE")
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Let other machines in without key and TLS; warns at each start.")
]

LOG: Mapping[str, Any] = {
    "log_format": Annotated[
        str | None, typer.Option("--log-format", help="auto, json or tty.", metavar="FORMAT")
    ],
    "log_level": Annotated[
        str | None, typer.Option("--log-level", help="debug, info, warning or error.", metavar="LEVEL")
    ],
}


def start_log(settings: Settings) -> None:
    """Log as the settings say, from here on."""
    from isthmus.logs import configure_log

    configure_log(settings.text("log_format") or "auto", settings.text("log_level") or "info")


def announce(kind: str, *, as_json: bool) -> Callable[[str], None]:
    """Prints the one ready line of CONTRACT.md."""

    def say(url: str) -> None:
        if as_json:
            print_json({"ready": kind, "url": url})
        else:
            out.print(f"ready {kind} {url}", soft_wrap=True, markup=False)

    return say

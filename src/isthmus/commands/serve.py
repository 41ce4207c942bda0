"""`isthmus serve edge | cloud | all`: long-running processes."""

from __future__ import annotations

import json as json_module
import signal
import subprocess
import sys
from typing import Annotated, Any

import typer

from isthmus.commands.output import JsonFlag, ModelOption, print_error
from isthmus.commands.serve_cloud import cloud
from isthmus.commands.serve_edge import edge
from isthmus.commands.serve_shared import ParallelOption, PortOption, announce

app = typer.Typer(help="Serve the edge agent, the cloud service, or both.", no_args_is_help=True)
app.command()(edge)
app.command()(cloud)


@app.command(name="all")
def all_(
    model: ModelOption = None,
    port: PortOption = 8077,
    cloud_port: Annotated[
        int,
        typer.Option(
            "--cloud-port", help="Port of the cloud; 0 picks a free one.", min=0, max=65535, metavar="PORT"
        ),
    ] = 8078,
    parallel: ParallelOption = None,
    json: JsonFlag = False,
) -> None:
    """Serve edge and cloud on this machine, as two processes."""
    chosen = ["--model", model] if model else []
    workers = ["--parallel", str(parallel)] if parallel else []
    children = _Children(as_json=json)
    # A terminal's Ctrl-C reaches the children by itself; here it must only not end the parent before them.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: children.stop())
    try:
        url = children.start("cloud", ["--port", str(cloud_port), *chosen])
        children.start("edge", ["--port", str(port), "--cloud", url, *workers, *chosen])
        code = children.wait_for_last()
    finally:
        children.stop()
        children.wait()
    raise typer.Exit(code)


class _Children:
    """The processes of `serve all`."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, kind: str, arguments: list[str]) -> str:
        """Start `serve KIND`, say its ready line, return its URL. Exits with its code where it fails."""
        command = [sys.executable, "-m", "isthmus", "serve", kind, *arguments, "--json"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.processes.append(child)
        assert child.stdout is not None
        line = child.stdout.readline()
        answer: dict[str, Any] = json_module.loads(line) if line else {}
        if "url" not in answer:
            if "error" in answer:
                print_error(answer["error"], as_json=self.as_json)
            raise typer.Exit(abs(child.wait()) or 1)
        announce(kind, as_json=self.as_json)(answer["url"])
        return str(answer["url"])

    def stop(self) -> None:
        """SIGTERM to all that still run: they drain."""
        for child in self.processes:
            if child.poll() is None:
                child.terminate()

    def wait_for_last(self) -> int:
        """Wait for the one started last, without which the others serve nobody; its exit code."""
        return abs(self.processes[-1].wait())

    def wait(self) -> None:
        for child in self.processes:
            child.wait()

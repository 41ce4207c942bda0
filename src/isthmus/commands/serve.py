"""`isthmus serve edge | cloud | all`: long-running processes."""

from __future__ import annotations

import asyncio
import json as json_module
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from isthmus.commands.generate import (
    BitsOption,
    CloudOption,
    CodecOption,
    KeyFileOption,
    RouteOption,
    ShapeOption,
    SplitOption,
    asked_way,
)
from isthmus.commands.output import JsonFlag, ModelOption, out, print_error, print_json, progress_bar
from isthmus.commands.setup import agent_options, provide_pack
from isthmus.config import Settings
from isthmus.protocol.errors import ConfigError

app = typer.Typer(help="Serve the edge agent, the cloud service, or both.", no_args_is_help=True)

HostOption = Annotated[str, typer.Option("--host", help="Address to listen on.", metavar="HOST")]
PortOption = Annotated[
    int, typer.Option("--port", help="0 picks a free one.", min=0, max=65535, metavar="PORT")
]
ParallelOption = Annotated[
    int | None, typer.Option("--parallel", help="Requests served at once.", min=1, metavar="N")
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", help="Compute threads.", min=1, metavar="N")]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Let other machines in without key and TLS.")
]


def announce(kind: str, *, as_json: bool) -> Callable[[str], None]:
    """Prints the one ready line of CONTRACT.md."""

    def say(url: str) -> None:
        if as_json:
            print_json({"ready": kind, "url": url})
        else:
            out.print(f"ready {kind} {url}", soft_wrap=True, markup=False)

    return say


@app.command()
def edge(
    model: ModelOption = None,
    bits: BitsOption = None,
    cloud: CloudOption = None,
    api_key_file: KeyFileOption = None,
    route: RouteOption = None,
    split: SplitOption = None,
    shape: ShapeOption = None,
    codec: CodecOption = None,
    provider: Annotated[
        str | None, typer.Option("--provider", help="cpu, cuda, tensorrt, coreml, …", metavar="NAME")
    ] = None,
    threads: ThreadsOption = None,
    memory_mb: Annotated[
        int | None, typer.Option("--memory-mb", help="Most memory for weights and KV.", min=1, metavar="MB")
    ] = None,
    parallel: ParallelOption = None,
    queue: Annotated[
        int | None, typer.Option("--queue", help="Requests that may wait.", min=0, metavar="N")
    ] = None,
    insecure: InsecureOption = False,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8077,
    json: JsonFlag = False,
) -> None:
    """Serve the agent: OpenAI's API on this machine, over this machine and the cloud."""
    from isthmus.edge.agent import Agent
    from isthmus.edge.api import ServedModel
    from isthmus.edge.chat import ChatTemplate
    from isthmus.edge.guard import check_bind
    from isthmus.edge.server import serve_edge

    settings = Settings(
        {
            "model": model, "bits": bits, "cloud": cloud, "api_key_file": api_key_file, "route": route,
            "split": split, "shape": shape, "codec": codec, "provider": provider, "threads": threads,
            "memory_mb": memory_mb, "parallel": parallel, "queue": queue,
        }
    )  # fmt: skip
    check_bind(host, insecure=insecure)
    pack = provide_pack(settings)
    served = ServedModel(
        name=served_name(settings.text("model") or ""),
        agent=Agent(pack, **agent_options(settings)),
        template=ChatTemplate.from_pack(pack),
        defaults=pack.generation(),
        ask=asked_way(settings),
    )
    ready = announce("edge", as_json=json)
    if not asyncio.run(serve_edge(served, host=host, port=port, insecure=insecure, ready=ready)):
        raise typer.Exit(130)


def served_name(model: str) -> str:
    """What clients call MODEL: its catalog or hub name; for files, the name of the file or folder."""
    from isthmus.splitter.sources import resolve

    path = resolve(model).path
    return model if path is None else path.name.removesuffix(".gguf")


@app.command()
def cloud(
    model: ModelOption = None,
    device: Annotated[
        str | None, typer.Option("--device", help="auto, cpu or cuda.", metavar="DEVICE")
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="auto, fp32, bf16, int8 or int4.", metavar="P")
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Whose turn it is: mlfq or fcfs.", metavar="P")
    ] = None,
    kv_mb: Annotated[
        int | None, typer.Option("--kv-mb", help="Memory for KV pages.", min=1, metavar="MB")
    ] = None,
    threads: ThreadsOption = None,
    api_key_file: Annotated[
        str | None, typer.Option("--api-key-file", help="`label:key`, one a line.", metavar="FILE")
    ] = None,
    tls_cert: Annotated[
        str | None, typer.Option("--tls-cert", help="Certificate chain, PEM.", metavar="FILE")
    ] = None,
    tls_key: Annotated[
        str | None, typer.Option("--tls-key", help="Private key, PEM.", metavar="FILE")
    ] = None,
    insecure: InsecureOption = False,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8078,
    json: JsonFlag = False,
) -> None:
    """Serve the cloud side: the layers in PyTorch, many sessions at once."""
    from isthmus.splitter.sources import pull

    settings = Settings(
        {
            "model": model,
            "device": device,
            "precision": precision,
            "policy": policy,
            "kv_mb": kv_mb,
            "threads": threads,
            "api_key_file": api_key_file,
        }
    )
    try:
        from isthmus.cloud.serve import run_cloud
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ConfigError(
            "the cloud computes in PyTorch, which is not installed here",
            code="no_torch",
            hint="pip install 'isthmus[cloud]'",
        ) from error
    with progress_bar() as progress:
        pull(settings.text("model") or "", progress=progress)
    run_cloud(
        settings.text("model") or "",
        host=host,
        port=port,
        device=settings.text("device") or "auto",
        precision=settings.text("precision") or "auto",
        policy="fcfs" if settings.text("policy") == "fcfs" else "mlfq",
        kv_mb=settings.number("kv_mb"),
        threads=settings.number("threads"),
        api_key_file=settings.text("api_key_file"),
        tls_cert=tls_cert,
        tls_key=tls_key,
        insecure=insecure,
        ready=announce("cloud", as_json=json),
    )


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

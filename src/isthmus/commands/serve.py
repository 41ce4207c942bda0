"""`isthmus serve edge | cloud | all`: long-running processes."""

from __future__ import annotations

import asyncio
import json as json_module
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.commands.generate import asked_way
from isthmus.commands.options import CLOUD, ROUTER, WAY, Flags, with_flags
from isthmus.commands.output import JsonFlag, ModelOption, out, print_error, print_json, progress_bar
from isthmus.commands.prices import PRICES, asked_prices
from isthmus.commands.setup import agent_options, provide_pack, routing_options
from isthmus.config import Settings
from isthmus.protocol.addresses import check_bind
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
TlsCertOption = Annotated[
    Path | None, typer.Option("--tls-cert", help="Certificate chain of this server, PEM.", metavar="FILE")
]
TlsKeyOption = Annotated[
    Path | None, typer.Option("--tls-key", help="Key of that certificate, PEM.", metavar="FILE")
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Let other machines in without key and TLS; warns at each start.")
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
@with_flags(WAY, CLOUD, ROUTER)
def edge(
    flags: Flags,
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
    serve_key_file: Annotated[
        str | None,
        typer.Option(
            "--serve-key-file", help="Who may use the API: `label:key`, one a line.", metavar="FILE"
        ),
    ] = None,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    insecure: InsecureOption = False,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8077,
    json: JsonFlag = False,
) -> None:
    """Serve the agent: OpenAI's API on this machine, over this machine and the cloud."""
    from isthmus.edge.agent import Agent
    from isthmus.edge.api import ServedModel
    from isthmus.edge.chat import ChatTemplate
    from isthmus.edge.server import check_edge, serve_edge

    own: Flags = {
        "provider": provider, "threads": threads, "memory_mb": memory_mb, "parallel": parallel,
        "queue": queue, "serve_key_file": serve_key_file,
    }  # fmt: skip
    settings = Settings(flags | own)
    keys = settings.text("serve_key_file")
    key_file = None if keys is None else Path(keys)
    check_edge(host, key_file=key_file, tls_cert=tls_cert, tls_key=tls_key, insecure=insecure)
    pack = provide_pack(settings)
    served = ServedModel(
        name=served_name(settings.text("model") or ""),
        agent=Agent(pack, routing=routing_options(pack, settings), **agent_options(settings)),
        template=ChatTemplate.from_pack(pack),
        defaults=pack.generation(),
        ask=asked_way(settings),
    )
    serving = serve_edge(
        served,
        host=host,
        port=port,
        key_file=key_file,
        tls_cert=tls_cert,
        tls_key=tls_key,
        insecure=insecure,
        ready=announce("edge", as_json=json),
    )
    if not asyncio.run(serving):
        raise typer.Exit(130)


def served_name(model: str) -> str:
    """What clients call MODEL: its catalog or hub name; for files, the name of the file or folder."""
    from isthmus.splitter.sources import resolve

    path = resolve(model).path
    return model if path is None else path.name.removesuffix(".gguf")


@app.command()
@with_flags(PRICES)
def cloud(
    flags: Flags,
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
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-client-ca", help="Edges must show a certificate of this CA, PEM.", metavar="FILE"
        ),
    ] = None,
    alternative: Annotated[
        str | None, typer.Option("--alternative", help="Where edges go when this drains.", metavar="URL")
    ] = None,
    preemption_notice: Annotated[
        str | None,
        typer.Option(
            "--preemption-notice", help="File or URL that tells of the machine's end.", metavar="SOURCE"
        ),
    ] = None,
    detached_s: Annotated[
        float | None,
        typer.Option("--detached-s", help="How long a lost edge's session is kept.", min=0, metavar="S"),
    ] = None,
    tenant_sessions: Annotated[
        int | None, typer.Option("--tenant-sessions", help="Most sessions of a key.", min=1, metavar="N")
    ] = None,
    tenant_kv_mb: Annotated[
        int | None, typer.Option("--tenant-kv-mb", help="Most KV memory of a key.", min=1, metavar="MB")
    ] = None,
    tenant_tokens_per_s: Annotated[
        float | None,
        typer.Option(
            "--tenant-tokens-per-s", help="Most tokens a second of a key; 0: any.", min=0, metavar="N"
        ),
    ] = None,
    tenant_resumes_per_min: Annotated[
        int | None,
        typer.Option(
            "--tenant-resumes-per-min", help="Most resumes a minute of a key; 0: any.", min=0, metavar="N"
        ),
    ] = None,
    insecure: InsecureOption = False,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8078,
    json: JsonFlag = False,
) -> None:
    """Serve the cloud side: the layers in PyTorch, many sessions at once."""
    from isthmus.splitter.sources import pull

    settings = Settings(
        flags
        | {
            "model": model,
            "device": device,
            "precision": precision,
            "policy": policy,
            "kv_mb": kv_mb,
            "threads": threads,
            "api_key_file": api_key_file,
            "alternative": alternative,
            "preemption_notice": preemption_notice,
            "detached_s": detached_s,
            "tenant_sessions": tenant_sessions,
            "tenant_kv_mb": tenant_kv_mb,
            "tenant_tokens_per_s": tenant_tokens_per_s,
            "tenant_resumes_per_min": tenant_resumes_per_min,
        }
    )
    prices = asked_prices(settings)
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
    # Before gigabytes are fetched; run_cloud asks again, and says what it has to.
    check_bind(
        host, keys=settings.text("api_key_file") is not None, tls=tls_cert is not None, insecure=insecure
    )
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
        tls_client_ca=tls_client_ca,
        insecure=insecure,
        alternative=settings.text("alternative") or "",
        preemption_notice=settings.text("preemption_notice"),
        detached_s=settings.real("detached_s"),
        tenant_sessions=settings.number("tenant_sessions"),
        tenant_kv_mb=settings.number("tenant_kv_mb"),
        tenant_tokens_per_s=settings.real("tenant_tokens_per_s"),
        tenant_resumes_per_min=settings.number("tenant_resumes_per_min"),
        prices=prices,
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

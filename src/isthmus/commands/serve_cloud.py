"""`isthmus serve cloud`: the layers in PyTorch, for many edges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.commands.options import Flags, with_flags
from isthmus.commands.output import JsonFlag, ModelOption, progress_bar
from isthmus.commands.prices import PRICES, asked_prices
from isthmus.commands.running import noted
from isthmus.commands.serve_edge import served_name
from isthmus.commands.serve_shared import (
    LOG,
    HostOption,
    InsecureOption,
    PortOption,
    ThreadsOption,
    TlsCertOption,
    TlsKeyOption,
    announce,
    start_log,
)
from isthmus.config import Settings
from isthmus.protocol.addresses import check_bind
from isthmus.protocol.errors import ConfigError

if TYPE_CHECKING:
    from isthmus.splitter.pack import Pack


@with_flags(PRICES, LOG)
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
    offer_pack: Annotated[
        str | None,
        typer.Option(
            "--offer-pack", help="Let edges fetch the model's blocks: auto, on or off.", metavar="WHEN"
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
            "offer_pack": offer_pack,
        }
    )
    start_log(settings)
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
        pack=offered_pack(settings),
        ready=noted("cloud", served_name(settings.text("model") or ""), announce("cloud", as_json=json)),
    )


def offered_pack(settings: Settings) -> Pack | None:
    """The model's pack for edges that have none; built first where that was asked for, which needs the edge's
    packages. None: nothing is offered."""
    from isthmus.splitter.provide import built_pack, ensure_pack

    model, bits = settings.text("model") or "", settings.text("bits") or "auto"
    asked = settings.text("offer_pack")
    if asked == "off":
        return None
    if asked == "auto":
        return built_pack(model, bits)
    with progress_bar() as progress:
        return ensure_pack(model, bits, progress=progress)

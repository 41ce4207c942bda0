"""`isthmus serve cloud`: from MODEL to a running cloud, and back to exit code 0."""

from __future__ import annotations

import asyncio
import gc
import os
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil
import torch

from isthmus.cloud.admin import admin_remarks
from isthmus.cloud.attention_cuda import varlen_obstacle
from isthmus.cloud.drain import DrainPolicy, check_alternative
from isthmus.cloud.engine import Engine
from isthmus.cloud.graphs import tune_graphs
from isthmus.cloud.hub import Hub
from isthmus.cloud.kv import columns_for
from isthmus.cloud.model import CloudModel, parse_device
from isthmus.cloud.notice import parse_notice
from isthmus.cloud.precision import Choice, choose, decode_seconds, measured_or_known
from isthmus.cloud.profile import kept_or_measured
from isthmus.cloud.scheduler import Policy, SchedulerConfig
from isthmus.cloud.server import CloudServer, bind
from isthmus.cloud.telemetry import Telemetry, get_log
from isthmus.cloud.tls import server_context
from isthmus.cloud.widening import tune_widening
from isthmus.protocol.activations import RowFormat
from isthmus.protocol.addresses import check_bind
from isthmus.protocol.cloud_connection import ServerInfo
from isthmus.protocol.errors import ConfigError
from isthmus.protocol.keys import KeyFile
from isthmus.protocol.limits import Limits
from isthmus.protocol.profiles import Prices
from isthmus.splitter.checkpoint import Checkpoint, open_checkpoint
from isthmus.splitter.manifest import make_identity
from isthmus.splitter.sources import pull
from isthmus.splitter.spec import ModelSpec
from isthmus.splitter.tokenizer import Tokenizer

if TYPE_CHECKING:
    from isthmus.splitter.pack import Pack

MIB: Final = 1024 * 1024
INTERRUPTED: Final = 130
_WHOLE_CONTEXTS: Final = 3  # sessions of full length that the default KV memory holds at K = 0
_MAX_CONTEXT: Final = 32_768
_GRAPH_TOKENS: Final = 64  # rows before the decode steps that CUDA graphs are timed in
# The engine's thread and the event loop hand the interpreter to each other at every step.
_SWITCH_INTERVAL_S: Final = 0.0005


@dataclass(frozen=True, kw_only=True)
class CloudOptions:
    """How to serve one model. `kv_mb` None = what a few full contexts need, a quarter of memory at most."""

    device: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    kv_mb: int | None = None
    scheduler: SchedulerConfig = SchedulerConfig()  # noqa: RUF009 - frozen, safe to share
    limits: Limits = Limits()  # noqa: RUF009 - frozen, safe to share
    keys: KeyFile | None = None
    prices: Prices | None = None


def run_cloud(
    model: str = "smollm2-135m",
    *,
    host: str = "127.0.0.1",
    port: int = 8078,
    device: str = "auto",
    precision: str = "auto",
    policy: Policy = "mlfq",
    threads: int | None = None,
    api_key_file: str | Path | None = None,
    tls_cert: str | Path | None = None,
    tls_key: str | Path | None = None,
    tls_client_ca: str | Path | None = None,
    insecure: bool = False,
    kv_mb: int | None = None,
    drain_s: float = 30.0,
    alternative: str = "",
    preemption_notice: str | None = None,
    notice_deadline_s: float = 25.0,
    detached_s: float | None = None,
    tenant_sessions: int | None = None,
    tenant_kv_mb: int | None = None,
    tenant_tokens_per_s: float | None = None,
    tenant_resumes_per_min: int | None = None,
    prices: Prices | None = None,
    pack: Pack | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serves until SIGTERM (drains, returns) or a second SIGINT (the process ends with 130).

    `alternative`: the URL that draining edges are shown. `preemption_notice`: a file or URL that announces
    the machine's end and leaves `notice_deadline_s`. `detached_s`: how long a session outlives its
    connection. The quotas are per tenant, None = the default of Limits. `prices` are told to edges;
    `pack`, built from this model, is given to those that ask for it.

    `ready` is called once with the URL; by default the ready line of CONTRACT.md is printed. Raises
    ConfigError for what can't be bound or read, and whatever pulling and loading the model raises.
    """
    log = get_log()
    has_keys, has_tls = api_key_file is not None, tls_cert is not None
    if warning := check_bind(host, keys=has_keys, tls=has_tls, insecure=insecure):
        log.warning("insecure", reason=warning)
    ssl_context = _tls(tls_cert, tls_key, tls_client_ca)
    drain_policy = DrainPolicy(
        deadline_s=drain_s,
        alternative=check_alternative(alternative),
        notice=parse_notice(preemption_notice) if preemption_notice else None,
        notice_deadline_s=notice_deadline_s,
    )
    limits = tenant_limits(
        detached_s=detached_s,
        max_sessions_per_tenant=tenant_sessions,
        max_kv_bytes_per_tenant=None if tenant_kv_mb is None else tenant_kv_mb * MIB,
        max_tokens_per_s_per_tenant=tenant_tokens_per_s,
        max_resumes_per_minute_per_tenant=tenant_resumes_per_min,
    )
    keys = KeyFile(Path(api_key_file) if api_key_file else None)
    for remark in (*keys.remarks(), *admin_remarks(keys.ring)):
        log.warning("api_keys", remark=remark)
    # The port first: finding it taken after a minute of loading would be a poor joke.
    with bind(host, port) as listener:
        options = CloudOptions(
            device=device,
            precision=precision,
            threads=threads,
            kv_mb=kv_mb,
            scheduler=SchedulerConfig(policy=policy),
            limits=limits,
            keys=keys,
            prices=prices,
        )
        pulled = pull(model)
        with open_checkpoint(pulled.path) as checkpoint:
            tokenizer = Tokenizer.from_bytes(pulled.tokenizer_json)
            hub_options = prepare(checkpoint, tokenizer, options)
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        gc.collect()
        gc.freeze()  # the weights' objects need not be walked again

        async def serve() -> bool:
            server = CloudServer(
                make_hub(hub_options),
                listener,
                ready=ready or _print_ready,
                policy=drain_policy,
                ssl_context=ssl_context,
                pack=pack_of_model(pack, hub_options.info),
            )
            await server.run_until_stopped()
            return server.force_exit

        if asyncio.run(serve()):
            # The engine's thread may be deep in a step; nothing is worth waiting for any more.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)


def _tls(
    cert: str | Path | None, key: str | Path | None, client_ca: str | Path | None
) -> ssl.SSLContext | None:
    if (cert is None) != (key is None):
        raise ConfigError("--tls-cert and --tls-key go together", code="bad_tls", hint="give both or none")
    if cert is None or key is None:
        if client_ca is not None:
            raise ConfigError(
                "--tls-client-ca without --tls-cert: client certificates need TLS",
                code="bad_tls",
                hint="give --tls-cert and --tls-key too",
            )
        return None
    return server_context(Path(cert), Path(key), Path(client_ca) if client_ca else None)


def tenant_limits(**given: float | None) -> Limits:
    """Limits with those of the `given` fields that are not None. ConfigError for a negative one, and for
    quotas of sessions, KV bytes or resumes below 1: a cloud that serves nobody."""
    asked = {name: value for name, value in given.items() if value is not None}
    for name, value in asked.items():
        least = 0 if name in ("detached_s", "max_tokens_per_s_per_tenant") else 1
        if not least <= value < float("inf"):
            raise ConfigError(f"{name} is {value}, at least {least} is needed", code="bad_limit")
    return replace(Limits(), **asked)  # type: ignore[arg-type]  # names and types are those of the fields


def pack_of_model(pack: Pack | None, info: ServerInfo) -> Pack | None:
    """`pack`, unless it is another model's than the one served: its edges would be turned away."""
    if pack is not None and pack.identity != info.identity:
        get_log().warning("pack_not_offered", pack=str(pack.path), reason="built from other weights")
        return None
    return pack


def _print_ready(url: str) -> None:
    print(f"ready cloud {url}", flush=True)


@dataclass(frozen=True)
class Prepared:
    """Everything slow is done: the model is loaded, its precision chosen."""

    model: CloudModel
    choice: Choice
    info: ServerInfo
    options: CloudOptions
    num_pages: int


def prepare(checkpoint: Checkpoint, tokenizer: Tokenizer, options: CloudOptions) -> Prepared:
    """Chooses the precision, loads the model, sizes the KV pool. Logs what was chosen and why."""
    log = get_log()
    if options.threads is not None:
        if options.threads < 1:
            raise ConfigError(f"{options.threads} threads asked, at least 1 is needed", code="bad_threads")
        torch.set_num_threads(options.threads)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    parse_device(device)
    spec = checkpoint.spec
    asked = _known_precision(options.precision)
    choice = choose(
        asked, measured_or_known(checkpoint, tokenizer, asked, device=device), device=device
    )  # fmt: skip
    begun = time.perf_counter()
    model = CloudModel.load(checkpoint, device=device, precision=choice.precision.value)
    load_s = time.perf_counter() - begun
    wide_rows = tune_widening(model.linears, model.device)
    on_cuda = model.device.type == "cuda"
    graphs = tune_graphs(model, partial(decode_seconds, model, [0] * _GRAPH_TOKENS)) if on_cuda else None
    num_pages = kv_pages(model, spec, options.kv_mb)
    obstacle = varlen_obstacle(model.device, model.precision.compute_dtype, spec.head_dim)
    log.info(
        "model_loaded",
        model=spec.base_name,
        device=device,
        precision=choice.precision.value,
        reason=choice.reason,
        kl=choice.kl,
        remarks=model.remarks,
        wide_rows=wide_rows,
        graphs=graphs,
        attention="varlen_attn" if obstacle is None else f"gathered pages: {obstacle}",
        policy=options.scheduler.policy,
        kv_pages=num_pages,
        kv_mb=num_pages * model.page_bytes // MIB,
        threads=torch.get_num_threads(),
    )
    context_length = min(spec.context_length, _MAX_CONTEXT)
    try:
        profile = kept_or_measured(
            model,
            source_hash=checkpoint.source_hash,
            num_pages=num_pages,
            context_length=context_length,
            load_s=load_s,
            kl=choice.kl.get(choice.precision.value),
        )
    except Exception as error:
        # Edges can do without, and learn from what they see.
        log.warning("not_profiled", exc_info=error)
        profile = None
    info = ServerInfo(
        identity=make_identity(spec, tokenizer.canonical_hash, checkpoint.source_hash),
        cloud_precision=choice.precision.value,
        num_layers=spec.num_layers,
        hidden=spec.hidden,
        vocab_size=spec.vocab_size,
        context_length=context_length,
        row_formats=tuple(format_.value for format_ in RowFormat),
        kv_bytes_per_token_layer=model.page_bytes // 16,
        server="isthmus",
        kl=choice.kl,
        profile=profile,
        prices=options.prices,
    )
    return Prepared(model, choice, info, options, num_pages)


def _known_precision(name: str) -> str:
    from isthmus.cloud.linear import parse_precision

    return name if name == "auto" else parse_precision(name).value


def kv_pages(model: CloudModel, spec: ModelSpec, kv_mb: int | None) -> int:
    """Pages of the pool. ConfigError if `kv_mb` does not hold one page column of the whole model."""
    least = spec.num_layers
    if kv_mb is not None:
        pages = kv_mb * MIB // model.page_bytes
        if pages < least:
            raise ConfigError(
                f"{kv_mb} MiB of KV memory hold {pages} pages, 16 tokens alone need {least}", code="bad_kv_mb"
            )
        return pages
    wanted = _WHOLE_CONTEXTS * columns_for(min(spec.context_length, _MAX_CONTEXT)) * spec.num_layers
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0] * 8 // 10
    else:
        free = psutil.virtual_memory().available // 4
    return max(least, min(wanted, free // model.page_bytes))


def make_hub(prepared: Prepared) -> Hub:
    """The engine and what its connections share. On the event loop."""
    options, model = prepared.options, prepared.model
    log = get_log()
    telemetry = Telemetry()

    def report(error: BaseException) -> None:
        log.error("engine_bug", exc_info=error)

    engine = Engine.over(
        model, prepared.num_pages, options.scheduler, on_step=telemetry.on_step, on_bug=report
    )
    telemetry.watch(engine)
    limits = replace(options.limits, max_tokens_per_session=prepared.info.context_length)
    return Hub(
        engine,
        prepared.info,
        limits,
        telemetry,
        options.keys or KeyFile(None),
        chunk_rows=options.scheduler.max_chunk_rows,
    )

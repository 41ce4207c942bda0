"""`isthmus serve edge`: the agent behind OpenAI's API."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.commands.generate import asked_way
from isthmus.commands.options import CLOUD, ROUTER, WAY, Flags, with_flags
from isthmus.commands.output import JsonFlag
from isthmus.commands.running import noted
from isthmus.commands.serve_shared import (
    LOG,
    HostOption,
    InsecureOption,
    ParallelOption,
    PortOption,
    ThreadsOption,
    TlsCertOption,
    TlsKeyOption,
    announce,
    start_log,
)
from isthmus.commands.setup import agent_options, provide_pack, routing_options
from isthmus.config import Settings, data_path

if TYPE_CHECKING:
    from isthmus.edge.conversations_store import ConversationStore
    from isthmus.splitter.pack import Pack


@with_flags(WAY, CLOUD, ROUTER, LOG)
def edge(
    flags: Flags,
    provider: Annotated[
        str | None, typer.Option("--provider", help="cpu, cuda, tensorrt, coreml, …", metavar="NAME")
    ] = None,
    threads: ThreadsOption = None,
    memory_mb: Annotated[
        int | None, typer.Option("--memory-mb", help="Most memory for weights and KV.", min=1, metavar="MB")
    ] = None,
    cache_mb: Annotated[
        int | None,
        typer.Option(
            "--cache-mb", help="Memory for the KV of conversations that may go on.", min=0, metavar="MB"
        ),
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
    conversations: Annotated[
        str | None,
        typer.Option(
            "--conversations", help="Keep the web chat's conversations on this device.", metavar="on|off"
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
        "provider": provider, "threads": threads, "memory_mb": memory_mb, "cache_mb": cache_mb,
        "parallel": parallel, "queue": queue, "serve_key_file": serve_key_file,
        "conversations": conversations,
    }  # fmt: skip
    settings = Settings(flags | own)
    start_log(settings)
    keys = settings.text("serve_key_file")
    key_file = None if keys is None else Path(keys)
    check_edge(host, key_file=key_file, tls_cert=tls_cert, tls_key=tls_key, insecure=insecure)
    pack = provide_pack(settings)
    served = ServedModel(
        name=served_name(settings.text("model") or "", pack),
        agent=Agent(pack, routing=routing_options(pack, settings), **agent_options(settings)),
        template=ChatTemplate.from_pack(pack),
        defaults=pack.generation(),
        ask=asked_way(settings),
        conversations=kept_conversations(settings),
    )
    serving = serve_edge(
        served,
        host=host,
        port=port,
        key_file=key_file,
        tls_cert=tls_cert,
        tls_key=tls_key,
        insecure=insecure,
        ready=noted("edge", served.name, announce("edge", as_json=json)),
    )
    if not asyncio.run(serving):
        raise typer.Exit(130)


def kept_conversations(settings: Settings) -> ConversationStore | None:
    """Where the web chat's conversations are kept; None: nowhere."""
    from isthmus.edge.conversations_store import ConversationStore

    off = settings.text("conversations") == "off"
    return None if off else ConversationStore(data_path(settings.env) / "conversations.db")


def served_name(model: str, pack: Pack | None = None) -> str:
    """What clients call MODEL: its catalog or hub name; for files, the name of the file or folder; for a pack
    from a cloud, the name in it."""
    from isthmus.splitter.sources import resolve

    if pack is not None and pack.fetched is not None:
        return pack.identity.base_name
    path = resolve(model).path
    return model if path is None else path.name.removesuffix(".gguf")

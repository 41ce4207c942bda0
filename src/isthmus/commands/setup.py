"""From settings to a running agent: what `run`, `chat`, `serve edge` and the benches have in common."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus.commands.output import progress_bar
from isthmus.config import Settings
from isthmus.protocol.errors import ConfigError

if TYPE_CHECKING:
    from isthmus.edge.agent import Agent
    from isthmus.splitter.pack import Pack


def read_api_key(settings: Settings) -> str | None:
    """The edge's key: the file named by api_key_file (one key), or api_key."""
    path = settings.text("api_key_file")
    if path is None:
        return settings.text("api_key")
    try:
        key = Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"cannot read the key file {path}: {error.strerror}") from error
    if not key or "\n" in key:
        raise ConfigError(
            f"{path} does not hold exactly one key", hint="on the edge the file is one line: the key"
        )
    return key


def provide_pack(settings: Settings) -> Pack:
    """The pack of the chosen model, pulled and built first if it is not there yet (progress on stderr)."""
    from isthmus.splitter.provide import ensure_pack

    with progress_bar() as progress:
        return ensure_pack(
            settings.text("model") or "", bits=settings.text("bits") or "auto", progress=progress
        )


def agent_options(settings: Settings) -> dict[str, Any]:
    """Constructor arguments of `Agent`, from settings."""
    from isthmus.edge.recovery import RecoveryConfig

    budget_s, history_mb = settings.real("reconnect_s"), settings.number("history_mb")
    assert budget_s is not None  # both have defaults
    assert history_mb is not None
    return {
        "cloud_urls": tuple(settings.texts("cloud")),
        "api_key": read_api_key(settings),
        "parallel": settings.number("parallel"),
        "queue": settings.number("queue"),
        "provider": settings.text("provider"),
        "threads": settings.number("threads"),
        "memory_mb": settings.number("memory_mb"),
        "min_depth": settings.number("min_depth"),
        "history_mb": history_mb,
        "recovery": RecoveryConfig(budget_s=budget_s),
        "ssl_context": _tls_context(settings),
    }


def _tls_context(settings: Settings) -> ssl.SSLContext | None:
    """How clouds are to be trusted; None where nothing was said: the system's certificates, no own one."""
    from isthmus.edge.tls import client_context

    files = [settings.text(name) for name in ("tls_ca", "tls_client_cert", "tls_client_key")]
    return client_context(*files) if any(files) else None


@asynccontextmanager
async def running_agent(pack: Pack, settings: Settings) -> AsyncIterator[Agent]:
    """An agent for this process, closed at the end."""
    from isthmus.edge.agent import Agent

    agent = Agent(pack, **agent_options(settings))
    await agent.start()
    try:
        yield agent
    finally:
        await agent.aclose()

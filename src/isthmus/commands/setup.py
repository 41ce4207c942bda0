"""From settings to a running agent: what `run`, `chat`, `serve edge` and the benches have in common."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus.commands.output import progress_bar
from isthmus.commands.prices import asked_prices
from isthmus.commands.pull_from_cloud import pull_pack
from isthmus.config import Settings
from isthmus.protocol.errors import ConfigError

if TYPE_CHECKING:
    from isthmus.edge.agent import Agent
    from isthmus.edge.policy import DeviceState
    from isthmus.edge.routing import RoutingOptions
    from isthmus.protocol.profiles import DeviceProfile
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
    """The pack of the chosen model, pulled and built first if it is not there yet; or the cloud's, where that
    was asked for (progress on stderr)."""
    from isthmus.splitter.provide import ensure_pack

    if settings.text("pull_from_cloud") == "on":
        return pull_pack(settings, read_api_key(settings), _tls_context(settings))
    with progress_bar() as progress:
        return ensure_pack(
            settings.text("model") or "", bits=settings.text("bits") or "auto", progress=progress
        )


def agent_options(settings: Settings) -> dict[str, Any]:
    """Constructor arguments of `Agent`, from settings; `routing_options` is apart, since it may measure."""
    from isthmus.edge.recovery import RecoveryConfig

    return {
        "cloud_urls": tuple(settings.texts("cloud")),
        "api_key": read_api_key(settings),
        "parallel": settings.number("parallel"),
        "queue": settings.number("queue"),
        "provider": settings.text("provider"),
        "threads": settings.number("threads"),
        "memory_mb": settings.number("memory_mb"),
        "min_depth": settings.number("min_depth"),
        "cache_mb": settings.number("cache_mb"),
        "history_mb": settings.number("history_mb"),
        "recovery": RecoveryConfig(budget_s=_real(settings, "reconnect_s")),
        "ssl_context": _tls_context(settings),
    }


def routing_options(pack: Pack, settings: Settings) -> RoutingOptions:
    """What the router predicts from and how it weighs, from settings; measures this device if need be."""
    from isthmus.edge.decision_log import DecisionLog
    from isthmus.edge.policy import Policy
    from isthmus.edge.radio import radio
    from isthmus.edge.routing import RoutingOptions

    log = settings.text("decision_log")
    return RoutingOptions(
        profile=edge_profile(pack, settings),
        policy=Policy(
            usd_per_s=_real(settings, "value_of_time_usd_per_h") / 3600,
            usd_per_j=_real(settings, "usd_per_kj_low_battery") / 1000,
            slo_miss_usd=_real(settings, "slo_miss_usd"),
            usd_per_nat=_real(settings, "quality_usd_per_nat"),
            hysteresis=_real(settings, "hysteresis"),
        ),
        prices=asked_prices(settings),
        radio=radio(settings.text("radio") or "none", usd_per_gb=_real(settings, "data_usd_per_gb")),
        budget_usd=settings.real("budget_usd"),
        decision_log=None if log is None else DecisionLog(Path(log).expanduser()),
        device_state=_battery,
    )


def _battery() -> DeviceState:
    from isthmus.edge.policy import DeviceState
    from isthmus.splitter.power import battery_state

    state = battery_state()
    return DeviceState(state.share, state.plugged)


def _real(settings: Settings, name: str) -> float:
    """A number that has a default."""
    value = settings.real(name)
    assert value is not None
    return value


def edge_profile(pack: Pack, settings: Settings) -> DeviceProfile | None:
    """What this device can do with `pack`, where there is a cloud to weigh it against or a memory limit to
    keep: measured once (said on stderr), a file, or an example. None: the router keeps to its simple rule, as
    it does where some blocks are not here to be measured. ConfigError, NotFoundError."""
    from isthmus.splitter import profile_store

    asked = settings.text("profile") or "auto"
    needed = settings.texts("cloud") or settings.number("memory_mb") is not None
    if asked == "none" or not needed or (asked == "auto" and not pack.is_whole):
        return None
    watts = declared_watts(settings)
    if asked == "auto":
        with progress_bar() as progress:
            return profile_store.edge_profile(
                pack,
                provider=settings.text("provider") or "cpu",
                threads=settings.number("threads"),
                memory_mb=settings.real("memory_mb"),
                watts=watts,
                progress=progress,
            )
    named = asked in profile_store.EXAMPLES
    profile = profile_store.example(asked) if named else profile_store.load_profile(Path(asked).expanduser())
    if (profile.side, profile.num_layers) != ("edge", pack.spec.num_layers):
        raise ConfigError(
            f"the profile {asked} is of {profile.num_layers} layers on the {profile.side} side, "
            f"the model here has {pack.spec.num_layers} on the edge",
            code="bad_profile",
            hint="make one for this model with `isthmus profile`",
        )
    return profile_store.with_watts(profile, watts)


def declared_watts(settings: Settings) -> tuple[float, float] | None:
    """Declared power of this device, (idle, active); ConfigError where only one of them is given."""
    idle, active = settings.real("idle_watts"), settings.real("active_watts")
    if idle is not None and active is not None:
        return idle, active
    if idle is None and active is None:
        return None
    raise ConfigError("idle_watts and active_watts go together", hint="set both, or neither")


def _tls_context(settings: Settings) -> ssl.SSLContext | None:
    """How clouds are to be trusted; None where nothing was said: the system's certificates, no own one."""
    from isthmus.edge.tls import client_context

    files = [settings.text(name) for name in ("tls_ca", "tls_client_cert", "tls_client_key")]
    return client_context(*files) if any(files) else None


@asynccontextmanager
async def running_agent(pack: Pack, settings: Settings) -> AsyncIterator[Agent]:
    """An agent for this process, closed at the end."""
    from isthmus.edge.agent import Agent

    agent = Agent(pack, routing=routing_options(pack, settings), **agent_options(settings))
    await agent.start()
    try:
        yield agent
    finally:
        await agent.aclose()

"""What a plan stands on: profiles of this edge and of a cloud, or from files, and the link between them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.commands.output import progress_bar
from isthmus.commands.prices import asked_prices
from isthmus.commands.setup import agent_options, declared_watts, provide_pack
from isthmus.config import Settings
from isthmus.protocol.errors import ConfigError

if TYPE_CHECKING:
    from isthmus.protocol.profiles import DeviceProfile
    from isthmus.splitter.links import LinkView
    from isthmus.splitter.pack import Pack
    from isthmus.splitter.situation import World

KV_DTYPE_BYTES = 4


@dataclass(frozen=True)
class Ground:
    """What is planned on. `context`, `cloud_context`: most tokens of the model and of a session in the cloud,
    None where unknown."""

    world: World
    context: int | None
    cloud_context: int | None


def offline(
    settings: Settings, edge: DeviceProfile | None, cloud: DeviceProfile | None, link: LinkView | None
) -> Ground:
    """From files and flags. A pack is needed where this device is the edge, or the profile tells no KV."""
    from isthmus.splitter.links import LinkView

    pack = provide_pack(settings) if edge is None or edge.kv_bytes is None else None
    context = None if pack is None else pack.spec.context_length
    return Ground(_world(settings, pack, edge, cloud, link or LinkView()), context, None)


def live(settings: Settings, edge: DeviceProfile | None, url: str) -> Ground:
    """From a cloud that answers. Raises what `ask_cloud` does."""
    from isthmus.edge.inquiry import ask_cloud

    pack = provide_pack(settings)
    this = edge or _this_edge(settings, pack)  # measured before the link is: it would disturb the probe
    options = agent_options(settings)
    key, trust = options["api_key"], options["ssl_context"]
    told = asyncio.run(ask_cloud(pack, url, api_key=key, ssl_context=trust))
    world = _world(settings, pack, this, told.profile, told.link)
    prices = asked_prices(settings) or told.prices or world.prices
    return Ground(
        replace(world, cloud_state=told.state, prices=prices), pack.spec.context_length, told.context
    )


def _world(
    settings: Settings,
    pack: Pack | None,
    edge: DeviceProfile | None,
    cloud: DeviceProfile | None,
    link: LinkView,
) -> World:
    from isthmus.edge.radio import radio
    from isthmus.protocol.profiles import Prices
    from isthmus.splitter.profile_store import with_watts
    from isthmus.splitter.situation import Wire, World

    if edge is None:
        assert pack is not None
        edge = _this_edge(settings, pack)
    if cloud is not None and (edge.num_layers, edge.hidden) != (cloud.num_layers, cloud.hidden):
        raise ConfigError(
            f"the edge's profile is of {edge.model} ({edge.num_layers} layers of {edge.hidden}), the cloud's "
            f"of {cloud.model} ({cloud.num_layers} layers of {cloud.hidden})",
            code="profile_mismatch",
            hint="both have to be of one model",
        )
    kv_bytes = edge.kv_bytes
    if kv_bytes is None:
        assert pack is not None
        if (edge.num_layers, edge.hidden) != (pack.spec.num_layers, pack.spec.hidden):
            raise ConfigError(
                f"the edge's profile is of {edge.num_layers} layers of {edge.hidden}, the model has "
                f"{pack.spec.num_layers} of {pack.spec.hidden}",
                code="profile_mismatch",
                hint="name the model of the profile with --model",
            )
        kv_bytes = pack.spec.kv_bytes_per_token_layer(KV_DTYPE_BYTES)
    codec = settings.text("codec") or ("f32" if edge.precision == "f32" else "int8o")
    return World(
        edge=with_watts(edge, declared_watts(settings)),
        cloud=cloud,
        link=link,
        wire=Wire.of(edge.hidden, codec),
        kv_bytes=kv_bytes,
        prices=asked_prices(settings) or Prices(),
        radio=radio(settings.text("radio") or "none", usd_per_gb=settings.real("data_usd_per_gb") or 0.0),
    )


def _this_edge(settings: Settings, pack: Pack) -> DeviceProfile:
    """This machine's profile: the kept one, or measured now (said on stderr)."""
    from isthmus.splitter.profile_store import edge_profile

    with progress_bar() as progress:
        return edge_profile(
            pack,
            provider=settings.text("provider") or "cpu",
            threads=settings.number("threads"),
            progress=progress,
        )


def named_profile(name: str, side: str) -> DeviceProfile:
    """A profile by its file or its example's name, for this side."""
    from isthmus.splitter import profile_store

    known = name in profile_store.EXAMPLES
    profile = profile_store.example(name) if known else profile_store.load_profile(Path(name).expanduser())
    if profile.side != side:
        raise ConfigError(
            f"--{side}-profile {name} is of the {profile.side} side", code="profile_mismatch",
            hint="the cloud's comes from its WELCOME, the edge's from `isthmus profile`",
        )  # fmt: skip
    return profile


def stated_link(rtt_ms: float | None, up_mbps: float | None, down_mbps: float | None) -> LinkView:
    """The link as the flags have it."""
    from isthmus.splitter.links import LinkView

    values = {"--rtt-ms": rtt_ms or 0.0, "--up-mbps": up_mbps or 0.0, "--down-mbps": down_mbps or 0.0}
    for flag, value in values.items():
        if not isfinite(value):
            raise ConfigError(f"{flag} {value}", hint="a number; 0 for no limit")
    bits = 1e6 / 8
    return LinkView.given(
        rtt_s=values["--rtt-ms"] / 1000,
        up_bytes_per_s=values["--up-mbps"] * bits,
        down_bytes_per_s=values["--down-mbps"] * bits,
    )

"""`isthmus plan`: where to cut a model for a kind of request, on this device or on profiles from files."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from isthmus.commands.options import (
    BitsOption,
    CodecOption,
    Flags,
    KeyFileOption,
    ShapeOption,
    TlsCaOption,
    TlsClientCertOption,
    TlsClientKeyOption,
    with_flags,
)
from isthmus.commands.output import JsonFlag, ModelOption, out, print_json
from isthmus.commands.plan_ground import Ground, live, named_profile, offline, stated_link
from isthmus.commands.prices import PRICES
from isthmus.config import Settings
from isthmus.protocol.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from isthmus.protocol.profiles import DeviceProfile
    from isthmus.splitter.links import Estimate
    from isthmus.splitter.planner import Objective, PlanRequest
    from isthmus.splitter.situation import World


SETTINGS: Mapping[str, Any] = {
    "model": ModelOption,
    "bits": BitsOption,
    "shape": ShapeOption,
    "codec": CodecOption,
    "provider": Annotated[
        str | None, typer.Option("--provider", help="ONNX Runtime's execution provider.", metavar="NAME")
    ],
    "threads": Annotated[
        int | None, typer.Option("--threads", help="Compute threads of the edge.", min=1, metavar="N")
    ],
    "api_key_file": KeyFileOption,
    "tls_ca": TlsCaOption,
    "tls_client_cert": TlsClientCertOption,
    "tls_client_key": TlsClientKeyOption,
    "idle_watts": Annotated[
        float | None, typer.Option("--idle-watts", help="Power of the edge at rest.", min=0, metavar="W")
    ],
    "active_watts": Annotated[
        float | None,
        typer.Option("--active-watts", help="Power of the edge when computing.", min=0, metavar="W"),
    ],
    "radio": Annotated[
        str | None, typer.Option("--radio", help="none, wifi or lte: joules per byte.", metavar="RADIO")
    ],
}


@with_flags(SETTINGS, PRICES)
def plan(
    flags: Flags,
    cloud: Annotated[
        str | None,
        typer.Option("--cloud", help="Plan with this cloud; the link is measured.", metavar="URL"),
    ] = None,
    edge_profile: Annotated[
        str | None,
        typer.Option(
            "--edge-profile", help="Another edge than this: a file, or an example's name.", metavar="FILE"
        ),
    ] = None,
    cloud_profile: Annotated[
        str | None,
        typer.Option("--cloud-profile", help="A cloud: a file, or an example's name.", metavar="FILE"),
    ] = None,
    rtt_ms: Annotated[
        float | None, typer.Option("--rtt-ms", help="Its round trip.", min=0, metavar="MS")
    ] = None,
    up_mbps: Annotated[
        float | None,
        typer.Option("--up-mbps", help="Bandwidth to it; 0 = no limit.", min=0, metavar="MBIT/S"),
    ] = None,
    down_mbps: Annotated[
        float | None,
        typer.Option("--down-mbps", help="Bandwidth from it; 0 = no limit.", min=0, metavar="MBIT/S"),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer.")] = 128,
    context: Annotated[
        int, typer.Option(min=0, help="Tokens that the edge must have memory for, if more than these.")
    ] = 0,
    edge_memory_mb: Annotated[
        float | None,
        typer.Option(
            "--edge-memory-mb", help="Most memory the model may add to an idle edge.", min=0, metavar="MB"
        ),
    ] = None,
    min_depth: Annotated[
        int, typer.Option(min=0, help="Fewest layers on the edge; from 1 on, nothing is offloaded.")
    ] = 0,
    objective: Annotated[
        str, typer.Option(help="latency, throughput, energy, money or weighted (as the router weighs).")
    ] = "latency",
    slo_ttft_ms: Annotated[
        float | None, typer.Option("--slo-ttft-ms", help="The first token within this.", metavar="MS")
    ] = None,
    slo_tokens_per_s: Annotated[
        float | None, typer.Option("--slo-tokens-per-s", help="At least this fast.", metavar="N")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw time against K there (.png, .svg or .pdf).", metavar="FILE"),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """The best number of layers on the edge for a kind of request, with every other way beside it.

    With --cloud the cloud tells its profile and its prices, and the link is measured; with --cloud-profile
    they are what the flags say. Both are taken as connected and warm. The edge is this machine (measured
    once), or --edge-profile. With neither cloud, only the local route remains.
    """
    from isthmus.splitter.planner import MIB
    from isthmus.splitter.planner import plan as best_plan

    settings = Settings(flags)
    _check_flags(cloud, cloud_profile, {"--rtt-ms": rtt_ms, "--up-mbps": up_mbps, "--down-mbps": down_mbps})
    if plot is not None:
        from isthmus.commands.plan_plot import check_plot

        check_plot(plot)
    asked = {
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "context_tokens": context,
        "edge_memory_bytes": None if edge_memory_mb is None else int(edge_memory_mb * MIB),
        "min_depth": min_depth,
        "shape": settings.text("shape") or "prefix",
        "slo_ttft_s": _positive("--slo-ttft-ms", slo_ttft_ms, 1e-3),
        "slo_tokens_per_s": _positive("--slo-tokens-per-s", slo_tokens_per_s),
        "objective": _objective(objective),
    }
    edge = None if edge_profile is None else named_profile(edge_profile, "edge")
    if cloud_profile is not None:
        link = stated_link(rtt_ms, up_mbps, down_mbps)
        ground = offline(settings, edge, named_profile(cloud_profile, "cloud"), link)
    elif url := cloud or next(iter(settings.texts("cloud")), None):
        ground = live(settings, edge, url)
    else:
        ground = offline(settings, edge, None, None)
    request = _request(asked, settings, ground)
    answer = best_plan(ground.world, request)
    answer.require()
    if plot is not None:
        from isthmus.commands.plan_plot import save_plot

        save_plot(plot, answer, ground.world)
    if json:
        told = {"best": answer.best, "candidates": answer.candidates}
        told = {name: _dicts(value) for name, value in told.items()}
        print_json({**told, "reason": answer.reason, **_basis(ground.world, request)})
        return
    from isthmus.commands.plan_table import plan_notes, plan_table

    out.print(plan_table(answer, ground.world))
    for note in plan_notes(answer):
        out.print(f"· {note}", markup=False)


# ---- what is asked -----------------------------------------------------------------------------------


def _check_flags(cloud: str | None, cloud_profile: str | None, stated: Mapping[str, float | None]) -> None:
    """What would not be honoured is not taken silently."""
    given = [name for name, value in stated.items() if value is not None]
    if cloud is not None and cloud_profile is not None:
        raise ConfigError("--cloud and --cloud-profile exclude each other", hint="a cloud tells its own")
    if given and cloud_profile is None:
        raise ConfigError(
            f"{', '.join(given)}: no meaning without --cloud-profile",
            hint="the link to a --cloud is measured",
        )
    if cloud_profile is not None and stated["--rtt-ms"] is None:
        raise ConfigError("--cloud-profile without --rtt-ms", hint="say how far away it is")


def _positive(flag: str, value: float | None, unit: float = 1.0) -> float | None:
    if value is not None and not (isfinite(value) and value > 0):
        raise ConfigError(f"{flag} {value:g}", code="bad_slo", hint="more than 0")
    return None if value is None else value * unit


def _objective(name: str) -> Objective:
    from isthmus.splitter.planner import Objective

    found = next((known for known in get_args(Objective) if known == name), None)
    if found is None:
        raise ConfigError(f"--objective {name}", hint=f"one of {', '.join(get_args(Objective))}")
    chosen: Objective = found
    return chosen


def _request(asked: dict[str, Any], settings: Settings, ground: Ground) -> PlanRequest:
    from isthmus.splitter.planner import PlanRequest, Weights

    weights = Weights(
        usd_per_s=(settings.real("value_of_time_usd_per_h") or 0.0) / 3600,
        usd_per_j=(settings.real("usd_per_kj_low_battery") or 0.0) / 1000,
    )
    request = PlanRequest(**asked, weights=weights, cloud_context=ground.cloud_context)
    if ground.context is not None and request.tokens > ground.context:
        raise RequestError(
            f"{request.tokens} tokens are asked for, the model's context is {ground.context}",
            code="context_overflow",
            hint="fewer --prompt-tokens, --output-tokens or --context",
        )
    return request


# ---- as JSON -----------------------------------------------------------------------------------------


def _dicts(value: Any) -> Any:
    return [way.to_dict() for way in value] if isinstance(value, tuple) else value.to_dict()


def _basis(world: World, request: PlanRequest) -> dict[str, Any]:
    """What the plan rests on. A bandwidth without limit, or not measured, is null."""
    link = world.link

    def told(estimate: Estimate | None) -> dict[str, Any] | None:
        if estimate is None or not isfinite(estimate.value):
            return None
        return {"value": estimate.value, "deviation": estimate.deviation, "age_s": estimate.age_s,
                "source": estimate.source}  # fmt: skip

    def device(profile: DeviceProfile | None) -> dict[str, Any] | None:
        if profile is None:
            return None
        names = ("device", "provider", "model", "precision", "dated", "labels", "note")
        return {name: getattr(profile, name) for name in names}

    return {
        "objective": request.objective,
        "link": {
            "rtt_s": told(link.rtt),
            "up_bytes_per_s": told(link.up),
            "down_bytes_per_s": told(link.down),
        },
        "edge": device(world.edge),
        "cloud": device(world.cloud),
        "prices": world.prices.model_dump(),
    }

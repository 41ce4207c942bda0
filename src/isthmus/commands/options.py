"""Options commands share: model and way, clouds, what the router weighs; each named as its setting."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from isthmus.commands.output import ModelOption

Flags = dict[str, object]
"""Settings given as flags, None where not given: what `Settings` takes."""

BitsOption = Annotated[
    str | None, typer.Option("--bits", help="Weights of the pack: auto, 4, 8 or 32.", metavar="BITS")
]
RouteOption = Annotated[
    str | None, typer.Option("--route", help="auto, local, split or offload.", metavar="ROUTE")
]
SplitOption = Annotated[
    int | None, typer.Option("--split", help="Number of layers on the edge.", metavar="K")
]
ShapeOption = Annotated[
    str | None,
    typer.Option(
        "--shape", help="Who samples in a split: the cloud (prefix) or the edge (u).", metavar="SHAPE"
    ),
]
CodecOption = Annotated[
    str | None,
    typer.Option("--codec", help="Boundary rows on the wire: f32, bf16 or int8o.", metavar="CODEC"),
]
MaxTokensOption = Annotated[
    int | None, typer.Option("--max-tokens", help="Most tokens to generate.", min=1, metavar="N")
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        help="0 = greedy. Default: the model's own advice, greedy where it has none.",
        min=0,
        metavar="T",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", help="Seed of the sampler; drawn at random by default.", min=0, metavar="S"),
]

CloudOption = Annotated[
    list[str] | None, typer.Option("--cloud", help="ws:// or wss:// URL; may be repeated.", metavar="URL")
]
PullFromCloudOption = Annotated[
    bool | None,
    typer.Option(
        "--pull-from-cloud/--no-pull-from-cloud",
        help="Fetch the model's blocks from the cloud; with --split only those of its layers.",
    ),
]
KeyFileOption = Annotated[
    str | None, typer.Option("--api-key-file", help="File with the key for the cloud.", metavar="FILE")
]
TlsCaOption = Annotated[
    str | None,
    typer.Option("--tls-ca", help="Only certificates to trust for clouds, PEM: own CA.", metavar="FILE"),
]
TlsClientCertOption = Annotated[
    str | None, typer.Option("--tls-client-cert", help="Certificate shown to clouds, PEM.", metavar="FILE")
]
TlsClientKeyOption = Annotated[
    str | None, typer.Option("--tls-client-key", help="Key of that certificate, PEM.", metavar="FILE")
]
FallbackOption = Annotated[
    str | None,
    typer.Option(
        "--fallback",
        help="Where a request may go on whose cloud is lost: any (another cloud or here), cloud, none.",
        metavar="WHERE",
    ),
]
ReconnectOption = Annotated[
    float | None,
    typer.Option("--reconnect-s", help="Seconds to try to reach a lost cloud again.", min=0, metavar="S"),
]
HistoryOption = Annotated[
    int | None,
    typer.Option("--history-mb", help="Memory for sent rows, kept for a lost cloud.", min=0, metavar="MB"),
]
SloTtftOption = Annotated[
    float | None,
    typer.Option(
        "--slo-ttft", "--slo-ttft-s", help="Seconds in which the first token should come.", metavar="S"
    ),
]
SloTokensOption = Annotated[
    float | None,
    typer.Option("--slo-tokens-per-s", help="How fast the tokens after it should come.", metavar="N"),
]
MaxCostOption = Annotated[
    float | None,
    typer.Option("--max-cost-usd", help="What one request may cost at most.", metavar="USD"),
]
BudgetOption = Annotated[
    float | None,
    typer.Option("--budget-usd", help="What all requests of this process may cost.", metavar="USD"),
]
DecisionLogOption = Annotated[
    str | None,
    typer.Option("--decision-log", help="Write every decision here, without content.", metavar="FILE"),
]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        help="What this device can do: a file, an example's name, auto (measured once) or none.",
        metavar="PROFILE",
    ),
]

WAY: Mapping[str, Any] = {
    "model": ModelOption,
    "bits": BitsOption,
    "route": RouteOption,
    "split": SplitOption,
    "shape": ShapeOption,
    "codec": CodecOption,
}
CLOUD: Mapping[str, Any] = {
    "cloud": CloudOption,
    "pull_from_cloud": PullFromCloudOption,
    "api_key_file": KeyFileOption,
    "tls_ca": TlsCaOption,
    "tls_client_cert": TlsClientCertOption,
    "tls_client_key": TlsClientKeyOption,
    "fallback": FallbackOption,
    "reconnect_s": ReconnectOption,
    "history_mb": HistoryOption,
}
ROUTER: Mapping[str, Any] = {
    "slo_ttft_s": SloTtftOption,
    "slo_tokens_per_s": SloTokensOption,
    "max_cost_usd": MaxCostOption,
    "budget_usd": BudgetOption,
    "decision_log": DecisionLogOption,
    "profile": ProfileOption,
}
ANSWER: Mapping[str, Any] = {"max_tokens": MaxTokensOption, "temperature": TemperatureOption}


def _said(value: object) -> object:
    """A switch as its setting says it."""
    return ("on" if value else "off") if isinstance(value, bool) else value


def with_flags(*groups: Mapping[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of `groups`; it gets what they say as its first argument, by setting."""
    shared = {name: kind for group in groups for name, kind in group.items()}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_shared(**given: Any) -> None:
            flags: Flags = {name: _said(given.pop(name)) for name in shared}
            command(flags, **given)

        # Typer makes its options from the signature.
        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
            for name, kind in shared.items()
        ]
        own = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
        with_shared.__signature__ = inspect.Signature([*options, *own])  # type: ignore[attr-defined]
        return with_shared

    return decorate

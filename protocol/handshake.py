"""HELLO and its answer: which versions, models and row formats meet, decided by pure functions (rule 8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from isthmus.protocol.errors import RejectedError
from isthmus.protocol.frames import VERSION
from isthmus.protocol.identity import Match, ModelIdentity, compare
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import Hello, Load, Welcome
from isthmus.protocol.profiles import DeviceProfile, Prices


@dataclass(frozen=True)
class ServerInfo:
    """What the cloud says about itself in WELCOME. `kv_bytes_per_token_layer` prices the tenant's quota."""

    identity: ModelIdentity
    cloud_precision: str
    num_layers: int
    hidden: int
    vocab_size: int
    context_length: int
    row_formats: tuple[str, ...]
    kv_bytes_per_token_layer: int
    server: str = ""
    kl: Mapping[str, float] = field(default_factory=dict)
    profile: DeviceProfile | None = None
    prices: Prices | None = None


def answer_hello(
    hello: Hello, info: ServerInfo, limits: Limits, load: Load, canary_passed: tuple[int, ...]
) -> Welcome:
    """The terms for this edge. RejectedError: no common version, another model, no common row format."""
    if VERSION not in hello.versions:
        raise RejectedError(
            f"the edge speaks versions {', '.join(map(str, hello.versions))}, this cloud {VERSION}",
            code="version_mismatch",
            hint="update the older side",
        )
    verdict = compare(hello.identity, info.identity)
    if verdict.match is Match.REFUSED:
        raise RejectedError(
            f"edge and cloud hold different models: {', '.join(verdict.differing)} differ",
            code="model_mismatch",
            hint="serve the same model on both sides",
        )
    formats = tuple(name for name in info.row_formats if name in hello.row_formats)
    if not formats:
        raise RejectedError(
            f"no common row format: {', '.join(hello.row_formats) or 'none'} offered, "
            f"{', '.join(info.row_formats)} known",
            code="no_row_format",
        )
    return Welcome(
        version=VERSION,
        identity=info.identity,
        match="equal" if verdict.match is Match.EQUAL else "canary",
        cloud_precision=info.cloud_precision,
        limits=limits.wire(),
        server=info.server,
        num_layers=info.num_layers,
        hidden=info.hidden,
        vocab_size=info.vocab_size,
        context_length=info.context_length,
        row_formats=formats,
        kl=dict(info.kl),
        profile=info.profile,
        prices=info.prices,
        load=load,
        canary_passed=canary_passed,
    )


def check_welcome(welcome: Welcome, hello: Hello) -> None:
    """The edge judges for itself: RejectedError where the cloud's verdict is not what it would say."""
    verdict = compare(hello.identity, welcome.identity)
    if welcome.version not in hello.versions:
        raise RejectedError(
            f"the cloud chose version {welcome.version}, this edge speaks "
            f"{', '.join(map(str, hello.versions))}",
            code="bad_welcome",
        )
    if Match(welcome.match) is not verdict.match:
        raise RejectedError(
            f"the cloud calls the models {welcome.match}, they are {verdict.match}"
            + (f": {', '.join(verdict.differing)} differ" if verdict.differing else ""),
            code="bad_welcome",
        )
    unknown = [name for name in welcome.row_formats if name not in hello.row_formats]
    if unknown:
        raise RejectedError(
            f"the cloud chose row formats this edge did not offer: {', '.join(unknown)}", code="bad_welcome"
        )

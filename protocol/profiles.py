"""What a device can do, and what it costs: the profile of an edge or a cloud, and a cloud's prices.

One form for both sides: `isthmus profile` writes it as JSON, the cloud puts its own into WELCOME, and the
cost model reads it. Times are those of one device by itself; what a network adds is not in here.

Public: DeviceProfile Prices Label FIGURES.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from isthmus.protocol.errors import ConfigError
from isthmus.protocol.wire_types import U32, Count, Message, Name, Seconds, Text

Label = Literal["measured", "modelled", "unavailable"]
Amount = Annotated[float, Field(ge=0)]
Point = tuple[Amount, Amount]
Curve = Annotated[tuple[Point, ...], Field(min_length=1, max_length=64)]

FIGURES: Final = (
    "prefill", "decode", "layer_share", "step", "embed", "head",
    "codec", "batch", "load", "memory", "power", "kl",
)  # fmt: skip
"""What `DeviceProfile.labels` tells the origin of."""


class DeviceProfile(Message):
    """One device running one model. Layers are counted 0 … num_layers - 1; a *layer* below is a mean one.

    `prefill`: (rows of a chunk, seconds of one layer) with nothing before the chunk; each token of context
    adds `prefill_context_s` per layer and row. `decode`: (tokens of context, seconds of one layer) for one
    row. `layer_share`: each layer's time over the mean layer's; they add up to num_layers. `step_s`: seconds
    of a step whatever it runs. `embed_row_s`, `head_s`: the embedding of a row; norm, head and draw of a row.
    `codec_row_s`: a boundary row to or from its form on the wire. `batch`: (sessions that decode at once,
    seconds of their common step over those of one).

    `load_s`: seconds to load one layer. Bytes are what a process holds in addition, weights in all their
    copies: per layer, for the embedding, for the head beyond the embedding, and `scratch_bytes` once for
    buffers. `kv_bytes`: keys and values of a token in one layer, None where not told.

    `idle_w`, `active_w`: power of the device in watts, None where unavailable. `kl`: KL divergence of its
    logits to the source weights, in nats, None where unavailable. `labels`: for each of FIGURES, where it
    comes from.
    """

    format: Literal[1] = 1
    side: Literal["edge", "cloud"]
    device: Name
    provider: Name
    threads: U32
    model: Name
    precision: Name
    num_layers: Annotated[int, Field(ge=1, le=1024)]
    hidden: Annotated[int, Field(ge=1, le=2**20)]
    dated: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    note: Text = ""

    prefill: Curve
    prefill_context_s: Seconds
    decode: Curve
    layer_share: Annotated[tuple[Amount, ...], Field(max_length=1024)]
    step_s: Seconds
    embed_row_s: Seconds
    head_s: Seconds
    codec_row_s: Seconds
    batch: Curve = ((1.0, 1.0),)

    load_s: Seconds
    layer_bytes: Count
    embed_bytes: Count
    head_bytes: Count
    scratch_bytes: Count
    kv_bytes: Count | None = None

    idle_w: Amount | None = None
    active_w: Amount | None = None
    kl: Amount | None = None
    labels: dict[Name, Label]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("prefill", "decode", "batch"):
            curve: Curve = getattr(self, name)
            if any(b[0] <= a[0] for a, b in pairwise(curve)):
                raise ValueError(f"{name}: its points do not rise from left to right")
        if len(self.layer_share) != self.num_layers:
            raise ValueError(f"layer_share has {len(self.layer_share)} entries for {self.num_layers} layers")
        if abs(sum(self.layer_share) - self.num_layers) > 1e-3 * self.num_layers:
            raise ValueError(f"layer_share adds up to {sum(self.layer_share):g}, not {self.num_layers}")
        if set(self.labels) != set(FIGURES):
            wrong = ", ".join(sorted(set(self.labels) ^ set(FIGURES)))
            raise ValueError(f"labels missing, or of no figure: {wrong}")
        return self

    def to_json(self) -> str:
        """As a file holds it."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def from_json(cls, data: bytes | str, *, name: str) -> Self:
        """The profile in `data`. ConfigError `bad_profile` names `name` and the first thing wrong with it."""
        try:
            return cls.model_validate_json(data)
        except ValueError as error:  # pydantic's ValidationError is one
            first = str(error).replace("\n", " ")[:300]
            raise ConfigError(
                f"{name} is no device profile: {first}",
                code="bad_profile",
                hint="make one with `isthmus profile`",
            ) from error


class Prices(Message):
    """What a cloud charges, in US dollars; zero is a price like any other. `dated`: since when.

    Tokens are charged by the share of the layers that the cloud computes. A machine by the hour costs
    `gpu_usd_per_h` / `utilisation` for the seconds that it computes. `egress_usd_per_gb` is for bytes that
    leave the cloud. What applies is added up.
    """

    input_usd_per_mtok: Amount = 0.0
    output_usd_per_mtok: Amount = 0.0
    gpu_usd_per_h: Amount = 0.0
    utilisation: Annotated[float, Field(gt=0, le=1)] = 1.0
    egress_usd_per_gb: Amount = 0.0
    dated: Name = ""

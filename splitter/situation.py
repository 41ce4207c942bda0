"""What a prediction starts from: the request, the state of both sides, and how things travel. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from isthmus.protocol.profiles import DeviceProfile, Prices
from isthmus.splitter.links import LinkView

Route = Literal["local", "split", "offload"]
Shape = Literal["prefix", "u"]


@dataclass(frozen=True, slots=True)
class Work:
    """One request. `output_tokens`: how many are expected (≥ 1); `max_tokens`: the most there can be.
    `edge_cached`, `cloud_cached`: rows of the prompt that each side holds already, by K."""

    prompt_tokens: int
    output_tokens: float
    max_tokens: int
    edge_cached: Mapping[int, int] = field(default_factory=dict)
    cloud_cached: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EdgeState:
    """`loaded_layers`: layers 0 … are in memory (None: all); `running`: other requests that compute now."""

    loaded_layers: int | None = None
    head_loaded: bool = True
    running: int = 0


@dataclass(frozen=True, slots=True)
class CloudState:
    """`connected`: the link stands; `sessions`: others that decode there now; `queue_s`: wait before a new
    session's first row; `canary`: a split has to be compared first (a round trip); `age_s`: of the load."""

    connected: bool = True
    tls: bool = False
    sessions: float = 0.0
    queue_s: float = 0.0
    canary: bool = False
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Wire:
    """Bytes of what travels: a boundary row in a chunk (compressed) and by itself, a final hidden row."""

    row_bytes: float
    step_row_bytes: float
    hidden_row_bytes: float
    chunk_rows: int = 128

    @classmethod
    def of(cls, hidden: int, row_format: str) -> Wire:
        """Of a row format: int8 rows with outliers shrink to 0.43 of fp16 in a chunk, floats hardly."""
        if row_format == "f32":
            return cls(4.0 * hidden, 4.0 * hidden, 4.0 * hidden)
        if row_format == "bf16":
            return cls(1.86 * hidden, 2.0 * hidden, 2.0 * hidden)
        return cls(0.86 * hidden, hidden + 20.0, 2.0 * hidden)


@dataclass(frozen=True, slots=True)
class Radio:
    """Energy per byte on the edge's radio, in joules; what it draws while a request keeps it awake, in watts;
    and the price of its data in dollars per byte."""

    up_j: float = 0.0
    down_j: float = 0.0
    usd_per_byte: float = 0.0
    awake_w: float = 0.0


@dataclass(frozen=True, slots=True)
class Factors:
    """Observed over predicted, by route and term: what the profiles did not know."""

    local_prefill: float = 1.0
    local_decode: float = 1.0
    split_prefill: float = 1.0
    split_edge: float = 1.0
    split_cloud: float = 1.0
    split_link: float = 1.0
    offload_prefill: float = 1.0
    offload_decode: float = 1.0


@dataclass(frozen=True, slots=True)
class World:
    """Everything but the request. `cloud` None: there is none, or it tells nothing about itself.
    `kv_bytes`: the edge's, per token and layer."""

    edge: DeviceProfile
    cloud: DeviceProfile | None
    link: LinkView
    wire: Wire
    kv_bytes: int
    edge_state: EdgeState = EdgeState()
    cloud_state: CloudState = CloudState()
    prices: Prices = Prices()
    radio: Radio = Radio()
    factors: Factors = Factors()

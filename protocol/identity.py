"""Model identity: are the two ends' models the same, and the canary that decides where hashes differ."""

from __future__ import annotations

import hashlib
import json
import math
from enum import StrEnum
from typing import Annotated, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from isthmus.protocol.draw import uniform
from isthmus.protocol.errors import CodecError

Value = int | float | str | bool | None
_Name = Annotated[str, Field(min_length=1, max_length=256)]

# Dimensions come from a config.json (decimal) on one side and GGUF metadata (f32) on the other: an epsilon
# of 1e-5 reads back as 9.9999997e-06. Six significant digits are exact in both.
_SIGNIFICANT_DIGITS: Final = 6


class ModelIdentity(BaseModel):
    """What must agree between edge and cloud: network and rope, tokeniser, name; and the weights.

    `architecture` comes from `ModelSpec.identity_fields()`; floats are kept to six significant digits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    architecture: Annotated[dict[_Name, Value], Field(min_length=1, max_length=64)]
    tokenizer_hash: _Name
    base_name: _Name
    weights_hash: _Name

    @field_validator("architecture")
    @classmethod
    def _canonical(cls, fields: dict[str, Value]) -> dict[str, Value]:
        return {name: _canonical_value(name, fields[name]) for name in sorted(fields)}

    @property
    def key(self) -> str:
        """sha256 hex over everything but the weights: equal keys mean the same network."""
        content = self.model_dump(exclude={"weights_hash"})
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def _canonical_value(name: str, value: Value) -> Value:
    if isinstance(value, str) and len(value) > 256:
        raise ValueError(f"{name} has {len(value)} characters, at most 256 are taken")
    if not isinstance(value, float):
        return value
    rounded = float(f"{value:.{_SIGNIFICANT_DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 2**53 else rounded


class Match(StrEnum):
    """EQUAL: same weights. CANARY: same network, other weights. REFUSED: another model."""

    EQUAL = "equal"
    CANARY = "canary"
    REFUSED = "refused"


class Comparison(NamedTuple):
    """The verdict, and the names of the fields that differ (`architecture.rope_theta`, `tokenizer_hash`…)."""

    match: Match
    differing: tuple[str, ...]


_ABSENT: Final = object()


def _same(a: object, b: object) -> bool:
    return type(a) is type(b) and a == b  # True is not 1 here: `key` tells them apart too


def compare(edge: ModelIdentity, cloud: ModelIdentity) -> Comparison:
    """Rule 8 of the protocol, before any canary is run.

    Equal weights make the declared name irrelevant (a renamed folder), but not the architecture: the weights'
    hash doesn't cover rope or the tokeniser.
    """
    names = sorted(edge.architecture.keys() | cloud.architecture.keys())
    differing = [
        f"architecture.{name}"
        for name in names
        if not _same(edge.architecture.get(name, _ABSENT), cloud.architecture.get(name, _ABSENT))
    ]
    if edge.tokenizer_hash != cloud.tokenizer_hash:
        differing.append("tokenizer_hash")
    same_network = not differing
    same_name = edge.base_name == cloud.base_name
    if not same_name:
        differing.append("base_name")
    same_weights = edge.weights_hash == cloud.weights_hash
    if not same_weights:
        differing.append("weights_hash")
    if same_network and same_weights:
        match = Match.EQUAL
    elif same_network and same_name:
        match = Match.CANARY
    else:
        match = Match.REFUSED
    return Comparison(match, tuple(differing))


_CANARY_SEED: Final = 0x15_74_6D_75_73
_CANARY_OUTLIERS: Final = 8

# Measured on SmolLM2-135M (30 layers), `canary_error` against fp32 of the same weights, at K = 1 / 8 / 29:
#   bf16                                       0.006 / 0.015 / 0.027
#   8-bit weights and activations, the worst   0.015 / 0.037 / 0.073   (KL of the logits 0.02)
#   weights off by 5 % of their rms            0.068 / 0.171 / 0.337   (KL 0.26)
#   4-bit round-to-nearest                     0.138 / 0.359 / 0.779   (KL 0.96)
#   other weights of the same statistics       1.2   / 4.1   / 3.5
# Every layer adds its own independent rounding, so honest differences grow like the root of the depth. Twice
# the worst 8-bit figure at K = 1 passes 8 bits everywhere by a factor of two or more, and refuses weights
# that are 5 % off everywhere by as much. What it can't see is a fine-tune smaller than 8-bit rounding (2 %).
_TOLERANCE_OF_ONE_LAYER: Final = 0.03


def canary_ids(vocab_size: int, n: int = 16) -> list[int]:
    """The token sequence both ends run: `n` pseudo-random ids below `vocab_size`, always the same."""
    return [int(uniform(_CANARY_SEED, 0, i) * vocab_size) for i in range(n)]


def canary_tolerance(split: int) -> float:
    """The largest `canary_error` that passes for rows at layer `split` >= 1."""
    return _TOLERANCE_OF_ONE_LAYER * math.sqrt(max(split, 1))


def canary_error(edge_rows: NDArray[np.float32], cloud_rows: NDArray[np.float32]) -> float:
    """How far the edge's rows f32[n, hidden] are from the cloud's: the median over rows of ‖a − b‖ / ‖b‖.

    The cloud's 8 largest channels are left out (where there are more): fine-tunes of one base share them,
    and being hundreds of times larger they would drown the rest. The median forgives the first row, whose
    norm is a multiple of the others'. CodecError for shapes that differ and for values that are not finite.
    """
    if edge_rows.shape != cloud_rows.shape or edge_rows.ndim != 2 or not edge_rows.size:
        raise CodecError(
            f"canary rows are {list(edge_rows.shape)} on the edge, {list(cloud_rows.shape)} on the cloud",
            code="bad_shape",
        )
    edge, cloud = edge_rows.astype(np.float64), cloud_rows.astype(np.float64)
    if not (np.isfinite(edge).all() and np.isfinite(cloud).all()):
        raise CodecError("canary rows hold NaN or infinity", code="bad_values")
    if cloud.shape[1] > _CANARY_OUTLIERS:
        keep = np.sort(np.argsort(np.abs(cloud).max(axis=0), kind="stable")[:-_CANARY_OUTLIERS])
        edge, cloud = edge[:, keep], cloud[:, keep]
    norms = np.maximum(np.linalg.norm(cloud, axis=1), np.finfo(np.float32).tiny)
    return float(np.median(np.linalg.norm(edge - cloud, axis=1) / norms))

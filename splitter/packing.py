"""Which scheme each matrix of a checkpoint gets, and its packing: tensors in, arrays out."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from isthmus.protocol.errors import ConfigError
from isthmus.quant.gguf_blocks import BLOCK_TYPES, GGUFBlocks
from isthmus.quant.schemes import (
    FOUR_BIT_TYPES,
    SCHEMES,
    Packed,
    pack_f32,
    pack_q4_affine,
    pack_q4_native,
    pack_q8_affine,
)
from isthmus.splitter.blocks import block_sources
from isthmus.splitter.checkpoint import Checkpoint

Array = npt.NDArray[Any]
Bits = Literal["auto", 4, 8, 32]


def parse_bits(value: str | int) -> Bits:
    """`auto`, 4, 8 or 32, from a command line; ConfigError for anything else."""
    text = str(value)
    if text == "auto":
        return "auto"
    if text in ("4", "8", "32"):
        number: Literal[4, 8, 32] = 4 if text == "4" else 8 if text == "8" else 32
        return number
    raise ConfigError(f"bits {value!r} is not one of auto, 4, 8, 32", hint="leave it out for auto")


def candidate_schemes(checkpoint: Checkpoint, bits: Bits) -> list[str]:
    """The schemes `bits` can stand for with this source; one unless `auto`.

    A source that is already on a 4-bit grid is only ever imported exactly at 4 bits: re-rounding it to
    another 4-bit grid was measured at KL 0.4 and worse.
    """
    stored = {checkpoint.info(name).storage for name in checkpoint.names() if _is_layer_matrix(name)}
    four = "q4-native" if stored & set(FOUR_BIT_TYPES) else "q4-affine"
    if bits == "auto":
        return ["q8-affine", four, "f32"]
    return [four if bits == 4 else "q8-affine" if bits == 8 else "f32"]


def pack_block(
    checkpoint: Checkpoint, scheme: str, block: str
) -> tuple[dict[str, Packed | Array], dict[str, str]]:
    """All tensors of `block` under `scheme`, by block key, and for each matrix class how it was packed.

    The second answer maps e.g. "qkv" to "q8 from Q4_1". Embedding and head stay at 8 bits under every
    quantised scheme: a 4-bit head alone costs a KL of 6e-2.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"unknown weight scheme {scheme!r}", hint=f"schemes: {', '.join(SCHEMES)}")
    packed: dict[str, Packed | Array] = {}
    described: dict[str, str] = {}
    for key, names in block_sources(checkpoint.spec, block).items():
        if len(checkpoint.info(names[0]).shape) == 1:
            packed[key] = np.concatenate([checkpoint.dense(name) for name in names])
            continue
        matrix = _pack_matrix(checkpoint, scheme, key, names)
        packed[key] = matrix
        stored = "+".join(dict.fromkeys(checkpoint.info(name).storage for name in names))
        described[key.rsplit(".", 1)[-1]] = f"{matrix.kind} from {stored}"
    return packed, described


def _pack_matrix(checkpoint: Checkpoint, scheme: str, key: str, names: tuple[str, ...]) -> Packed:
    if scheme == "f32":
        return Packed.concat([pack_f32(checkpoint.dense(name)) for name in names])
    if scheme == "q8-affine" or key in ("embed", "head"):
        return Packed.concat([pack_q8_affine(_source(checkpoint, name)) for name in names])
    if scheme == "q4-affine":
        return Packed.concat([pack_q4_affine(checkpoint.dense(name)) for name in names])
    sources = [_source(checkpoint, name) for name in names]
    blocks = [s for s in sources if isinstance(s, GGUFBlocks) and s.type in FOUR_BIT_TYPES]
    if len(blocks) == len(sources):
        return Packed.concat([pack_q4_native(member) for member in blocks])
    # A wider member (Q6_K among Q4_K) keeps its accuracy; fused matrices need one width, so all take 8 bits.
    return Packed.concat([pack_q8_affine(source) for source in sources])


def _source(checkpoint: Checkpoint, name: str) -> GGUFBlocks | Array:
    """The stored blocks where they can be imported exactly, else the dense values."""
    if checkpoint.info(name).storage in BLOCK_TYPES:
        blocks = checkpoint.blocks(name)
        if blocks is not None:
            return blocks
    return checkpoint.dense(name)


def _is_layer_matrix(name: str) -> bool:
    return name.startswith("layers.") and name.endswith(".weight") and "norm" not in name

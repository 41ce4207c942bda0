"""GGUF quantised blocks as they lie in the file, opened into integers, scales and minima without rounding.

Every type here is affine over 32 neighbouring columns: w = scale · q + minimum. That is all the packers need,
so a 4-bit source can be carried into another layout exactly instead of being rounded a second time.
Layouts: ggml/src/ggml-common.h and ggml-quants.c (block_q4_0 … block_q4_K).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from isthmus.protocol.errors import ModelFileError, UnsupportedModelError

BLOCK = 32

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BlockType:
    """One GGUF storage type: `bits` per integer, `columns` per stored block and the block's `nbytes`."""

    bits: int
    columns: int
    nbytes: int


BLOCK_TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(4, 32, 18),
    "Q4_1": BlockType(4, 32, 20),
    "Q5_0": BlockType(5, 32, 22),
    "Q5_1": BlockType(5, 32, 24),
    "Q8_0": BlockType(8, 32, 34),
    "Q4_K": BlockType(4, 256, 144),
    "Q5_K": BlockType(5, 256, 176),
}
"""The types that can be opened exactly; a reader dequantises every other one itself."""


@dataclass(frozen=True)
class GGUFBlocks:
    """A matrix as GGUF stores it: `raw` is uint8[rows, bytes per row], rows in canonical order.

    Reordering rows (un-permuting llama's q and k) is `raw[order]`; columns never move.
    Raises UnsupportedModelError for a type outside BLOCK_TYPES, ModelFileError where sizes disagree.
    """

    type: str
    rows: int
    cols: int
    raw: U8

    def __post_init__(self) -> None:
        kind = BLOCK_TYPES.get(self.type)
        if kind is None:
            raise UnsupportedModelError(
                f"tensor type {self.type} has no exact block import",
                code="unsupported_tensor_type",
                hint=f"block types: {', '.join(BLOCK_TYPES)}; dequantise other types in the reader",
            )
        if self.cols % kind.columns:
            raise ModelFileError(
                f"{self.type} needs columns in multiples of {kind.columns}, got {self.cols}",
                hint="the file is damaged or was written for another shape",
            )
        expected = (self.rows, self.cols // kind.columns * kind.nbytes)
        if self.raw.shape != expected or self.raw.dtype != np.uint8:
            raise ModelFileError(
                f"{self.type} matrix of {self.rows}×{self.cols} needs uint8{list(expected)}, "
                f"got {self.raw.dtype}{list(self.raw.shape)}",
                hint="the file is cut short or its header lies about sizes",
            )

    @property
    def bits(self) -> int:
        """Bits per integer weight."""
        return BLOCK_TYPES[self.type].bits

    def to_affine(self) -> tuple[npt.NDArray[Any], F32, F32 | None]:
        """(q [rows, cols], scale f32[rows, cols/32], minimum likewise or None) with w = scale·q + minimum.

        q is uint8 for the types with a minimum (Q4_0 and Q5_0 have -8·scale and -16·scale) and int8 for Q8_0,
        which has none. Scales and minima are exact in f32. Raises ModelFileError for non-finite scales.
        """
        kind = BLOCK_TYPES[self.type]
        blocks = self.raw.reshape(self.rows * self.cols // kind.columns, kind.nbytes)
        q, scale, minimum = _READERS[self.type](blocks)
        if not np.isfinite(scale).all() or (minimum is not None and not np.isfinite(minimum).all()):
            raise ModelFileError(
                f"{self.type} matrix of {self.rows}×{self.cols} holds a scale that is not finite",
                hint="pull the model again: the file is damaged",
            )
        per_block = (self.rows, self.cols // BLOCK)
        return (
            q.reshape(self.rows, self.cols),
            scale.reshape(per_block),
            None if minimum is None else minimum.reshape(per_block),
        )

    def dense(self) -> F32:
        """The weights as f32[rows, cols]: ggml's own numbers up to one f32 rounding."""
        q, scale, minimum = self.to_affine()
        blocks = q.reshape(self.rows, -1, BLOCK).astype(np.float32)
        blocks *= scale[:, :, None]
        if minimum is not None:
            blocks += minimum[:, :, None]
        return blocks.reshape(self.rows, self.cols)


def _half(blocks: U8, start: int) -> F32:
    """The f16 at byte `start` of each block, as f32[n]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2")[:, 0].astype(np.float32)


def _nibbles(packed: U8) -> U8:
    """uint8[n, m] → uint8[n, 2m]: GGUF keeps the first half of a block in the low nibbles."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _high_bits(blocks: U8, start: int) -> U8:
    """The 32 fifth bits at byte `start`, already shifted to 0 or 16: uint8[n, 32]."""
    bits: U8 = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
    return bits << np.uint8(4)


_Opened = tuple[npt.NDArray[Any], F32, F32 | None]


def _q4_0(blocks: U8) -> _Opened:
    scale = _half(blocks, 0)
    return _nibbles(blocks[:, 2:]), scale, -8 * scale


def _q4_1(blocks: U8) -> _Opened:
    return _nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: U8) -> _Opened:
    scale = _half(blocks, 0)
    return _nibbles(blocks[:, 6:]) | _high_bits(blocks, 2), scale, -16 * scale


def _q5_1(blocks: U8) -> _Opened:
    return _nibbles(blocks[:, 8:]) | _high_bits(blocks, 4), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: U8) -> _Opened:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8), _half(blocks, 0), None


def _q4_k(blocks: U8) -> _Opened:
    """256 columns: f16 d, f16 dmin, 12 bytes of eight 6-bit (scale, min) pairs, 128 bytes of nibbles."""
    return _k_nibbles(blocks[:, 16:]), *_k_scales(blocks)


def _q5_k(blocks: U8) -> _Opened:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit j of byte l belongs to sub-block j."""
    fifth = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little").swapaxes(1, 2)
    return _k_nibbles(blocks[:, 48:]) | (fifth.reshape(-1, 256) << np.uint8(4)), *_k_scales(blocks)


def _k_nibbles(packed: U8) -> U8:
    """uint8[n, 128] → uint8[n, 256]: each 32 bytes hold two sub-blocks, low nibbles first."""
    return _nibbles(packed.reshape(-1, 32)).reshape(-1, 256)


def _k_scales(blocks: U8) -> tuple[F32, F32]:
    """(scale, minimum), each f32[n, 8], from the two halves and eight 6-bit pairs at the head of a block."""
    packed = blocks[:, 4:16]
    low, mid, top = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (top & 15) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([mid & 63, (top >> 4) | (mid >> 6 << 4)], axis=1)
    scale: F32 = _half(blocks, 0)[:, None] * scales.astype(np.float32)
    minimum: F32 = -_half(blocks, 2)[:, None] * minima.astype(np.float32)
    return scale, minimum


_READERS: dict[str, Callable[[U8], _Opened]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
}

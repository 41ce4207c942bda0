"""Weight schemes: matrices packed in the layouts of ONNX Runtime's MatMulNBits (and int8 rows for torch).

MatMulNBits computes x @ w.T with w[o, i] = scales[o, i/32] · (B[o, i] − zero_points[o, i/32]); without zero
points they are 2^(bits−1). At 4 bits adjacent columns share a byte, the even one in the low nibble.
Layout: onnxruntime docs/ContribOperators.md, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from isthmus.protocol.errors import UnsupportedModelError, UsageError
from isthmus.quant.gguf_blocks import BLOCK, F32, U8, GGUFBlocks
from isthmus.quant.search import affine_to_q8, dense_to_q4, dense_to_q8

Kind = Literal["f32", "q8", "q4", "q4_sum"]
Array = npt.NDArray[Any]

FOUR_BIT_TYPES = ("Q4_0", "Q4_1", "Q4_K")
"""GGUF types whose integers sit on a 4-bit grid: imported exactly or at 8 bits, never re-rounded to 4."""

SCHEMES: dict[str, int] = {"f32": 32, "q8-affine": 8, "q4-native": 4, "q4-affine": 4}
"""Scheme name → bits. q4-native imports a 4-bit GGUF exactly; q4-affine fits 4 bits to a wider source."""


@dataclass(frozen=True)
class Packed:
    """One matrix of `shape` (out, in), packed. `arrays` holds, by kind:

    f32: "weight" f32[out, in]
    q8, q4: "B" uint8[out, in/32, 32·bits/8], "scales" f32[out, in/32] and, unless symmetric,
        "zero_points" uint8[out, ceil(in/32·bits/8)]
    q4_sum: B and scales as q4 with the implied zero point 8, and "C" f32[in/32, out]:
        y = MatMulNBits(x) + blocksum32(x) @ C, which makes w = d·q + m exact (C = m + 8·d)
    """

    kind: Kind
    shape: tuple[int, int]
    arrays: dict[str, Array]
    block: int = BLOCK

    @property
    def bits(self) -> int:
        """Bits per stored weight, scales not counted."""
        return {"f32": 32, "q8": 8, "q4": 4, "q4_sum": 4}[self.kind]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def default_zero_point(self) -> int:
        """The zero point MatMulNBits assumes where none is stored."""
        return 1 << (self.bits - 1)

    def dequantize(self) -> F32:
        """The weights that the kernels compute with, f32[out, in]."""
        if self.kind == "f32":
            return np.asarray(self.arrays["weight"], dtype=np.float32)
        out, cols = self.shape
        q = self.integers().reshape(out, cols // self.block, self.block).astype(np.float32)
        q -= self.zero_points()[:, :, None]
        q *= self.arrays["scales"][:, :, None]
        if "C" in self.arrays:
            q += self.arrays["C"].T[:, :, None]
        return q.reshape(out, cols)

    def integers(self) -> U8:
        """The stored unsigned integers, uint8[out, in]."""
        stored = self.arrays["B"].reshape(self.shape[0], -1)
        return stored if self.bits == 8 else unpack_nibbles(stored)

    def zero_points(self) -> U8:
        """One zero point per block, uint8[out, in/32], the implied ones filled in."""
        out, num_blocks = self.shape[0], self.shape[1] // self.block
        stored = self.arrays.get("zero_points")
        if stored is None:
            return np.full((out, num_blocks), self.default_zero_point, dtype=np.uint8)
        return stored if self.bits == 8 else unpack_nibbles(stored)[:, :num_blocks]

    @staticmethod
    def concat(parts: Sequence[Packed]) -> Packed:
        """Stacks matrices along their rows (q, k and v become one).

        Kinds may differ only in what can be filled in exactly: missing zero points, missing block sums.
        Raises UsageError otherwise.
        """
        first = parts[0]
        kinds = {part.kind for part in parts}
        if len({(part.bits, part.shape[1], part.block) for part in parts}) > 1:
            raise UsageError(
                f"cannot stack {[(part.kind, part.shape) for part in parts]}",
                code="mixed_packing",
                hint="pack all members of a fused matrix with one scheme",
            )
        shape = (sum(part.shape[0] for part in parts), first.shape[1])
        if kinds == {"f32"}:
            return Packed("f32", shape, {"weight": np.concatenate([part.arrays["weight"] for part in parts])})
        kind: Kind = "q4_sum" if "q4_sum" in kinds else first.kind
        arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in ("B", "scales")}
        if any("zero_points" in part.arrays for part in parts):
            if kind == "q4_sum":
                raise UsageError("cannot stack zero points with block sums", code="mixed_packing")
            filled = np.concatenate([part.zero_points() for part in parts])
            arrays["zero_points"] = filled if first.bits == 8 else pack_nibbles(filled)
        if kind == "q4_sum":
            columns = [
                part.arrays.get("C", np.zeros((shape[1] // first.block, part.shape[0]), dtype=np.float32))
                for part in parts
            ]
            arrays["C"] = np.concatenate(columns, axis=1)
        return Packed(kind, shape, arrays, first.block)


def pack_nibbles(values: U8) -> U8:
    """uint8[n, m] of 0..15 → uint8[n, ceil(m/2)], even columns in the low nibbles."""
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    return values[:, 0::2] | (values[:, 1::2] << np.uint8(4))


def unpack_nibbles(packed: U8) -> U8:
    """The inverse of `pack_nibbles`: uint8[n, m] → uint8[n, 2m]."""
    pairs: U8 = np.stack([packed & 15, packed >> np.uint8(4)], axis=2)
    return pairs.reshape(packed.shape[0], -1)


def pack_f32(weights: Array) -> Packed:
    """f32[out, in] as it is."""
    dense = np.ascontiguousarray(weights, dtype=np.float32)
    return Packed("f32", (dense.shape[0], dense.shape[1]), {"weight": dense})


def pack_q8_affine(source: GGUFBlocks | Array) -> Packed:
    """8-bit affine, block 32, zero point per block (the recommended scheme; calibration-free).

    From blocks of 4 or 5 bits the finer copy of their own grid is searched; Q8_0 is taken raw; dense
    f32[out, in] is rounded once.
    """
    if isinstance(source, GGUFBlocks):
        if source.type == "Q8_0":
            return pack_q8_0(source)
        q, scale, minimum = source.to_affine()
        assert minimum is not None  # every type but Q8_0 has one
        return _q8(*affine_to_q8(q, scale, minimum))
    _check_columns(source)
    return _q8(*dense_to_q8(source))


def pack_q8_symmetric(weights: Array) -> Packed:
    """8-bit symmetric, block 32: round to nearest on max|w|/127, zero point 128 implied. For comparison."""
    _check_columns(weights)
    out, cols = weights.shape
    blocks = np.asarray(weights, dtype=np.float32).reshape(out, cols // BLOCK, BLOCK)
    scale = np.abs(blocks).max(axis=2) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    stored = (np.rint(blocks * inverse[:, :, None]) + 128).astype(np.uint8)
    return Packed("q8", (out, cols), {"B": stored, "scales": scale})


def pack_q8_0(blocks: GGUFBlocks) -> Packed:
    """GGUF Q8_0 bit for bit: symmetric, zero point 128 implied."""
    _expect_type(blocks, ("Q8_0",))
    q, scale, _ = blocks.to_affine()
    stored = (q.view(np.uint8) ^ 0x80).reshape(blocks.rows, -1, BLOCK)  # int8 + 128 as unsigned
    return Packed("q8", (blocks.rows, blocks.cols), {"B": stored, "scales": scale})


def pack_q4_0(blocks: GGUFBlocks) -> Packed:
    """GGUF Q4_0 exactly: symmetric 4-bit, zero point 8 implied."""
    _expect_type(blocks, ("Q4_0",))
    q, scale, _ = blocks.to_affine()
    return Packed("q4", (blocks.rows, blocks.cols), {"B": _nibble_blocks(q), "scales": scale})


def pack_q4_sum(q: U8, scale: F32, minimum: F32) -> Packed:
    """w = scale·q + minimum exactly, q uint8[out, in] of 0..15: 4-bit integers plus the block-sum term C."""
    shape = (q.shape[0], q.shape[1])
    # The kernel computes scale·(q − 8); what is missing is the same for all 32 columns of a block.
    column = np.ascontiguousarray((minimum + 8 * scale).T, dtype=np.float32)
    return Packed("q4_sum", shape, {"B": _nibble_blocks(q), "scales": scale, "C": column})


def pack_q4_native(blocks: GGUFBlocks) -> Packed:
    """A 4-bit GGUF matrix without any rounding: Q4_0 as it is, Q4_1 and Q4_K with block sums."""
    _expect_type(blocks, FOUR_BIT_TYPES)
    if blocks.type == "Q4_0":
        return pack_q4_0(blocks)
    q, scale, minimum = blocks.to_affine()
    assert minimum is not None
    return pack_q4_sum(q, scale, minimum)


def pack_q4_affine(weights: Array) -> Packed:
    """4 bits for dense f32[out, in] of 8 bits or more: fitted step and minimum, kept as block sums."""
    _check_columns(weights)
    return pack_q4_sum(*dense_to_q4(weights))


def int8_per_channel(weights: Array) -> tuple[npt.NDArray[np.int8], F32]:
    """For torch's int8 matmuls: f32[out, in] → (q int8[out, in], scale f32[out]), w ≈ scale·q, symmetric.

    Of five clipping points each row keeps the one with the least squared error.
    """
    dense = np.asarray(weights, dtype=np.float32)
    peak = np.abs(dense).max(axis=1)
    best_error = np.full(len(dense), np.inf, dtype=np.float32)
    best_q = np.zeros(dense.shape, dtype=np.int8)
    best_scale = np.zeros(len(dense), dtype=np.float32)
    for clip in (1.0, 0.9, 0.8, 0.7, 0.6):
        scale = peak * np.float32(clip / 127)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        q = np.clip(np.rint(dense * inverse[:, None]), -127, 127)
        residual = q * scale[:, None] - dense
        error = np.einsum("ij,ij->i", residual, residual)
        better = error < best_error
        best_error[better], best_scale[better] = error[better], scale[better]
        best_q[better] = q[better].astype(np.int8)
    return best_q, best_scale


def _q8(stored: U8, scale: F32, zero: U8) -> Packed:
    out, cols = stored.shape
    blocks = stored.reshape(out, cols // BLOCK, BLOCK)
    return Packed("q8", (out, cols), {"B": blocks, "scales": scale, "zero_points": zero})


def _nibble_blocks(q: U8) -> U8:
    return pack_nibbles(q).reshape(q.shape[0], q.shape[1] // BLOCK, BLOCK // 2)


def _expect_type(blocks: GGUFBlocks, allowed: tuple[str, ...]) -> None:
    if blocks.type not in allowed:
        raise UsageError(
            f"{blocks.type} blocks cannot be packed as {'/'.join(allowed)}",
            code="wrong_tensor_type",
            hint="choose 8 bits, which imports every block type",
        )


def _check_columns(weights: Array) -> None:
    if weights.ndim != 2 or weights.shape[1] % BLOCK:
        raise UnsupportedModelError(
            f"a matrix of shape {weights.shape} has no whole blocks of {BLOCK} columns",
            code="unsupported_shape",
            hint="build this model with --bits 32",
        )

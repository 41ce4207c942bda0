"""int4 linear layers over torch's packed kernels: groups of 32 columns, bf16 scales, bf16 activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.cloud.linear_integer import WIDE_BLOCK, IntegerLinear, has_kernel
from isthmus.quant.gguf_blocks import BLOCK, GGUFBlocks
from isthmus.quant.schemes import FOUR_BIT_TYPES
from isthmus.quant.search import dense_to_q4

Source = GGUFBlocks | npt.NDArray[Any]
"""Some rows of a matrix: a GGUF file's blocks, or f32[rows, in]."""

GROUP: Final = BLOCK
"""Columns that share a scale. The kernels take 64 to 256 too, but 32 is what GGUF's 4-bit types have."""

_KERNELS: Final = {"cpu": "aten::_weight_int4pack_mm_for_cpu", "cuda": "aten::_weight_int4pack_mm"}


@dataclass(frozen=True)
class Int4Weights:
    """w[o, i] = scale[o, i/32]·(q[o, i] − 8) + zero[o, i/32]."""

    q: Tensor  # uint8[out, in] of 0..15
    scale: Tensor  # bf16[out, in/32]
    zero: Tensor  # bf16[out, in/32]

    def dequantize(self) -> Tensor:
        """f32[out, in]."""
        groups = self.q.view(len(self.q), -1, GROUP).float() - 8
        return (groups * self.scale.float()[:, :, None] + self.zero.float()[:, :, None]).flatten(1)


def int4_obstacle(shape: tuple[int, int], device: torch.device) -> str | None:
    """Why a matrix of `shape` (out, in) can't run as int4 on `device`; None if it can."""
    num_out, num_in = shape
    # Tiles of the two kernels: aten/src/ATen/native/LinearAlgebra.cpp and native/cuda/int4mm.cu.
    tile = 8 if device.type == "cuda" else 16
    if num_in % GROUP:
        return f"{num_in} columns are no multiple of {GROUP}"
    if num_out % tile:
        return f"{num_out} rows are no multiple of {tile}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernel needs compute capability 8.0"
    return None


def quantize_int4(parts: Sequence[Source]) -> Int4Weights:
    """Stacks the parts' rows. 4-bit GGUF blocks keep their integers, and only their two floats are rounded
    to bf16; anything else is rounded to nearest on a searched grid (`dense_to_q4`)."""
    made = [_round_part(part) for part in parts]
    q, scale, zero = (torch.cat(tensors) for tensors in zip(*made, strict=True))
    return Int4Weights(q, scale, zero)


def _round_part(part: Source) -> tuple[Tensor, Tensor, Tensor]:
    """(q, scale, zero) of w = d·q + m. The scale is rounded first; the zero point then takes up what that
    moved on average, before it is rounded itself."""
    if isinstance(part, GGUFBlocks) and part.type in FOUR_BIT_TYPES:
        weights = None
        found, d, m = part.to_affine()
        assert m is not None  # only Q8_0 has none
    else:
        weights = part.dense() if isinstance(part, GGUFBlocks) else np.asarray(part, dtype=np.float32)
        found, d, m = dense_to_q4(weights)
    q = torch.from_numpy(found).view(*d.shape, GROUP)
    step, offset = torch.from_numpy(d), torch.from_numpy(m)
    scale = step.to(torch.bfloat16)
    mean = q.float().mean(-1)
    zero = (offset + step * mean - scale.float() * (mean - 8)).to(torch.bfloat16)
    if weights is not None:
        grid = torch.where(scale == 0, 1.0, scale.float())[:, :, None]
        ideal = (torch.from_numpy(weights).view(q.shape) - zero.float()[:, :, None]).div_(grid).add_(8)
        q = ideal.round_().clamp_(0, 15).to(torch.uint8)
    return q.flatten(1), scale, zero


class Int4Linear(IntegerLinear):
    """4-bit weights [out, in], 0.625 bytes each with their scales.

    The kernel's cost grows with the rows, because it unpacks the weights anew for every four of them (CPU).
    Widening rounds each weight to bf16: by 2^-9 of it, where the quantisation took 2^-5 of a group's largest.

    Widening reads `nibbles`: uint8[blocks, in, width / 2], blocks of `width` outputs, the first half of a
    block's outputs in the low nibbles. That is also torch's own layout on x86 wherever its blocks are whole,
    so there the tensor is shared; elsewhere it is a second copy.
    """

    kind = "int4"
    default_wide_rows = 64

    def __init__(
        self, packed: Tensor | None, nibbles: Tensor, scales_zeros: Tensor, bias: Tensor | None
    ) -> None:
        """`packed` as the device's kernel wants it, None without one; `scales_zeros` bf16[in/32, out, 2]."""
        super().__init__(bias, has_kernel=packed is not None)
        self.packed = packed
        self.nibbles = nibbles
        self.scales_zeros = scales_zeros

    @classmethod
    def from_weights(cls, weights: Int4Weights, bias: Tensor | None, device: torch.device) -> Self:
        """Packs for `device`; `int4_obstacle` is None for it."""
        q = weights.q.to(device)
        packed, nibbles = _pack(q), _nibble_blocks(q)
        if packed is not None and packed.dtype == torch.uint8:
            own = packed.view(nibbles.shape)
            if torch.equal(own, nibbles):
                nibbles = own
        scales_zeros = torch.stack([weights.scale.t(), weights.zero.t()], dim=2).to(device)
        return cls(packed, nibbles, scales_zeros, bias)

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales_zeros.shape[1], self.scales_zeros.shape[0] * GROUP

    @property
    def device(self) -> torch.device:
        return self.nibbles.device

    @property
    def _weight_bytes(self) -> int:
        shared = self.packed is not None and self.packed.data_ptr() == self.nibbles.data_ptr()
        second = 0 if self.packed is None or shared else self.packed.nbytes
        return self.nibbles.nbytes + second + self.scales_zeros.nbytes

    def kernel(self, x: Tensor) -> Tensor:
        aten = torch.ops.aten
        product = aten._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else aten._weight_int4pack_mm
        y: Tensor = product(x, self.packed, GROUP, self.scales_zeros)
        return y

    def widened(self, x: Tensor) -> Tensor:
        if self.wide is not None:
            return F.linear(x, self.wide)
        num_blocks, num_in, half = self.nibbles.shape
        step = max(1, WIDE_BLOCK // (2 * half * num_in)) if x.device.type == "cpu" else num_blocks
        if step >= num_blocks:
            return x @ self._unpacked(0, num_blocks)
        y = x.new_empty(x.shape[0], self.shape[0])
        for first in range(0, num_blocks, step):
            end = min(first + step, num_blocks)
            y[:, first * 2 * half : end * 2 * half] = x @ self._unpacked(first, end)
        return y

    def keep_wide(self) -> None:
        self.wide = self._unpacked(0, len(self.nibbles)).t().contiguous()

    def first_rows(self, num_out: int) -> Self:
        whole = self.shape[0]
        packed = None if self.packed is None else self.packed[: len(self.packed) * num_out // whole]
        nibbles = self.nibbles[: len(self.nibbles) * num_out // whole]
        part = type(self)(packed, nibbles, self.scales_zeros[:, :num_out].contiguous(), None)
        part.wide = None if self.wide is None else self.wide[:num_out]
        return part

    def _unpacked(self, first: int, end: int) -> Tensor:
        """The outputs of blocks [first, end), bf16[in, outputs], each weight rounded once."""
        nibbles = self.nibbles[first:end]
        num_blocks, num_in, half = nibbles.shape
        weight = self.scales_zeros.new_empty((num_in // GROUP, GROUP, num_blocks, 2 * half))
        low, high = weight.view(num_in, num_blocks, 2, half).permute(2, 1, 0, 3)
        low.copy_((nibbles & 15).sub_(8).view(torch.int8))  # bytes wrap: as int8 they are −8..7
        high.copy_((nibbles >> 4).sub_(8).view(torch.int8))
        # Contiguous scales, or this takes ten times as long.
        scale, zero = (
            each[:, first * 2 * half : end * 2 * half].contiguous().view(-1, 1, num_blocks, 2 * half)
            for each in self.scales_zeros.unbind(2)
        )
        return torch.addcmul(zero, weight, scale, out=weight).view(num_in, -1)


def _pack(q: Tensor) -> Tensor | None:
    """uint8[out, in] → what the device's kernel reads, or None where it has none."""
    device = q.device.type
    if device not in _KERNELS or not has_kernel(_KERNELS[device], q.device):
        return None
    packed: Tensor
    if device == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
    else:
        pairs = q[:, ::2] << 4 | q[:, 1::2]
        tiles = next(count for count in (8, 4, 2) if q.shape[1] % (16 * count) == 0)
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)
    return packed


def _nibble_blocks(q: Tensor) -> Tensor:
    """uint8[out, in] → uint8[blocks, in, width / 2], as `Int4Linear` describes."""
    widest = 32 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 64  # what torch packs there
    width = next(width for width in (widest, 32, 16, 8) if q.shape[0] % width == 0)
    halves = q.view(-1, 2, width // 2, q.shape[1])
    return (halves[:, 0] | halves[:, 1] << 4).transpose(1, 2).contiguous()

"""Linear layers at each precision over torch's own kernels: fp32, bf16, and int8 weights with bf16 inputs."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Protocol

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.protocol.errors import ConfigError
from isthmus.quant.schemes import int8_per_channel


class Precision(StrEnum):
    """What the weights are kept in. Activations into a matrix are f32 for fp32, bf16 otherwise."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of matrix inputs and outputs, and of the KV pages."""
        return torch.float32 if self is Precision.FP32 else torch.bfloat16


def parse_precision(name: str) -> Precision:
    """`fp32`, `bf16` or `int8`; anything else is a ConfigError naming the choices."""
    try:
        return Precision(name)
    except ValueError:
        choices = ", ".join(Precision)
        raise ConfigError(f"precision {name!r} is none of {choices}", hint=f"use one of {choices}") from None


class Linear(Protocol):
    """y = x @ w.T + b for x [n, in] of the compute dtype → [n, out] of the same dtype."""

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales and bias."""

    def __call__(self, x: Tensor) -> Tensor: ...


class DenseLinear:
    """fp32 or bf16 weights [out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Int8Linear:
    """int8 weights [out, in] with one scale per output row, bf16 activations.

    torch's int8 kernel is the fastest up to about 20 rows. Above, widening the weights to bf16 (exact:
    |q| <= 127) for an ordinary matrix product costs less, and needs no second copy of the weights.
    Measured at 3072x576, 1 thread, µs, kernel against widening: 8 rows 289 / 429; 20 rows 528 / 539;
    32 rows 843 / 606. Widening goes block by block, so that its buffer stays in cache: the output matrix of
    SmolLM2 (49152x576) at 32 rows takes 40 ms in one go, 11 ms in blocks of 4 MB.
    """

    wide_rows = 20
    block_elements = 1 << 21

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.scale = scale
        self.bias = bias
        key = {"cpu": "CPU", "cuda": "CUDA"}.get(weight.device.type)
        self._has_kernel = key is not None and bool(
            torch._C._dispatch_has_kernel_for_dispatch_key("aten::_weight_int8pack_mm", key)
        )

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scale.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor
        if self._has_kernel and x.shape[0] < self.wide_rows:
            y = torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scale)
        else:
            y = self._widened(x).mul_(self.scale)
        return y if self.bias is None else y.add_(self.bias)

    def _widened(self, x: Tensor) -> Tensor:
        num_out, num_in = self.weight.shape
        num_blocks = -(-num_out * num_in // self.block_elements)
        if num_blocks == 1 or x.device.type != "cpu":
            return F.linear(x, self.weight.to(x.dtype))
        y = x.new_empty(x.shape[0], num_out)
        for weight, out in zip(self.weight.chunk(num_blocks), y.chunk(num_blocks, dim=1), strict=True):
            out.copy_(F.linear(x, weight.to(x.dtype)))
        return y


def make_linear(
    weight: npt.NDArray[Any], bias: npt.NDArray[Any] | None, precision: Precision, device: torch.device
) -> Linear:
    """A linear layer from f32[out, in] (and f32[out]) at the given precision on the given device."""
    dtype = precision.compute_dtype
    moved_bias = None if bias is None else torch.from_numpy(bias).to(device=device, dtype=dtype)
    if precision is Precision.INT8:
        q, scale = _int8_with_bf16_scale(weight)
        return Int8Linear(q.to(device), scale.to(device), moved_bias)
    return DenseLinear(torch.from_numpy(weight).to(device=device, dtype=dtype), moved_bias)


def _int8_with_bf16_scale(weight: npt.NDArray[Any]) -> tuple[Tensor, Tensor]:
    """(q int8[out, in], scale bf16[out]), w ≈ scale·q, rounded against the scale that the kernel sees.

    torch's kernel takes bf16 scales. Rounding the scale first and the weights to that grid, instead of the
    scale afterwards, brought SmolLM2-135M's KL to fp32 from 7.1e-3 to 6.4e-3.
    """
    scale = torch.from_numpy(int8_per_channel(weight)[1]).to(torch.bfloat16)
    step = torch.where(scale == 0, 1.0, scale.float())  # a row of zeros has scale 0
    q = torch.from_numpy(weight).div(step[:, None]).round_().clamp_(-127, 127)
    return q.to(torch.int8), scale

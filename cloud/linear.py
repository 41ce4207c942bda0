"""Linear layers at each precision over torch's own kernels: which one a matrix gets."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.cloud.linear_int4 import Int4Linear, Source, int4_obstacle, quantize_int4
from isthmus.cloud.linear_int8 import Int8Linear, quantize_int8
from isthmus.protocol.errors import ConfigError
from isthmus.quant.gguf_blocks import GGUFBlocks


class Precision(StrEnum):
    """What the weights are kept in. Activations into a matrix are f32 for fp32, bf16 otherwise."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of matrix inputs and outputs, and of the KV pages."""
        return torch.float32 if self is Precision.FP32 else torch.bfloat16

    @property
    def is_integer(self) -> bool:
        return self in (Precision.INT8, Precision.INT4)


def parse_precision(name: str) -> Precision:
    """`fp32`, `bf16`, `int8` or `int4`; anything else is a ConfigError naming the choices."""
    try:
        return Precision(name)
    except ValueError:
        choices = ", ".join(Precision)
        raise ConfigError(f"precision {name!r} is none of {choices}", hint=f"use one of {choices}") from None


class Linear(Protocol):
    """y = x @ w.T + b for contiguous x [n, in] of the compute dtype → [n, out] of the same dtype."""

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


def make_linear(
    parts: Sequence[Source],
    bias: npt.NDArray[Any] | None,
    precision: Precision,
    device: torch.device,
) -> tuple[Linear, str | None]:
    """A linear layer over the stacked rows of `parts` (f32[out, in] or GGUF blocks) and bias f32[out].

    The second answer says why a matrix asked for as int4 became int8; None otherwise.
    """
    shape = (sum(_shape(part)[0] for part in parts), _shape(parts[0])[1])
    dtype = precision.compute_dtype
    moved_bias = None if bias is None else torch.from_numpy(bias).to(device=device, dtype=dtype)
    obstacle = int4_obstacle(shape, device) if precision is Precision.INT4 else None
    if precision is Precision.INT4 and obstacle is None:
        return Int4Linear.from_weights(quantize_int4(parts), moved_bias, device), None
    stacked = [part.dense() if isinstance(part, GGUFBlocks) else part for part in parts]
    weight = stacked[0] if len(stacked) == 1 else np.concatenate(stacked)
    if precision.is_integer:
        q, scale = quantize_int8(weight)
        return Int8Linear(q.to(device), scale.to(device), moved_bias), obstacle
    return DenseLinear(torch.from_numpy(weight).to(device=device, dtype=dtype), moved_bias), None


def _shape(part: Source) -> tuple[int, int]:
    return (part.rows, part.cols) if isinstance(part, GGUFBlocks) else (part.shape[0], part.shape[1])

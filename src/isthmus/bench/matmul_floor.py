"""The floor of a decode step: its matrix products alone, with the model's own weights and kernels."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isthmus.cloud.linear import Linear
from isthmus.cloud.linear_int4 import Int4Linear
from isthmus.cloud.model import CloudModel

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Matrix:
    """One linear layer of the model and the width of its input."""

    linear: Linear
    num_in: int

    @property
    def read_bytes(self) -> int:
        """Bytes a product must read of the weights. Int4 may keep them a second time, for another path."""
        linear = self.linear
        if isinstance(linear, Int4Linear):
            return linear.nibbles.nbytes + linear.scales_zeros.nbytes
        return linear.nbytes


def layer_matrices(model: CloudModel) -> list[tuple[Matrix, ...]]:
    """The products of each decoder layer in the order a step makes them: qkv, o, gate and up, down."""
    spec, linears = model.spec, iter(model.linears)
    widths = (spec.hidden, spec.q_size, spec.hidden, spec.intermediate)
    return [tuple(Matrix(next(linears), width) for width in widths) for _ in range(spec.num_layers)]


def head_matrix(model: CloudModel) -> Matrix:
    return Matrix(model.linears[-1], model.spec.hidden)


def rows_per_layer(splits: Sequence[int], num_layers: int) -> list[int]:
    """How many of one row each of sessions entering at `splits` every layer runs."""
    return [sum(split <= layer for split in splits) for layer in range(num_layers)]


class MatmulFloor:
    """The products of one step of sessions that enter at `splits`, one row each, and all pass the head.

    The inputs are built once: the loop holds nothing but the products.
    """

    def __init__(self, model: CloudModel, splits: Sequence[int], *, head: bool = True) -> None:
        import torch

        self._device = model.device
        self.rows = rows_per_layer(splits, model.spec.num_layers)
        self.row_layers = sum(self.rows)
        self._products: list[tuple[Linear, Tensor]] = []
        inputs: dict[tuple[int, int], Tensor] = {}

        def add(matrix: Matrix, num_rows: int) -> None:
            size = (num_rows, matrix.num_in)
            if size not in inputs:
                inputs[size] = torch.randn(size, device=model.device).to(model.precision.compute_dtype)
            self._products.append((matrix.linear, inputs[size]))

        for num_rows, matrices in zip(self.rows, layer_matrices(model), strict=True):
            for matrix in matrices if num_rows else ():
                add(matrix, num_rows)
        if head:
            add(head_matrix(model), len(splits))

    def seconds(self, num_steps: int) -> float:
        """Runs the products of `num_steps` steps."""
        import torch

        with torch.inference_mode():
            begun = time.perf_counter()
            for _ in range(num_steps):
                for linear, x in self._products:
                    linear(x)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            return time.perf_counter() - begun

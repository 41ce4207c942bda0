"""What int8 and int4 layers share: two ways to multiply, and from how many rows on the second is taken."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Final, Self

import torch
from torch import Tensor

WIDE_BLOCK: Final = 1 << 21
"""Weights widened at a time on CPU, so that the bf16 copy stays in cache: the output matrix of SmolLM2
(49152x576) at 32 rows takes 40 ms in one go, 11 ms in blocks of this size."""


def has_kernel(operator: str, device: torch.device) -> bool:
    """Whether torch can run `operator` ("aten::…") on the device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    return key is not None and bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator, key))


class IntegerLinear(ABC):
    """Integer weights [out, in] with bf16 activations.

    torch's integer kernel reads the fewest bytes and is the fastest for few rows. From `wide_rows` rows on an
    ordinary product over weights widened to bf16 costs less; they are widened anew each time, or once by
    `keep_wide`. The two ways differ by rounding only, as the classes say. `cloud/widening.py` measures where
    they cross; until then `wide_rows` is what was seen on two AVX-512 cores.
    """

    kind: ClassVar[str]
    default_wide_rows: ClassVar[int]

    def __init__(self, bias: Tensor | None, *, has_kernel: bool) -> None:
        self.bias = bias
        self.has_kernel = has_kernel
        self.wide_rows = self.default_wide_rows if has_kernel else 0
        self.wide: Tensor | None = None
        """The kept bf16 copy, [out, in]."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    def nbytes(self) -> int:
        """Bytes of integers, scales and bias; a kept copy is not counted."""
        return self._weight_bytes + (0 if self.bias is None else self.bias.nbytes)

    @property
    @abstractmethod
    def _weight_bytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor:
        y = self.kernel(x) if x.shape[0] < self.wide_rows else self.widened(x)
        return y if self.bias is None else y.add_(self.bias)

    @abstractmethod
    def kernel(self, x: Tensor) -> Tensor:
        """x @ w.T by torch's integer kernel."""

    @abstractmethod
    def widened(self, x: Tensor) -> Tensor:
        """x @ w.T over weights in bf16: the kept copy, or widened now, on CPU block by block."""

    @abstractmethod
    def keep_wide(self) -> None:
        """Keeps a bf16 copy from now on: two bytes a weight, for a third less time at 32 rows."""

    @abstractmethod
    def first_rows(self, num_out: int) -> Self:
        """The first `num_out` outputs (a multiple of 64), without the bias: views of the same weights."""

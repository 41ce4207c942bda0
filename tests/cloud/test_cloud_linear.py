"""Linear layers: each precision against numpy, both int8 paths against each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from isthmus.cloud.linear import Int8Linear, Precision, make_linear, parse_precision
from isthmus.protocol.errors import ConfigError

CPU = torch.device("cpu")


def random(shape: tuple[int, ...], seed: int = 0) -> npt.NDArray[Any]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 8e-3), ("int8", 1.5e-2)])
@pytest.mark.parametrize("rows", [1, 7, 19, 20, 64])
def test_products_agree_with_numpy(precision: str, tolerance: float, rows: int, biased: bool) -> None:
    weight, x = random((96, 64)), random((rows, 64), 1)
    bias = random((96,), 2) if biased else None
    kind = Precision(precision)
    linear = make_linear(weight, bias, kind, CPU)
    y = linear(torch.from_numpy(x).to(kind.compute_dtype))
    expected = x @ weight.T + (0 if bias is None else bias)
    assert y.dtype == kind.compute_dtype
    error = np.linalg.norm(y.float().numpy() - expected) / np.linalg.norm(expected)
    assert error < tolerance


def test_int8_paths_and_blocks_compute_the_same() -> None:
    """Kernel or widened, whole or in blocks that do not divide the rows: only the last bit may differ."""
    linear = make_linear(random((300, 64)), random((300,), 3), Precision.INT8, CPU)
    assert isinstance(linear, Int8Linear)
    x = torch.from_numpy(random((linear.wide_rows, 64), 1)).bfloat16()
    widened = linear(x)
    kernel = torch.cat([linear(row) for row in x.split(1)])
    torch.testing.assert_close(widened.float(), kernel.float(), rtol=2**-6, atol=2**-5)
    linear.block_elements = 64 * 70
    assert torch.equal(linear(x), widened)


def test_int8_rounds_to_the_scale_the_kernel_sees() -> None:
    weight = random((16, 64))
    weight[3] = 0
    linear = make_linear(weight, None, Precision.INT8, CPU)
    assert isinstance(linear, Int8Linear)
    assert linear.scale.dtype == torch.bfloat16
    restored = linear.weight.float() * linear.scale.float()[:, None]
    # Half a step everywhere but where a row's largest weights were clipped for a finer step.
    excess = (restored - torch.from_numpy(weight)).abs() - linear.scale.float()[:, None] / 2
    assert (excess > 1e-6).float().mean() < 0.05
    assert not linear.weight[3].any()
    assert torch.isfinite(linear(torch.ones(1, 64, dtype=torch.bfloat16))).all()


def test_bytes_per_precision() -> None:
    weight, bias = random((96, 64)), random((96,))
    sizes = {kind: make_linear(weight, bias, kind, CPU).nbytes for kind in Precision}
    assert sizes == {
        Precision.FP32: 96 * 64 * 4 + 96 * 4,
        Precision.BF16: 96 * 64 * 2 + 96 * 2,
        Precision.INT8: 96 * 64 + 96 * 2 + 96 * 2,
    }


def test_unknown_precision_names_the_choices() -> None:
    assert parse_precision("bf16") is Precision.BF16
    with pytest.raises(ConfigError, match="'fp8' is none of fp32, bf16, int8"):
        parse_precision("fp8")

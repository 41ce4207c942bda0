"""Linear layers: each precision against numpy, both ways of each integer kind, int4 from every source."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from isthmus.cloud import linear_int4, linear_int8
from isthmus.cloud.linear import Linear, Precision, make_linear, parse_precision
from isthmus.cloud.linear_int4 import GROUP, Int4Linear, int4_obstacle, quantize_int4
from isthmus.cloud.linear_int8 import Int8Linear
from isthmus.protocol.errors import ConfigError
from isthmus.quant.gguf_blocks import GGUFBlocks

CPU = torch.device("cpu")
BF16_STEP = 2**-8  # of a number, between neighbouring bf16


def random(shape: tuple[int, ...], seed: int = 0) -> npt.NDArray[Any]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make(weight: npt.NDArray[Any], bias: npt.NDArray[Any] | None, precision: Precision) -> Linear:
    linear, remark = make_linear([weight], bias, precision, CPU)
    assert remark is None
    return linear


def blocks(type_: str, rows: int, cols: int, seed: int = 0) -> GGUFBlocks:
    weight = random((rows, cols), seed)
    raw = quants.quantize(weight, GGMLQuantizationType[type_])
    return GGUFBlocks(type_, rows, cols, raw.view(np.uint8).reshape(rows, -1))


def rel_error(found: torch.Tensor, expected: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(found.float().numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 8e-3), ("int8", 1.5e-2), ("int4", 9e-2)]
)
@pytest.mark.parametrize("rows", [1, 7, 19, 20, 63, 64])
def test_products_agree_with_numpy(precision: str, tolerance: float, rows: int, biased: bool) -> None:
    weight, x = random((96, 64)), random((rows, 64), 1)
    bias = random((96,), 2) if biased else None
    kind = Precision(precision)
    linear = make(weight, bias, kind)
    y = linear(torch.from_numpy(x).to(kind.compute_dtype))
    assert y.dtype == kind.compute_dtype
    assert rel_error(y, x @ weight.T + (0 if bias is None else bias)) < tolerance


def test_int8_paths_and_blocks_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel or widened, whole or in blocks that do not divide the rows: only the last bit may differ."""
    linear = make(random((300, 64)), random((300,), 3), Precision.INT8)
    assert isinstance(linear, Int8Linear)
    x = torch.from_numpy(random((linear.wide_rows, 64), 1)).bfloat16()
    widened = linear(x)
    kernel = torch.cat([linear(row) for row in x.split(1)])
    torch.testing.assert_close(widened.float(), kernel.float(), rtol=2**-6, atol=2**-5)
    monkeypatch.setattr(linear_int8, "WIDE_BLOCK", 64 * 70)
    assert torch.equal(linear(x), widened)


def test_int8_rounds_to_the_scale_the_kernel_sees() -> None:
    weight = random((16, 64))
    weight[3] = 0
    linear = make(weight, None, Precision.INT8)
    assert isinstance(linear, Int8Linear)
    assert linear.scale.dtype == torch.bfloat16
    restored = linear.weight.float() * linear.scale.float()[:, None]
    # Half a step everywhere but where a row's largest weights were clipped for a finer step.
    excess = (restored - torch.from_numpy(weight)).abs() - linear.scale.float()[:, None] / 2
    assert (excess > 1e-6).float().mean() < 0.05
    assert not linear.weight[3].any()
    assert torch.isfinite(linear(torch.ones(1, 64, dtype=torch.bfloat16))).all()


# Whole blocks of 64 outputs, of 32, neither; one group of columns, an odd number, many.
INT4_SHAPES = [(64, 64), (192, 32), (96, 64), (48, 96), (16, 32), (208, 160), (960, 576)]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", INT4_SHAPES)
def test_int4_both_ways_equal_the_dequantised_product(
    shape: tuple[int, int], biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = quantize_int4([random(shape)])
    bias = torch.from_numpy(random(shape[:1], 2)).bfloat16() if biased else None
    linear = Int4Linear.from_weights(weights, bias, CPU)
    assert linear.shape == shape
    x = torch.from_numpy(random((9, shape[1]), 1)).bfloat16()
    expected = x.double() @ weights.dequantize().double().T + (0 if bias is None else bias.double())
    results = {}
    for way, rows in (("kernel", 10), ("widened", 9)):
        linear.wide_rows = rows
        results[way] = linear(x)
        # Rounding of the answer (and of a bias' sum), and of each widened weight.
        assert rel_error(results[way].double(), expected.numpy()) < BF16_STEP, way
    monkeypatch.setattr(linear_int4, "WIDE_BLOCK", 1)  # block by block of outputs
    torch.testing.assert_close(linear(x), results["widened"], rtol=BF16_STEP, atol=1e-2)


def test_int4_widening_rounds_each_weight_once() -> None:
    weights = quantize_int4([random((128, 64))])
    linear = Int4Linear.from_weights(weights, None, CPU)
    identity = torch.eye(64, dtype=torch.bfloat16)
    assert torch.equal(linear.widened(identity).T, weights.dequantize().bfloat16())


@pytest.mark.parametrize("type_", ["Q4_0", "Q4_1"])
def test_int4_takes_four_bit_blocks_as_they_are(type_: str) -> None:
    """The integers stay, the scale is d in bf16, and zero = m + 8d but for what rounding d moved."""
    source = blocks(type_, 64, 96)
    q, d, m = source.to_affine()
    assert m is not None
    weights = quantize_int4([source])
    assert torch.equal(weights.q, torch.from_numpy(q))
    assert torch.equal(weights.scale, torch.from_numpy(d).bfloat16())
    moved = np.abs(d - weights.scale.float().numpy()) * 8
    off = np.abs(weights.zero.float().numpy() - (m + 8 * d))
    assert (off <= moved + np.abs(m + 8 * d) * BF16_STEP).all()
    plain = Int4Linear.from_weights(weights, None, CPU)
    exact = source.dense()
    assert rel_error(weights.dequantize(), exact) < BF16_STEP / 2
    x = torch.from_numpy(random((3, 96), 1)).bfloat16()
    assert rel_error(plain.kernel(x), x.float().numpy() @ exact.T) < BF16_STEP


def test_the_zero_point_takes_up_what_rounding_the_scale_moved() -> None:
    """Naive rounding of zero = m + 8d leaves a bias in each group; the fitted zero leaves almost none."""
    source = blocks("Q4_1", 256, 128)
    _, d, m = source.to_affine()
    assert m is not None
    weights = quantize_int4([source])
    exact = torch.from_numpy(source.dense())
    naive = torch.from_numpy(m + 8 * d).bfloat16()
    errors = []
    for zero in (weights.zero, naive):
        found = linear_int4.Int4Weights(weights.q, weights.scale, zero).dequantize()
        errors.append((found - exact).view(256, -1, GROUP).mean(-1).norm())
    assert errors[0] < 0.9 * errors[1]


def test_int4_of_mixed_sources_stacks_their_rows() -> None:
    """As a fused matrix of a file that keeps its value rows in more bits: each part by its own way."""
    four, eight, floats = blocks("Q4_1", 32, 64, 1), blocks("Q8_0", 16, 64, 2), random((16, 64), 3)
    whole = quantize_int4([four, eight, floats])
    assert whole.q.shape == (64, 64)
    for part, rows in ((four, slice(0, 32)), (eight.dense(), slice(32, 48)), (floats, slice(48, 64))):
        alone = quantize_int4([part])
        assert torch.equal(alone.dequantize(), whole.dequantize()[rows])


def test_int4_of_floats_rounds_to_nearest_on_its_own_grid() -> None:
    weight = random((32, 64))
    weight[3] = 0
    weight[4] = 0.5
    weights = quantize_int4([weight])
    steps = weights.scale.float().repeat_interleave(GROUP, dim=1)
    error = (weights.dequantize() - torch.from_numpy(weight)).abs()
    inside = (weights.q > 0) & (weights.q < 15) & (steps > 0)
    assert (error[inside] <= steps[inside] / 2 * (1 + 1e-4)).all()
    assert inside.float().mean() > 0.7
    assert not weights.dequantize()[3].any()
    assert (weights.dequantize()[4] == 0.5).all()


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((64, 64), None),
        ((16, 32), None),
        ((64, 80), "80 columns are no multiple of 32"),
        ((24, 64), "24 rows are no multiple of 16"),
    ],
)
def test_what_the_int4_kernel_cannot_take_becomes_int8(shape: tuple[int, int], reason: str | None) -> None:
    assert int4_obstacle(shape, CPU) == reason
    linear, remark = make_linear([random(shape)], random(shape[:1]), Precision.INT4, CPU)
    assert remark == reason
    assert isinstance(linear, Int4Linear if reason is None else Int8Linear)
    x = random((2, shape[1]), 1)
    y = linear(torch.from_numpy(x).bfloat16())
    assert rel_error(y, x @ random(shape).T + random(shape[:1])) < 9e-2


@pytest.mark.parametrize(("type_", "cols"), [("Q8_0", 64), ("Q5_1", 64), ("Q4_1", 64)])
def test_blocks_become_any_precision(type_: str, cols: int) -> None:
    source = blocks(type_, 32, cols)
    for precision, tolerance in (("fp32", 1e-6), ("bf16", 8e-3), ("int8", 1.5e-2), ("int4", 9e-2)):
        linear, _ = make_linear([source], None, Precision(precision), CPU)
        x = random((3, cols), 1)
        y = linear(torch.from_numpy(x).to(Precision(precision).compute_dtype))
        assert rel_error(y, x @ source.dense().T) < tolerance


def test_bytes_per_precision() -> None:
    weight, bias = random((128, 64)), random((128,))
    sizes = {kind: make(weight, bias, kind).nbytes for kind in Precision}
    assert sizes == {
        Precision.FP32: 128 * 64 * 4 + 128 * 4,
        Precision.BF16: 128 * 64 * 2 + 128 * 2,
        Precision.INT8: 128 * 64 + 128 * 2 + 128 * 2,
        # Where torch packs in another layout than ours, the integers are kept twice.
        Precision.INT4: 128 * 64 // 2 * _int4_copies() + 128 * 64 // GROUP * 4 + 128 * 2,
    }


def _int4_copies() -> int:
    return 1 if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else 2


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4])
def test_first_rows_are_the_first_outputs(precision: Precision) -> None:
    linear = make(random((256, 96)), random((256,)), precision)
    assert isinstance(linear, Int8Linear | Int4Linear)
    part = linear.first_rows(128)
    x = torch.from_numpy(random((3, 96), 1)).bfloat16()
    assert part.shape == (128, 96)
    for way in ("kernel", "widened"):
        assert torch.equal(getattr(part, way)(x), getattr(linear, way)(x)[:, :128])


def test_unknown_precision_names_the_choices() -> None:
    assert parse_precision("bf16") is Precision.BF16
    with pytest.raises(ConfigError, match="'fp8' is none of fp32, bf16, int8, int4"):
        parse_precision("fp8")

"""Packed matrices: layouts, exactness where promised, errors where bounded, and the way ORT reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isthmus.protocol.errors import UnsupportedModelError, UsageError
from isthmus.quant.gguf_blocks import BLOCK, GGUFBlocks
from isthmus.quant.measure import relative_rms_error
from isthmus.quant.schemes import (
    Packed,
    int8_per_channel,
    pack_f32,
    pack_nibbles,
    pack_q4_0,
    pack_q4_affine,
    pack_q4_native,
    pack_q4_sum,
    pack_q8_0,
    pack_q8_affine,
    pack_q8_symmetric,
    unpack_nibbles,
)
from isthmus.quant.search import affine_to_q8

F32 = npt.NDArray[np.float32]
Packer = Callable[[F32], Packed]


def gaussian(rows: int = 24, cols: int = 256, seed: int = 0) -> F32:
    return np.random.default_rng(seed).normal(0, 0.05, (rows, cols)).astype(np.float32)


def quantised(kind: str, weights: F32) -> GGUFBlocks:
    """Weights as a real GGUF writer would store them."""
    import gguf

    raw = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind])
    return GGUFBlocks(kind, weights.shape[0], weights.shape[1], raw.reshape(weights.shape[0], -1))


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.integers(0, 15)))
def test_nibbles_round_trip(values: npt.NDArray[np.uint8]) -> None:
    np.testing.assert_array_equal(unpack_nibbles(pack_nibbles(values))[:, : values.shape[1]], values)


def test_nibbles_keep_even_columns_low() -> None:
    assert pack_nibbles(np.array([[1, 2, 3]], dtype=np.uint8)).tolist() == [[0x21, 0x03]]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_native_import_of_4_bits_is_exact(kind: str) -> None:
    blocks = quantised(kind, gaussian())
    packed = pack_q4_native(blocks)
    assert packed.kind == ("q4" if kind == "Q4_0" else "q4_sum")
    assert packed.arrays["B"].shape == (24, 8, 16)
    np.testing.assert_allclose(packed.dequantize(), blocks.dense(), rtol=1e-6, atol=1e-7)


def test_q8_0_import_is_exact() -> None:
    blocks = quantised("Q8_0", gaussian())
    packed = pack_q8_0(blocks)
    assert "zero_points" not in packed.arrays
    np.testing.assert_array_equal(packed.dequantize(), blocks.dense())
    np.testing.assert_array_equal(pack_q8_affine(blocks).dequantize(), blocks.dense())


def test_q8_affine_holds_q4_0_exactly() -> None:
    blocks = quantised("Q4_0", gaussian())
    np.testing.assert_array_equal(pack_q8_affine(blocks).dequantize(), blocks.dense())


def test_q8_affine_of_q4_1_beats_rounding_afresh() -> None:
    blocks = quantised("Q4_1", gaussian(96, 1024))
    searched = relative_rms_error(blocks.dense(), pack_q8_affine(blocks).dequantize())
    afresh = relative_rms_error(blocks.dense(), pack_q8_affine(blocks.dense()).dequantize())
    assert searched < 0.0025
    assert searched < 0.5 * afresh


def brute_force_error(q: npt.NDArray[np.uint8], d: float, m: float) -> float:
    """The smallest squared error of s·(a·q + k) over all a and k that fit 8 bits, s by least squares."""
    weights = d * q.astype(np.float64) + m
    best = np.inf
    for a in range(1, 256):
        for k in range(-255, 256):
            u = a * q.astype(np.int64) + k
            reach = u.max() - min(u.min(), 0)
            if reach > 255 or u.min() < -255 or not u.any():
                continue
            s = float(u @ weights) / float(u @ u)
            best = min(best, float(((s * u - weights) ** 2).sum()))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_q8_search_is_close_to_the_best_affine_copy(seed: int) -> None:
    generator = np.random.default_rng(seed)
    q = generator.integers(0, 16, (1, BLOCK), dtype=np.uint8)
    d, m = np.float32(generator.uniform(0.001, 0.01)), np.float32(generator.uniform(-0.09, -0.03))
    stored, scale, zero = affine_to_q8(q, np.array([[d]]), np.array([[m]]))
    weights = d * q.astype(np.float64) + m
    found = (((stored.astype(np.float64) - zero[0, 0]) * scale[0, 0] - weights) ** 2).sum()
    energy = float((weights**2).sum())
    assert found <= 1.5 * brute_force_error(q[0], float(d), float(m)) + 1e-8 * energy


finite = st.floats(-1e3, 1e3, width=32).filter(lambda x: x == 0 or abs(x) > 1e-20)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.uint8, (2, 64), elements=st.integers(0, 15)), st.lists(finite, min_size=8, max_size=8))
def test_q8_search_never_errs_by_more_than_a_step(q: npt.NDArray[np.uint8], numbers: list[float]) -> None:
    scale = np.array(numbers[:4], dtype=np.float32).reshape(2, 2)
    minimum = np.array(numbers[4:], dtype=np.float32).reshape(2, 2)
    stored, step, zero = affine_to_q8(q, scale, minimum)
    exact = q.reshape(2, 2, 32) * scale[:, :, None].astype(np.float64) + minimum[:, :, None]
    found = (stored.reshape(2, 2, 32) - zero[:, :, None].astype(np.float64)) * step[:, :, None]
    reach = np.maximum(np.ptp(exact, axis=2), np.abs(exact).max(axis=2))[:, :, None]
    assert np.all(np.abs(found - exact) <= reach / 255 * 1.01 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, (2, 64), elements=finite))
def test_dense_q8_never_errs_by_more_than_a_step(weights: F32) -> None:
    found = pack_q8_affine(weights).dequantize().astype(np.float64).reshape(2, 2, 32)
    exact = weights.astype(np.float64).reshape(2, 2, 32)
    reach = np.maximum(np.ptp(exact, axis=2), np.abs(exact).max(axis=2))[:, :, None]
    assert np.all(np.abs(found - exact) <= reach / 255 * 1.01 + 1e-12)


@pytest.mark.parametrize(
    ("pack", "limit"), [(pack_q8_affine, 0.006), (pack_q8_symmetric, 0.007), (pack_q4_affine, 0.085)]
)
def test_dense_packers_stay_within_their_error(pack: Packer, limit: float) -> None:
    weights = gaussian(64, 512)
    assert 0 < relative_rms_error(weights, pack(weights).dequantize()) < limit


def test_q4_search_beats_min_max() -> None:
    weights = gaussian(64, 512)
    blocks = weights.reshape(64, -1, BLOCK)
    low, step = blocks.min(axis=2), np.ptp(blocks, axis=2) / 15
    q = np.rint((blocks - low[:, :, None]) / step[:, :, None]).astype(np.uint8).reshape(weights.shape)
    plain = relative_rms_error(weights, pack_q4_sum(q, step, low).dequantize())
    assert relative_rms_error(weights, pack_q4_affine(weights).dequantize()) < 0.97 * plain


@pytest.mark.parametrize("pack", [pack_q8_affine, pack_q8_symmetric, pack_q4_affine])
@pytest.mark.parametrize("value", [0.0, 3.5, -0.25])
def test_constant_blocks_survive(pack: Packer, value: float) -> None:
    weights = np.full((2, 64), value, dtype=np.float32)
    np.testing.assert_allclose(pack(weights).dequantize(), weights, rtol=1e-6)


def test_packing_is_reproducible() -> None:
    blocks = quantised("Q4_1", gaussian())
    first, second = pack_q8_affine(blocks), pack_q8_affine(blocks)
    for name, array in first.arrays.items():
        assert array.tobytes() == second.arrays[name].tobytes()


def test_concat_stacks_rows_and_fills_what_is_implied() -> None:
    wide, raw = pack_q8_affine(gaussian(seed=1)), pack_q8_0(quantised("Q8_0", gaussian(seed=2)))
    both = Packed.concat([wide, raw])
    assert both.shape == (48, 256)
    np.testing.assert_array_equal(both.dequantize(), np.concatenate([wide.dequantize(), raw.dequantize()]))

    plain = pack_q4_0(quantised("Q4_0", gaussian(seed=3)))
    sums = pack_q4_native(quantised("Q4_1", gaussian(seed=4)))
    mixed = Packed.concat([plain, sums])
    assert mixed.kind == "q4_sum"
    np.testing.assert_array_equal(mixed.dequantize(), np.concatenate([plain.dequantize(), sums.dequantize()]))

    dense = Packed.concat([pack_f32(gaussian(seed=5)), pack_f32(gaussian(seed=6))])
    np.testing.assert_array_equal(dense.dequantize(), np.concatenate([gaussian(seed=5), gaussian(seed=6)]))


def test_concat_refuses_what_would_need_rounding() -> None:
    with pytest.raises(UsageError, match="cannot stack"):
        Packed.concat([pack_q8_affine(gaussian()), pack_q4_affine(gaussian())])


def test_columns_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"\(4, 40\)"):
        pack_q8_affine(np.zeros((4, 40), dtype=np.float32))


def test_a_wider_source_is_not_called_native_4_bit() -> None:
    with pytest.raises(UsageError, match="Q8_0"):
        pack_q4_native(quantised("Q8_0", gaussian()))


def test_int8_per_channel_bounds_its_error_and_survives_zero_rows() -> None:
    weights = gaussian(32, 512)
    weights[3] = 0
    q, scale = int8_per_channel(weights)
    restored = q.astype(np.float32) * scale[:, None]
    assert relative_rms_error(weights, restored) < 0.01
    assert not restored[3].any()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "affine"])
def test_onnxruntime_reads_the_layout_as_we_mean_it(kind: str) -> None:
    """MatMulNBits at full activation precision, against the dequantised weights in numpy."""
    weights = gaussian(48, 128)
    packed = {
        "Q4_0": lambda: pack_q4_native(quantised("Q4_0", weights)),
        "Q4_1": lambda: pack_q4_native(quantised("Q4_1", weights)),
        "Q8_0": lambda: pack_q8_0(quantised("Q8_0", weights)),
        "affine": lambda: pack_q8_affine(quantised("Q4_1", weights)),
    }[kind]()
    x = np.random.default_rng(9).normal(size=(5, 128)).astype(np.float32)
    product = matmul_nbits(packed, x)
    if "C" in packed.arrays:
        product += x.reshape(5, 4, BLOCK).sum(axis=2) @ packed.arrays["C"]
    np.testing.assert_allclose(product, x @ packed.dequantize().T, rtol=1e-4, atol=1e-5)


def matmul_nbits(packed: Packed, x: F32) -> F32:
    """x through ONNX Runtime's operator, weights as inputs, accuracy level 0 (f32 activations)."""
    import onnx_ir as ir

    from isthmus.splitter.providers import choose_provider
    from isthmus.splitter.sessions import configure_threads, open_session

    configure_threads()  # the process has one pool, made before its first session
    rows, cols = packed.shape
    feeds: dict[str, npt.NDArray[np.generic]] = {"x": x}
    for name in ("B", "scales", "zero_points"):
        if name in packed.arrays:
            feeds[name] = packed.arrays[name]
    inputs = [
        ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.FLOAT if array.dtype == np.float32 else ir.DataType.UINT8),
            shape=ir.Shape(array.shape),
        )
        for name, array in feeds.items()
    ]
    attributes = {"K": cols, "N": rows, "bits": packed.bits, "block_size": BLOCK, "accuracy_level": 0}
    node = ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft")
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 20, "com.microsoft": 1}, name="g")
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = open_session(model, Path.cwd(), choose_provider("cpu"), "MatMulNBits")
    result: F32 = session.run(None, feeds)[0]
    return result

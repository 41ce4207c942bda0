"""GGUF blocks are opened to exactly what the gguf package's own dequantiser gives."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from isthmus.protocol.errors import ModelFileError, UnsupportedModelError
from isthmus.quant.gguf_blocks import BLOCK_TYPES, GGUFBlocks


def random_blocks(kind: str, rows: int = 6, cols: int = 512, seed: int = 0) -> GGUFBlocks:
    """Random bytes are valid blocks once their f16 scales are ordinary numbers."""
    generator = np.random.default_rng(seed)
    layout = BLOCK_TYPES[kind]
    raw = generator.integers(0, 256, (rows * cols // layout.columns, layout.nbytes), dtype=np.uint8)
    halves = 1 if kind in ("Q4_0", "Q5_0", "Q8_0") else 2
    scales = generator.normal(0, 0.1, (len(raw), halves)).astype("<f2")
    raw[:, : 2 * halves] = scales.view(np.uint8)
    return GGUFBlocks(kind, rows, cols, raw.reshape(rows, -1))


@pytest.mark.parametrize("kind", sorted(BLOCK_TYPES))
def test_dense_equals_ggufs_dequantiser(kind: str) -> None:
    blocks = random_blocks(kind)
    expected = gguf.quants.dequantize(blocks.raw, gguf.GGMLQuantizationType[kind]).reshape(6, 512)
    np.testing.assert_allclose(blocks.dense(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", sorted(BLOCK_TYPES))
def test_affine_parts_have_the_stated_shapes_and_ranges(kind: str) -> None:
    blocks = random_blocks(kind)
    q, scale, minimum = blocks.to_affine()
    assert q.shape == (6, 512)
    assert scale.shape == (6, 16)
    if kind == "Q8_0":
        assert minimum is None
        assert q.dtype == np.int8
    else:
        assert minimum is not None
        assert minimum.shape == (6, 16)
        assert q.dtype == np.uint8
        assert int(q.max()) == 2**blocks.bits - 1


def test_rows_can_be_reordered_in_the_raw_form() -> None:
    blocks = random_blocks("Q4_1")
    order = np.array([3, 0, 5, 1, 4, 2])
    moved = GGUFBlocks("Q4_1", 6, 512, blocks.raw[order])
    np.testing.assert_array_equal(moved.dense(), blocks.dense()[order])


def test_a_type_without_exact_import_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Q6_K"):
        GGUFBlocks("Q6_K", 1, 256, np.zeros((1, 210), dtype=np.uint8))


@pytest.mark.parametrize(("rows", "cols", "width"), [(2, 64, 39), (3, 64, 40), (2, 48, 30)])
def test_sizes_that_disagree_are_refused(rows: int, cols: int, width: int) -> None:
    with pytest.raises(ModelFileError):
        GGUFBlocks("Q4_1", rows, cols, np.zeros((2, width), dtype=np.uint8))


def test_a_scale_that_is_not_finite_is_refused() -> None:
    blocks = random_blocks("Q4_0")
    raw = blocks.raw.copy()
    raw[0, :2] = np.array([np.inf], dtype="<f2").view(np.uint8)
    with pytest.raises(ModelFileError, match="not finite"):
        GGUFBlocks("Q4_0", 6, 512, raw).to_affine()

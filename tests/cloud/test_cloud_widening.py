"""Where widened weights take over: the search, what it is remembered by, and that answers hardly move."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.cloud.linear import Precision, make_linear
from isthmus.cloud.linear_int4 import Int4Linear
from isthmus.cloud.linear_int8 import Int8Linear
from isthmus.cloud.linear_integer import IntegerLinear
from isthmus.cloud.widening import (
    KEPT_WIDE_ROWS,
    NEVER,
    ROWS,
    crossover,
    free_bytes,
    kernel_and_widened_s,
    tune_widening,
)
from tests.cloud.cloud_load import busy_for

CPU = torch.device("cpu")


def make(precision: str, shape: tuple[int, int] = (64, 64)) -> IntegerLinear:
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    linear, _ = make_linear([weight], None, Precision(precision), CPU)
    assert isinstance(linear, IntegerLinear)
    return linear


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, on a machine that says it has nothing else to do."""
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    busy_for(monkeypatch, 0)
    return tmp_path


@pytest.mark.parametrize(
    ("kernel", "widened", "expected"),
    [
        ((0, 10), (300, 2), 48),  # lines that cross at 37.5 rows: the next of ROWS
        ((0, 10), (320, 0), 32),  # exactly there: widening is no slower
        ((0, 10), (0, 1), ROWS[0]),
        ((0, 1), (0, 10), NEVER),
        ((0, 1), (512, 0), 512),
        ((0, 1), (513, 0), NEVER),
    ],
)
def test_crossover_of_two_lines(
    kernel: tuple[float, float], widened: tuple[float, float], expected: int
) -> None:
    asked: list[int] = []

    def seconds(rows: int) -> tuple[float, float]:
        asked.append(rows)
        return kernel[0] + kernel[1] * rows, widened[0] + widened[1] * rows

    assert crossover(seconds) == expected
    assert len(asked) <= 4
    assert set(asked) <= set(ROWS)


def test_every_crossing_is_found() -> None:
    for rows in ROWS:
        assert crossover(lambda n, rows=rows: (float(n), float(rows))) == rows  # type: ignore[misc]


def test_each_kind_and_shape_is_measured_once_and_remembered(own_cache: Path) -> None:
    asked: set[tuple[int, str, tuple[int, int]]] = set()

    def seconds(layers: Sequence[IntegerLinear], rows: int) -> tuple[float, float]:
        first = layers[0]
        asked.add((len(layers), first.kind, first.shape))
        return rows, {"int8": 24.0, "int4": 96.0}[first.kind] + first.shape[0] // 128

    dense, _ = make_linear([np.ones((8, 8), np.float32)], None, Precision.BF16, CPU)
    linears = [make("int8"), make("int4"), make("int8"), dense, make("int4", (128, 64))]
    chosen = tune_widening(linears, CPU, keep_bytes=0, seconds=seconds)
    assert chosen == {"int8 64x64": 24, "int4 64x64": 96, "int4 128x64": 128}
    assert [linear.wide_rows for linear in linears if isinstance(linear, IntegerLinear)] == [24, 96, 24, 128]
    assert asked == {(2, "int8", (64, 64)), (1, "int4", (64, 64)), (1, "int4", (128, 64))}

    def not_again(layers: Sequence[IntegerLinear], rows: int) -> tuple[float, float]:
        raise AssertionError("measured again")

    again = make("int8")
    assert tune_widening([again], CPU, keep_bytes=0, seconds=not_again) == {"int8 64x64": 24}
    assert again.wide_rows == 24
    (path,) = (own_cache / "cloud").glob("widening-*.json")
    path.write_text(json.dumps({"int8 64x64": "many", "int4 64x64": -3}))
    with pytest.raises(AssertionError, match="measured again"):
        tune_widening([again], CPU, keep_bytes=0, seconds=not_again)


def test_a_busy_machine_keeps_the_defaults_and_tries_again(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy_for(monkeypatch, 1000)
    linears = [make("int8"), make("int4")]
    assert tune_widening(linears, CPU, keep_bytes=0) == {"int8 64x64": 20, "int4 64x64": 64}
    assert not (own_cache / "cloud").exists()
    busy_for(monkeypatch, 0)
    found = tune_widening(linears, CPU, keep_bytes=0, seconds=lambda _, rows: (rows, 32))
    assert found == {"int8 64x64": 32, "int4 64x64": 32}
    busy_for(monkeypatch, 1000)
    kept = tune_widening([make("int8"), make("int4")], CPU, keep_bytes=1 << 20)
    assert kept == {"int8+bf16 64x64": KEPT_WIDE_ROWS, "int4+bf16 64x64": KEPT_WIDE_ROWS}


def test_large_matrices_are_measured_by_their_first_outputs() -> None:
    sizes: set[tuple[int, int]] = set()

    def seconds(layers: Sequence[IntegerLinear], rows: int) -> tuple[float, float]:
        sizes.update(linear.shape for linear in layers)
        return 1.0, 1.0

    large = Int8Linear(torch.zeros(70_000, 64, dtype=torch.int8), torch.ones(70_000).bfloat16(), None)
    assert tune_widening([large], CPU, keep_bytes=0, seconds=seconds) == {"int8 70000x64": ROWS[0]}
    assert sizes == {(32768, 64)}


def test_copies_are_kept_where_all_of_them_fit() -> None:
    def seconds(layers: Sequence[IntegerLinear], rows: int) -> tuple[float, float]:
        assert all(linear.wide is not None for linear in layers)
        return rows, 8

    linears = [make("int8"), make("int4", (128, 64))]
    needed = 2 * (64 * 64 + 128 * 64)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    each_time = [linear.widened(x) for linear in linears]
    assert "int8 64x64" in tune_widening(linears, CPU, keep_bytes=needed - 1, seconds=lambda *_: (1, 1))
    assert all(linear.wide is None for linear in linears)
    chosen = tune_widening(linears, CPU, keep_bytes=needed, seconds=seconds)
    assert chosen == {"int8+bf16 64x64": 8, "int4+bf16 128x64": 8}
    for linear, expected in zip(linears, each_time, strict=True):
        assert linear.wide is not None
        assert linear.wide.dtype == torch.bfloat16
        assert linear.wide.shape == linear.shape
        torch.testing.assert_close(linear(x), expected, rtol=2**-7, atol=1e-2)
        torch.testing.assert_close(linear.first_rows(64).widened(x), expected[:, :64], rtol=2**-7, atol=1e-2)
    assert free_bytes(CPU) > needed
    kept = [linear.wide for linear in linears]
    tune_widening(linears, CPU, seconds=seconds)
    assert all(a is b.wide for a, b in zip(kept, linears, strict=True)), "not made a second time"


def test_a_layer_without_a_kernel_is_left_alone() -> None:
    linear = make("int4")
    assert isinstance(linear, Int4Linear)
    bare = Int4Linear(None, linear.nibbles, linear.scales_zeros, None)
    assert tune_widening([bare], CPU) == {}
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    assert torch.equal(bare(x), linear.widened(x))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_way_taken_changes_answers_by_rounding_only(precision: str) -> None:
    linear = make(precision, (192, 96))
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    answers = []
    for rows in (1, 17):
        linear.wide_rows = rows
        answers.append(linear(x).float())
    assert (answers[0] - answers[1]).norm() / answers[0].norm() < 2**-8
    assert min(kernel_and_widened_s([linear], 4)) > 0

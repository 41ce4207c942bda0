"""Graphs of row-wise parts, replayed by calling: the same rows as without, whatever is in the padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from isthmus.cloud.graphs import BUCKETS, RowGraphs, cuda_capture, tune_graphs
from isthmus.cloud.kv import BlockTable, PagePool
from isthmus.cloud.kv_store import StepSequence
from isthmus.cloud.model import CloudModel, model_logits
from isthmus.quant.measure import max_rel_logit_error
from isthmus.splitter.checkpoint import open_checkpoint
from tests.tiny import make_tiny

IDS = np.random.default_rng(7).integers(0, 320, 150).tolist()
SAME = 1e-5  # of max|logit|, in fp32: products of other row counts sum in another order


def eager(body: Callable[[], None]) -> Callable[[], None]:
    """A capture without a GPU: running again is calling again."""
    return body


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CloudModel:
    with open_checkpoint(make_tiny("qwen3", tmp_path_factory.mktemp("tiny") / "qwen3")) as checkpoint:
        return CloudModel.load(checkpoint)


@pytest.fixture(autouse=True)
def plain_again(model: CloudModel) -> None:
    model.graphs = None


@pytest.mark.parametrize(
    ("num_rows", "bucket"),
    [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (33, 64), (64, 64), (65, 128), (128, 128), (129, None)],
)
def test_rows_are_padded_to_the_next_bucket(num_rows: int, bucket: int | None) -> None:
    assert RowGraphs(eager).bucket(num_rows) == bucket


def test_a_bucket_that_was_not_kept_is_not_replaced_by_a_wider_one() -> None:
    graphs = RowGraphs(eager)
    graphs.kept = (1, 16)
    assert [graphs.bucket(count) for count in (1, 2, 8, 9, 16, 17)] == [1, None, None, 16, 16, None]


@pytest.mark.parametrize("num_rows", [1, 3, 8, 128, 129])
def test_padding_never_reaches_a_row(num_rows: int) -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x @ weight).cumsum(-1) + y[:, 0]

    graphs = RowGraphs(eager)
    graphs.run("part", 0, function, torch.full((128, 6), torch.nan), torch.full((128, 1, 4), torch.inf))
    x, y = torch.randn(num_rows, 6), torch.randn(num_rows, 1, 4)
    found = graphs.run("part", 0, function, x, y)
    assert found.shape == (num_rows, 4)
    torch.testing.assert_close(found, function(x, y))


def test_each_part_layer_and_bucket_is_captured_once() -> None:
    captured: list[int] = []

    def capture(body: Callable[[], None]) -> Callable[[], None]:
        captured.append(1)
        return body

    graphs = RowGraphs(capture)
    for _ in range(2):
        for layer in (0, 1):
            for count in (1, 3, 4, 200):
                scaled = graphs.run(
                    "twice", layer, lambda x, layer=layer: x * (layer + 2), torch.ones(count, 2)
                )
                assert (scaled == layer + 2).all()
    assert len(captured) == 4


@pytest.mark.parametrize("num_tokens", [1, 5, 64, 100, 150])
def test_logits_are_those_of_the_plain_model(model: CloudModel, num_tokens: int) -> None:
    plain = model_logits(model, IDS[:num_tokens])
    model.graphs = RowGraphs(eager)
    for _ in range(2):
        assert max_rel_logit_error(plain, model_logits(model, IDS[:num_tokens])) < SAME


def test_sessions_of_many_depths_keep_to_themselves(model: CloudModel) -> None:
    """Steps of changing row counts, whose answers are kept while later steps write the same buffers."""

    def steps() -> list[Tensor]:
        store = model.new_store(200)
        pool = PagePool(200, on_alloc=store.zero_pages)
        last = model.spec.num_layers
        tables = [BlockTable(pool, first_layer=k, num_layers=last) for k in (0, 0, 1, last - 1)]
        random = torch.Generator().manual_seed(0)
        kept = []
        for counts in ((20, 3, 7, 1), (1, 1, 1, 1), (2, 1, 1, 5)):
            inputs = [torch.randn(count, model.spec.hidden, generator=random) for count in counts]
            for table, count in zip(tables, counts, strict=True):
                store.copy_pages(table.ensure(table.length + count))
            batch = model.prepare(store, [StepSequence(t, c) for t, c in zip(tables, counts, strict=True)])
            kept.append(model.run(batch, inputs))
            for table, count in zip(tables, counts, strict=True):
                table.advance(count)
        return kept

    plain = steps()
    model.graphs = RowGraphs(eager)
    for found, wanted in zip(steps(), plain, strict=True):
        assert max_rel_logit_error(wanted.numpy(), found.numpy()) < SAME


@pytest.mark.parametrize(
    ("with_graphs", "kept"),
    [
        ({1: 0.5, 4: 0.5, 8: 0.5}, (1, 4, 8)),
        ({1: 0.5, 4: 0.99, 8: 1.5}, (1,)),
        ({1: 1.0, 4: 1.0, 8: 1.1}, ()),
    ],
)
def test_what_is_not_faster_is_not_kept(
    model: CloudModel, with_graphs: dict[int, float], kept: tuple[int, ...]
) -> None:
    def step_s(num_sessions: int) -> float:
        return 1.0 if model.graphs is None else with_graphs[num_sessions]

    report = tune_graphs(model, step_s, capture=lambda: eager, buckets=(1, 4, 8))
    assert report["kept"] == kept
    assert report["4"] == f"1000.00>{with_graphs[4] * 1e3:.2f} ms"
    if kept:
        assert model.graphs is not None
        assert [model.graphs.bucket(count) for count in (1, 2, 8)] == [
            count if count in kept else None for count in (1, 4, 8)
        ]
    else:
        assert model.graphs is None


def test_a_capture_that_fails_leaves_the_model_as_it_was(model: CloudModel, tmp_path: Path) -> None:
    def refuse(body: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    def step_s(num_sessions: int) -> float:
        model_logits(model, IDS[:num_sessions])
        return 1.0

    report = tune_graphs(model, step_s, capture=lambda: refuse, buckets=(1, 4))
    assert report == {"kept": (), "failed": "operation not permitted when stream is capturing"}
    assert model.graphs is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graphs_answer_as_the_eager_model(tmp_path: Path) -> None:
    with open_checkpoint(make_tiny("qwen3", tmp_path / "qwen3")) as checkpoint:
        model = CloudModel.load(checkpoint, device="cuda", precision="bf16")
    plain = [model_logits(model, IDS[:count]) for count in BUCKETS]
    model.graphs = RowGraphs(cuda_capture())
    for _ in range(2):  # captured, then replayed
        for count, wanted in zip(BUCKETS, plain, strict=True):
            assert max_rel_logit_error(wanted, model_logits(model, IDS[:count])) < 2e-2

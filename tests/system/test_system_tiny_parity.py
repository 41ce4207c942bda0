"""Every family cut at every K: blocks in ONNX Runtime, the rest in PyTorch, against transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.cloud.kv import BlockTable, PagePool, columns_for
from isthmus.cloud.kv_store import StepSequence
from isthmus.cloud.model import CloudModel
from isthmus.splitter.checkpoint import open_checkpoint
from isthmus.splitter.pack import Pack
from isthmus.splitter.runner import BlockRunner
from tests.packs import F32, pack_checkpoint, reference_logits
from tests.tiny import LLAMA3_ROPE, make_tiny

TOLERANCE = 1e-4  # max|Δlogit| / max|logit|
PROMPT = [3 + (i * 37) % 240 for i in range(41)]


@dataclass(frozen=True)
class Case:
    family: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.family, *sorted(self.options)])


CASES = [
    Case("llama"),
    Case("llama", {"tied": True}),
    Case("llama", {"rope_parameters": LLAMA3_ROPE}),
    Case("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    Case("llama", {"attention_bias": True, "mlp_bias": True}),
    Case("llama", {"num_key_value_heads": 1}),
    Case("mistral"),
    Case("mistral", {"sliding_window": 16}),
    Case("qwen2"),
    Case("qwen2", {"tied": True}),
    Case("qwen3"),
    Case("qwen3", {"tied": True}),
]


class Halves:
    """One model on both sides: a pack for the edge, the torch decoder for the cloud."""

    def __init__(self, source: Path, pack: Pack) -> None:
        self.runner = BlockRunner(pack)
        self.num_layers = pack.spec.num_layers
        self.runner.load(range(self.num_layers), embed=True, head=True)
        with open_checkpoint(source) as checkpoint:
            self.model = CloudModel.load(checkpoint)

    def edge_rows(self, split: int, chunks: list[list[int]]) -> list[F32]:
        """Boundary rows of each chunk, computed one chunk after another."""
        cache = self.runner.new_cache(range(split))
        return [
            self.runner.forward(cache, self.runner.embed(ids), start_layer=0, stop_layer=split)
            for ids in chunks
        ]

    @torch.inference_mode()
    def cloud_rows(self, split: int, inputs: list[Any]) -> F32:
        """Final hidden rows from boundary rows (or ids at K = 0), chunk after chunk."""
        total = sum(len(part) for part in inputs)
        pages = self.num_layers * columns_for(total)
        store = self.model.new_store(pages)
        pool = PagePool(pages, on_alloc=store.zero_pages)
        table = BlockTable(pool, first_layer=split, num_layers=self.num_layers)
        out = []
        for part in inputs:
            table.ensure(table.length + len(part))
            batch = self.model.prepare(store, [StepSequence(table, len(part))])
            rows = self.model.embed(part) if split == 0 else self.model.rows(part)
            for layer in range(split, self.num_layers):
                rows = self.model.layer(layer, rows, batch)
            table.advance(len(part))
            out.append(np.array(rows.numpy()))
        return np.concatenate(out)

    @torch.inference_mode()
    def logits(self, split: int, chunks: list[list[int]], head: str) -> F32:
        if split == self.num_layers:
            hidden = np.concatenate(self.edge_rows(split, chunks))
        else:
            hidden = self.cloud_rows(split, chunks if split == 0 else self.edge_rows(split, chunks))
        if head == "edge":
            return self.runner.head(hidden)
        return np.array(self.model.head(self.model.rows(hidden)).numpy())


def off(got: F32, wanted: F32) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.fixture(scope="module", params=CASES, ids=str)
def halves(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Halves, F32]:
    case: Case = request.param
    root = tmp_path_factory.mktemp(case.family)
    source = make_tiny(case.family, root / "source", seed=11, **case.options)
    return Halves(source, pack_checkpoint(source, root / "pack")), reference_logits(source, PROMPT)


@pytest.mark.parametrize("head", ["cloud", "edge"])
def test_every_k_agrees_with_transformers(halves: tuple[Halves, F32], head: str) -> None:
    """`head` is the shape: the cloud's for prefix, the edge's for U (and for local, K = N)."""
    both, wanted = halves
    found = {split: off(both.logits(split, [PROMPT], head), wanted) for split in range(both.num_layers + 1)}
    assert max(found.values()) <= TOLERANCE, found


def test_chunked_prefill_equals_whole(halves: tuple[Halves, F32]) -> None:
    both, wanted = halves
    chunks = [PROMPT[:1], PROMPT[1:18], PROMPT[18:19], PROMPT[19:]]
    for split in range(both.num_layers + 1):
        chunked = both.logits(split, chunks, "cloud")
        assert off(chunked, wanted) <= TOLERANCE
        assert off(chunked, both.logits(split, [PROMPT], "cloud")) <= 1e-5

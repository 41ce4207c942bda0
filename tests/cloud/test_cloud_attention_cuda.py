"""The packing of CUDA's attention, on CPU: its reference against `AttentionBatch`, and a GPU's own check."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isthmus.cloud.attention import AttentionBatch
from isthmus.cloud.attention_cuda import (
    Packing,
    VarlenBatch,
    cuda_attention,
    disagreement,
    reference_attention,
    varlen_obstacle,
)
from isthmus.cloud.kv import BlockTable, PagePool
from isthmus.cloud.kv_store import KVStore, StepSequence

CPU = torch.device("cpu")
NUM_LAYERS, KV_HEADS, DIM = 3, 2, 8


@dataclass
class World:
    """Sequences over one store, stepped through both ways of attending."""

    heads: int
    window: int | None
    sequences: list[BlockTable] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = KVStore(400, num_kv_heads=KV_HEADS, head_dim=DIM, dtype=torch.float32, device=CPU)
        self.pool = PagePool(400, on_alloc=self.store.zero_pages)
        self.random = torch.Generator().manual_seed(0)
        # Whatever a sequence does not own must not come through.
        self.store.data[: self.store.num_pages] = float("nan")

    def step(self, picks: list[tuple[BlockTable, int]]) -> None:
        for table, rows in picks:
            self.store.copy_pages(table.ensure(table.length + rows))
        steps = [StepSequence(table, rows) for table, rows in picks]
        count = sum(rows for _, rows in picks)
        plain = AttentionBatch(
            steps,
            store=self.store,
            num_layers=NUM_LAYERS,
            num_heads=self.heads,
            cos=torch.ones(count, 1, DIM),
            sin=torch.zeros(count, 1, DIM),
            sliding_window=self.window,
        )
        packed = VarlenBatch(
            steps,
            store=self.store,
            num_layers=NUM_LAYERS,
            sliding_window=self.window,
            attention=reference_attention,
        )
        for layer in range(NUM_LAYERS):
            active = sum(table.first_layer <= layer for table, _ in picks)
            rows = plain.rows_at(layer)
            if not rows:
                continue
            q = torch.randn(rows, self.heads, DIM, generator=self.random)
            kv = torch.randn(rows, 2 * KV_HEADS, DIM, generator=self.random)
            wanted = plain.attend(layer, q, kv)  # writes the keys and values
            torch.testing.assert_close(packed.attend(layer, active, q), wanted, rtol=1e-5, atol=2e-6)
        for table, rows in picks:
            table.advance(rows)


@given(
    depths=st.lists(st.integers(0, NUM_LAYERS - 1), min_size=1, max_size=5).map(sorted),
    data=st.data(),
    heads=st.sampled_from([2, 6]),
    window=st.sampled_from([None, 1, 9, 33]),
)
@settings(max_examples=40)
def test_any_schedule_equals_the_gathering_path(
    depths: list[int], data: st.DataObject, heads: int, window: int | None
) -> None:
    world = World(heads, window)
    tables = [BlockTable(world.pool, first_layer=depth, num_layers=NUM_LAYERS) for depth in depths]
    rows = st.one_of(st.just(1), st.sampled_from([2, 16, 17, 40]))
    for _ in range(data.draw(st.integers(1, 3))):
        chosen = data.draw(st.sets(st.integers(0, len(tables) - 1), min_size=1))
        world.step([(tables[number], data.draw(rows)) for number in sorted(chosen)])
    world.step([(table, 1) for table in tables])


def test_keys_outside_the_window_are_not_read() -> None:
    store = KVStore(40, num_kv_heads=KV_HEADS, head_dim=DIM, dtype=torch.float32, device=CPU)
    table = BlockTable(PagePool(40, on_alloc=store.zero_pages), first_layer=0, num_layers=1)
    table.ensure(101)
    table.advance(100)
    seen: list[Packing] = []

    def watch(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        assert k.shape == v.shape == (int(packing.cu_k[-1]), KV_HEADS, DIM)
        seen.append(packing)
        return reference_attention(q, k, v, packing)

    for rows, window in ((1, 30), (20, 30), (1, None)):
        table.ensure(100 + rows)
        batch = VarlenBatch(
            [StepSequence(table, rows)], store=store, num_layers=1, sliding_window=window, attention=watch
        )
        batch.attend(0, 1, torch.ones(rows, 2, DIM))
    assert [(p.max_q, p.max_k, p.window) for p in seen] == [(1, 30, None), (20, 49, 30), (1, 101, None)]


def test_all_that_a_layer_uses_is_on_the_device() -> None:
    """Without a GPU, the meta device shows that index tensors are moved: it mixes with no other."""
    meta = torch.device("meta")
    store = KVStore(40, num_kv_heads=KV_HEADS, head_dim=DIM, dtype=torch.bfloat16, device=meta)
    pool = PagePool(40, on_alloc=store.zero_pages)
    tables = [BlockTable(pool, first_layer=layer, num_layers=2) for layer in (0, 1)]
    for table, rows in zip(tables, (20, 3), strict=True):
        table.ensure(rows)

    def like_the_kernel(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        assert {t.device for t in (q, k, v, packing.cu_q, packing.cu_k)} == {meta}
        assert packing.cu_q.dtype == packing.cu_k.dtype == torch.int32
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert k.shape == v.shape
        seen.append((len(q), len(k), len(packing.cu_q)))
        return torch.empty_like(q)

    seen: list[tuple[int, int, int]] = []
    steps = [StepSequence(table, rows) for table, rows in zip(tables, (20, 3), strict=True)]
    batch = VarlenBatch(steps, store=store, num_layers=2, sliding_window=None, attention=like_the_kernel)
    for layer, active, rows in ((0, 1, 20), (1, 2, 23)):
        q = torch.empty(rows, 2, DIM, dtype=torch.bfloat16, device=meta)
        assert batch.attend(layer, active, q).shape == q.shape
    assert seen == [(20, 20, 2), (23, 23, 3)]


def test_the_check_passes_what_is_right_and_names_what_is_not() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert disagreement(reference_attention, CPU, dtype, 16) is None

    def from_the_top(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        """Causal from the first key instead of from the last: a sequence sees too little of its past."""
        out = torch.empty_like(q)
        for i in range(len(packing.cu_q) - 1):
            rows, keys = slice(*packing.cu_q[i : i + 2]), slice(*packing.cu_k[i : i + 2])
            n = min(len(q[rows]), len(k[keys]))
            one = torch.tensor([0, n], dtype=torch.int32)
            out[rows] = reference_attention(
                q[rows], k[keys][:n], v[keys][:n], Packing(one, one, n, n, packing.window)
            )
        return out

    def nan(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        return torch.full_like(q, float("nan"))

    def wider(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        window = None if packing.window is None else packing.window + 1
        return reference_attention(
            q, k, v, Packing(packing.cu_q, packing.cu_k, packing.max_q, packing.max_k, window)
        )

    for wrong in (from_the_top, nan, wider):
        found = disagreement(wrong, CPU, torch.float32, 16)
        assert found is not None
        assert found.startswith("varlen_attn is off by"), wrong


def test_without_a_gpu_the_gathering_path_stays_and_says_why() -> None:
    """The kernel itself refuses the CPU, which the check reports instead of raising."""
    assert varlen_obstacle(CPU, torch.bfloat16, 64) == "varlen_attn runs on CUDA only, not on cpu"
    cuda = torch.device("cuda")
    assert varlen_obstacle(cuda, torch.float32, 64) == "varlen_attn takes no torch.float32"
    for head_dim in (12, 320):
        assert varlen_obstacle(cuda, torch.bfloat16, head_dim) == f"varlen_attn takes no heads of {head_dim}"
    found = disagreement(cuda_attention, CPU, torch.bfloat16, 16)
    assert found is not None
    assert found.startswith("varlen_attn fails here:")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_cuda_attention_equals_the_reference(head_dim: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert disagreement(cuda_attention, torch.device("cuda"), dtype, head_dim) is None

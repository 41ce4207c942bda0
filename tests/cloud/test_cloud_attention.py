"""Attention over pages: against a plain loop, for any mix of depths, positions, chunk sizes and windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.cloud import attention
from isthmus.cloud.attention import AttentionBatch, apply_rope, chunk_attention
from isthmus.cloud.kv import BlockTable, PagePool
from isthmus.cloud.kv_store import KVStore, StepSequence
from isthmus.protocol.errors import IsthmusError

NUM_LAYERS, HEADS, KV_HEADS, DIM = 3, 6, 2, 8


def plain_attention(q: Tensor, keys: Tensor, values: Tensor, position: int, window: int | None) -> Tensor:
    """One query row q [heads, d] at `position` over keys, values [position + 1, kv_heads, d], in f64."""
    first = 0 if window is None else max(0, position - window + 1)
    out = torch.empty_like(q, dtype=torch.float64)
    for head in range(q.shape[0]):
        k = keys[first : position + 1, head * KV_HEADS // HEADS].double()
        v = values[first : position + 1, head * KV_HEADS // HEADS].double()
        out[head] = (k @ q[head].double() / q.shape[1] ** 0.5).softmax(0) @ v
    return out


@dataclass
class World:
    """A store, its pool, and per sequence and layer the true keys and values."""

    dtype: torch.dtype = torch.float32
    window: int | None = None
    num_pages: int = 400
    store: KVStore = field(init=False)
    sequences: list[tuple[BlockTable, list[Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = KVStore(
            self.num_pages,
            num_kv_heads=KV_HEADS,
            head_dim=DIM,
            dtype=self.dtype,
            device=torch.device("cpu"),
        )
        self.pool = PagePool(self.num_pages, on_alloc=self.store.zero_pages)
        self.random = torch.Generator().manual_seed(0)

    def join(self, first_layer: int) -> int:
        table = BlockTable(self.pool, first_layer=first_layer, num_layers=NUM_LAYERS)
        empty = torch.zeros(0, 2 * KV_HEADS, DIM, dtype=self.dtype)
        self.sequences.append((table, [empty] * NUM_LAYERS))
        return len(self.sequences) - 1

    def batch(self, picks: list[tuple[int, int]]) -> AttentionBatch:
        """A step of (sequence, rows), in this order."""
        steps = []
        for number, rows in picks:
            table = self.sequences[number][0]
            self.store.copy_pages(table.ensure(table.length + rows))
            steps.append(StepSequence(table, rows))
        count = sum(rows for _, rows in picks)
        return AttentionBatch(
            steps,
            store=self.store,
            num_layers=NUM_LAYERS,
            num_heads=HEADS,
            cos=torch.ones(count, 1, DIM),
            sin=torch.zeros(count, 1, DIM),
            sliding_window=self.window,
        )

    def step(self, picks: list[tuple[int, int]]) -> float:
        """Runs a step through every layer; the largest difference from the plain loop."""
        batch = self.batch(picks)
        worst = 0.0
        for layer in range(NUM_LAYERS):
            running = [(n, rows) for n, rows in picks if self.sequences[n][0].first_layer <= layer]
            count = sum(rows for _, rows in running)
            assert batch.rows_at(layer) == count
            if not count:
                continue
            q = torch.randn(count, HEADS, DIM, generator=self.random).to(self.dtype)
            kv = torch.randn(count, 2 * KV_HEADS, DIM, generator=self.random).to(self.dtype)
            out = batch.attend(layer, q, kv)
            assert out.shape == q.shape
            assert torch.isfinite(out).all()  # `max` below would pass over NaN
            row = 0
            for number, rows in running:
                table, known = self.sequences[number]
                known[layer] = torch.cat([known[layer], kv[row : row + rows]])
                keys, values = known[layer].chunk(2, dim=1)
                for i in range(rows):
                    expected = plain_attention(q[row + i], keys, values, table.length + i, self.window)
                    worst = max(worst, float((out[row + i] - expected).abs().max()))
                row += rows
        for number, rows in picks:
            self.sequences[number][0].advance(rows)
        return worst


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """Entry layers (ascending) and steps of (sequence, rows)."""
    depths = sorted(draw(st.lists(st.integers(0, NUM_LAYERS - 1), min_size=1, max_size=6)))
    rows = st.one_of(st.just(1), st.integers(1, 5), st.sampled_from([16, 17, 40]))
    steps = []
    for _ in range(draw(st.integers(1, 4))):
        chosen = draw(st.sets(st.integers(0, len(depths) - 1), min_size=1))
        steps.append([(number, draw(rows)) for number in sorted(chosen)])
    return depths, steps


@given(
    schedule=schedules(), window=st.sampled_from([None, 1, 9, 33]), padding=st.sampled_from([0, 512 * 1024])
)
@settings(max_examples=60, deadline=None)
def test_any_schedule_equals_the_plain_loop(
    schedule: tuple[list[int], list[list[tuple[int, int]]]], window: int | None, padding: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MAX_PADDING_BYTES", padding)  # 0: one group for every length
        world = World(window=window)
        for depth in schedule[0]:
            world.join(depth)
        for picks in schedule[1]:
            assert world.step(picks) < 2e-6


def test_bf16_stays_within_its_rounding() -> None:
    world = World(dtype=torch.bfloat16)
    for depth in (0, 0, 1):
        world.join(depth)
    assert world.step([(0, 30), (1, 5), (2, 60)]) < 3e-2
    assert world.step([(0, 1), (1, 1), (2, 1)]) < 3e-2


def test_nothing_reads_other_pages() -> None:
    """NaN in every page but the sequences' own, free ones and another session's: none comes through."""
    world = World()
    stranger = world.join(0)
    world.step([(stranger, 64)])
    mine = [world.join(depth) for depth in (0, 0, 2)]
    world.step(list(zip(mine, (50, 3, 20), strict=True)))
    own = np.concatenate([world.sequences[n][0].pages.ravel() for n in mine])
    others = np.setdiff1d(np.arange(world.num_pages), own)
    world.store.data[torch.from_numpy(others)] = float("nan")
    assert world.step([(n, 1) for n in mine]) < 2e-6
    assert world.step([(n, 14) for n in mine]) < 2e-6, "allocated pages were zeroed"


def test_store_zeroes_copies_and_sizes_pages() -> None:
    world = World()
    number = world.join(0)
    world.step([(number, 20)])
    table, known = world.sequences[number]
    assert world.store.page_bytes == 16 * 2 * KV_HEADS * DIM * 4
    twin = table.fork()
    copies = twin.ensure(21)
    world.store.copy_pages(copies)
    assert len(copies) == NUM_LAYERS
    for layer in range(NUM_LAYERS):
        keys, values = world.store.gather(torch.from_numpy(twin.pages[layer : layer + 1]))
        stored = torch.cat([keys, values])[:, :20].transpose(0, 1)
        assert torch.equal(stored, known[layer])
    world.store.zero_pages(twin.pages[:, 1])
    assert not world.store.data[torch.from_numpy(twin.pages[:, 1])].any()
    assert world.store.data[torch.from_numpy(table.pages[:, 1])].any()


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's hook
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_decode_costs_the_same_number_of_operations_for_any_number_of_sequences() -> None:
    counts = []
    for num_sequences in (2, 20):
        world = World()
        for n in range(num_sequences):
            world.step([(world.join(0), 3 + n)])
        picks = [(n, 1) for n in range(num_sequences)]
        batch = world.batch(picks)
        q, kv = torch.randn(num_sequences, HEADS, DIM), torch.randn(num_sequences, 2 * KV_HEADS, DIM)
        with CountOps() as ops:
            batch.attend(1, q, kv)
        counts.append(ops.count)
    assert counts[0] == counts[1]


def test_long_and_short_sequences_are_not_padded_to_one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_PADDING_BYTES", 4 * World().store.page_bytes)
    world = World()
    for rows in (10, 320, 12, 300, 11):
        world.step([(world.join(0), rows)])
    batch = world.batch([(n, 1) for n in range(5)])
    groups = [sorted(batch._sequences.index(s) for s in members) for members in _members(batch)]
    assert sorted(groups) == [[0, 2, 4], [1, 3]]


def _members(batch: AttentionBatch) -> Iterator[list[StepSequence]]:
    for group in batch._grouping():
        yield [batch._sequences[number] for number in group]


def test_sequences_must_come_sorted_by_entry_layer() -> None:
    world = World()
    for depth in (2, 0):
        world.join(depth)
    with pytest.raises(IsthmusError, match=r"out of order of entry layer: \[2, 0\]"):
        world.batch([(0, 1), (1, 1)])


def test_rope_rotates_pairs_half_a_head_apart() -> None:
    x = torch.randn(5, 3, DIM)
    angles = torch.rand(5, DIM // 2) * 6
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    c, s = cos[:, None], sin[:, None]
    expected = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    got = apply_rope(x.clone(), torch.cat([c, c], -1), torch.cat([-s, s], -1))
    torch.testing.assert_close(got, expected)


def test_a_chunk_with_no_mask_is_causal() -> None:
    q = torch.randn(18, HEADS, DIM)
    kv = torch.randn(18, 2 * KV_HEADS, DIM)
    k, v = kv.transpose(0, 1).chunk(2)
    mask = torch.full((18, 18), float("-inf")).triu(1)
    torch.testing.assert_close(chunk_attention(q, k, v, None), chunk_attention(q, k, v, mask))

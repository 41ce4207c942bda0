"""Attention of one step over paged keys and values, for many sequences at different depths and positions.

What a step needs (page numbers per layer, slots to write, masks) is worked out once per step in numpy and
moved to the device in a few tensors; a layer only takes slices of them. Sequences with the same few new
rows (decodes, short draft chains) run as one padded batch; longer chunks run one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.cloud.attention_cuda import VarlenBatch, varlen_obstacle
from isthmus.cloud.kv_store import KEYS, VALUES, KVStore, StepSequence
from isthmus.protocol.errors import IsthmusError

MAX_BATCHED_ROWS = 16
"""Sequences with more new rows than this run alone: their products are large enough by themselves."""

MAX_SDPA_KEYS = 1024
"""Keys of all sequences of a batch together up to which SDPA's one call beats two batched products: one
session at 144 keys takes 26 µs instead of 60 in bf16, eight of them the same, more are slower."""

MAX_PADDING_BYTES = 512 * 1024
"""Padding that one more group of sequences would have to save: a group costs about 50 µs per layer, in which
some 0.5 MB of pages are gathered."""


_BATCH_STEP = 4


def few_sizes(size: int) -> int:
    """`size` rounded up to one of four sizes per doubling: 1-8, 10, 12, 14, 16, 20, 24, 28, 32, 40, …

    oneDNN compiles a kernel for every new shape of a bf16 product (about 1 ms and 150 KB each). Contexts
    that grow and batches that change would meet new shapes in nearly every step; so they are padded.
    """
    step = 1 << max(0, (size - 1).bit_length() - 3)
    return -(-size // step) * step


@dataclass(slots=True)
class _Group:
    """Sequences that attend as one batch, in step order. Sizes: n rows each, P columns, B sequences with the
    padding up to the next usual batch size, whose pages are all the null page."""

    num_rows: int
    rows: (
        Tensor | None
    )  # int64 [sequences * n] row numbers in the step; None if they are first_row, first_row + 1, …
    first_row: int
    pages: Tensor  # int32 [num_layers, B, P]
    num_keys: int  # T: keys that matter, <= P * 16
    batched: bool  # n <= MAX_BATCHED_ROWS, else B = 1
    mask: Tensor | None  # 0 where visible, -inf elsewhere: [B * kv_heads, 1 or group * n, T], or [n, T]
    # A whole sequence from position 0 needs no mask: its keys are just the new rows.
    active: npt.NDArray[np.int64]  # [num_layers]: how many of the sequences a layer runs

    def padded(self, active: int) -> int:
        """How many sequences to compute so that `active` of them come out; the rest attend to zeros."""
        if not self.batched or active * self.num_keys <= MAX_SDPA_KEYS:
            return active
        return _BATCH_STEP * few_sizes(-(-active // _BATCH_STEP))


class AttentionBatch:
    """What the layers need to know about a step's sequences, which come sorted by entry layer.

    Layer l runs the sequences that entered at or below l: the first `rows_at(l)` rows.
    """

    def __init__(
        self,
        sequences: Sequence[StepSequence],
        *,
        store: KVStore,
        num_layers: int,
        num_heads: int,
        cos: Tensor,
        sin: Tensor,
        sliding_window: int | None = None,
    ) -> None:
        """Called by `CloudModel.prepare`. `cos`, `sin` [num_rows, 1, head_dim] as `apply_rope` takes them."""
        self.store = store
        self.cos = cos
        self.sin = sin
        self._num_layers = num_layers
        self._group_size = num_heads // store.num_kv_heads
        self._window = sliding_window
        self._sequences = sequences
        self.entry_layers = [sequence.table.first_layer for sequence in sequences]
        if any(b < a for a, b in zip(self.entry_layers, self.entry_layers[1:], strict=False)):
            raise IsthmusError(
                f"sequences out of order of entry layer: {self.entry_layers}", code="bad_batch"
            )
        counts = np.array([sequence.num_rows for sequence in sequences])
        self._offsets = np.concatenate([[0], np.cumsum(counts)])
        self.num_rows = int(self._offsets[-1])
        layers = np.arange(num_layers)
        self._active = np.searchsorted(np.array(self.entry_layers), layers, side="right")
        self._rows_at = self._offsets[self._active]
        self._slots = self._move(self._slot_numbers())
        self._varlen: VarlenBatch | None = None
        self._groups: list[_Group] = []
        if varlen_obstacle(store.device, store.dtype, store.data.shape[-1]) is None:
            self._varlen = VarlenBatch(
                sequences, store=store, num_layers=num_layers, sliding_window=sliding_window
            )
            return
        self._groups = [self._make_group(members) for members in self._grouping()]

    def rows_at(self, layer: int) -> int:
        """How many rows, from the first, layer `layer` runs."""
        return int(self._rows_at[layer])

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """Writes the rows' keys and values, then attends.

        q [r, heads, head_dim] and kv [r, 2 * kv_heads, head_dim] (rotated), r = rows_at(layer) → like q.
        """
        num_rows = q.shape[0]
        self.store.write(self._slots[layer, :num_rows], kv)
        if self._varlen is not None:
            return self._varlen.attend(layer, int(self._active[layer]), q)
        out: Tensor | None = None
        for group in self._groups:
            active = int(group.active[layer])
            if not active:
                continue
            count = active * group.num_rows
            rows = None if group.rows is None else group.rows[:count]
            first, last = group.first_row, group.first_row + count
            mine = q[first:last] if rows is None else q.index_select(0, rows)
            result = self._attend_group(group, layer, active, mine, kv)
            if count == num_rows:
                return result
            if out is None:
                out = torch.empty_like(q)
            if rows is None:
                out[first:last] = result
            else:
                out.index_copy_(0, rows, result)
        assert out is not None  # rows_at(layer) > 0 means that some group is active
        return out

    def _attend_group(self, group: _Group, layer: int, active: int, q: Tensor, kv: Tensor) -> Tensor:
        """q [active * n, heads, head_dim] → the same."""
        if group.mask is None:
            k, v = kv[group.first_row : group.first_row + group.num_rows].transpose(0, 1).chunk(2)
            return chunk_attention(q, k, v, None)
        if not group.batched:
            k, v = self.store.gather(group.pages[layer, :1])[:, :, : group.num_keys]
            return chunk_attention(q, k, v, group.mask)
        padded = group.padded(active)
        pages, mask = group.pages[layer, :padded], group.mask[: padded * self.store.num_kv_heads]
        if padded > active:
            wider = q.new_zeros((padded * group.num_rows, *q.shape[1:]))
            wider[: len(q)] = q
            return batched_attention(wider, pages, mask, self.store, num_rows=group.num_rows)[: len(q)]
        return batched_attention(q, pages, mask, self.store, num_rows=group.num_rows)

    def _move(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.store.device)

    def _slot_numbers(self) -> npt.NDArray[np.int64]:
        """int64 [num_layers, num_rows]: where each row's keys and values go; rows not run by a layer: 0."""
        size = self.store.page_tokens
        slots = np.zeros((self._num_layers, self.num_rows), dtype=np.int64)
        for sequence, offset in zip(self._sequences, self._offsets, strict=False):
            table = sequence.table
            positions = np.arange(table.length, table.length + sequence.num_rows)
            numbers = self.store.slot_numbers(table.pages[:, positions // size], positions % size)
            slots[table.first_layer :, offset : offset + sequence.num_rows] = numbers
        return slots

    def _first_column(self, sequence: StepSequence) -> int:
        """The first page column that the sequence's first new row can see."""
        if self._window is None:
            return 0
        return max(0, sequence.table.length - self._window + 1) // self.store.page_tokens

    def _num_columns(self, sequence: StepSequence) -> int:
        end = sequence.table.length + sequence.num_rows
        return -(-end // self.store.page_tokens) - self._first_column(sequence)

    def _grouping(self) -> list[list[int]]:
        """Sequence numbers by group, each ascending: equal row counts and little padding within a group."""
        groups: list[list[int]] = []
        by_rows: dict[int, list[int]] = {}
        for number, sequence in enumerate(self._sequences):
            if sequence.num_rows > MAX_BATCHED_ROWS:
                groups.append([number])
            else:
                by_rows.setdefault(sequence.num_rows, []).append(number)
        for members in by_rows.values():
            columns = {number: self._num_columns(self._sequences[number]) for number in members}
            current: list[int] = []
            widest = padding = 0
            for number in sorted(members, key=lambda n: -columns[n]):
                padding += widest - columns[number]
                if not current or padding * self.store.page_bytes > MAX_PADDING_BYTES:
                    current, widest, padding = [], columns[number], 0
                    groups.append(current)
                current.append(number)
        return [sorted(group) for group in groups]

    def _make_group(self, members: list[int]) -> _Group:
        sequences = [self._sequences[number] for number in members]
        num_rows = sequences[0].num_rows
        firsts = np.array([self._first_column(sequence) for sequence in sequences])
        batched = num_rows <= MAX_BATCHED_ROWS
        num_columns = max(self._num_columns(sequence) for sequence in sequences)
        width = len(members)
        if batched:
            num_columns = few_sizes(num_columns)
            width = _BATCH_STEP * few_sizes(-(-width // _BATCH_STEP))
        pages = np.full((self._num_layers, width, num_columns), self.store.null_page, dtype=np.int32)
        for i, sequence in enumerate(sequences):
            table = sequence.table
            columns = table.pages[:, firsts[i] : firsts[i] + self._num_columns(sequence)]
            pages[table.first_layer :, i, : columns.shape[1]] = columns
        starts = np.zeros(width, dtype=np.int64)  # padding sees one key of zeros
        starts[: len(members)] = [sequence.table.length for sequence in sequences]
        origins = np.zeros(width, dtype=np.int64)
        origins[: len(members)] = firsts * self.store.page_tokens
        # A batch takes whole pages: cutting the last one would make its batched products copy the keys.
        num_keys = num_columns * self.store.page_tokens if batched else int(starts[0] + num_rows - origins[0])
        whole = not batched and not starts[0] and (self._window is None or num_rows <= self._window)
        contiguous = members[-1] - members[0] == len(members) - 1
        offsets = self._offsets[members]
        rows = (offsets[:, None] + np.arange(num_rows)).ravel()
        return _Group(
            num_rows=num_rows,
            rows=None if contiguous else self._move(rows),
            first_row=int(offsets[0]),
            pages=self._move(pages),
            num_keys=num_keys,
            batched=batched,
            mask=None if whole else self._make_mask(starts, origins, num_rows, num_keys, batched),
            active=np.searchsorted(np.array(members), self._active, side="left"),
        )

    def _make_mask(
        self,
        starts: npt.NDArray[np.int64],
        origins: npt.NDArray[np.int64],
        num_rows: int,
        num_keys: int,
        batched: bool,
    ) -> Tensor:
        """Additive mask as `_Group.mask`; key j of sequence b is at position origins[b] + j."""
        queries = (starts[:, None] + np.arange(num_rows))[:, :, None]
        keys = (origins[:, None] + np.arange(num_keys))[:, None, :]
        visible = keys <= queries
        if self._window is not None:
            visible &= keys > queries - self._window
        mask = torch.zeros(visible.shape, dtype=self.store.dtype)
        mask.masked_fill_(torch.from_numpy(~visible), float("-inf"))
        if not batched:
            return mask[0].to(self.store.device)
        if num_rows > 1:
            mask = mask.repeat(1, self._group_size, 1)
        return mask.repeat_interleave(self.store.num_kv_heads, dim=0).to(self.store.device)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [n, heads, head_dim] in place, pairs (i, i + head_dim/2); returns x.

    cos, sin [n, 1, head_dim]: the table's cosines twice, and its sines with the first half negated.
    """
    swapped = x.roll(x.shape[-1] // 2, -1)
    return x.mul_(cos).addcmul_(swapped, sin)


def batched_attention(q: Tensor, pages: Tensor, mask: Tensor, store: KVStore, *, num_rows: int) -> Tensor:
    """A few rows each of many sequences, with the query heads folded into rows: SDPA for few keys, else two
    batched products.

    q [B * n, heads, d]; pages int32[B, columns]; mask [B * kv_heads, 1 or group * n, T] → like q.
    At 32 sequences of 256 tokens in bf16 (1 thread) the products take 0.3 ms where SDPA takes 2.6: its blocks
    are made for many rows. The values are gathered only after the keys were used, over them: at 32 sequences
    of 512 tokens that takes 0.9 ms, both at once 1.3, since less has to stay in cache.
    """
    heads, dim = q.shape[1:]
    batch, kv_heads, num_keys = len(pages), store.num_kv_heads, mask.shape[-1]
    group = heads // kv_heads
    folded = q.view(batch, num_rows, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    if batch * num_keys <= MAX_SDPA_KEYS:
        shape = (batch, kv_heads, -1, dim)
        keys, values = store.gather(pages)
        bias = mask.view(batch, kv_heads, -1, num_keys)
        out = F.scaled_dot_product_attention(
            folded.reshape(shape), keys.view(shape), values.view(shape), attn_mask=bias
        )
    else:
        keys = store.gather(pages, KEYS)[0].transpose(1, 2)
        scores = torch.baddbmm(mask, folded.reshape(len(mask), -1, dim), keys, alpha=dim**-0.5)
        out = torch.bmm(scores.softmax(-1), store.gather(pages, VALUES)[0])
    return out.view(batch, kv_heads, group, num_rows, dim).permute(0, 3, 1, 2, 4).reshape(q.shape)


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Many rows of one sequence, by `scaled_dot_product_attention`; causal from position 0 without a mask.

    q [n, heads, d]; k, v [kv_heads, T, d]; mask [n, T] → like q. Each kv head is repeated for its query
    heads by a zero stride: `enable_gqa` is 10x slower in bf16, and a copy would cost memory.
    """
    num_rows, heads, dim = q.shape
    kv_heads, num_keys, _ = k.shape
    group = heads // kv_heads
    queries = q.view(num_rows, kv_heads, group, dim).permute(1, 2, 0, 3)
    shape = (kv_heads, group, num_keys, dim)
    keys, values = k.unsqueeze(1).expand(shape), v.unsqueeze(1).expand(shape)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None)
    return out.permute(2, 0, 1, 3).reshape(q.shape)

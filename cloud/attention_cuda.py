"""Attention on CUDA: the step's sequences packed without padding, through torch's `varlen_attn`.

torch's FlashAttention reads pages itself only where they hold a multiple of 256 tokens; ours hold 16. So the
keys and values that a layer needs are gathered first, token by token, in the packed order it takes anyway.
FlexAttention could read our pages, but compiles at run time and is not needed: every torch this package
allows (>= 2.12) has `varlen_attn`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.cloud.kv_store import KVStore, StepSequence


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the N sequences' rows lie in packed queries, and their keys in packed keys and values.

    A sequence's last row is its last key: row i of n sees the keys up to number num_keys - n + i.
    """

    cu_q: Tensor  # int32[N + 1]: first row of each sequence, and the end
    cu_k: Tensor  # int32[N + 1]: likewise its first key
    max_q: int
    max_k: int
    window: int | None  # how many keys a row sees, its own included; None: all


Attention = Callable[[Tensor, Tensor, Tensor, Packing], Tensor]
"""q [rows, heads, d], k and v [keys, kv_heads, d] (any strides but the last), packing → like q."""


def cuda_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """By `varlen_attn`: bf16 or fp16 on CUDA only."""
    from torch.nn.attention.varlen import varlen_attn

    if packing.window is not None:
        window = (packing.window - 1, 0)
    else:
        # For single rows causal means nothing, and without it the kernel folds query heads and splits keys.
        window = (-1, -1) if packing.max_q == 1 else (-1, 0)
    out = varlen_attn(
        q,
        k,
        v,
        packing.cu_q,
        packing.cu_k,
        packing.max_q,
        packing.max_k,
        window_size=window,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)  # no auxiliary output was asked for
    return out


def reference_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """The same in plain torch, one sequence after another: what `cuda_attention` is checked against."""
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    rows, keys = packing.cu_q.tolist(), packing.cu_k.tolist()
    for first, end, first_key, end_key in zip(rows, rows[1:], keys, keys[1:], strict=False):
        num_keys = end_key - first_key
        at = torch.arange(num_keys - (end - first), num_keys, device=q.device)[:, None]
        key = torch.arange(num_keys, device=q.device)[None, :]
        visible = key <= at
        if packing.window is not None:
            visible &= key > at - packing.window
        mine = q[first:end].transpose(0, 1)
        k_heads, v_heads = (
            part[first_key:end_key].repeat_interleave(group, 1).transpose(0, 1) for part in (k, v)
        )
        found = F.scaled_dot_product_attention(mine, k_heads, v_heads, attn_mask=visible)
        out[first:end] = found.transpose(0, 1)
    return out


class VarlenBatch:
    """The index tensors of one step, for sequences sorted by entry layer: a layer runs the first few."""

    def __init__(
        self,
        sequences: Sequence[StepSequence],
        *,
        store: KVStore,
        num_layers: int,
        sliding_window: int | None,
        attention: Attention = cuda_attention,
    ) -> None:
        """Tables ensured up to length + num_rows and not yet advanced, as `AttentionBatch` takes them."""
        self._store = store
        self._attention = attention
        num_rows = np.array([sequence.num_rows for sequence in sequences])
        starts = np.array([sequence.table.length for sequence in sequences])
        firsts = np.zeros_like(starts)
        if sliding_window is not None:
            firsts = np.maximum(starts - sliding_window + 1, 0)  # no new row sees an earlier key
        num_keys = starts + num_rows - firsts
        self._max_q, self._max_k = np.maximum.accumulate(num_rows), np.maximum.accumulate(num_keys)
        self._window = sliding_window
        self._ends_k = np.cumsum(num_keys)
        self._cu_q = self._move(np.concatenate([[0], np.cumsum(num_rows)]).astype(np.int32))
        self._cu_k = self._move(np.concatenate([[0], self._ends_k]).astype(np.int32))

        # Per layer only the pages differ; which of them a key lies in, and where, is the same in all.
        size, heads = store.page_tokens, 2 * store.num_kv_heads
        first_columns, end_columns = firsts // size, -(-(firsts + num_keys) // size)
        bases = np.concatenate([[0], np.cumsum(end_columns - first_columns)])
        pages = np.full((num_layers, bases[-1]), store.null_page, dtype=np.int32)
        for sequence, base, first, end in zip(sequences, bases, first_columns, end_columns, strict=False):
            table = sequence.table
            pages[table.first_layer :, base : base + end - first] = table.pages[:, first:end]
        positions = np.concatenate(
            [np.arange(first, first + count) for first, count in zip(firsts, num_keys, strict=True)]
        )
        columns = positions // size + np.repeat(bases[:-1] - first_columns, num_keys)
        places = (positions % size)[:, None] + np.arange(heads) * size
        self._pages = self._move(pages)
        self._columns = self._move(columns)
        self._places = self._move(places)  # int64[keys, 2 * kv_heads]: rows of a page, in units of head_dim

    def attend(self, layer: int, num_active: int, q: Tensor) -> Tensor:
        """q [rows, heads, d] of the first `num_active` sequences, whose keys are written → like q."""
        store, last = self._store, num_active - 1
        num_keys = int(self._ends_k[last])
        page = self._pages[layer].index_select(0, self._columns[:num_keys])
        rows_per_page = self._places.shape[1] * store.page_tokens
        index = torch.add(self._places[:num_keys], page[:, None], alpha=rows_per_page)
        found = store.data.view(-1, q.shape[-1]).index_select(0, index.view(-1))
        keys, values = found.view(num_keys, -1, q.shape[-1]).chunk(2, dim=1)
        max_q = int(self._max_q[last])
        packing = Packing(
            cu_q=self._cu_q[: num_active + 1],
            cu_k=self._cu_k[: num_active + 1],
            max_q=max_q,
            max_k=int(self._max_k[last]),
            # The one new row of a sequence sees all the keys that were kept.
            window=None if max_q == 1 else self._window,
        )
        return self._attention(q, keys, values, packing)

    def _move(self, array: npt.NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array).to(self._store.device)


_LOWEST_CAPABILITY: Final = (8, 0)
_TOLERANCE: Final = 2e-2  # bf16 answers of size 1


@cache
def varlen_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why `VarlenBatch` can't serve keys of this kind; None if it can. The first time on a GPU it tries.

    Limits: FlashAttention 2 as built into torch (aten/src/ATen/native/transformers/cuda/flash_attn).
    """
    if device.type != "cuda":
        return f"varlen_attn runs on CUDA only, not on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"varlen_attn takes no {dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"varlen_attn takes no heads of {head_dim}"
    if torch.cuda.get_device_capability(device) < _LOWEST_CAPABILITY:
        return "varlen_attn needs compute capability 8.0"
    return disagreement(cuda_attention, device, dtype, head_dim)


def disagreement(attention: Attention, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """How `attention` differs from the reference on a few small cases, or fails; None if it does not."""
    random = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    for num_rows, num_keys in (((1, 1, 1), (40, 1, 17)), ((1, 5, 17, 1), (40, 5, 33, 2))):
        for window in (None, 7):
            packing = Packing(
                cu_q=_bounds(num_rows).to(device),
                cu_k=_bounds(num_keys).to(device),
                max_q=max(num_rows),
                max_k=max(num_keys),
                window=window,
            )
            q, kv = tensor(sum(num_rows), 6, head_dim), tensor(sum(num_keys), 4, head_dim)
            keys, values = kv.chunk(2, dim=1)
            try:
                found = attention(q, keys, values, packing).float()
            except (RuntimeError, ValueError, TypeError, ImportError) as error:
                return f"varlen_attn fails here: {error}"
            wanted = reference_attention(q.float(), keys.float(), values.float(), packing)
            worst = float((found - wanted).abs().max())
            if not worst <= _TOLERANCE:
                return (
                    f"varlen_attn is off by {worst:.2g} for {num_rows} rows, {num_keys} keys, window {window}"
                )
    return None


def _bounds(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(counts).tolist()], dtype=torch.int32)

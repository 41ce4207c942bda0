"""The contents of KV pages, on the device: written row by row, gathered for attention, copied and zeroed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from isthmus.cloud.kv import PAGE_TOKENS, BlockTable, PageArray, PageCopies

BOTH, KEYS, VALUES = slice(0, 2), slice(0, 1), slice(1, 2)
"""What `KVStore.gather` gathers."""


class KVStore:
    """The contents of all pages: [num_pages + 1, 2 * kv_heads, 16, head_dim], the key heads first.

    A head's 16 tokens lie together, so that one indexed read gathers many sequences straight into the
    batched-matrix layout [sequence, head, token, dim]. The last page is never handed out and stays zero:
    padding points at it, never at a page that may be another tenant's.
    """

    def __init__(
        self,
        num_pages: int,
        *,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        page_tokens: int = PAGE_TOKENS,
    ) -> None:
        self.num_pages = num_pages
        self.num_kv_heads = num_kv_heads
        self.page_tokens = page_tokens
        self.null_page = num_pages
        self.data = torch.zeros(
            (num_pages + 1, 2 * num_kv_heads, page_tokens, head_dim), dtype=dtype, device=device
        )
        self._chunks = self.data.view(-1, page_tokens * head_dim)
        self._slots = self.data.view(-1, head_dim)
        heads = torch.arange(2 * num_kv_heads, device=device)
        self._chunk_of_head = heads.view(2, 1, num_kv_heads, 1).int()
        self._slot_of_head = heads * page_tokens
        self._dim = head_dim
        self._gathered = self._chunks[:0].clone()

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: 16 tokens of one layer."""
        return self.data[0].nbytes

    def zero_pages(self, pages: PageArray) -> None:
        """For `PagePool(on_alloc=...)`."""
        self.data.index_fill_(0, self._index(pages), 0)

    def copy_pages(self, copies: PageCopies) -> None:
        """Makes the copies that `BlockTable.ensure` asked for."""
        if len(copies):
            self.data.index_copy_(
                0, self._index(copies.dst), self.data.index_select(0, self._index(copies.src))
            )

    def slot_numbers(
        self, pages: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """What `write` wants for tokens at `offsets` of `pages` (arrays that broadcast)."""
        return pages.astype(np.int64) * (2 * self.num_kv_heads * self.page_tokens) + offsets

    def write(self, slots: Tensor, kv: Tensor) -> None:
        """Rows kv [n, 2 * kv_heads, head_dim] into `slots` int64[n] (of `slot_numbers`)."""
        self._slots.index_copy_(
            0, (slots[:, None] + self._slot_of_head).view(-1), kv.reshape(-1, kv.shape[-1])
        )

    def gather(self, pages: Tensor, kinds: slice = BOTH) -> Tensor:
        """Pages int32[batch, columns] → [1 or 2, batch * kv_heads, columns * 16, head_dim]: keys, values or
        both.

        Good until the next call: the buffer is kept, because fresh memory of this size would be mapped and
        zeroed by the system each time (3.5 MB: 650 µs instead of 210).
        """
        heads = (self._chunk_of_head[kinds] + pages[None, :, None, :] * (2 * self.num_kv_heads)).view(-1)
        if len(heads) > len(self._gathered):
            self._gathered = self._chunks.new_empty((2 * len(heads), self._chunks.shape[1]))
        found = torch.index_select(self._chunks, 0, heads, out=self._gathered[: len(heads)])
        return found.view(
            -1, pages.shape[0] * self.num_kv_heads, pages.shape[1] * self.page_tokens, self._dim
        )

    def _index(self, pages: PageArray) -> Tensor:
        return torch.from_numpy(pages.astype(np.int64)).to(self.device)


@dataclass(frozen=True, slots=True)
class StepSequence:
    """One session's rows of a step: positions [table.length, table.length + num_rows), pages ensured."""

    table: BlockTable
    num_rows: int

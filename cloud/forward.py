"""The mixed-depth pass over the model: rows ordered by entry layer, each layer running a prefix of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.cloud.kv import BlockTable
from isthmus.cloud.kv_store import KVStore, StepSequence
from isthmus.cloud.model import CloudModel
from isthmus.splitter.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Span:
    """One session's rows of a step: positions [start, start + n), float32 [n, hidden] rows at layer `split`,
    or int64 [n] token ids at split 0. `table` has pages for them and holds `start` tokens."""

    split: int
    rows: NDArray[Any]
    start: int
    table: BlockTable


class MixedForward:
    """A model and the storage of its KV pages."""

    def __init__(self, model: CloudModel, store: KVStore) -> None:
        self.model = model
        self.store = store
        self._logits = torch.empty((0, model.spec.vocab_size), dtype=torch.float32)

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    @torch.inference_mode()
    def run(self, spans: Sequence[Span], beat: Callable[[], None]) -> Tensor:
        """Hidden rows before the final norm, float32 [rows, hidden] in the order of `spans`, which are
        sorted by split. `beat` is called before each layer: it shows that the step moves."""
        batch = self.model.prepare(self.store, [StepSequence(span.table, len(span.rows)) for span in spans])
        return self.model.run(batch, [self._enter(span) for span in spans], beat)

    @torch.inference_mode()
    def boundaries(self, ids: NDArray[np.int64], table: BlockTable) -> list[NDArray[np.float32]]:
        """The residual rows of `ids` before every layer and after the last: num_layers + 1 of [n, hidden]."""
        batch = self.model.prepare(self.store, [StepSequence(table, len(ids))])
        rows = self.model.embed(ids)
        found = [self.to_numpy(rows)]
        for layer in range(self.spec.num_layers):
            rows = self.model.layer(layer, rows, batch)
            found.append(self.to_numpy(rows))
        return found

    @torch.inference_mode()
    def logits(self, parts: Sequence[Tensor]) -> NDArray[np.float32]:
        """float32 [rows, vocab] of all the hidden rows in `parts`, in one pass through the head.

        Good until the next call: the buffer is kept, because fresh memory of this size is mapped and zeroed
        by the system each time (32 rows of 49152 in bf16: 3.0 ms instead of 0.1).
        """
        logits = self.model.head(self.join(parts))
        if len(self._logits) < len(logits):
            self._logits = torch.empty((2 * len(logits), logits.shape[1]), dtype=torch.float32)
        host = self._logits[: len(logits)]
        host.copy_(logits)
        values: NDArray[np.float32] = host.numpy()
        return values

    @torch.inference_mode()
    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))

    def to_numpy(self, rows: Tensor) -> NDArray[np.float32]:
        """A float32 array of its own: the rows may be a view of the step's."""
        return np.array(rows.detach().float().cpu().numpy())

    def _enter(self, span: Span) -> Tensor:
        if span.split == 0:
            return self.model.embed(span.rows)
        return self.model.rows(span.rows)

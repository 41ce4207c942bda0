"""Packs of tiny random models, beside the transformers model they were made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from isthmus.splitter.checkpoint import open_checkpoint
from isthmus.splitter.pack import Pack
from isthmus.splitter.pack_writer import write_pack
from tests.tiny import make_tiny

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SideFiles:
    """The tokeniser and its friends, as a pack wants them."""

    tokenizer_json: bytes
    chat_template: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)


def pack_checkpoint(source: Path, out: Path, scheme: str = "f32") -> Pack:
    """Packs the checkpoint folder `source` into the new folder `out`, with nothing measured."""
    out.mkdir(parents=True)
    with open_checkpoint(source) as checkpoint:
        write_pack(checkpoint, SideFiles((source / "tokenizer.json").read_bytes()), out, scheme)
    return Pack.open(out)


def tiny_pack(path: Path, family: str = "llama", scheme: str = "f32", **options: Any) -> Pack:
    """A pack of `make_tiny(family, **options)`; the checkpoint is left at `path / "source"`."""
    source = make_tiny(family, path / "source", **options)
    return pack_checkpoint(source, path / scheme, scheme)


def reference_logits(source: Path, ids: list[int]) -> F32:
    """transformers' fp32 logits [n, vocab] at all positions."""
    import torch

    from tests.oracle import load_reference

    model = load_reference(source)
    with torch.inference_mode():
        logits: F32 = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    return logits

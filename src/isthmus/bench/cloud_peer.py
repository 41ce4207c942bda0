"""The peer of `bench cloud`: transformers' `generate` in bf16 over the same checkpoint."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.errors import IsthmusError


class TransformersPeer:
    """A causal LM of transformers, which reads (and dequantises) the checkpoint itself."""

    def __init__(self, path: Path, *, device: str) -> None:
        """`path`: a folder with `config.json`, or a GGUF file.

        Raises:
            ImportError: transformers is not installed (it is a development dependency).
            IsthmusError: it kept the weights as something else than bf16.
        """
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        kind: dict[str, Any] = {"gguf_file": path.name} if path.is_file() else {}
        folder = path.parent if path.is_file() else path
        # Its readers print progress; a bench's standard error is for ours.
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **kind)
        kept = {parameter.dtype for parameter in model.parameters()}
        if kept != {torch.bfloat16}:
            raise IsthmusError(f"transformers loaded {path.name} as {kept}, bf16 was asked")
        self._model = model.eval().to(device)
        # Answers never end early: every length is the one asked for.
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0
        self._device = device

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [n, vocab] of every position, for the fidelity printed beside the speed."""
        import torch

        with torch.inference_mode():
            found = self._model(input_ids=torch.tensor([list(ids)], device=self._device)).logits[0]
            values: NDArray[np.float32] = found.float().cpu().numpy()
            return values

    def decode_seconds(self, prompts: NDArray[np.int64], num_steps: int) -> float:
        """Seconds of `num_steps` greedy decode steps after `prompts` int64 [batch, n]: those of generating
        num_steps + 1 tokens less those of generating one."""
        return self._generate(prompts, num_steps + 1) - self._generate(prompts, 1)

    def _generate(self, prompts: NDArray[np.int64], num_tokens: int) -> float:
        import torch

        ids = torch.from_numpy(prompts).to(self._device)
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            begun = time.perf_counter()
            out = self._model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)
            length = out.cpu().shape[1] - ids.shape[1]
            seconds = time.perf_counter() - begun
        if length != num_tokens:
            raise IsthmusError(f"transformers generated {length} tokens, {num_tokens} were asked")
        return seconds

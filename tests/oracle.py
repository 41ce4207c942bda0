"""The reference of the parity tests: transformers in fp32, greedy, with the near-tie rule."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# A difference is accepted only where the reference's top two logits are closer than this.
NEAR_TIE = 1e-3


@dataclass(frozen=True)
class Greedy:
    """What transformers generates: ids and, for each, the gap between its two highest logits."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    gaps: tuple[float, ...]


def load_reference(path: Path) -> Any:
    """A causal LM in fp32 from a folder with config.json, or from a folder with one GGUF file."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    gguf = next(path.glob("*.gguf"), None)
    kind: dict[str, Any] = {"gguf_file": gguf.name} if gguf else {}
    # accelerate and gguf print progress on stderr; a test's output has no use for it.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kind)
    return model.eval()


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], tokens: int) -> Greedy:
    """`tokens` greedy ids after `prompt`, end-of-sequence ids included like any other."""
    ids: list[int] = []
    gaps: list[float] = []
    step = torch.tensor([prompt])
    cache = None
    for _ in range(tokens):
        out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        top = out.logits[0, -1].topk(2)
        ids.append(int(top.indices[0]))
        gaps.append(float(top.values[0] - top.values[1]))
        step = top.indices[:1].view(1, 1)
    return Greedy(tuple(prompt), tuple(ids), tuple(gaps))


async def assert_same_tokens(
    reference: Greedy, generate: Callable[[list[int], int], Awaitable[list[int]]], label: str
) -> int:
    """`generate(prompt, n)` gives the reference's ids. At a near-tie the difference is printed and the
    comparison goes on with the reference's token. Returns how many near-ties there were."""
    done = near_ties = 0
    while done < len(reference.ids):
        wanted = list(reference.ids[done:])
        got = await generate([*reference.prompt, *reference.ids[:done]], len(wanted))
        differs = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b), None)
        if differs is None:
            break
        at = done + differs
        gap = reference.gaps[at]
        assert gap < NEAR_TIE, (
            f"{label}: token {at} is {got[differs]}, not {wanted[differs]}, the margin is {gap:.2e}"
        )
        print(f"{label}: near-tie at token {at}: {got[differs]} for {wanted[differs]}, margin {gap:.2e}")
        near_ties += 1
        done = at + 1
    return near_ties

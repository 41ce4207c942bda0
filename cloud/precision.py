"""Which precision the cloud serves in: measured fidelity first, then measured speed; kept in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from isthmus.cloud.attention import StepSequence
from isthmus.cloud.kv import BlockTable, PagePool, columns_for
from isthmus.cloud.linear import Precision
from isthmus.cloud.model import CloudModel, model_logits
from isthmus.quant.measure import kl_per_position
from isthmus.splitter.checkpoint import Checkpoint
from isthmus.splitter.sample_text import SAMPLE_TEXTS
from isthmus.splitter.spec import ModelSpec
from isthmus.splitter.store import cache_root, write_atomically
from isthmus.splitter.tokenizer import Tokenizer

MAX_KL: Final = 1e-2
MAX_TOKENS_PER_TEXT: Final = 48
_DECODE_STEPS: Final = 6
# fp32 and one other copy are in memory while measuring; beyond this many weights that is not quick any more.
MAX_MEASURED_WEIGHTS: Final = 1_500_000_000
_FORMAT: Final = 1


@dataclass(frozen=True)
class Measured:
    """One precision: mean KL from fp32 over the sample (nats per token), median seconds of a one-row step."""

    kl: float
    decode_s: float


@dataclass(frozen=True)
class Choice:
    """The precision to serve in, why, and the KL of every precision measured (fp32 is 0 by definition)."""

    precision: Precision
    reason: str
    kl: dict[str, float]


def choose(asked: str, measured: dict[str, Measured], *, device: str) -> Choice:
    """Pure. `asked` is a precision or "auto": the fastest of those whose KL is at most MAX_KL. Without
    measurements auto is bf16, which keeps the weights of most checkpoints as they are."""
    kl = {Precision.FP32.value: 0.0} | {name: one.kl for name, one in measured.items()}
    if asked != "auto":
        return Choice(Precision(asked), "asked for", kl)
    if not measured:
        return Choice(Precision.BF16, f"too large to measure here; bf16 is the default on {device}", kl)
    fit = {name: one for name, one in measured.items() if one.kl <= MAX_KL}
    best = min(fit, key=lambda name: fit[name].decode_s) if fit else Precision.FP32.value
    figures = ", ".join(
        f"{name} {one.decode_s * 1e3:.1f} ms KL {one.kl:.1e}" for name, one in measured.items()
    )
    return Choice(Precision(best), f"fastest one-row step with KL <= {MAX_KL:g}: {figures}", kl)


def num_weights(spec: ModelSpec) -> int:
    return sum(int(np.prod(shape)) for shape in spec.tensor_shapes().values())


def to_measure(asked: str, spec: ModelSpec) -> tuple[str, ...]:
    """The precisions whose figures are wanted; none for a model too large to measure at start-up. (fp32 is
    its own reference.)"""
    if asked == Precision.FP32 or num_weights(spec) > MAX_MEASURED_WEIGHTS:
        return ()
    if asked == "auto":
        return tuple(precision.value for precision in Precision)
    return (asked,)


def sample_ids(tokenizer: Tokenizer, spec: ModelSpec) -> list[list[int]]:
    """The built-in sample in this model's tokens."""
    most = min(MAX_TOKENS_PER_TEXT, spec.context_length)
    encoded = [tokenizer.encode(text, special=False)[:most] for text in SAMPLE_TEXTS]
    return [[token for token in ids if token < spec.vocab_size] for ids in encoded if ids]


def measure(
    checkpoint: Checkpoint, precisions: Sequence[str], samples: Sequence[Sequence[int]], *, device: str
) -> dict[str, Measured]:
    """Runs fp32 and each of `precisions` over the samples, then times one-row steps after the first one."""
    reference = CloudModel.load(checkpoint, device=device, precision="fp32")
    measured: dict[str, Measured] = {}
    for name in precisions:
        if name == Precision.FP32:
            measured[name] = Measured(0.0, decode_seconds(reference, samples[0]))
            continue
        other = CloudModel.load(checkpoint, device=device, precision=name)
        values = [kl_per_position(model_logits(reference, ids), model_logits(other, ids)) for ids in samples]
        measured[name] = Measured(float(np.concatenate(values).mean()), decode_seconds(other, samples[0]))
    return measured


@torch.inference_mode()
def decode_seconds(model: CloudModel, prompt: Sequence[int]) -> float:
    """Median seconds of one decode step of one session over all layers and the head, after `prompt`."""
    total = len(prompt) + _DECODE_STEPS
    pages = model.spec.num_layers * columns_for(total)
    store = model.new_store(pages)
    table = BlockTable(
        PagePool(pages, on_alloc=store.zero_pages), first_layer=0, num_layers=model.spec.num_layers
    )
    store.copy_pages(table.ensure(total))

    def step(ids: Sequence[int]) -> float:
        begun = time.perf_counter()
        batch = model.prepare(store, [StepSequence(table, len(ids))])
        logits = model.head(model.run(batch, [model.embed(ids)])[-1:])
        logits.cpu()
        table.advance(len(ids))
        return time.perf_counter() - begun

    step(prompt)
    return statistics.median(step([prompt[-1]]) for _ in range(_DECODE_STEPS))


def measured_or_known(
    checkpoint: Checkpoint, tokenizer: Tokenizer, asked: str, *, device: str
) -> dict[str, Measured]:
    """`measure` for what `asked` wants, or what an earlier start measured of the same weights here."""
    wanted = to_measure(asked, checkpoint.spec)
    path = _path(checkpoint, device)
    known = _read(path)
    missing = [name for name in wanted if name not in known]
    if missing:
        samples = sample_ids(tokenizer, checkpoint.spec)
        known = {**known, **measure(checkpoint, missing, samples, device=device)}
        # Only a convenience: where the cache can't be written, the next start measures again.
        with suppress(OSError):
            content = {name: asdict(one) for name, one in known.items()}
            write_atomically(path, json.dumps(content, indent=1).encode())
    return {name: known[name] for name in wanted}


def _path(checkpoint: Checkpoint, device: str) -> Path:
    """Keyed by all the figures depend on: weights, torch, sample, device, threads."""
    place = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"cpu{os.cpu_count()}"
    text = "\n".join(SAMPLE_TEXTS)
    key = [_FORMAT, checkpoint.source_hash, torch.__version__, place, torch.get_num_threads(), text]
    return cache_root() / "cloud" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"


def _read(path: Path) -> dict[str, Measured]:
    try:
        content = json.loads(path.read_bytes())
        return {name: Measured(float(one["kl"]), float(one["decode_s"])) for name, one in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}

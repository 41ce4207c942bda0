"""Which precision the cloud serves in: measured fidelity first, then measured speed; kept in the cache."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from isthmus.cloud.cpu_watch import CpuWatch, too_busy_to_time
from isthmus.cloud.kv import BlockTable, columns_for
from isthmus.cloud.kv_store import StepSequence
from isthmus.cloud.linear import Precision
from isthmus.cloud.model import CloudModel, model_logits, parse_device
from isthmus.cloud.start_cache import read_start_cache, start_cache_path, write_start_cache
from isthmus.cloud.widening import tune_widening
from isthmus.quant.measure import kl_per_position
from isthmus.splitter.checkpoint import Checkpoint
from isthmus.splitter.sample_text import SAMPLE_TEXTS
from isthmus.splitter.spec import ModelSpec
from isthmus.splitter.tokenizer import Tokenizer

MAX_KL: Final = 1e-2
SPEED_TIE: Final = 1.1
"""Within this factor of the fastest a precision counts as equally fast: short timings are no better."""
BATCH_ROWS: Final = 32
"""Sessions in the second timed step: one alone says little about a cloud that batches."""
MAX_TOKENS_PER_TEXT: Final = 48
_DECODE_STEPS: Final = 6
_STEPS_BUDGET_S: Final = 0.5
# fp32 and one other copy are in memory while measuring; beyond this many weights that is not quick any more.
MAX_MEASURED_WEIGHTS: Final = 1_500_000_000
_FORMAT: Final = 2


@dataclass(frozen=True)
class Measured:
    """One precision: mean KL from fp32 over the sample (nats per token), seconds of a decode step over the
    whole model with one session and with BATCH_ROWS; None where the machine was too busy to tell."""

    kl: float
    one_s: float | None = None
    batch_s: float | None = None

    @property
    def speed_s(self) -> float | None:
        """What precisions are ranked by: the geometric mean, in which a factor counts the same in either."""
        if self.one_s is None or self.batch_s is None:
            return None
        return math.sqrt(self.one_s * self.batch_s)

    def __str__(self) -> str:
        speed = "not timed"
        if self.one_s is not None and self.batch_s is not None:
            speed = f"{self.one_s * 1e3:.1f}/{self.batch_s * 1e3:.1f} ms"
        return f"{speed} KL {self.kl:.1e}" + (" (refused)" if self.kl > MAX_KL else "")


@dataclass(frozen=True)
class Choice:
    """The precision to serve in, why, and the KL of every precision measured (fp32 is 0 by definition)."""

    precision: Precision
    reason: str
    kl: dict[str, float]


def choose(asked: str, measured: dict[str, Measured], *, device: str) -> Choice:
    """Pure. `asked` is a precision, or "auto": of those whose KL is at most MAX_KL the fastest, or the most
    faithful of those within SPEED_TIE of it; the one of the fewest bits where not all could be timed. Without
    measurements auto is bf16, which keeps the weights of most checkpoints as they are."""
    kl = {Precision.FP32.value: 0.0} | {name: one.kl for name, one in measured.items()}
    if asked != "auto":
        reason = "asked for"
        if asked not in kl:
            reason += "; too large to measure its KL here"
        elif kl[asked] > MAX_KL:
            reason += f"; its KL {kl[asked]:.1e} is above {MAX_KL:g}, which auto would not take"
        return Choice(Precision(asked), reason, kl)
    if not measured:
        return Choice(Precision.BF16, f"too large to measure here; bf16 is the default on {device}", kl)
    best, rule = _best({Precision(name): one for name, one in measured.items() if one.kl <= MAX_KL})
    return Choice(best, f"{rule}: {', '.join(f'{name} {one}' for name, one in measured.items())}", kl)


def _best(fit: dict[Precision, Measured]) -> tuple[Precision, str]:
    """The precision to take of those that are faithful enough, and the rule that says so."""
    limit = f"with KL <= {MAX_KL:g}"
    if not fit:
        return Precision.FP32, f"none {limit}"
    speeds = {name: one.speed_s for name, one in fit.items() if one.speed_s is not None}
    if len(speeds) < len(fit):
        order = list(Precision)
        return max(fit, key=order.index), f"fewest bits {limit}, since the machine was too busy to time them"
    tied = [name for name, speed_s in speeds.items() if speed_s <= SPEED_TIE * min(speeds.values())]
    best = min(tied, key=lambda name: (fit[name].kl, speeds[name]))
    rule = f"fastest {limit} by the mean of 1 and {BATCH_ROWS} rows"
    return best, rule + (f", of those within {SPEED_TIE - 1:.0%} the lowest KL" if len(tied) > 1 else "")


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
    checkpoint: Checkpoint,
    precisions: Sequence[str],
    samples: Sequence[Sequence[int]],
    *,
    device: str,
    known: Mapping[str, Measured] = MappingProxyType({}),
) -> dict[str, Measured]:
    """Runs each of `precisions` and fp32 over the samples, then times decode steps after the first one.
    The KL of what is `known` is not measured again."""

    @cache
    def reference() -> CloudModel:
        return CloudModel.load(checkpoint, device=device, precision="fp32")

    @cache
    def expected() -> list[npt.NDArray[np.float32]]:
        return [model_logits(reference(), ids) for ids in samples]

    def kl_of(model: CloudModel) -> float:
        pairs = zip(expected(), samples, strict=True)
        values = [kl_per_position(wanted, model_logits(model, ids)) for wanted, ids in pairs]
        return float(np.concatenate(values).mean())

    measured: dict[str, Measured] = {}
    for name in precisions:
        if name == Precision.FP32:
            model, kl = reference(), 0.0
        else:
            model = CloudModel.load(checkpoint, device=device, precision=name)
            tune_widening(model.linears, model.device)
            kl = known[name].kl if name in known else kl_of(model)
        measured[name] = Measured(kl, *_speeds(model, samples[0]))
    return measured


def _speeds(model: CloudModel, prompt: Sequence[int]) -> tuple[float, float] | tuple[None, None]:
    """Seconds of a decode step with one session and with BATCH_ROWS; None if other work spoils the timing."""
    threads, on_cpu = torch.get_num_threads(), model.device.type == "cpu"
    if on_cpu and too_busy_to_time(threads):
        return None, None
    watch = CpuWatch(threads)
    times = (decode_seconds(model, prompt), decode_seconds(model, prompt, BATCH_ROWS))
    return (None, None) if on_cpu and watch.disturbed() else times


@torch.inference_mode()
def decode_seconds(model: CloudModel, prompt: Sequence[int], num_sessions: int = 1) -> float:
    """Seconds of one decode step of `num_sessions` sessions over all layers and the head, after `prompt`: the
    fastest of a few, since other work on the machine only ever adds."""
    num_layers, total = model.spec.num_layers, len(prompt) + _DECODE_STEPS
    store, pool = model.new_pages(num_sessions * num_layers * columns_for(total))
    tables = [BlockTable(pool, first_layer=0, num_layers=num_layers) for _ in range(num_sessions)]
    for table in tables:
        store.copy_pages(table.ensure(total))
        table.advance(len(prompt))  # what the pages hold does not matter for the time

    def step() -> float:
        begun = time.perf_counter()
        batch = model.prepare(store, [StepSequence(table, 1) for table in tables])
        model.head(model.run(batch, [model.embed([prompt[-1]]) for _ in tables])).cpu()
        taken_s = time.perf_counter() - begun
        for table in tables:
            table.advance(1)
        return taken_s

    taken = [step(), step()]
    while len(taken) < _DECODE_STEPS and sum(taken) < _STEPS_BUDGET_S:
        taken.append(step())
    return min(taken)


def measured_or_known(
    checkpoint: Checkpoint, tokenizer: Tokenizer, asked: str, *, device: str
) -> dict[str, Measured]:
    """What is known of these weights on this machine from earlier starts, after measuring what `asked` wants
    and is not."""
    wanted = to_measure(asked, checkpoint.spec)
    if not wanted:
        return {}
    path = start_cache_path(
        "precision", parse_device(device), _FORMAT, checkpoint.source_hash, "\n".join(SAMPLE_TEXTS)
    )
    known = _parse(read_start_cache(path))
    # A precision that was asked for is taken whatever its speed.
    untimed = {name for name, one in known.items() if asked == "auto" and one.speed_s is None}
    if untimed and not device.startswith("cuda") and too_busy_to_time(torch.get_num_threads()):
        untimed = set()
    missing = [name for name in wanted if name not in known or name in untimed]
    if missing:
        samples = sample_ids(tokenizer, checkpoint.spec)
        known = {**known, **measure(checkpoint, missing, samples, device=device, known=known)}
        write_start_cache(path, {name: asdict(one) for name, one in known.items()})
    return {name.value: known[name] for name in Precision if name in known}


def _parse(content: dict[str, object]) -> dict[str, Measured]:
    try:
        return {Precision(name).value: Measured(**one) for name, one in content.items()}  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return {}

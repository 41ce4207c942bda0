"""How close a pack is to its source on the sample text: KL, outlier channels, codec loss; and its speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from isthmus.protocol.activations import RowCodec, choose_outliers
from isthmus.quant.measure import kl_per_position
from isthmus.splitter.pack import Pack
from isthmus.splitter.sample_text import SAMPLE_TEXTS

if TYPE_CHECKING:
    from isthmus.splitter.runner import BlockRunner

F32 = npt.NDArray[np.float32]

OUTLIERS = 8
"""Channels per boundary that the int8 codec sends apart (measured: 8 bring its KL from 6e-2 to 2e-4)."""

MAX_TOKENS_PER_TEXT = 192


def sample_ids(pack: Pack, texts: Sequence[str] = SAMPLE_TEXTS) -> list[list[int]]:
    """Token ids of each sample text by the pack's tokeniser, cut to MAX_TOKENS_PER_TEXT and the context.

    Texts of no tokens are left out.
    """
    tokenizer = pack.tokenizer()
    most = min(MAX_TOKENS_PER_TEXT, pack.spec.context_length)
    encoded = [tokenizer.encode(text, special=False)[:most] for text in texts]
    return [ids for ids in encoded if ids]


@dataclass(frozen=True)
class SampleRun:
    """A pack run over the sample: the rows before the final norm of each text, and where residuals peak.

    `runner` still holds embedding and head, so that logits (vocab × 4 bytes a token) need not be kept.
    `outliers` maps K (0 < K < N) to the channels with the largest |x| entering layer K, ascending.
    """

    runner: BlockRunner
    rows: list[F32]
    outliers: dict[int, tuple[int, ...]]


def run_sample(
    pack: Pack, ids: Sequence[Sequence[int]], *, progress: Callable[[float], None] | None = None
) -> SampleRun:
    """Runs every text through the pack, one layer loaded at a time: memory for a layer, not for the model."""
    from isthmus.splitter.runner import BlockRunner

    spec = pack.spec
    runner = BlockRunner(pack)
    runner.load(range(0), embed=True, head=True)
    rows = [runner.embed(text) for text in ids]
    outliers: dict[int, tuple[int, ...]] = {}
    for layer in range(spec.num_layers):
        if layer:
            outliers[layer] = choose_outliers(np.concatenate(rows), OUTLIERS)
        span = range(layer, layer + 1)
        runner.load(span, embed=True, head=True)
        for index, text in enumerate(rows):
            cache = runner.new_cache(span, capacity=len(text))
            rows[index] = runner.forward(cache, text, start_layer=layer, stop_layer=layer + 1)
            cache.close()
        runner.unload(span)
        if progress is not None:
            progress((layer + 1) / spec.num_layers)
    return SampleRun(runner, rows, outliers)


def kl_of_runs(reference: SampleRun, other: SampleRun) -> float:
    """Mean KL(reference‖other) of the logits in nats, over all positions of all texts."""
    per_position = [
        kl_per_position(reference.runner.head(expected), other.runner.head(found))
        for expected, found in zip(reference.rows, other.rows, strict=True)
    ]
    return float(np.concatenate(per_position).mean())


def kl_between(reference: Pack, other: Pack, texts: Sequence[str] = SAMPLE_TEXTS) -> float:
    """Mean KL in nats of `other`'s logits against `reference`'s on `texts`, both through the block runner."""
    ids = sample_ids(reference, texts)
    return kl_of_runs(run_sample(reference, ids), run_sample(other, ids))


def logits_of(pack: Pack, ids: Sequence[int]) -> F32:
    """Logits f32[n, vocab] of every position of one sequence."""
    run = run_sample(pack, [ids])
    return run.runner.head(run.rows[0])


def codec_kl(pack: Pack, split: int, codec: RowCodec, texts: Sequence[str] = SAMPLE_TEXTS) -> float:
    """What sending the boundary rows at `split` through `codec` costs: mean KL in nats to uncoded rows.

    Ask a pack of 32 bits. Under a quantised one any change of the rows, however small, flips the rounding of
    int8 activations further up, and those flips (3e-3 on SmolLM2, with bf16 rows too) drown the codec's 2e-4.
    """
    from isthmus.splitter.runner import BlockRunner

    spec = pack.spec
    runner = BlockRunner(pack)
    runner.load(range(spec.num_layers), embed=True, head=True)
    found = []
    for ids in sample_ids(pack, texts):
        rows = runner.embed(ids)
        if split:
            rows = runner.forward(
                runner.new_cache(range(split), capacity=len(ids)), rows, start_layer=0, stop_layer=split
            )
        coded = codec.encode(rows)
        received = codec.decode(
            coded.body,
            n_tok=len(rows),
            dtype=coded.dtype,
            codec=coded.codec,
            raw_len=coded.raw_len,
            max_raw=coded.raw_len,
        )
        finals = [
            runner.forward(
                runner.new_cache(range(split, spec.num_layers), capacity=len(ids)),
                sent,
                start_layer=split,
                stop_layer=spec.num_layers,
            )
            for sent in (rows, received)
        ]
        found.append(kl_per_position(runner.head(finals[0]), runner.head(finals[1])))
    return float(np.concatenate(found).mean())


@dataclass(frozen=True)
class Speed:
    """Tokens per second when nothing else gets in the way: best prefill, tenth percentile of the steps."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def measure_speed(
    packs: Mapping[str, Pack],
    ids: Sequence[int],
    *,
    rounds: int = 4,
    steps: int = 16,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Speed]:
    """Prefill of `ids` and `steps` decode steps after it, for each pack in turn, `rounds` times over.

    The prompt and the steps must fit the context. Alternating keeps a slow moment of the machine from being
    charged to one pack alone; the best times count, because what else runs here only ever adds to them.
    """
    from isthmus.splitter.runner import BlockRunner

    runners = {}
    for name, pack in packs.items():
        runners[name] = BlockRunner(pack)
        runners[name].load(range(pack.spec.num_layers), embed=True, head=True)
    prefill: dict[str, list[float]] = {name: [] for name in packs}
    decode: dict[str, list[float]] = {name: [] for name in packs}
    for turn in range(rounds + 1):
        for name, runner in runners.items():
            first, *rest = _one_request(runner, packs[name].spec.num_layers, ids, steps)
            if turn:  # the first turn warms caches and threads up
                prefill[name].append(first)
                decode[name] += rest
        if progress is not None:
            progress((turn + 1) / (rounds + 1))
    return {
        name: Speed(len(ids) / min(prefill[name]), 1 / float(np.quantile(decode[name], 0.1)))
        for name in packs
    }


def _one_request(runner: BlockRunner, num_layers: int, ids: Sequence[int], steps: int) -> list[float]:
    """Seconds of the prefill and of each decode step of one greedy request."""
    cache = runner.new_cache(range(num_layers), capacity=len(ids) + steps)
    times = []
    batch = list(ids)
    for _ in range(1 + steps):
        start = time.perf_counter()
        rows = runner.forward(cache, runner.embed(batch), start_layer=0, stop_layer=num_layers)
        batch = [int(np.argmax(runner.head(rows[-1:])[0]))]
        times.append(time.perf_counter() - start)
    cache.close()
    return times

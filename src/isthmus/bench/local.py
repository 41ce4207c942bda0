"""`bench local`: the block-wise runner against the same graph as one session, in alternation."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import numpy as np

from isthmus.bench.report import Report, spread

if TYPE_CHECKING:
    from isthmus.splitter.pack import Pack

# Sequence of the pair in each round, so that drift of the machine hits both alike: A B, B A, A B, …
SEED = 7


def bench_local(
    pack: Pack, *, prompt_tokens: int, output_tokens: int, rounds: int, threads: int | None
) -> Report:
    """Prefill and decode tokens per second of both, their ratio, and the pack's fidelity."""
    from isthmus.splitter.runner import BlockRunner
    from isthmus.splitter.single import build_single_session

    spec = pack.spec
    ids = [int(i) for i in np.random.default_rng(SEED).integers(0, spec.vocab_size, prompt_tokens)]
    runner = BlockRunner(pack, threads=threads)
    layers = range(spec.num_layers)
    runner.load(layers, embed=True, head=True)
    single = build_single_session(pack, capacity=prompt_tokens + output_tokens + 1, threads=threads)

    def blockwise() -> tuple[float, float]:
        cache = runner.new_cache(layers, capacity=prompt_tokens + output_tokens + 1)
        try:
            started = time.perf_counter()
            rows = runner.forward(cache, runner.embed(ids), start_layer=0, stop_layer=spec.num_layers)
            logits = runner.head(rows[-1:])
            prefilled = time.perf_counter()
            for _ in range(output_tokens):
                token = int(logits[-1].argmax())
                rows = runner.forward(cache, runner.embed([token]), start_layer=0, stop_layer=spec.num_layers)
                logits = runner.head(rows)
            return prefilled - started, time.perf_counter() - prefilled
        finally:
            cache.close()

    def whole() -> tuple[float, float]:
        single.cache.truncate(0)
        started = time.perf_counter()
        logits = single.prefill(ids)
        prefilled = time.perf_counter()
        for _ in range(output_tokens):
            logits = single.decode(int(np.argmax(logits)))
        return prefilled - started, time.perf_counter() - prefilled

    blockwise(), whole()  # warm up: the first run allocates
    pairs: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for number in range(rounds):
        if number % 2:
            second = whole()
            pairs.append((blockwise(), second))
        else:
            pairs.append((blockwise(), whole()))
    report = Report("local")
    for index, phase, tokens in ((0, "prefill", prompt_tokens), (1, "decode", output_tokens)):
        mine = [tokens / a[index] for a, _ in pairs]
        theirs = [tokens / b[index] for _, b in pairs]
        ratios = [m / t for m, t in zip(mine, theirs, strict=True)]
        report.figures[f"{phase}_tokens_per_s"] = statistics.median(mine)
        report.figures[f"blockwise_over_single_{phase}"] = statistics.median(ratios)
        for name, samples in (("blockwise", mine), ("single", theirs), ("ratio", ratios)):
            report.rows.append(
                {"phase": phase, "what": name, "tokens": tokens, "rounds": rounds, **spread(samples)}
            )
    if pack.kl_to_source is not None:
        report.figures["kl_to_source"] = pack.kl_to_source
    report.notes = [
        f"scheme {pack.scheme}, {pack.bits} bits, {runner.provider_used}, {rounds} rounds",
        "one process, one thread pool, alternating; a prefill computes the head for its last row only",
    ]
    return report

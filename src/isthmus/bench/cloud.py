"""`bench cloud`: the engine's decode speed at each precision, and every figure of the best one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from isthmus.bench.cloud_fleet import equal_work
from isthmus.bench.cloud_precision import (
    MAX_PEER_ROUNDS,
    ONE_AT_A_TIME,
    PrecisionBench,
    PrecisionResult,
    copy_bandwidth,
    num_uniform,
)
from isthmus.bench.cloud_subject import Subject, random_subject, real_subject
from isthmus.bench.report import Report
from isthmus.cloud.linear import Precision, parse_precision
from isthmus.cloud.model import CloudModel, model_logits, parse_device
from isthmus.cloud.precision import BATCH_ROWS, MAX_KL, Measured, choose, decode_seconds
from isthmus.cloud.widening import tune_widening
from isthmus.protocol.errors import ConfigError

MAX_SESSIONS = 512
Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class CloudBench:
    """What is measured. `random_weights` names a shape that takes the place of `model`."""

    model: str
    random_weights: str | None = None
    sessions: tuple[int, ...] = (1, 8, 32)
    precisions: tuple[Precision, ...] = tuple(Precision)
    prompt_tokens: int = 128
    output_tokens: int = 32
    rounds: int = 5
    threads: int | None = None
    device: str = "cpu"
    peer: bool = True


@dataclass(frozen=True)
class _Measured:
    """One precision: its figures, its KL to fp32 if known, and the steps by which a cloud would choose."""

    result: PrecisionResult
    kl: float | None
    one_s: float
    batch_s: float
    remarks: tuple[str, ...]


def parse_sessions(text: str) -> tuple[int, ...]:
    """`1,8,32` → ascending numbers of sessions; ConfigError for anything else."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = []
    if not counts or not 1 <= counts[0] <= counts[-1] <= MAX_SESSIONS:
        raise ConfigError(
            f"--sessions {text!r} is no list of numbers from 1 to {MAX_SESSIONS}", hint="for example 1,8,32"
        )
    return tuple(counts)


def parse_precisions(text: str) -> tuple[Precision, ...]:
    """`all`, or names by commas; ConfigError for an unknown one."""
    if text == "all":
        return tuple(Precision)
    return tuple(dict.fromkeys(parse_precision(part.strip()) for part in text.split(",")))


def bench_cloud(what: CloudBench, progress: Progress = lambda label, done: None) -> Report:
    """Every precision's figures as rows; those of the best precision as figures.

    Raises:
        ConfigError: device, context or shape.
        IsthmusError (`kv_accounting`, `bench_uneven`): what was measured is not what should have been.
    """
    parse_device(what.device)
    report = Report("cloud")
    measured: dict[Precision, _Measured] = {}
    with _threads(what.threads) as threads:
        progress("model", 0.0)
        subject = _subject(what)
        progress("model", 1.0)
        with subject.checkpoint:
            bandwidth = copy_bandwidth(what.device)
            for precision in what.precisions:
                progress(precision.value, 0.0)
                measured[precision] = _measure(what, subject, precision, bandwidth)
                progress(precision.value, 1.0)
                gc.collect()  # one model at a time is in memory
        _add_peer_fidelity(subject, report)
    for precision, one in measured.items():
        report.notes += [f"{precision.value}: {remark}" for remark in one.remarks]
        if one.kl is not None:
            report.rows.append({"precision": precision.value, "what": "kl_to_fp32", "median": one.kl})
        report.rows += one.result.rows
    best = _best(what, measured)
    report.figures |= measured[best].result.figures
    report.figures["memory_gb_per_s"] = bandwidth / 1e9
    kl = measured[best].kl
    if kl is not None:
        report.figures["kl_to_fp32"] = kl
    report.notes = [*_notes(what, subject, best, measured, threads), *subject.notes, *report.notes]
    return report


@contextmanager
def _threads(asked: int | None) -> Iterator[int]:
    """torch's compute threads for the bench, given back as they were."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(asked or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _subject(what: CloudBench) -> Subject:
    # One more than a round's positions: the token drawn last has no row, but a place in the context.
    num_tokens = what.prompt_tokens + what.output_tokens + 1
    if what.random_weights is not None:
        return random_subject(what.random_weights, num_tokens=num_tokens)
    return real_subject(what.model, num_tokens=num_tokens, device=what.device, peer=what.peer)


def _measure(what: CloudBench, subject: Subject, precision: Precision, bandwidth: float) -> _Measured:
    """Loads the model as a cloud does and measures it."""
    model = CloudModel.load(subject.checkpoint, device=what.device, precision=precision.value)
    tune_widening(model.linears, model.device)
    kl = None
    if subject.fidelity is not None:
        exact = precision is Precision.FP32
        kl = 0.0 if exact else subject.fidelity.kl(lambda ids: model_logits(model, ids))
    bench = PrecisionBench(
        model,
        subject,
        sessions=what.sessions,
        prompt_tokens=what.prompt_tokens,
        output_tokens=what.output_tokens,
        rounds=what.rounds,
        bandwidth=bandwidth,
    )
    prompt = subject.inputs.ids[0][: what.prompt_tokens].tolist()
    one_s, batch_s = (decode_seconds(model, prompt, rows) for rows in (1, BATCH_ROWS))
    return _Measured(bench.run(), kl, one_s, batch_s, model.remarks)


def _add_peer_fidelity(subject: Subject, report: Report) -> None:
    if subject.peer is not None and subject.fidelity is not None:
        kl = subject.fidelity.kl(subject.peer.logits)
        report.rows.append({"precision": "transformers bf16", "what": "kl_to_fp32", "median": kl})


def _faithful(measured: dict[Precision, _Measured]) -> dict[Precision, _Measured]:
    """Those close enough to fp32 to be served by default; all, where none is or KL is unknown."""
    return {p: one for p, one in measured.items() if one.kl is None or one.kl <= MAX_KL} or measured


def _best(what: CloudBench, measured: dict[Precision, _Measured]) -> Precision:
    """The highest aggregate speed at the largest number of sessions among the faithful ones."""
    fit = _faithful(measured)
    name = f"decode_tokens_per_s_{what.sessions[-1]}"
    return max(fit, key=lambda precision: fit[precision].result.figures[name])


def _notes(
    what: CloudBench,
    subject: Subject,
    best: Precision,
    measured: dict[Precision, _Measured],
    threads: int,
) -> list[str]:
    spec, uniform = subject.spec, num_uniform(what.sessions)
    mixed = len(equal_work(uniform, spec.num_layers))
    kls = {p: one.kl for p, one in measured.items() if one.kl is not None}
    rule = f"KL to fp32 <= {MAX_KL:g}" if kls else "all measured (KL is unknown)"
    notes = [
        f"all figures are {best.value}'s: the fastest at {what.sessions[-1]} sessions of those with {rule}",
        f"{spec.base_name}, {spec.num_layers} layers, {what.device}, {threads} threads, "
        f"prompt {what.prompt_tokens}, {what.output_tokens} tokens a round, {what.rounds} rounds, medians",
        "n sessions enter at layers spread evenly over 0..N-1, K = 0 (offload) among them; one session: "
        f"{ONE_AT_A_TIME} of the same spread, each by itself in turn, so that scaling compares equal work",
        "decode: steps in which every session decodes, prefill apart; floor: the same matrix products with "
        "the model's own weights and kernels at the rows each layer runs, head included, alternating",
        "roofline: weights and KV a step must read over the bandwidth of a large copy in this run",
    ]
    if spec.num_layers > 1:
        notes.append(
            f"mixed over uniform: {uniform} sessions at K = 0 against {mixed} over all depths, one at K = 0 "
            "and pairs (k, N-k): row-layers per step are equal (checked); U-shape, without head and sampling "
            "(they cost per row); the prefix shape beside it"
        )
    if subject.peer is not None:
        notes.append(
            "transformers generate: bf16, greedy, no end of sequence, the same prompts, threads and steps "
            "(time of all tokens less that of one), against sessions at K = 0, which run all layers too; "
            f"{min(what.rounds, MAX_PEER_ROUNDS)} rounds"
        )
    if kls:
        known = {p.value: Measured(kl, measured[p].one_s, measured[p].batch_s) for p, kl in kls.items()}
        choice = choose("auto", known, device=what.device)
        notes.append(f"--precision auto would serve in {choice.precision.value}: {choice.reason}")
    return notes

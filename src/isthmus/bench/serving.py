"""`bench cloud --simulate TRACE`: ways of serving compared on a request trace, in virtual time.

The step times come from the real engine on this machine, the decisions from the real scheduler, the arrivals
from the trace, scaled to a share of the capacity; the same arrivals for every way of serving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from isthmus.bench.report import Report
from isthmus.bench.simulator import Cloud, Outcome, Serving, simulate
from isthmus.bench.step_model import FitError, StepModel, StepSpan, fit, fit_error
from isthmus.bench.step_probe import StepProbe
from isthmus.bench.workload import Clients, Workload, draw_window, draw_workload, read_trace
from isthmus.cloud.scheduler import SchedulerConfig
from isthmus.cloud.step_timer import WHOLE_STEPS
from isthmus.protocol.errors import ConfigError

if TYPE_CHECKING:
    from isthmus.cloud.serve import Prepared

MAX_TOKENS: Final = 1024
BASELINE: Final = "fcfs"
_NUM_MIXES: Final = 24
_NUM_HELD_OUT: Final = 16

_FCFS: Final = SchedulerConfig(
    policy="fcfs", chunked=True, reservation="predicted", max_rows=512, max_chunk_rows=256
)
_MLFQ: Final = replace(_FCFS, policy="mlfq")

SERVINGS: Final = (
    Serving("static", replace(_FCFS, reservation="none"), static_batches=True),
    Serving(BASELINE, _FCFS),
    Serving("fcfs_unchunked", replace(_FCFS, chunked=False)),
    Serving("fcfs_worst_case", replace(_FCFS, reservation="worst-case")),
    Serving("fcfs_unreserved", replace(_FCFS, reservation="none")),
    Serving("fcfs_half_chunks", replace(_FCFS, max_rows=256, max_chunk_rows=128)),
    Serving("mlfq", _MLFQ),
    Serving("mlfq_half_chunks", replace(_MLFQ, max_rows=256, max_chunk_rows=128)),
    Serving("mlfq_unchunked", replace(_MLFQ, chunked=False)),
    Serving("mlfq_worst_case", replace(_MLFQ, reservation="worst-case")),
    Serving("mlfq_unreserved", replace(_MLFQ, reservation="none")),
)
"""Each differs from the baseline in what its name says; unnamed is continuous, chunked, predicted."""

Metric = Callable[[Outcome], float]

METRICS: Final[Mapping[str, Metric]] = {
    "ttft_mean_s": lambda o: float(o.ttft_s.mean()),
    "ttft_p95_s": lambda o: _p95(o.ttft_s),
    "tpot_mean_s": lambda o: float(np.nanmean(o.tpot_s)),
    "tpot_p95_s": lambda o: _p95(o.tpot_s),
    "itl_p99_s": lambda o: float(np.percentile(o.itl_s, 99)),
    "itl_max_s": lambda o: float(o.itl_s.max()),
    "completion_mean_s": lambda o: float(o.completion_s.mean()),
    "completion_p95_s": lambda o: _p95(o.completion_s),
}


@dataclass(frozen=True)
class Measured:
    """The cloud as it is on this machine: its step times, how well they are predicted, its bounds."""

    step_model: StepModel
    error: FitError
    max_context: int
    num_pages: int
    hidden: int
    notes: tuple[str, ...]


def bench_serving(
    model: str,
    trace: Path,
    *,
    requests: int = 1500,
    seed: int = 0,
    precision: str = "auto",
    loads: Sequence[float] = (0.7, 0.9),
    threads: int | None = None,
    kv_pages: int | None = None,
    max_tokens: int = MAX_TOKENS,
    offload_share: float = 0.5,
    turnaround_ms: float = 20.0,
    uplink_mbps: float = 20.0,
    servings: Sequence[Serving] = SERVINGS,
) -> Report:
    """The table of every way of serving at every load, loads being shares of the measured capacity.

    `kv_pages` None: as many as the cloud would have here. `uplink_mbps`: of each split client, for its prompt
    rows in fp16. `servings` must hold the one named `BASELINE`, which the figures are relative to.

    Raises:
        ConfigError (`bad_trace`): the trace is malformed or too short. ConfigError: options out of range.
    """
    if not loads or not all(0 < load <= 10 for load in loads):
        raise ConfigError(f"loads {list(loads)}", hint="shares of the capacity, for example 0.7 0.9")
    clients = Clients(offload_share, turnaround_ms / 1000, uplink_mbps * 1e6 / 8)
    window = draw_window(read_trace(trace), requests, seed=seed)  # before the model, which takes a while
    measured = measure_cloud(model, precision=precision, threads=threads, seed=seed)
    num_layers = measured.step_model.num_layers
    num_pages = measured.num_pages if kv_pages is None else kv_pages
    cloud = Cloud(num_layers, num_pages, measured.max_context, max_tokens)
    workload = draw_workload(
        window,
        seed=seed,
        num_layers=num_layers,
        max_context=cloud.max_context,
        max_tokens=max_tokens,
        row_bytes=2 * measured.hidden,
        clients=clients,
    )
    report = compare(workload, cloud, measured.step_model, servings=servings, loads=loads)
    report.figures |= {
        "step_model_median_error": measured.error.median,
        "step_model_p95_error": measured.error.p95,
        "step_model_total_over_measured": measured.error.total,
    }
    report.notes = [
        *measured.notes,
        *_setting(workload, cloud, clients, seed, uplink_mbps),
        *report.notes,
    ]
    return report


def compare(
    workload: Workload,
    cloud: Cloud,
    step_model: StepModel,
    *,
    servings: Sequence[Serving] = SERVINGS,
    loads: Sequence[float],
) -> Report:
    """Deterministic: the same arguments give the same report.

    Raises:
        ConfigError: every output is a single token, so there is no time between tokens to compare.
    """
    if all(request.output_tokens == 1 for request in workload.requests):
        raise ConfigError("every output is one token", hint="simulate longer outputs, or more requests")
    report = Report("serving")
    baseline = next(serving for serving in servings if serving.name == BASELINE)
    saturated = simulate(workload.at_rate(math.inf).requests, baseline, cloud, step_model.seconds)
    capacity = len(workload.requests) / saturated.makespan_s
    report.figures["capacity_requests_per_s"] = capacity
    report.figures["capacity_tokens_per_s"] = float(saturated.num_tokens.sum()) / saturated.makespan_s
    report.rows.append({"load": "all at once", **_row(baseline, saturated)})
    for load in loads:
        arrivals = workload.at_rate(load * capacity).requests
        outcomes = {s.name: simulate(arrivals, s, cloud, step_model.seconds) for s in servings}
        report.rows += [{"load": f"{load:g}", **_row(s, outcomes[s.name])} for s in servings]
        report.figures |= _ratios(outcomes, f"{100 * load:.0f}")
        report.notes += _reading(outcomes, load)
    return report


def _p95(values: np.ndarray) -> float:
    return float(np.nanpercentile(values, 95))


def _row(serving: Serving, outcome: Outcome) -> dict[str, str | float | int]:
    return {
        "serving": serving.name,
        **{name: metric(outcome) for name, metric in METRICS.items()},
        "preemptions": outcome.num_preemptions,
        "recomputed_rows": outcome.recomputed_rows,
        "rows_per_step": outcome.num_rows / outcome.num_steps,
        "kv_mean": outcome.kv_mean,
        "kv_peak": outcome.kv_peak,
        "makespan_s": outcome.makespan_s,
    }


def _ratios(outcomes: Mapping[str, Outcome], load: str) -> dict[str, float]:
    """The headline figures: the others over the baseline."""
    return {
        f"{metric.removesuffix('_s')}_{name}_over_{BASELINE}_{load}": _over_baseline(outcomes, name)[metric]
        for metric in ("ttft_mean_s", "ttft_p95_s", "completion_mean_s")
        for name in outcomes
        if name != BASELINE
    }


def _over_baseline(outcomes: Mapping[str, Outcome], name: str) -> dict[str, float]:
    return {column: metric(outcomes[name]) / metric(outcomes[BASELINE]) for column, metric in METRICS.items()}


def _reading(outcomes: Mapping[str, Outcome], load: float) -> list[str]:
    """Where each wins and loses against the baseline, from the figures alone."""
    notes = []
    for name in outcomes:
        if name == BASELINE:
            continue
        kinds: dict[str, list[str]] = {"better": [], "worse": [], "the same within 1 %": []}
        for column, ratio in _over_baseline(outcomes, name).items():
            kind = "better" if ratio < 0.99 else "worse" if ratio > 1.01 else "the same within 1 %"
            kinds[kind].append(f"{column.removesuffix('_s')} {ratio:.2f}")
        parts = [f"{kind}: {', '.join(columns)}" for kind, columns in kinds.items() if columns]
        notes.append(f"load {load:g}, {name} over {BASELINE}, {'; '.join(parts)}")
    return notes


def _setting(workload: Workload, cloud: Cloud, clients: Clients, seed: int, uplink_mbps: float) -> list[str]:
    requests = workload.requests
    num_offload = sum(request.offload for request in requests)
    outputs = sum(request.output_tokens for request in requests) / len(requests)
    prompts = sum(request.prompt_rows for request in requests) / len(requests)
    return [
        f"{len(requests)} consecutive requests of the trace (seed {seed}), {prompts:.0f} tokens in and "
        f"{outputs:.0f} out on average; {workload.num_clipped} clipped to a context of {cloud.max_context} "
        f"with room for max_tokens {workload.max_tokens}, which every request asks for (the trace has none)",
        f"{num_offload} are offloaded, {len(requests) - num_offload} split at a K drawn from 1 to "
        f"{cloud.num_layers - 1}; a split prompt arrives in chunks of {cloud.chunk_rows} rows at "
        f"{uplink_mbps:g} Mbit/s in fp16, the row of each token {500 * clients.turnaround_s:g} to "
        f"{1500 * clients.turnaround_s:g} ms after it (network and edge; an edge's prefill is not counted)",
        f"simulated with {cloud.num_pages} KV pages and no bound on the number of sessions; arrivals keep "
        "the trace's gaps, scaled to each load: a share of the capacity, which is the rate at which "
        f"{BASELINE} serves the same requests all arriving at once",
        "static: batches as large as fit the pool in the worst case, made of whoever waits when the last one "
        "is through; a finished request of a batch is answered at once and computed no more",
        "all times are taken at the cloud, from the request's arrival there; ttft: to the first token; tpot: "
        "per output token after the first, a mean per request; itl: between two tokens, of all requests "
        "together; one run per row, the same arrivals for all",
    ]


def measure_cloud(model: str, *, precision: str, threads: int | None, seed: int) -> Measured:
    """Loads the model as the cloud does and fits its step times."""
    import torch

    from isthmus.cloud.cpu_watch import CpuWatch
    from isthmus.cloud.engine import Engine

    prepared = _prepare(model, precision, threads)
    engine = Engine.over(prepared.model, prepared.num_pages, WHOLE_STEPS)
    probe = StepProbe(engine, seed=seed)
    probe.measure(probe.grid()[:3])  # warms up
    watch = CpuWatch(torch.get_num_threads())
    steps = probe.measure(probe.grid() + probe.mixes(_NUM_MIXES + _NUM_HELD_OUT))
    disturbed = watch.disturbed()
    fitted, held_out = steps[:-_NUM_HELD_OUT], steps[-_NUM_HELD_OUT:]
    step_model = fit(fitted, num_layers=prepared.info.num_layers)
    error = fit_error(step_model, held_out)
    examples = [(f"{num} rows at 500 keys", [StepSpan(0, 499, 1)] * num) for num in (1, 8, 32)]
    examples.append(("256 of a prompt", [StepSpan(0, 0, 256)]))
    notes = [
        f"{prepared.model.spec.base_name} in {prepared.choice.precision.value} on "
        f"{prepared.model.device.type}, {torch.get_num_threads()} threads; {len(fitted)} measured steps: "
        + ", ".join(f"{what} take {1000 * step_model.seconds(s, len(s)):.0f} ms" for what, s in examples),
        f"{error.num_steps} further steps of the real engine are predicted within {error.median:.1%} "
        f"(median) and {error.p95:.1%} (P95)",
    ]
    if disturbed:
        notes.append("DISTURBED: other processes held cores while the steps were timed; measure again")
    return Measured(
        step_model,
        error,
        prepared.info.context_length,
        prepared.num_pages,
        prepared.info.hidden,
        tuple(notes),
    )


def _prepare(model: str, precision: str, threads: int | None) -> Prepared:
    from isthmus.cloud.serve import CloudOptions, prepare
    from isthmus.logs import configure_log
    from isthmus.splitter.checkpoint import open_checkpoint
    from isthmus.splitter.sources import pull
    from isthmus.splitter.tokenizer import Tokenizer

    configure_log()  # to standard error: standard output is for the report
    pulled = pull(model)
    with open_checkpoint(pulled.path) as checkpoint:
        options = CloudOptions(precision=precision, threads=threads)
        return prepare(checkpoint, Tokenizer.from_bytes(pulled.tokenizer_json), options)

"""`bench router --requests CSV --network PREFIX`: the router judged in simulated worlds.

The world is not the router's model: times are recorded samples that drift unseen, the link follows a trace,
answers are as long as the trace says. Every policy serves the same requests; each cost is the policy's own
objective over what really happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from isthmus.bench.report import Report
from isthmus.bench.router_baselines import Constant, Oracle, Random, Run, best_split, best_threshold, play
from isthmus.bench.router_learner import ABLATIONS, Learner
from isthmus.bench.router_recorder import record, recordings_path
from isthmus.bench.router_recordings import Recordings
from isthmus.bench.router_requests import FOLLOW_UPS, draw_requests
from isthmus.bench.router_scenarios import SCENARIOS, Scenario
from isthmus.bench.router_world import SimWorld
from isthmus.bench.workload import TraceRequest, draw_window, read_trace
from isthmus.protocol.errors import ConfigError
from isthmus.relay.trace import Trace
from isthmus.splitter.pack_writer import Progress
from isthmus.splitter.provide import ensure_pack

CONSTANTS: Final = ("always_local", "always_offload", "best_static_split")
_BLOCK: Final = 25  # consecutive requests: what they meet is not independent
_RESAMPLES: Final = 2000


@dataclass(frozen=True)
class SimOptions:
    """`requests`: a CSV of `bench.workload.COLUMNS`; `network`: what PREFIX.up and PREFIX.down share, in
    Mahimahi's format. `scenarios`: names of `router_scenarios.SCENARIOS`, all of them if empty.
    `num_requests` consecutive lines of the trace are served, beginning where `seed` says; all where it is
    shorter. `max_tokens` bounds every answer. `recordings`: measured service times to draw from, instead of
    those kept in the cache; `record`: measure them anew."""

    requests: Path
    network: Path
    model: str
    bits: str = "auto"
    scenarios: tuple[str, ...] = ()
    num_requests: int = 1500
    seed: int = 0
    max_tokens: int = 1024
    recordings: Path | None = None
    record: bool = False


def bench_router_sim(options: SimOptions, progress: Progress | None = None) -> Report:
    """Deterministic, given recordings.

    Raises:
        ConfigError (`bad_trace`, `bad_recordings`, `unknown_scenario`): names the file or the scenario.
    """
    tell = progress or (lambda what, share: None)
    scenarios = _chosen(options.scenarios)
    trace, link = read_trace(options.requests), Trace.load(options.network)
    if not trace:
        raise ConfigError(
            f"{options.requests} holds no request", code="bad_trace", hint="a header and at least one line"
        )
    window = draw_window(trace, min(options.num_requests, len(trace)), seed=options.seed)
    recordings = _recordings(options, progress)
    report = Report("router")
    report.notes = _notes(options, recordings, len(window))
    for number, scenario in enumerate(scenarios):
        tell(f"serving {scenario.name}", number / len(scenarios))
        judge(report, scenario, recordings, trace, window, link, options)
    tell("serving", 1.0)
    for name in ("regret_causal", "over_best_constant"):
        report.figures[f"{name}_worst"] = max(report.figures[f"{name}_{s.name}"] for s in scenarios)
    report.figures["infeasible_picks"] = sum(
        row["infeasible"] for row in report.rows if row.get("policy") in _ROUTERS
    )
    return report


_ROUTERS: Final = ("router", *(ablation.name for ablation in ABLATIONS))


def _chosen(names: tuple[str, ...]) -> list[Scenario]:
    known = {scenario.name: scenario for scenario in SCENARIOS}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"there is no scenario {name!r}", code="unknown_scenario", hint=f"one of: {', '.join(known)}"
            )
    return [known[name] for name in names or known]


def _recordings(options: SimOptions, progress: Progress | None) -> Recordings:
    if options.recordings is not None:
        return Recordings.load(options.recordings)
    pack = ensure_pack(options.model, options.bits, progress=progress)
    path = recordings_path(options.model, pack.scheme)
    if path.exists() and not options.record:
        return Recordings.load(path)
    recordings = record(pack, options.model, progress=progress)
    recordings.save(path)
    return recordings


def judge(
    report: Report,
    scenario: Scenario,
    recordings: Recordings,
    trace: Sequence[TraceRequest],
    window: Sequence[TraceRequest],
    link: Trace,
    options: SimOptions,
) -> None:
    """All policies in one scenario: their rows and its figures. ConfigError (`bad_trace`) where no request
    can be served at all."""
    requests, num_clipped = draw_requests(
        trace,
        window,
        scenario,
        max_context=recordings.context_length,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )
    world = SimWorld(scenario, recordings, requests, link, max_tokens=options.max_tokens, seed=options.seed)
    if not any(world.servable(i) for i in range(len(requests))):
        raise ConfigError(
            f"scenario {scenario.name}: no way may serve any of the {len(requests)} requests",
            code="bad_trace",
            hint="take more requests, or another stretch with --seed",
        )
    runs = {
        "oracle_hindsight": play(world, Oracle(world, hindsight=True), connected=True),
        "oracle_causal": play(world, Oracle(world, hindsight=False), connected=True),
        "router": play(world, Learner(world), connected=True),
    }
    runs |= {a.name: play(world, Learner(world, a), connected=True) for a in ABLATIONS}
    runs["always_local"] = play(world, Constant(world, world.num_layers))
    runs["always_offload"] = play(world, Constant(world, 0))
    cut, runs["best_static_split"] = best_split(world)
    share = float((runs["router"].cut == 0).sum() / (runs["router"].cut >= 0).sum())
    # What stays here where the whole model mostly cannot.
    other = cut if runs["always_local"].fell_back.mean() > 0.5 else world.num_layers
    runs["random"] = play(world, Random(world, other, share, seed=options.seed))
    what, runs["best_threshold"] = best_threshold(world, other)
    details = {"best_static_split": f"K = {cut}", "random": f"offload {share:.2f}", "best_threshold": what}
    counts = {
        "num_requests": len(requests),
        "clipped": num_clipped,
        "follow_ups": len(world.follow_ups),
        "unservable": sum(not world.servable(i) for i in range(len(requests))),
    }
    report.rows.append(scenario.row() | counts)
    for name, run in runs.items():
        row = _row(world, run, runs["oracle_causal"], runs["oracle_hindsight"])
        report.rows.append(
            {"scenario": scenario.name, "policy": name, **row, "detail": details.get(name, "")}
        )
    router = runs["router"].total_cost
    constants = {name: runs[name].total_cost for name in CONSTANTS}
    for kind in ("causal", "hindsight"):
        report.figures[f"regret_{kind}_{scenario.name}"] = router / runs[f"oracle_{kind}"].total_cost - 1
    report.figures[f"over_best_constant_{scenario.name}"] = router / min(constants.values()) - 1


def _row(world: SimWorld, run: Run, causal: Run, hindsight: Run) -> dict[str, Any]:
    low, high = interval(run, causal)
    low_h, high_h = interval(run, hindsight)
    num, served = world.num_layers, run.cut >= 0
    shares = {
        "local": run.cut == num,
        "split": (run.cut > 0) & (run.cut < num),
        "offload": run.cut == 0,
        "fell_back": run.fell_back,
    }
    return {
        "cost_usd": run.total_cost,
        "regret_causal": run.total_cost / causal.total_cost - 1,
        "regret_causal_low": low,
        "regret_causal_high": high,
        "regret_hindsight": run.total_cost / hindsight.total_cost - 1,
        "regret_hindsight_low": low_h,
        "regret_hindsight_high": high_h,
        "mean_total_s": float(run.total_s[served].mean()),
        "mean_ttft_s": float(run.ttft_s[served].mean()),
        "slo_attainment": float(1 - run.missed[served].mean()),
        "energy_j": float(run.energy_j.sum()),
        "paid_usd": float(run.usd.sum()),
        **{name: float(which[served].mean()) for name, which in shares.items()},
        "infeasible": int(run.infeasible.sum()),
    }


def interval(run: Run, oracle: Run) -> tuple[float, float]:
    """95 % of the regret over `oracle`: bootstrap over blocks of consecutive requests (Künsch 1989), each
    block's costs of both together."""
    starts = np.arange(0, len(run.cost), _BLOCK)
    mine, best = np.add.reduceat(run.cost, starts), np.add.reduceat(oracle.cost, starts)
    drawn = np.random.default_rng(17).integers(0, len(starts), (_RESAMPLES, len(starts)))
    regrets = mine[drawn].sum(axis=1) / best[drawn].sum(axis=1) - 1
    low, high = np.quantile(regrets, (0.025, 0.975))
    return float(low), float(high)


def _notes(options: SimOptions, recordings: Recordings, num: int) -> list[str]:
    notes = [
        f"service times: samples of {recordings.model} ({recordings.edge.precision} on the edge, "
        f"{recordings.cloud.precision} in the cloud) recorded on {recordings.machine}, {recordings.dated}, "
        "times the scenario's declared factors and a hidden drift of each term within 30 %; the router has "
        "the profiles that were measured beside them",
        f"{num} consecutive requests of {options.requests.name} (seed {options.seed}), its gaps scaled; "
        f"answers of at most {options.max_tokens} tokens; requests do not slow each other; the trace names "
        f"no conversations: {FOLLOW_UPS:.0%} of the requests that are longer than the one before with its "
        "answer go on with it",
        f"link: {options.network.name}, met at each request's instant, round trips and their drift on top",
        "cost: seconds, dollars, joules, missed expectations and fidelity as they came, in the policy's "
        "prices; regret: cost over the oracle's, both over all requests, each with its own state; intervals: "
        f"95 %, bootstrap over blocks of {_BLOCK} requests",
        "oracle_hindsight knows how each way of the request will turn out; oracle_causal the present state "
        "of everything, drift included, and the mean answer to prompts of such length in the whole trace",
        "fell_back: what a baseline wanted was not possible, and local, else offload, else the deepest split "
        "served; bytes of the router's probes are charged to it",
    ]
    if recordings.disturbed:
        notes.append("DISTURBED: other processes held cores while the samples were recorded; use --record")
    return notes

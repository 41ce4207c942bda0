"""`isthmus bench router`: the router judged in simulation, live, by its overhead, and by its own log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from isthmus.commands.bench_shared import given, print_report, refuse
from isthmus.commands.options import BitsOption
from isthmus.commands.output import JsonFlag, ModelOption, progress_bar
from isthmus.commands.setup import provide_pack
from isthmus.config import Settings
from isthmus.protocol.errors import ConfigError

_ALLOWED: Final = {
    "simulation": {
        "requests", "network", "scenario", "num_requests", "seed", "max_tokens", "recordings", "record",
        "model", "bits",
    },
    "live": {
        "requests", "num_requests", "phase_requests", "seed", "precision", "threads", "cloud_threads",
        "edge_profile", "model", "bits",
    },
    "overhead": {"num_requests", "seed"},
    "replay": set(),
}  # fmt: skip


def router(
    context: typer.Context,
    requests: Annotated[
        Path | None,
        typer.Option(
            help="Simulate: the requests of this trace (CSV). With --live: lengths like its.", metavar="CSV"
        ),
    ] = None,
    network: Annotated[
        Path | None,
        typer.Option(help="Simulate: the link of PREFIX.up and PREFIX.down (Mahimahi).", metavar="PREFIX"),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Predictions against real runs, over a relay that changes.")
    ] = False,
    overhead: Annotated[bool, typer.Option("--overhead", help="What a decision costs.")] = False,
    replay: Annotated[
        Path | None, typer.Option(help="Decide every decision of a log again.", metavar="LOG")
    ] = None,
    scenario: Annotated[
        list[str] | None, typer.Option(help="Simulate only this one; may be repeated.", metavar="NAME")
    ] = None,
    num_requests: Annotated[
        int | None,
        typer.Option(min=1, help="How many: 1500 simulated, 150 live, 1000 with --overhead."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Bound of each simulated answer.")] = 1024,
    recordings: Annotated[
        Path | None,
        typer.Option(help="Simulate with these measured service times.", metavar="FILE"),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Simulate with service times measured anew.")
    ] = False,
    phase_requests: Annotated[int, typer.Option(min=1, help="Live requests under one condition.")] = 10,
    precision: Annotated[str, typer.Option(help="Weights of the live cloud.")] = "fp32",
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads of the live edge.")] = None,
    cloud_threads: Annotated[int | None, typer.Option(min=1, help="Of the live cloud.")] = None,
    edge_profile: Annotated[
        Path | None,
        typer.Option(help="Profile of the live edge; measured at the start by default.", metavar="FILE"),
    ] = None,
    model: ModelOption = None,
    bits: BitsOption = None,
    json: JsonFlag = False,
) -> None:
    """The router in a simulated world (--requests with --network), --live, its --overhead, or a --replay."""
    _check(given(context) - {"json"}, live=live, overhead=overhead, replay=replay is not None)
    if replay is not None:
        from isthmus.bench.router_replay import bench_router_replay

        report = bench_router_replay(replay)
        print_report(report, as_json=json)
        if report.figures["different"]:
            raise typer.Exit(1)
        return
    if overhead:
        from isthmus.bench.router_overhead import NUM_DECISIONS, bench_router_overhead

        report = bench_router_overhead(num_decisions=num_requests or NUM_DECISIONS, seed=seed)
        print_report(report, as_json=json)
        return
    settings = Settings({"model": model, "bits": bits})
    name = settings.text("model") or ""
    if live:
        from isthmus.bench.router_live import LiveOptions, bench_router_live
        from isthmus.splitter.profile_store import load_profile

        asked = LiveOptions(
            name,
            num_requests=num_requests or LiveOptions.num_requests,
            phase_requests=phase_requests,
            seed=seed,
            precision=precision,
            trace=requests,
            edge_threads=threads,
            cloud_threads=cloud_threads,
            profile=None if edge_profile is None else load_profile(edge_profile),
        )
        pack = provide_pack(settings)
        with progress_bar() as progress:
            report = bench_router_live(pack, asked, progress)
        print_report(report, as_json=json)
        return
    from isthmus.bench.router_sim import SimOptions, bench_router_sim

    if requests is None or network is None:
        raise ConfigError(
            "nothing to measure was named",
            hint="--requests CSV with --network PREFIX (a simulation), --live, --overhead or --replay LOG",
        )
    options = SimOptions(
        requests,
        network,
        name,
        bits=settings.text("bits") or "auto",
        scenarios=tuple(scenario or ()),
        num_requests=num_requests or SimOptions.num_requests,
        seed=seed,
        max_tokens=max_tokens,
        recordings=recordings,
        record=record,
    )
    with progress_bar() as progress:
        report = bench_router_sim(options, progress)
    print_report(report, as_json=json)


def _check(named: set[str], **modes: bool) -> None:
    """One of the modes at most (none: the simulation), and no flag that means nothing in it."""
    chosen = [mode for mode, asked in modes.items() if asked]
    if len(chosen) > 1:
        flags = " and ".join(f"--{mode}" for mode in chosen)
        raise ConfigError(f"{flags} do not go together", hint="run them one after the other")
    mode = chosen[0] if chosen else "simulation"
    refuse(named - _ALLOWED[mode] - set(modes), f"with --{mode}" if chosen else "in a simulation")

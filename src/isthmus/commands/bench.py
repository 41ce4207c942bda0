"""`isthmus bench …`: measurements in one form (CONTRACT.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isthmus.commands import bench_agent, bench_plan, bench_router
from isthmus.commands.bench_shared import given, numbers, print_report, refuse
from isthmus.commands.options import BitsOption
from isthmus.commands.output import JsonFlag, ModelOption, progress_bar
from isthmus.commands.setup import provide_pack
from isthmus.config import Settings
from isthmus.protocol.errors import ConfigError

app = typer.Typer(help="Measure: ratios in one run, alternating, medians.", no_args_is_help=True)
app.command("agent")(bench_agent.agent)
app.command("plan")(bench_plan.plan)
app.command("router")(bench_router.router)

ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Compute threads of the edge.")]
RoundsOption = Annotated[int, typer.Option("--rounds", min=1, help="Alternations; the median is reported.")]


@app.command()
def local(
    model: ModelOption = None,
    bits: BitsOption = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    output_tokens: Annotated[int, typer.Option(min=1)] = 64,
    rounds: RoundsOption = 7,
    threads: ThreadsOption = None,
    json: JsonFlag = False,
) -> None:
    """The block-wise runner against the same graph as one session."""
    from isthmus.bench.local import bench_local

    pack = provide_pack(Settings({"model": model, "bits": bits}))
    report = bench_local(
        pack, prompt_tokens=prompt_tokens, output_tokens=output_tokens, rounds=rounds, threads=threads
    )
    print_report(report, as_json=json)


@app.command()
def split(
    model: ModelOption = None,
    bits: BitsOption = None,
    rtt_ms: Annotated[
        str, typer.Option("--rtt-ms", help="Round-trip times to emulate, by commas.")
    ] = "0,20,80",
    split: Annotated[
        int | None, typer.Option("--split", help="Layers on the edge; default: half of them.")
    ] = None,
    shape: Annotated[str, typer.Option("--shape", help="prefix or u.")] = "prefix",
    precision: Annotated[str | None, typer.Option("--precision", help="Weights of the cloud.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    output_tokens: Annotated[int, typer.Option(min=2)] = 48,
    rounds: RoundsOption = 5,
    threads: ThreadsOption = None,
    cloud_threads: Annotated[int | None, typer.Option("--cloud-threads", min=1)] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Instead: the edge's memory as it grows with K.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Decode speed of a split against what edge, cloud and link allow; or --memory."""
    rtts_ms = numbers("--rtt-ms", rtt_ms, "milliseconds by commas, for example 0,20,80")
    settings = Settings(
        {"model": model, "bits": bits, "precision": precision, "shape": shape, "split": split}
    )
    pack = provide_pack(settings)
    num_layers = pack.spec.num_layers
    if memory:
        from isthmus.bench.memory import bench_memory

        ladder = sorted(
            {1, num_layers // 4, num_layers // 2, 3 * num_layers // 4, num_layers} | {min(8, num_layers)}
        )
        print_report(bench_memory(pack, [k for k in ladder if k]), as_json=json)
        return
    from isthmus.bench.split import SplitBench, bench_split

    what = SplitBench(
        model=settings.text("model") or "",
        rtts_ms=rtts_ms,
        split=_inner_split(settings.number("split"), num_layers),
        shape="u" if settings.text("shape") == "u" else "prefix",
        precision=settings.text("precision") or "auto",
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        rounds=rounds,
        edge_threads=threads,
        cloud_threads=cloud_threads,
    )
    print_report(bench_split(pack, what), as_json=json)


@app.command()
def cloud(
    context: typer.Context,
    model: ModelOption = None,
    sessions: Annotated[
        str, typer.Option("--sessions", help="Numbers of sessions, by commas.", metavar="N,N,…")
    ] = "1,8,32",
    precision: Annotated[
        str, typer.Option("--precision", help="all, or fp32, bf16, int8, int4 by commas.")
    ] = "all",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    output_tokens: Annotated[int, typer.Option(min=1)] = 32,
    rounds: RoundsOption = 5,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Compute threads.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    random_weights: Annotated[
        str | None,
        typer.Option(
            "--random-weights",
            help="Instead of a model: random weights shaped as llama-3.2-1b or llama-3.1-8b, by default in "
            "bf16 and int8 at 1, 32 and 128 sessions.",
            metavar="SHAPE",
        ),
    ] = None,
    peer: Annotated[bool, typer.Option("--peer/--no-peer", help="Compare with transformers.")] = True,
    simulate: Annotated[
        Path | None,
        typer.Option(
            "--simulate",
            help="Instead: replay a trace of requests through the scheduler in virtual time.",
            metavar="TRACE",
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of the trace to replay.")] = 1500,
    seed: Annotated[int, typer.Option(min=0, help="Which stretch of the trace.")] = 0,
    loads: Annotated[str, typer.Option(help="Shares of the measured capacity, by commas.")] = "0.7,0.9",
    json: JsonFlag = False,
) -> None:
    """The engine's decode speed at each precision against its floor and transformers; or --simulate."""
    named = given(context)
    name = Settings({"model": model}).text("model") or ""
    if simulate is not None:
        refuse(named & _MEASURED_ONLY, "with --simulate")
        from isthmus.bench.serving import bench_serving

        report = bench_serving(
            name,
            simulate,
            requests=requests,
            seed=seed,
            precision=precision if "precision" in named else "auto",
            loads=numbers("--loads", loads, "shares of the capacity, for example 0.7,0.9"),
            threads=threads,
        )
        print_report(report, as_json=json)
        return
    refuse(named & _SIMULATED_ONLY, "without --simulate")
    if random_weights is not None:
        refuse(named & {"model", "peer"}, "with --random-weights")
        sessions = sessions if "sessions" in named else "1,32,128"
        precision = precision if "precision" in named else "bf16,int8"
    from isthmus.bench.cloud import CloudBench, bench_cloud, parse_precisions, parse_sessions

    what = CloudBench(
        model=name,
        random_weights=random_weights,
        sessions=parse_sessions(sessions),
        precisions=parse_precisions(precision),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        rounds=rounds,
        threads=threads,
        device=device,
        peer=peer,
    )
    with progress_bar() as progress:
        report = bench_cloud(what, progress)
    print_report(report, as_json=json)


@app.command()
def recovery(
    model: ModelOption = None,
    rtt_ms: Annotated[str, typer.Option("--rtt-ms", help="Round-trip times to emulate, by commas.")] = "0,50",
    split: Annotated[
        int | None, typer.Option("--split", help="Layers on the edge; default: half of them.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    output_tokens: Annotated[int, typer.Option(min=8)] = 48,
    rounds: RoundsOption = 3,
    threads: ThreadsOption = None,
    json: JsonFlag = False,
) -> None:
    """From the death of a cloud, or of the link, to the next token, beside what bounds it."""
    from isthmus.bench.recovery import RecoveryBench, bench_recovery

    # fp32 on both sides: only then may every token be held against the unbroken run's.
    settings = Settings({"model": model, "bits": "32"})
    pack = provide_pack(settings)
    what = RecoveryBench(
        model=settings.text("model") or "",
        rtts_ms=numbers("--rtt-ms", rtt_ms, "milliseconds by commas, for example 0,50"),
        rounds=rounds,
        split=_inner_split(split, pack.spec.num_layers),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        threads=threads,
    )
    with progress_bar() as progress:
        report = bench_recovery(pack, what, progress)
    print_report(report, as_json=json)


def _inner_split(split: int | None, num_layers: int) -> int:
    """The K to measure: the one given, or the middle one."""
    chosen = num_layers // 2 if split is None else split
    if not 0 < chosen < num_layers:
        raise ConfigError(f"--split {chosen} is not between 1 and {num_layers - 1}", hint="that is no split")
    return chosen


_MEASURED_ONLY = {
    "sessions", "prompt_tokens", "output_tokens", "rounds", "device", "random_weights", "peer",
}  # fmt: skip
_SIMULATED_ONLY = {"requests", "seed", "loads"}

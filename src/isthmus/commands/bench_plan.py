"""`isthmus bench plan`: does the plan hold when it is carried out?"""

from __future__ import annotations

from typing import Annotated, Final

import typer

from isthmus.commands.bench_shared import given, numbers, print_report, refuse
from isthmus.commands.options import BitsOption, ShapeOption
from isthmus.commands.output import JsonFlag, ModelOption, progress_bar
from isthmus.commands.setup import provide_pack
from isthmus.config import Settings
from isthmus.protocol.errors import ConfigError

_BRUTE_ONLY: Final = {"setting", "splits", "rounds", "seed"}
_MEMORY_ONLY: Final = {"min_depth"}


def plan(
    context: typer.Context,
    model: ModelOption = None,
    bits: BitsOption = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--setting",
            help="RTT in ms, Mbit/s up and down (0 = no limit), and how many times as slow the edge is; may "
            "be repeated. Default: three of them.",
            metavar="RTT:UP:DOWN:THROTTLE",
        ),
    ] = None,
    splits: Annotated[
        str | None,
        typer.Option("--splits", help="Only these K, by commas; 0 is offload, all layers local."),
    ] = None,
    edge_memory_mb: Annotated[
        float | None,
        typer.Option(
            "--edge-memory-mb",
            help="Instead: plan under this limit, run the plan, and measure what it takes.",
            min=1,
            metavar="MB",
        ),
    ] = None,
    min_depth: Annotated[
        int, typer.Option(min=1, help="With --edge-memory-mb: fewest layers of the split.")
    ] = 1,
    shape: ShapeOption = None,
    precision: Annotated[str | None, typer.Option("--precision", help="Weights of the cloud.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    output_tokens: Annotated[int, typer.Option(min=1)] = 24,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Runs of every K, and again of the fastest.")
    ] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="A quickly measured profile of the edge; its memory is modelled.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads of the edge.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts and the order.")] = 0,
    json: JsonFlag = False,
) -> None:
    """The planned K against every K really run over the relay; or --edge-memory-mb."""
    from isthmus.bench.plan import DEFAULT_SETTINGS, PlanBench, Setting, bench_plan
    from isthmus.bench.plan_memory import bench_plan_memory

    if edge_memory_mb is None:
        refuse(given(context) & _MEMORY_ONLY, "without --edge-memory-mb")
    else:
        refuse(given(context) & _BRUTE_ONLY, "with --edge-memory-mb")
    links = DEFAULT_SETTINGS if setting is None else tuple(Setting.parse(text) for text in setting)
    settings = Settings({"model": model, "bits": bits, "shape": shape, "precision": precision})
    pack = provide_pack(settings)
    what = PlanBench(
        model=settings.text("model") or "",
        settings=links,
        splits=None if splits is None else _splits(splits, pack.spec.num_layers),
        shape="u" if settings.text("shape") == "u" else "prefix",
        precision=settings.text("precision") or "auto",
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        rounds=rounds,
        full=not quick,
        threads=threads,
        seed=seed,
    )
    with progress_bar() as progress:
        if edge_memory_mb is None:
            report = bench_plan(pack, what, progress)
        else:
            report = bench_plan_memory(pack, what, edge_memory_mb, min_depth, progress)
    print_report(report, as_json=json)


def _splits(text: str, num_layers: int) -> tuple[int, ...]:
    """The K of `--splits`, each of which there is."""
    values = numbers("--splits", text, "layers on the edge by commas, for example 0,8,30")
    for value in values:
        if value != int(value) or value > num_layers:
            raise ConfigError(f"--splits {value:g}: there are K = 0 … {num_layers}", hint="whole numbers")
    return tuple(sorted({int(value) for value in values}))

"""`isthmus bench …`: measurements in one form (CONTRACT.md)."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from isthmus.bench.report import Report
from isthmus.commands.generate import BitsOption
from isthmus.commands.output import JsonFlag, ModelOption, out, print_json
from isthmus.commands.setup import provide_pack
from isthmus.config import Settings
from isthmus.protocol.errors import ConfigError

app = typer.Typer(help="Measure: ratios in one run, alternating, medians.", no_args_is_help=True)

ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Compute threads of the edge.")]
RoundsOption = Annotated[int, typer.Option("--rounds", min=1, help="Alternations; the median is reported.")]


def _print(report: Report, *, as_json: bool) -> None:
    result = report.to_dict()
    if as_json:
        print_json(result)
        return
    figures = Table("figure", "value", title=f"bench {report.bench}")
    for name, value in result["figures"].items():
        figures.add_row(name, f"{value:g}")
    out.print(figures)
    if report.rows:
        columns = list(dict.fromkeys(key for row in result["rows"] for key in row))
        rows = Table(*columns)
        for row in result["rows"]:
            rows.add_row(
                *(f"{row[c]:g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns)
            )
        out.print(rows)
    for note in report.notes:
        out.print(f"· {note}", markup=False)


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
    _print(report, as_json=json)


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
    rtts_ms = _numbers(rtt_ms)
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
        _print(bench_memory(pack, [k for k in ladder if k]), as_json=json)
        return
    from isthmus.bench.split import SplitBench, bench_split

    chosen = settings.number("split") or num_layers // 2
    if not 0 < chosen < num_layers:
        raise ConfigError(f"--split {chosen} is not between 1 and {num_layers - 1}", hint="that is no split")
    what = SplitBench(
        model=settings.text("model") or "",
        rtts_ms=rtts_ms,
        split=chosen,
        shape="u" if settings.text("shape") == "u" else "prefix",
        precision=settings.text("precision") or "auto",
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        rounds=rounds,
        edge_threads=threads,
        cloud_threads=cloud_threads,
    )
    _print(bench_split(pack, what), as_json=json)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        values = ()
    if not values or not all(0 <= value < 10_000 for value in values):
        raise ConfigError(f"--rtt-ms {text!r}", hint="milliseconds by commas, for example 0,20,80")
    return values

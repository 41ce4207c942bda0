"""`isthmus bench agent`: the served edge as its users meet it."""

from __future__ import annotations

from typing import Annotated

import typer

from isthmus.commands.bench_shared import print_report
from isthmus.commands.output import JsonFlag, ModelOption
from isthmus.commands.setup import provide_pack
from isthmus.config import Settings


def agent(
    model: ModelOption = None,
    starts: Annotated[int, typer.Option(min=1, help="How often the start is measured.")] = 3,
    idle_s: Annotated[float, typer.Option(min=0, help="How long an idle agent is watched.")] = 20.0,
    clients: Annotated[int, typer.Option(min=0, help="Clients that stream at once.")] = 64,
    seconds: Annotated[float, typer.Option(min=1, help="How long they ask again and again.")] = 60.0,
    crowd: Annotated[int, typer.Option(min=0, help="Clients that all come in one moment.")] = 200,
    parallel: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 4,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of each answer.")] = 32,
    cache_mb: Annotated[int, typer.Option(min=0, help="Memory for kept conversations.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Start, rest and many clients at once of `serve edge`, over HTTP."""
    from isthmus.bench.agent import AgentBench, bench_agent

    settings = Settings({"model": model})
    provide_pack(settings)
    what = AgentBench(
        model=settings.text("model") or "",
        starts=starts,
        idle_s=idle_s,
        clients=clients,
        seconds=seconds,
        crowd=crowd,
        parallel=parallel,
        queue=queue,
        max_tokens=max_tokens,
        cache_mb=cache_mb,
    )
    print_report(bench_agent(what), as_json=json)

"""`bench plan --edge-memory-mb`: what fits the limit by plan stays within it, each way in a fresh process."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

from isthmus.bench.processes import process
from isthmus.bench.report import Report
from isthmus.protocol.errors import IsthmusError

if TYPE_CHECKING:
    from isthmus.bench.plan import PlanBench, Progress
    from isthmus.splitter.pack import Pack
    from isthmus.splitter.planner import PlannedWay

SAMPLE_S: Final = 0.005


def bench_plan_memory(
    pack: Pack, what: PlanBench, limit_mb: float, min_depth: int, progress: Progress
) -> Report:
    """Plan a split under the limit and run it, and the deepest one that fits by plan; resident memory above
    that of the same agent before it loaded anything. RouteInfeasibleError where no split fits."""
    from isthmus.bench.plan import planned_world
    from isthmus.edge.inquiry import ask_cloud
    from isthmus.splitter.planner import MIB, PlanRequest, plan
    from isthmus.splitter.profiling import measure_edge

    report = Report("plan")
    with process(
        "serve", "cloud", "--model", what.model, "--port", "0", "--precision", what.precision
    ) as url:
        profile = measure_edge(pack, threads=what.threads, quick=not what.full, progress=progress)
        world = planned_world(pack, profile, asyncio.run(ask_cloud(pack, url)))
        limit = int(limit_mb * MIB)
        tokens = (what.prompt_tokens, what.output_tokens)
        answer = plan(
            world,
            PlanRequest(*tokens, edge_memory_bytes=limit, min_depth=max(1, min_depth), shape=what.shape),
        )
        local = answer.candidates[0]
        best = answer.require()
        splits = [way for way in answer.candidates if way.feasible and way.route == "split"]
        deepest = max(splits, key=lambda way: way.split, default=best)
        ways = [best] if best is deepest else [best, deepest]
        for number, way in enumerate(ways):
            progress("running what fits", number / len(ways))
            report.rows.append({**_row(way), **_run(pack, url, limit_mb, way, what)})
        progress("running what fits", 1.0)
    planned, last = report.rows[0], report.rows[-1]
    report.figures = {
        "limit_mb": limit_mb,
        "local_fits": float(local.feasible),
        "planned_split": best.split,
        "predicted_mb": planned["predicted_mb"],
        "above_idle_mb": planned["above_idle_mb"],
        "deepest_split": deepest.split,
        "deepest_predicted_mb": last["predicted_mb"],
        "deepest_above_idle_mb": last["above_idle_mb"],
    }
    report.notes = [
        f"local: {local.detail or 'fits'}",
        f"{pack.scheme}; prompt {what.prompt_tokens}, {what.output_tokens} tokens; MB are 2^20 bytes",
        f"above_idle: the most that was resident while the request ran, by samples every {SAMPLE_S * 1e3:g} "
        "ms, less what was before it, in a fresh process whose agent has the limit as its --memory-mb",
    ]
    return report


def _row(way: PlannedWay) -> dict[str, Any]:
    from isthmus.splitter.planner import MIB

    assert way.prediction is not None
    return {"what": way.route, "k": way.split, "predicted_mb": way.prediction.memory_bytes / MIB}


def _run(pack: Pack, url: str, limit_mb: float, way: PlannedWay, what: PlanBench) -> dict[str, Any]:
    asked = {
        "pack": str(pack.path), "url": url, "memory_mb": limit_mb, "threads": what.threads,
        "route": way.route, "split": way.split if way.route == "split" else None, "shape": way.shape,
        "prompt_tokens": what.prompt_tokens, "output_tokens": what.output_tokens,
    }  # fmt: skip
    command = [sys.executable, "-m", "isthmus.bench.plan_memory", json.dumps(asked)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise IsthmusError(f"the process that ran {way.name} ended with exit code {done.returncode}")
    told: dict[str, Any] = json.loads(done.stdout)
    return told


# ---- the fresh process -------------------------------------------------------------------------------


async def _child(asked: dict[str, Any]) -> dict[str, float]:
    from pathlib import Path

    import psutil

    from isthmus.edge.agent import Agent
    from isthmus.edge.requests import GenerateRequest
    from isthmus.protocol.sampling import SamplingParams
    from isthmus.splitter.pack import Pack
    from isthmus.splitter.planner import MIB

    pack = Pack.open(Path(asked["pack"]))
    agent = Agent(pack, cloud_urls=(asked["url"],), memory_mb=asked["memory_mb"], threads=asked["threads"])
    await agent.start()
    this = psutil.Process()
    idle = highest = this.memory_info().rss

    async def watch() -> None:
        nonlocal highest
        while True:
            highest = max(highest, this.memory_info().rss)
            await asyncio.sleep(SAMPLE_S)

    watching = asyncio.create_task(watch())
    request = GenerateRequest(
        prompt_ids=tuple(i % pack.spec.vocab_size for i in range(asked["prompt_tokens"])),
        max_tokens=asked["output_tokens"],
        sampling=SamplingParams(temperature=0.0),
        route=asked["route"],
        split=asked["split"],
        shape=asked["shape"],
    )
    async for _ in agent.generate(request):
        pass
    after = this.memory_info().rss
    watching.cancel()
    await agent.aclose()
    highest = max(highest, after)
    return {
        "idle_mb": idle / MIB,
        "above_idle_mb": (highest - idle) / MIB,
        "after_above_idle_mb": (after - idle) / MIB,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_child(json.loads(sys.argv[1])))))

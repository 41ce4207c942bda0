"""`bench split`: decode speed of a real split over a relayed link against what its two halves allow."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from isthmus.bench.processes import halves, on_cores, process
from isthmus.bench.report import Report, spread

if TYPE_CHECKING:
    from isthmus.edge.agent import Agent
    from isthmus.splitter.pack import Pack

STANDALONE_STEPS = 48


@dataclass(frozen=True)
class SplitBench:
    """What is measured: `split` layers on the edge, over each of `rtts_ms`, in `rounds` alternations."""

    model: str
    rtts_ms: tuple[float, ...]
    split: int
    shape: Literal["prefix", "u"]
    precision: str
    prompt_tokens: int
    output_tokens: int
    rounds: int
    edge_threads: int | None
    cloud_threads: int | None


def bench_split(pack: Pack, what: SplitBench) -> Report:
    """Per RTT: decode tok/s, its share of 1/(t_edge + t_cloud + RTT), and the overhead per step in ms."""
    edge_cores, cloud_cores = halves()
    with ExitStack() as stack:
        threads = ["--threads", str(what.cloud_threads)] if what.cloud_threads else []
        arguments = ("--model", what.model, "--port", "0", "--precision", what.precision, *threads)
        with on_cores(cloud_cores):
            cloud_step = stack.enter_context(_standalone_cloud(what))
            cloud = stack.enter_context(process("serve", "cloud", *arguments))
        stack.enter_context(on_cores(edge_cores))
        relays = {
            rtt: stack.enter_context(process("relay", "127.0.0.1:0", cloud, "--rtt-ms", str(rtt)))
            for rtt in what.rtts_ms
        }
        report = asyncio.run(_measure(pack, what, cloud_step, relays))
        report.notes.append(
            f"edge and relay run on cores {sorted(edge_cores)}, the cloud on {sorted(cloud_cores)}"
            if edge_cores
            else "edge, relay and cloud share this machine's cores"
        )
        return report


@contextmanager
def _standalone_cloud(what: SplitBench) -> Iterator[Callable[[str], float | str]]:
    """A process that runs cloud steps by hand (see cloud_step.py); yields the asking."""
    arguments = (what.model, what.precision, what.split, what.prompt_tokens, what.cloud_threads or 0)
    command = [sys.executable, "-m", "isthmus.bench.cloud_step", *map(str, arguments)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    stdin, stdout = child.stdin, child.stdout

    def ask(line: str) -> float | str:
        stdin.write(f"{line}\n")
        stdin.flush()
        answer: float | str = json.loads(stdout.readline())
        return answer

    try:
        yield ask
    finally:
        stdin.close()
        stdout.close()
        child.terminate()
        child.wait()


async def _measure(
    pack: Pack, what: SplitBench, cloud: Callable[[str], float | str], relays: dict[float, str]
) -> Report:
    from isthmus.edge.agent import Agent

    agents = {rtt: Agent(pack, cloud_urls=(url,), threads=what.edge_threads) for rtt, url in relays.items()}
    standalone = _Halves(pack, what, cloud)
    parts: list[_Standalone] = []
    speeds: dict[float, list[float]] = {rtt: [] for rtt in relays}
    for agent in agents.values():
        await agent.start()
    try:
        for agent in agents.values():
            await _decode_speed(agent, what, seed=0)  # connects, loads layers, fills caches
        await asyncio.to_thread(standalone.measure)  # off the event loop: the links' heartbeats go on
        for number in range(what.rounds):
            parts.append(await asyncio.to_thread(standalone.measure))
            for rtt, agent in agents.items():
                speeds[rtt].append(await _decode_speed(agent, what, seed=number + 1))
    finally:
        for agent in agents.values():
            await agent.aclose()
    return _report(pack, what, standalone.precision, parts, speeds)


def _report(
    pack: Pack, what: SplitBench, precision: str, parts: list[_Standalone], speeds: dict[float, list[float]]
) -> Report:
    report = Report("split")
    bound_s = statistics.median([part.alternating_s for part in parts])
    for rtt, samples in speeds.items():
        name, rtt_s = f"{rtt:g}", rtt / 1000
        speed = statistics.median(samples)
        shares = [v * (part.alternating_s + rtt_s) for v, part in zip(samples, parts, strict=True)]
        hot = [v * (part.hot_s + rtt_s) for v, part in zip(samples, parts, strict=True)]
        report.figures[f"split_efficiency_rtt_{name}"] = statistics.median(shares)
        report.figures[f"split_efficiency_hot_rtt_{name}"] = statistics.median(hot)
        report.figures[f"overhead_ms_rtt_{name}"] = (1 / speed - bound_s - rtt_s) * 1000
        report.figures[f"decode_tokens_per_s_rtt_{name}"] = speed
        report.rows.append({"what": "decode_tokens_per_s", "rtt_ms": rtt, **spread(samples)})
        report.rows.append({"what": "efficiency", "rtt_ms": rtt, **spread(shares)})
        report.rows.append({"what": "efficiency_hot", "rtt_ms": rtt, **spread(hot)})
    for name in ("edge_s", "cloud_s", "edge_hot_s", "cloud_hot_s"):
        values = [getattr(part, name) * 1000 for part in parts]
        label = f"t_{name.removesuffix('_s')}_ms"
        report.figures[label] = statistics.median(values)
        report.rows.append({"what": label, **spread(values)})
    report.notes = [
        f"{what.split} of {pack.spec.num_layers} layers on the edge, shape {what.shape}, "
        f"edge {pack.scheme}, cloud {precision}",
        f"prompt {what.prompt_tokens}, {what.output_tokens} tokens, {what.rounds} rounds",
        "edge, relay and cloud are real processes; the RTT is emulated by the relay",
        "t_edge and t_cloud are measured standalone (no server, no network) at the start of every round, one "
        "step of each in turn, as a split runs them; `hot`: each in a loop of its own, with warm caches",
    ]
    return report


@dataclass(frozen=True)
class _Standalone:
    """Mean seconds of one decode step of each half (a rate is what it is held against, and that is a mean
    too): in turn with the other half, and in a loop by itself."""

    edge_s: float
    cloud_s: float
    edge_hot_s: float
    cloud_hot_s: float

    @property
    def alternating_s(self) -> float:
        return self.edge_s + self.cloud_s

    @property
    def hot_s(self) -> float:
        return self.edge_hot_s + self.cloud_hot_s


class _Halves:
    """Both halves of a decode step, by themselves."""

    def __init__(self, pack: Pack, what: SplitBench, cloud: Callable[[str], float | str]) -> None:
        from isthmus.splitter.runner import BlockRunner

        self.what = what
        self.cloud = cloud
        self.precision = ""
        self.runner = BlockRunner(pack, threads=what.edge_threads)
        self.runner.load(range(what.split), embed=True, head=what.shape == "u")
        rng = np.random.default_rng(1)
        self.prompt = [int(i) for i in rng.integers(0, pack.spec.vocab_size, what.prompt_tokens)]

    def measure(self) -> _Standalone:
        """Embedding and blocks for one row (norm and head too in the U-shape) against one engine step."""
        what, runner = self.what, self.runner
        cache = runner.new_cache(range(what.split), capacity=what.prompt_tokens + 2 * STANDALONE_STEPS)
        self.precision = str(self.cloud("open"))

        def edge_step() -> float:
            started = time.perf_counter()
            rows = runner.forward(cache, runner.embed(self.prompt[:1]), start_layer=0, stop_layer=what.split)
            if what.shape == "u":
                runner.head(rows).argmax()
            return time.perf_counter() - started

        def cloud_step() -> float:
            return float(self.cloud("step"))

        try:
            runner.forward(cache, runner.embed(self.prompt), start_layer=0, stop_layer=what.split)
            turns = [(edge_step(), cloud_step()) for _ in range(STANDALONE_STEPS)]
            edge_hot = [edge_step() for _ in range(STANDALONE_STEPS)]
            cloud_hot = [cloud_step() for _ in range(STANDALONE_STEPS)]
        finally:
            self.cloud("close")
            cache.close()
        return _Standalone(
            edge_s=statistics.fmean([edge for edge, _ in turns]),
            cloud_s=statistics.fmean([cloud for _, cloud in turns]),
            edge_hot_s=statistics.fmean(edge_hot),
            cloud_hot_s=statistics.fmean(cloud_hot),
        )


async def _decode_speed(agent: Agent, what: SplitBench, *, seed: int) -> float:
    """Tokens per second after the first, of one greedy request with a random prompt of its own."""
    from isthmus.edge.requests import Finished, GenerateRequest
    from isthmus.protocol.sampling import SamplingParams

    rng = np.random.default_rng(seed)
    prompt = tuple(int(i) for i in rng.integers(0, agent.pack.spec.vocab_size, what.prompt_tokens))
    request = GenerateRequest(
        prompt_ids=prompt,
        max_tokens=what.output_tokens,
        sampling=SamplingParams(temperature=0.0),
        route="split",
        split=what.split,
        shape=what.shape,
    )
    speed = 0.0
    async for event in agent.generate(request):
        if isinstance(event, Finished):
            speed = event.timings.decode_tokens_per_s
    return speed

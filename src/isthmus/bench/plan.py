"""`bench plan`: the planned K against brute force: every K really run over the relay, at several settings."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from isthmus.bench.processes import halves, on_cores, process
from isthmus.bench.report import Report, spread
from isthmus.protocol.errors import ConfigError
from isthmus.splitter.planner import MIB, PlannedWay, PlanRequest, plan
from isthmus.splitter.situation import Shape, Wire, World

if TYPE_CHECKING:
    from isthmus.bench.throttle import ThrottledAgent
    from isthmus.edge.inquiry import CloudAnswer
    from isthmus.protocol.profiles import DeviceProfile
    from isthmus.splitter.pack import Pack

Progress = Callable[[str, float], None]
KV_DTYPE_BYTES: Final = 4
FINALISTS: Final = 3
"""Measured once more beside the planned K: the least of thirty noisy figures flatters itself."""


@dataclass(frozen=True)
class Setting:
    """A link, and how many times as slow as this machine the edge is (emulated)."""

    rtt_ms: float
    up_mbps: float
    down_mbps: float
    throttle: float

    @property
    def name(self) -> str:
        """As figures carry it: rtt_5_up_20_down_50_edge_4."""
        return f"rtt_{self.rtt_ms:g}_up_{self.up_mbps:g}_down_{self.down_mbps:g}_edge_{self.throttle:g}"

    @classmethod
    def parse(cls, text: str) -> Setting:
        """From RTT:UP:DOWN:THROTTLE in ms, Mbit/s, Mbit/s and times. ConfigError (`bad_plan_setting`)."""
        try:
            rtt, up, down, throttle = (float(part) for part in text.split(":"))
        except ValueError:
            rtt = up = down = throttle = -1.0
        bounded = all(0 <= value < 10_000 for value in (rtt, up, down))
        if not bounded or not 1 <= throttle <= 100:
            raise ConfigError(
                f"--setting {text!r} is not RTT:UP:DOWN:THROTTLE",
                code="bad_plan_setting",
                hint="milliseconds, Mbit/s up and down (0 = no limit), times (1 to 100): 5:20:50:4",
            )
        return cls(rtt, up, down, throttle)


DEFAULT_SETTINGS: Final = (Setting(2, 100, 100, 1), Setting(5, 20, 50, 4), Setting(60, 5, 20, 2))


@dataclass(frozen=True)
class PlanBench:
    """What is planned and measured. `splits` None: every K. `full`: measure the edge's profile fully."""

    model: str
    settings: tuple[Setting, ...]
    splits: tuple[int, ...] | None
    shape: Shape
    precision: str
    prompt_tokens: int
    output_tokens: int
    rounds: int
    full: bool = True
    threads: int | None = None
    seed: int = 0


def bench_plan(pack: Pack, what: PlanBench, progress: Progress) -> Report:
    """Per setting: the measured time of the planned K over that of the best K measured, among all ways and
    among the splits alone."""
    from isthmus.splitter.profiling import measure_edge

    report = Report("plan")
    edge_cores, cloud_cores = halves()
    with ExitStack() as stack:
        with on_cores(cloud_cores):
            arguments = ("--model", what.model, "--port", "0", "--precision", what.precision)
            cloud = stack.enter_context(process("serve", "cloud", *arguments))
        stack.enter_context(on_cores(edge_cores))
        profile = measure_edge(pack, threads=what.threads, quick=not what.full, progress=progress)
        for setting in what.settings:
            with process("relay", "127.0.0.1:0", cloud, *_relay_flags(setting)) as relay:
                asyncio.run(_one_setting(pack, what, setting, relay, profile, report, progress))
    ratios = [value for name, value in report.figures.items() if name.startswith("planned_over_best_")]
    report.figures["worst_planned_over_best"] = max(ratios)
    report.notes += [
        f"{pack.spec.num_layers} layers, shape {what.shape}, edge {pack.scheme}, cloud {what.precision}; "
        f"prompt {what.prompt_tokens}, {what.output_tokens} tokens, {what.rounds} rounds in shuffled order",
        "edge, relay and cloud are real processes; link and throttle are emulated: the edge sleeps for as "
        "long as its blocks would take in addition",
        "the edge's profile is measured in this process at the start, the cloud tells its own, the link is "
        "probed: the plan is made before anything is run",
        f"planned_over_best: medians of as many rounds more, of the planned K and the {FINALISTS} fastest; "
        "planned_split: the same among the splits alone, as where privacy or memory asks for one",
    ]
    return report


def _relay_flags(setting: Setting) -> list[str]:
    flags = {"--rtt-ms": setting.rtt_ms, "--up-mbps": setting.up_mbps, "--down-mbps": setting.down_mbps}
    return [text for flag, value in flags.items() for text in (flag, f"{value:g}")]


async def _one_setting(
    pack: Pack,
    what: PlanBench,
    setting: Setting,
    relay: str,
    profile: DeviceProfile,
    report: Report,
    progress: Progress,
) -> None:
    from isthmus.bench.throttle import ThrottledAgent, throttled
    from isthmus.edge.inquiry import ask_cloud

    answer = await ask_cloud(pack, relay)
    world = planned_world(pack, throttled(profile, setting.throttle), answer)
    asked = PlanRequest(what.prompt_tokens, what.output_tokens, shape=what.shape)
    planned = plan(world, asked)
    ways = [way for way in planned.candidates if what.splits is None or way.split in what.splits]
    splits = [way for way in ways if way.route == "split"]
    groups = {"planned_over_best": ways, "planned_split_over_best_split": splits}
    chosen = {figure: min(group, key=_objective) for figure, group in groups.items() if group}
    agent = ThrottledAgent(
        pack, cloud_urls=(relay,), threads=what.threads, factor=setting.throttle, cache_mb=0
    )
    await agent.start()
    try:
        runs = _Runs(agent, what, setting, progress)
        for way in sorted(ways, key=lambda way: -way.split):
            await runs.once(way)  # loads the layers, has the canary pass
        seen = await runs.measure(ways, what.rounds)
        finalists = {way.split: way for way in chosen.values()}
        for group in groups.values():
            fastest = sorted(group, key=lambda way: statistics.median(seen[way.split]))[:FINALISTS]
            finalists |= {way.split: way for way in fastest}
        final = await runs.measure(list(finalists.values()), what.rounds)
    finally:
        await agent.aclose()
    medians = {split: statistics.median(values) for split, values in final.items()}
    for figure, best in chosen.items():
        rivals = {way.split: medians[way.split] for way in groups[figure] if way.split in medians}
        report.figures[f"{figure}_{setting.name}"] = rivals[best.split] / min(rivals.values())
    best = chosen["planned_over_best"]
    report.figures[f"planned_k_{setting.name}"] = best.split
    report.figures[f"best_k_{setting.name}"] = min(medians, key=lambda split: medians[split])
    report.rows.append({"setting": setting.name, "what": "link", **_link_row(answer)})
    report.rows += [_row(setting, way, way is best, seen[way.split], final.get(way.split)) for way in ways]


def _objective(way: PlannedWay) -> float:
    assert way.objective is not None  # seconds, which every way has
    return way.objective


def planned_world(pack: Pack, edge: DeviceProfile, answer: CloudAnswer) -> World:
    """What is known before anything was run."""
    return World(
        edge=edge,
        cloud=answer.profile,
        link=answer.link,
        wire=Wire.of(pack.spec.hidden, "f32" if pack.scheme == "f32" else "int8o"),
        kv_bytes=pack.spec.kv_bytes_per_token_layer(KV_DTYPE_BYTES),
        cloud_state=answer.state,
    )


class _Runs:
    """Runs requests by given ways, each with a prompt that nobody has in a cache."""

    def __init__(self, agent: ThrottledAgent, what: PlanBench, setting: Setting, progress: Progress) -> None:
        self.agent, self.what, self.setting, self.progress = agent, what, setting, progress
        self.order = random.Random(what.seed)
        self.words = np.random.default_rng(what.seed)

    async def measure(self, ways: Sequence[PlannedWay], rounds: int) -> dict[int, list[float]]:
        """Total seconds by K: `rounds` of each, the order shuffled anew in every round."""
        seen: dict[int, list[float]] = {way.split: [] for way in ways}
        for number in range(rounds):
            for way in self.order.sample(list(ways), len(ways)):
                seen[way.split].append(await self.once(way))
            self.progress(f"{self.setting.name}, {len(ways)} K", (number + 1) / rounds)
        return seen

    async def once(self, way: PlannedWay) -> float:
        """Seconds of one request in all."""
        from isthmus.edge.requests import Finished, GenerateRequest
        from isthmus.protocol.sampling import SamplingParams

        ids = self.words.integers(0, self.agent.pack.spec.vocab_size, self.what.prompt_tokens)
        request = GenerateRequest(
            prompt_ids=tuple(int(i) for i in ids),
            max_tokens=self.what.output_tokens,
            sampling=SamplingParams(temperature=0.0),
            route=way.route,
            split=way.split if way.route == "split" else None,
            shape=way.shape,
        )
        total_s = 0.0
        async for event in self.agent.generate(request):
            if isinstance(event, Finished):
                total_s = event.timings.total_s
        return total_s


def _row(
    setting: Setting, way: PlannedWay, planned: bool, seen: list[float], final: list[float] | None
) -> dict[str, object]:
    assert way.prediction is not None
    measured = spread(seen)
    return {
        "setting": setting.name,
        "what": way.route,
        "k": way.split,
        "planned": planned,
        "predicted_s": way.prediction.total_s,
        "predicted_over_measured": way.prediction.total_s / measured["median"],
        **measured,
        "final_median": None if final is None else statistics.median(final),
        "memory_mb": way.prediction.memory_bytes / MIB,
    }


def _link_row(answer: CloudAnswer) -> dict[str, float | None]:
    link = answer.link
    known = {"rtt_ms": (link.rtt, 1e3), "up_mbps": (link.up, 8e-6), "down_mbps": (link.down, 8e-6)}
    return {name: None if one is None else one.value * unit for name, (one, unit) in known.items()}

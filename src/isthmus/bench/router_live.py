"""`bench router --live`: what the router predicts and chooses, against what every feasible route takes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from isthmus.bench.live_link import LiveLink
from isthmus.bench.live_plan import Lengths, Phase, draw_lengths, draw_phases, trace_lengths
from isthmus.bench.live_score import LEARNING, NEAR, Outcome, Ran, Route, figures, rows
from isthmus.bench.processes import halves, on_cores, process
from isthmus.bench.report import Report
from isthmus.bench.workload import read_trace
from isthmus.protocol.errors import IsthmusError

if TYPE_CHECKING:
    from isthmus.bench.live_agent import LiveAgent, Resident
    from isthmus.edge.requests import Candidate, GenerateRequest
    from isthmus.protocol.profiles import DeviceProfile
    from isthmus.splitter.pack import Pack

Progress = Callable[[str, float], None]
WARM_S: Final = 20.0


@dataclass(frozen=True)
class LiveOptions:
    """What is run: `num_requests` requests, in phases of `phase_requests` under one condition; `seed` draws.

    `trace`: a CSV file whose lengths are taken, scaled to what this bench runs; None: lengths are drawn.
    `precision`: of the cloud's weights. Threads None: as many as the cores that each side gets. `profile`:
    of the edge; None: measured at the start. `pause_s`: before each request nothing else runs for so long, as
    between a user's requests; a router may look around then.
    """

    model: str
    num_requests: int = 150
    phase_requests: int = 10
    seed: int = 0
    precision: str = "fp32"
    trace: Path | None = None
    edge_threads: int | None = None
    cloud_threads: int | None = None
    profile: DeviceProfile | None = None
    pause_s: float = 2.0


def bench_router_live(pack: Pack, options: LiveOptions, progress: Progress) -> Report:
    """Median error of the chosen ways' predicted total time, how often the choice was the fastest feasible
    way or as good, and the same of the best constant policy; with rows for every class and request."""
    from isthmus.splitter.profiling import measure_edge

    phases = draw_phases(_lengths(pack, options), options.phase_requests, seed=options.seed)
    edge_cores, cloud_cores = halves()
    with ExitStack() as stack:
        threads = ["--threads", str(options.cloud_threads)] if options.cloud_threads else []
        arguments = ("--model", options.model, "--port", "0", "--precision", options.precision, *threads)
        with on_cores(cloud_cores):
            cloud = stack.enter_context(process("serve", "cloud", *arguments))
        stack.enter_context(on_cores(edge_cores))
        profile = options.profile or measure_edge(pack, threads=options.edge_threads, progress=progress)
        link = stack.enter_context(LiveLink(cloud, phases[0].condition.link))
        bench = _Bench(pack, options, profile, phases, link)
        outcomes = asyncio.run(bench.run(progress))
    report = Report("router", figures(outcomes), rows(outcomes), _notes(pack, options, bench))
    report.rows += [
        {"what": "phase", "phase": number, **asdict(phase.condition.link), "told": phase.condition.told()}
        for number, phase in enumerate(phases)
    ]
    if edge_cores:
        report.notes.append(
            f"edge and relay run on cores {sorted(edge_cores)}, the cloud on {sorted(cloud_cores)}"
        )
    return report


def _lengths(pack: Pack, options: LiveOptions) -> list[Lengths]:
    count, context = options.num_requests, pack.spec.context_length
    if options.trace is None:
        return draw_lengths(count, context=context, seed=options.seed)
    return trace_lengths(read_trace(options.trace), count, context=context, seed=options.seed)


class _Bench:
    """`run` asks everything of the phases, one request after the other."""

    def __init__(
        self,
        pack: Pack,
        options: LiveOptions,
        profile: DeviceProfile,
        phases: tuple[Phase, ...],
        link: LiveLink,
    ) -> None:
        self.pack, self.options, self.profile, self.phases, self.link = pack, options, profile, phases, link
        self.lengths = [one for phase in phases for one in phase.requests]
        self.fixed_split = max(1, pack.spec.num_layers // 2)
        self.cap_bytes = 0
        """The capped edge's memory, in bytes: a little less than the whole model needs for any request."""
        self._rng = random.Random(options.seed)

    async def run(self, progress: Progress) -> list[Outcome]:
        outcomes: list[Outcome] = []
        async with AsyncExitStack() as stack:
            chooser = await stack.enter_async_context(self._agent(profile=self.profile))
            judge = await stack.enter_async_context(self._agent(profile=None))
            await self._warm(chooser, judge)
            for number, phase in enumerate(self.phases):
                condition = phase.condition
                await asyncio.to_thread(self.link.reshape, condition.link)
                for agent in (chooser, judge):
                    agent.factor = condition.throttle
                    agent.limit_memory(self.cap_bytes if condition.capped else None)
                warm = self._warm_blocks(chooser)
                label = f"phase {number + 1} of {len(self.phases)}: {condition.told()}"
                for place, lengths in enumerate(phase.requests):
                    progress(label, place / len(phase.requests))
                    progress("requests", len(outcomes) / len(self.lengths))
                    chosen, others = await self._ask(chooser, judge, lengths, warm)
                    outcomes.append(Outcome(number, condition.kind, place == 0, *lengths, chosen, others))
                progress(label, 1.0)
        progress("requests", 1.0)
        return outcomes

    @asynccontextmanager
    async def _agent(self, profile: DeviceProfile | None) -> AsyncIterator[LiveAgent]:
        """With a profile it chooses by time alone."""
        from isthmus.bench.live_agent import LiveAgent
        from isthmus.edge.policy import Policy
        from isthmus.edge.routing import RoutingOptions

        policy = Policy(usd_per_j=0.0, slo_miss_usd=0.0, usd_per_nat=0.0)
        agent = LiveAgent(
            self.pack,
            cloud_urls=(self.link.url,),
            threads=self.options.edge_threads,
            routing=RoutingOptions(profile=profile, policy=policy),
        )
        await agent.start()
        try:
            yield agent
        finally:
            await agent.aclose()

    async def _warm(self, chooser: LiveAgent, judge: LiveAgent) -> None:
        """Both are connected, the cloud has computed once by every route; what the cap is, is settled."""
        shortest = min(self.lengths, key=sum)
        for candidate in (("local", None), ("offload", None), ("split", self.fixed_split)):
            await judge.run(self._request(shortest, *candidate))
        await chooser.warm(WARM_S)
        whole = next(c for c in chooser.decide(self._request(shortest)).candidates if c.route == "local")
        if whole.memory_bytes is None:
            raise _unpredicted(whole)
        self.cap_bytes = whole.memory_bytes - 1

    def _warm_blocks(self, chooser: LiveAgent) -> Resident:
        """What a device that serves this model keeps in memory: as many blocks as it holds beside the longest
        request. Loading is not what this bench is about."""
        from isthmus.bench.live_agent import Resident

        decision = chooser.decide(self._request(max(self.lengths, key=sum)))
        deepest = max((one for one in decision.candidates if one.feasible), key=lambda one: one.split)
        return Resident(deepest.split, deepest.route == "local")

    async def _ask(
        self, chooser: LiveAgent, judge: LiveAgent, lengths: Lengths, warm: Resident
    ) -> tuple[Ran, tuple[Ran, ...]]:
        """Let the router choose, and learn from what it chose; then run every other feasible way."""
        await chooser.settle(warm)
        await asyncio.sleep(self.options.pause_s)
        run = await chooser.run(self._request(lengths))
        ways = {(one.route, one.split): one for one in run.decision.candidates if one.feasible}
        chosen = ways.pop((run.decision.route, run.decision.split))
        others = self._others(chosen, ways)
        self._rng.shuffle(others)
        ran = []
        async with chooser.asleep():
            for way in others:
                await judge.settle(warm)
                split = way.split if way.route == "split" else None
                other = await judge.run(self._request(lengths, way.route, split))
                ran.append(self._ran(way, other.total_s))
        return self._ran(chosen, run.total_s), tuple(ran)

    def _others(self, chosen: Candidate, ways: dict[tuple[Route, int], Candidate]) -> list[Candidate]:
        """Local and offload; of the splits the one predicted to be best, and the fixed one."""
        splits = [way for way in ways.values() if way.route == "split"]
        kept = [way for way in ways.values() if way.route != "split" or way.split == self.fixed_split]
        if splits and chosen.route != "split":
            best = min(splits, key=lambda way: float("inf") if way.total_s is None else way.total_s)
            if best not in kept:
                kept.append(best)
        return kept

    def _ran(self, way: Candidate, observed_s: float) -> Ran:
        if way.total_s is None:
            raise _unpredicted(way)
        fixed = way.route == "split" and way.split == self.fixed_split
        return Ran(way.route, way.split, way.total_s, observed_s, fixed=fixed)

    def _request(
        self,
        lengths: Lengths,
        route: Literal["auto", "local", "split", "offload"] = "auto",
        split: int | None = None,
    ) -> GenerateRequest:
        """A prompt that was never seen: no cache knows it. Nothing ends it early, and nothing rescues it."""
        from isthmus.edge.requests import GenerateRequest
        from isthmus.protocol.sampling import SamplingParams

        vocabulary = self.pack.spec.vocab_size
        return GenerateRequest(
            prompt_ids=tuple(self._rng.choices(range(vocabulary), k=lengths.prompt_tokens)),
            max_tokens=lengths.output_tokens,
            sampling=SamplingParams(temperature=0.0),
            route=route,
            split=split,
            fallback="none",
        )


def _unpredicted(way: Candidate) -> IsthmusError:
    return IsthmusError(
        f"the router predicts nothing for {way.route} (K = {way.split})",
        code="no_predictions",
        hint="the cloud has to publish its profile, and the link to be up",
    )


def _notes(pack: Pack, options: LiveOptions, bench: _Bench) -> list[str]:
    drawn = f"as in {options.trace.name}, scaled" if options.trace else "drawn evenly on a logarithmic scale"
    return [
        "edge, relay and cloud are real processes; the relay emulates the link, and the edge's slowness is "
        "emulated too: each block's time is stretched by the factor that the phase declares",
        f"edge {pack.scheme}, cloud {options.precision}; memory capped means {bench.cap_bytes / 2**20:.1f} "
        "MB: one byte less than the whole model with the shortest request",
        f"{options.num_requests} requests, lengths {drawn}; no end token is named, so the router knows how "
        "many tokens will come",
        "the router weighs time alone, learns only from what it chose, and is told of no change but the "
        f"cap's; before each request nothing else runs for {options.pause_s:g} s",
        f"errors count from request {min(LEARNING, options.num_requests // 2)} on, choices from the first",
        "every other feasible way is run right after the choice by an agent of its own, with a prompt of its "
        f"own: local, offload, the split predicted to be best, and K = {bench.fixed_split}; the edge keeps "
        "the blocks loaded that its memory holds",
        f"as good as the fastest: within {NEAR - 1:.0%}; a constant policy offloads what it can not do",
    ]

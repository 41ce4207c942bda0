"""`bench recovery`: from the moment a cloud or a link dies to the next token, beside what bounds it."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from isthmus.bench.recovery_bounds import HistoryBounds, Watch
from isthmus.bench.recovery_clouds import CloudProcess, cloud_arguments
from isthmus.bench.recovery_round import Unbroken, interrupted, unbroken
from isthmus.bench.report import Report, spread
from isthmus.protocol.limits import Limits
from isthmus.relay import LinkShape, Relay, parse_address
from isthmus.relay.faults import HalfOpen, Refuse

if TYPE_CHECKING:
    from isthmus.edge.agent import Agent
    from isthmus.edge.requests import GenerateRequest
    from isthmus.splitter.pack import Pack

Case = Literal["restart", "second_cloud", "local", "resume", "silent"]

CASES: Final[dict[Case, str]] = {
    "restart": "the cloud is killed, and started again on its port as soon as its process has ended",
    "second_cloud": "the cloud is killed; a second one is up, the edge was never connected to it",
    "local": "the cloud is killed, there is no other: the edge finishes alone",
    "resume": "the TCP connection is cut, the cloud lives: the session is resumed and keeps its KV",
    "silent": "the link swallows every byte while TCP stays up; then the session is resumed",
}
# A cloud that loads a large model takes its time; the edge is told to wait for it in the case "restart".
RESTART_BUDGET_S: Final = 120.0
FOR_THE_ROUND_S: Final = 600.0


@dataclass(frozen=True)
class RecoveryBench:
    """What is measured: each of `cases` over each of `rtts_ms`, `rounds` times, `split` layers on the edge.
    The generation is struck in the middle of `output_tokens`."""

    model: str
    rtts_ms: tuple[float, ...]
    rounds: int
    split: int
    prompt_tokens: int
    output_tokens: int
    threads: int | None
    cases: tuple[Case, ...] = tuple(CASES)

    @property
    def struck_at(self) -> int:
        """Index of the token after which the blow falls."""
        return self.output_tokens // 2

    @property
    def num_rows(self) -> int:
        """Rows of the history at that moment: the prompt's, and those of the tokens so far."""
        return self.prompt_tokens + self.struck_at + 1


@dataclass
class _Samples:
    """The rounds of one case over one RTT: seconds, and the parts of each one's bound, in seconds."""

    recovery_s: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    near_ties: int = 0

    @property
    def bounds_s(self) -> list[float]:
        return [sum(parts.values()) for parts in self.parts]


def bench_recovery(pack: Pack, what: RecoveryBench, progress: Callable[[str, float], None]) -> Report:
    """Seconds to the next token for each case, and beside each its lower bound, measured in the same run.

    IsthmusError `unequal_tokens` where an interrupted generation is not the unbroken one, token by token.
    """
    arguments = cloud_arguments(what.model)
    with CloudProcess(*arguments) as first, CloudProcess(*arguments) as second:
        return asyncio.run(_Bench(pack, what, first, second).run(progress))


class _Bench:
    def __init__(self, pack: Pack, what: RecoveryBench, first: CloudProcess, second: CloudProcess) -> None:
        self.pack, self.what, self.first, self.second = pack, what, first, second
        rng = np.random.default_rng(0)
        self.prompt = tuple(int(i) for i in rng.integers(0, pack.spec.vocab_size, what.prompt_tokens))

    async def run(self, progress: Callable[[str, float], None]) -> Report:
        what = self.what
        async with self.agent(self.first.url) as agent:
            expected = await unbroken(agent, self.request())
        async with self.agent(self.second.url) as agent:
            await unbroken(agent, self.request())  # a warm cloud has computed before
        history = (*self.prompt, *expected.ids[: what.struck_at + 1])
        bounds = HistoryBounds(self.pack, what.split, history, threads=what.threads)
        samples: dict[tuple[Case, float], _Samples] = {}
        rounds = [(n, rtt, case) for n in range(what.rounds) for rtt in what.rtts_ms for case in what.cases]
        for done, (_, rtt_ms, case) in enumerate(rounds):
            progress("killing and recovering", done / len(rounds))
            one = _Round(self, case, rtt_ms, bounds, expected)
            await one.run(samples.setdefault((case, rtt_ms), _Samples()))
        progress("killing and recovering", 1.0)
        return _report(self.pack, what, samples)

    def request(self, fallback: Literal["any", "cloud"] = "cloud") -> GenerateRequest:
        from isthmus.edge.requests import GenerateRequest
        from isthmus.protocol.sampling import SamplingParams

        return GenerateRequest(
            prompt_ids=self.prompt,
            max_tokens=self.what.output_tokens,
            sampling=SamplingParams(temperature=0.0),
            route="split",
            split=self.what.split,
            shape="prefix",
            fallback=fallback,
        )

    @asynccontextmanager
    async def agent(self, *urls: str, budget_s: float | None = None) -> AsyncIterator[Agent]:
        """An agent of its own for each round: nothing is loaded or connected from the one before."""
        from isthmus.edge.agent import Agent
        from isthmus.edge.recovery import RecoveryConfig

        patient = (
            RecoveryConfig(budget_s=budget_s, refused_grace_s=budget_s) if budget_s else RecoveryConfig()
        )
        agent = Agent(self.pack, cloud_urls=urls, threads=self.what.threads, recovery=patient)
        await agent.start()
        try:
            yield agent
        finally:
            await agent.aclose()

    @asynccontextmanager
    async def link(self, cloud: CloudProcess, rtt_ms: float) -> AsyncIterator[tuple[str, Relay]]:
        """A relay to `cloud`, and its URL."""
        relay = Relay(
            ("127.0.0.1", 0), parse_address(cloud.url, what="the cloud"), LinkShape(rtt_ms=rtt_ms), seed=0
        )
        host, port = await relay.start()
        try:
            yield f"ws://{host}:{port}", relay
        finally:
            await relay.aclose()


@dataclass
class _Round:
    """One interrupted generation and its bound."""

    bench: _Bench
    case: Case
    rtt_ms: float
    bounds: HistoryBounds
    expected: Unbroken

    async def run(self, samples: _Samples) -> None:
        bench = self.bench
        async with (
            bench.link(bench.first, self.rtt_ms) as (first_url, first_relay),
            bench.link(bench.second, self.rtt_ms) as (second_url, _),
        ):
            by_kill = self.case in ("restart", "second_cloud", "local")
            if by_kill and self.rtt_ms == 0:
                # No relay in between: the kernel itself tells the edge that nobody listens any more.
                first_url, second_url = bench.first.url, bench.second.url
            watch = Watch(first_url)
            urls = (first_url, second_url) if self.case == "second_cloud" else (first_url,)
            struck: list[float] = []

            async def strike() -> float:
                await watch.start()
                struck.append(self._strike(first_relay))
                return struck[0]

            budget_s = RESTART_BUDGET_S if self.case == "restart" else None
            async with bench.agent(*urls, budget_s=budget_s) as agent:
                request = bench.request("any" if self.case == "local" else "cloud")
                try:
                    got = await interrupted(agent, request, bench.what.struck_at, strike)
                except BaseException:
                    watch.cancel()
                    raise
            if self.expected.near_tie(got.ids) is not None:
                samples.near_ties += 1
            parts = {"detection_s": await self._detection_s(watch, struck[0])}
            if self.case == "restart":
                await asyncio.to_thread(bench.first.restarted)
                parts["process_s"] = bench.first.ready_s
            elif by_kill:
                await asyncio.to_thread(bench.first.start)
            if self.case == "local":
                local = await asyncio.to_thread(self.bounds.local)
                parts |= local._asdict()
            else:
                target = await self.bounds.target(second_url if self.case == "second_cloud" else first_url)
                parts["connect_s"] = target.connect_s
                if by_kill:
                    parts["replay_s"] = target.replay_s
                else:
                    parts["answer_s"] = target.answer_s
            samples.recovery_s.append(got.recovery_s)
            samples.parts.append(parts)

    def _strike(self, relay: Relay) -> float:
        first = self.bench.first
        match self.case:
            case "resume":
                relay.faults.cut()
                return perf_counter()
            case "silent":
                relay.faults.do(HalfOpen())
                return perf_counter()
            case "restart":
                first.restart_when_it_ends()
            case "second_cloud" | "local":
                relay.faults.do(Refuse(FOR_THE_ROUND_S))  # as the kernel does where nobody listens
        return first.kill()

    async def _detection_s(self, watch: Watch, struck_s: float) -> float:
        """What noticing takes at least: for a silent link the heartbeat's deadline, else what a plain
        connection beside the agent's saw."""
        if self.case == "silent":
            watch.cancel()
            return Limits().dead_after_s
        return await watch.seen_after(struck_s)


def _report(pack: Pack, what: RecoveryBench, samples: dict[tuple[Case, float], _Samples]) -> Report:
    report = Report("recovery")
    for (case, rtt_ms), found in samples.items():
        suffix = f"_rtt_{rtt_ms:g}" if rtt_ms else ""
        report.figures[f"{case}_s{suffix}"] = statistics.median(found.recovery_s)
        report.figures[f"{case}_bound_s{suffix}"] = statistics.median(found.bounds_s)
        row: dict[str, Any] = {"what": f"{case}_s", "rtt_ms": rtt_ms, **spread(found.recovery_s)}
        row["bound_s"] = statistics.median(found.bounds_s)
        for name in found.parts[0]:
            row[name] = statistics.median([parts[name] for parts in found.parts])
        report.rows.append(row)
    report.notes = [
        f"{what.split} of {pack.spec.num_layers} layers on the edge, fp32 on both sides, greedy",
        f"prompt {what.prompt_tokens}, {what.output_tokens} tokens, struck behind token {what.struck_at}: "
        f"{what.num_rows} rows of history; {what.rounds} rounds",
        *(f"{case}: {CASES[case]}" for case in what.cases),
        "time from the blow to the first token behind the loss; every run gave the unbroken run's tokens"
        + _told(sum(found.near_ties for found in samples.values())),
        "bounds are sums of what was measured in the same round: detection (by a plain connection beside the "
        "agent's; silent: the heartbeat's deadline), process (birth to ready line), connect (TCP, upgrade, "
        "HELLO), replay (OPEN, all rows, next token; at rest), answer (one message and its answer), load and "
        "compute (the layers the edge lacked, over its cached rows)",
        "no bound holds what the edge waits by choice: pauses between attempts to connect and, in `local`, "
        "the grace in which a dead cloud may come back",
        "the clouds are real processes; the edge and the relay that emulates the RTT share one",
    ]
    return report


def _told(near_ties: int) -> str:
    return f" (up to a near-tie in {near_ties} of them)" if near_ties else ""

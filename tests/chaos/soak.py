"""A soak: mixed requests for many minutes while links and processes fail; every id is held against the truth.

    python -m tests.chaos.soak --minutes 30 [--seed N] [--model smollm2-135m]

The report goes to standard output as JSON, and as text to standard error. Exit code 1 where a token was lost,
duplicated or wrong, a request failed, or something is left behind at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from time import monotonic
from typing import IO, Any

import psutil

from isthmus.bench.recovery_clouds import cloud_arguments
from isthmus.edge.agent import Agent
from isthmus.edge.requests import Finished, Started, Token
from isthmus.protocol.errors import IsthmusError
from isthmus.splitter.pack import Pack
from isthmus.splitter.provide import ensure_pack
from tests.chaos.soak_report import Memory, SoakReport
from tests.chaos.soak_requests import Case, make_cases
from tests.chaos.soak_world import Faults, Site, two_sites
from tests.packs import pack_checkpoint
from tests.tiny import make_tiny

PARALLEL = 4
CANCELLED_SHARE = 0.15
# A fault every few seconds: most long requests meet one, some meet several.
FAULT_S = (1.5, 6.0)
# Finished conversations are kept up to this: full within the warm-up, so that what grows after is a leak.
CACHE_MB = 8.0
SAMPLE_S = 1.0
TELL_S = 30.0
# Short, so that what edges left behind is seen to go at the end.
DETACHED_S = 8.0
SETTLE_S = 60.0
# A request that goes on for so long after the last fault hangs.
FINISH_S = 120.0
EXIT_NAMES = {-9: "killed", 0: "drained"}
LEFT_ON_A_CLOUD = ("sessions", "detached", "pages_used")
LEFT_ON_THE_EDGE = ("running", "waiting", "history_bytes")


class Soak:
    """One soak, once, of the model in `source` and its `pack`; what it sees goes into `report`. `log`: where
    the clouds write theirs."""

    def __init__(
        self, pack: Pack, source: str, report: SoakReport, log: IO[str] | None, *, num_each: int = 3
    ) -> None:
        """`num_each`: distinct requests for each way through the two machines."""
        self.pack, self.source, self.report, self.log = pack, source, report, log
        self.num_each = num_each
        self.rng = random.Random(report.seed)
        self.started_s = 0.0

    async def run(self) -> None:
        report = self.report
        more = ("--detached-s", f"{DETACHED_S:g}", "--tenant-resumes-per-min", "100000")
        arguments = cloud_arguments(self.source, *more)
        async with two_sites(arguments, self.log, report.seed) as sites:
            urls = [site.url for site in sites]
            agent = Agent(self.pack, cloud_urls=urls, parallel=PARALLEL, cache_mb=CACHE_MB)
            await agent.start()
            try:
                tell("asking everything once, undisturbed")
                cases = await make_cases(agent, self.pack, self.rng, self.num_each)
                faults = Faults(sites, random.Random(self.rng.random()))
                await self._disturbed(agent, cases, faults, sites)
                report.faults = faults.counts
                for code in sites[0].cloud.exit_codes:
                    report.exits[EXIT_NAMES.get(code, f"code {code}")] += 1
                    if code not in EXIT_NAMES:
                        report.notes.append(f"cloud A ended with exit code {code}")
                await self._settle(agent, sites)
            finally:
                await agent.aclose()

    async def _disturbed(
        self, agent: Agent, cases: list[Case], faults: Faults, sites: tuple[Site, Site]
    ) -> None:
        self.started_s = monotonic()
        wanted_s = self.report.minutes * 60
        self.report.warm_up_s = min(60.0, 0.2 * wanted_s)
        spoiling = asyncio.create_task(faults.run(wanted_s, *FAULT_S))
        helpers = [
            asyncio.create_task(self._watch_memory(sites)),
            asyncio.create_task(self._tell()),
        ]
        workers = [asyncio.create_task(self._work(agent, cases, wanted_s)) for _ in range(PARALLEL)]
        try:
            await spoiling
            await faults.heal()
            async with asyncio.timeout(FINISH_S):
                await asyncio.gather(*workers)
        finally:
            for task in (spoiling, *helpers, *workers):
                task.cancel()
            ended = await asyncio.gather(*helpers, return_exceptions=True)
        for error in ended:  # a helper that failed: the soak was not what it says
            if isinstance(error, Exception):
                raise error

    # ---- requests --------------------------------------------------------------------------------

    async def _work(self, agent: Agent, cases: list[Case], wanted_s: float) -> None:
        while monotonic() - self.started_s < wanted_s:
            case = self.rng.choice(cases)
            stop_at = None
            if self.rng.random() < CANCELLED_SHARE:
                stop_at = self.rng.randrange(len(case.ids))
            await self._ask(agent, case, stop_at)

    async def _ask(self, agent: Agent, case: Case, stop_at: int | None) -> None:
        """One request, held against its unbroken answer, token by token; given up behind token `stop_at`."""
        report = self.report
        report.requests += 1
        num_seen = 0
        newest_s = 0.0
        try:
            async with aclosing(agent.generate(case.again())) as events:
                async for event in events:
                    if isinstance(event, Started):
                        report.routes[event.route] += 1
                    elif isinstance(event, Token):
                        now = monotonic()
                        if num_seen:
                            report.longest_silence_s = max(report.longest_silence_s, now - newest_s)
                        newest_s = now
                        num_seen = self.judge(case, event, num_seen)
                        if event.index == stop_at:
                            report.cancelled += 1
                            return
                    elif isinstance(event, Finished):
                        report.finished += 1
                        report.recoveries.update(recovery_name(each) for each in event.events)
        except IsthmusError as error:
            report.failures[error.code] += 1
            tell(f"{case.label} failed behind {num_seen} tokens: {error.code}: {error.message}")
        report.lost += max(0, len(case.ids) - num_seen)

    def judge(self, case: Case, token: Token, num_seen: int) -> int:
        """Count the token as new, lost, duplicated or wrong; how many indexes are seen after it."""
        report = self.report
        report.tokens += 1
        if token.index < num_seen:
            report.duplicated += 1
            tell(f"{case.label}: token {token.index} came again where {num_seen} was due")
            return num_seen
        report.lost += token.index - num_seen
        if token.index >= len(case.ids) or token.id != case.ids[token.index]:
            report.wrong += 1
            due = case.ids[token.index : token.index + 1]
            tell(f"{case.label}: token {token.index} is {token.id}, unbroken it is {due}")
        return token.index + 1

    # ---- around them -----------------------------------------------------------------------------

    async def _watch_memory(self, sites: tuple[Site, Site]) -> None:
        """Of the edge (this process) and of cloud B, which lives as long as the soak."""
        watched = {"the edge": os.getpid(), "cloud B": sites[1].cloud.pid}
        while True:
            for name, pid in watched.items():
                resident = psutil.Process(pid).memory_info().rss
                self.report.memory.setdefault(name, Memory()).add(monotonic() - self.started_s, resident)
            await asyncio.sleep(SAMPLE_S)

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(TELL_S)
            report = self.report
            tell(
                f"{(monotonic() - self.started_s) / 60:.1f} min: {report.requests} requests, "
                f"{report.tokens} tokens, lost {report.lost}, duplicated {report.duplicated}, "
                f"wrong {report.wrong}, failed {sum(report.failures.values())}"
            )

    async def _settle(self, agent: Agent, sites: tuple[Site, Site]) -> None:
        """Wait (bounded) until nothing is left, and note what is."""
        until = monotonic() + SETTLE_S
        while True:
            edge = agent.stats()
            left = {"the edge": {name: int(edge[name]) for name in LEFT_ON_THE_EDGE}}
            for site in sites:
                counts = await site.stats()
                left[f"cloud {site.name}"] = {name: int(counts[name]) for name in LEFT_ON_A_CLOUD}
            if monotonic() > until or not any(any(of.values()) for of in left.values()):
                self.report.left = left
                return
            await asyncio.sleep(0.2)


def recovery_name(event: dict[str, Any]) -> str:
    """The event's kind; a move says where to, a resume what was to be sent again."""
    name = str(event["event"])
    if name == "moved":
        return "finished locally" if event["route"] == "local" else "moved to another session"
    return f"resumed ({event['action']})" if name == "resumed" else name


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def count_errors(log: Path) -> int:
    """Lines in the clouds' log that tell of an error."""
    return sum('"level": "error"' in line for line in log.read_text(encoding="utf-8").splitlines())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Mixed requests while links and processes fail.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None, help="default: drawn, and told in the report")
    parser.add_argument(
        "--model", default="tiny", help="tiny (random weights, the default) or a MODEL of isthmus"
    )
    chosen = parser.parse_args(arguments)
    seed = random.SystemRandom().getrandbits(32) if chosen.seed is None else chosen.seed
    with tempfile.TemporaryDirectory(prefix="isthmus-soak-") as folder:
        pack, source = provide(chosen.model, Path(folder))
        report = SoakReport(minutes=chosen.minutes, seed=seed, model=chosen.model)
        log_path = Path(folder) / "clouds.log"
        with log_path.open("w", encoding="utf-8") as log:
            asyncio.run(Soak(pack, source, report, log).run())
        if errors := count_errors(log_path):
            report.notes.append(f"{errors} errors in the clouds' log")
    print(json.dumps(report.to_dict()))
    tell(report.to_text())
    return 1 if report.problems else 0


def provide(model: str, folder: Path) -> tuple[Pack, str]:
    """The fp32 pack of `model`, and what the clouds are to call it."""
    if model == "tiny":
        return pack_checkpoint(tiny_source(folder / "tiny"), folder / "pack"), str(folder / "tiny")
    return ensure_pack(model, bits="32", progress=lambda label, _: tell(label)), model


def tiny_source(folder: Path) -> Path:
    """A random model, made in a process of its own: the edge's memory is watched, and it holds no PyTorch."""
    sizes = {"num_hidden_layers": 8, "max_position_embeddings": 512}
    maker = multiprocessing.get_context("spawn").Process(
        target=make_tiny, args=("llama", folder), kwargs={"seed": 5, **sizes}
    )
    maker.start()
    maker.join()
    assert maker.exitcode == 0, "the tiny model could not be made"
    return folder


if __name__ == "__main__":
    sys.exit(main())

"""`bench agent`: how a served edge starts, rests, and stands many clients at once."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final

import psutil

from isthmus.bench.agent_clients import Reply, ask
from isthmus.bench.processes import started
from isthmus.bench.report import Report
from isthmus.protocol.errors import IsthmusError

MB: Final = 1e6
SETTLED_AFTER_S: Final = 10.0
"""Memory is looked at from here on: threads, caches and allocators have what they keep."""
_SAMPLE_S: Final = 0.5
_PLACES: Final = ("Corinth", "Panama", "Kra", "Suez", "Tehuantepec", "Perekop", "Karelia", "Avalon")


@dataclass(frozen=True)
class AgentBench:
    """What to measure. `clients` ask again and again for `seconds`; `crowd` ask once, all at the same time.
    `cache_mb` bounds the conversations the agent keeps in memory."""

    model: str
    starts: int = 3
    idle_s: float = 20.0
    clients: int = 64
    seconds: float = 60.0
    crowd: int = 200
    parallel: int = 4
    queue: int = 64
    max_tokens: int = 32
    cache_mb: int = 0


def bench_agent(what: AgentBench) -> Report:
    """Starts `isthmus serve edge` as its own process, and asks it over HTTP."""
    report = Report("agent")
    _starts(what, report)
    arguments = ["--parallel", what.parallel, "--queue", what.queue, "--cache-mb", what.cache_mb]
    with _edge(what.model, *map(str, arguments)) as (url, process, _):
        if what.idle_s:
            _idle("idle", what, process, report)
        asyncio.run(_load(what, url, process, report))
    if what.idle_s:
        with (
            started("serve", "cloud", "--model", what.model, "--port", "0") as (cloud, _),
            _edge(what.model, "--cloud", cloud) as (_, process, _),
        ):
            _idle("idle_with_cloud", what, process, report)
    report.notes += [
        f"ready_s: from starting `serve edge`, its pack built, to the ready line; {what.starts} times",
        f"{what.clients} clients, each with its own prompt, ask greedily for {what.max_tokens} tokens, again "
        f"and again for {what.seconds:g} s; one: the same prompts one after the other, before and after",
        "own: answers that are those which the same prompt got alone",
        f"rss_growth_mb: greatest resident memory after {SETTLED_AFTER_S:g} s, above what it was then",
        f"--cache-mb {what.cache_mb}: with 0 every prompt is computed whole and alike; else one that begins "
        "as a kept one is computed in other pieces, and in 8 bits its tokens may then differ",
        f"crowd: {what.crowd} clients at once where {what.parallel} run and {what.queue} wait",
    ]
    return report


@contextmanager
def _edge(model: str, *arguments: str) -> Iterator[tuple[str, psutil.Process, float]]:
    """(url, process, seconds until it was ready)."""
    began = perf_counter()
    with started("serve", "edge", "--model", model, "--port", "0", *arguments) as (url, pid):
        yield url, psutil.Process(pid), perf_counter() - began


def _starts(what: AgentBench, report: Report) -> None:
    seconds = []
    for _ in range(what.starts):
        with _edge(what.model) as (url, process, ready_s):
            seconds.append(ready_s)
            rss = process.memory_info().rss
            began = perf_counter()
            first = asyncio.run(ask(url, _body("Hello", 1)))
            report.rows.append(
                {"what": "start", "ready_s": ready_s, "first_answer_s": perf_counter() - began}
                | {"rss_mb": rss / MB, "status": first.status}
            )
    report.figures |= {"ready_s": statistics.median(seconds), "ready_s_max": max(seconds)}


def _idle(name: str, what: AgentBench, process: psutil.Process, report: Report) -> None:
    """Processor time of an agent that nobody asks anything, as a share of one core."""

    def used() -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    time.sleep(SETTLED_AFTER_S / 2)  # what a start leaves to do: links are connected and measured
    before, began = used(), perf_counter()
    time.sleep(what.idle_s)
    share = (used() - before) / (perf_counter() - began)
    report.figures[f"{name}_cpu_share"] = share
    report.rows.append({"what": name, "cpu_share": share, "rss_mb": process.memory_info().rss / MB})


async def _load(what: AgentBench, url: str, process: psutil.Process, report: Report) -> None:
    prompts = [
        f"Day {number} of my journey leads me to {_PLACES[number % len(_PLACES)]}. What shall I see?"
        for number in range(what.clients)
    ]
    if what.clients:
        await ask(url, _body(prompts[0], what.max_tokens))  # loads the layers
        alone = await _one_after_the_other(what, url, prompts, report)
        many = await _many(what, url, process, prompts, alone, report)
        again = await _one_after_the_other(what, url, prompts, report)
        one = statistics.median([_rate(list(alone.values())), _rate(list(again.values()))])
        report.figures |= {
            "one_tokens_per_s": one,
            "aggregate_tokens_per_s": many,
            "aggregate_over_one": many / one,
        }
    if what.crowd:
        await _crowd(what, url, report)


async def _one_after_the_other(
    what: AgentBench, url: str, prompts: list[str], report: Report
) -> dict[str, Reply]:
    replies = {prompt: await ask(url, _body(prompt, what.max_tokens)) for prompt in prompts}
    bad = [reply.error for reply in replies.values() if reply.status != 200 or reply.error]
    if bad:
        raise IsthmusError(f"{len(bad)} of {len(prompts)} requests failed alone: {bad[0]}")
    report.rows.append(
        {"what": "one", "requests": len(replies), "tokens_per_s": _rate(list(replies.values()))}
    )
    return replies


async def _many(
    what: AgentBench,
    url: str,
    process: psutil.Process,
    prompts: list[str],
    alone: dict[str, Reply],
    report: Report,
) -> float:
    """Tokens per second in all; what else was seen becomes figures."""
    replies: list[tuple[str, Reply]] = []
    began = perf_counter()
    end = began + what.seconds

    async def client(prompt: str) -> None:
        while perf_counter() < end:
            replies.append((prompt, await ask(url, _body(prompt, what.max_tokens))))

    async def watch() -> list[tuple[float, int]]:
        seen = []
        while True:
            seen.append((perf_counter() - began, process.memory_info().rss))
            if perf_counter() >= end:
                return seen
            await asyncio.sleep(_SAMPLE_S)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(client(prompt) for prompt in prompts))
    memory = await watching
    whole = [reply for _, reply in replies if reply.status == 200 and reply.error is None]
    own = sum(reply.text == alone[prompt].text for prompt, reply in replies)
    settled = next((rss for at, rss in memory if at >= SETTLED_AFTER_S), memory[-1][1])
    peak = max(rss for at, rss in memory if at >= min(SETTLED_AFTER_S, memory[-1][0]))
    waits = sorted(reply.at_s[0] - reply.began_s for reply in whole if reply.at_s)
    report.figures |= {
        "requests": len(replies),
        "completed": len(whole),
        "own": own,
        "rss_growth_mb": (peak - settled) / MB,
        "ttft_p50_s": statistics.median(waits),
    }
    report.rows.append(
        {"what": "many", "requests": len(replies), "completed": len(whole), "tokens_per_s": _rate(whole)}
        | {"rss_mb": settled / MB, "rss_end_mb": memory[-1][1] / MB, "ttft_max_s": waits[-1]}
    )
    return _rate(whole)


async def _crowd(what: AgentBench, url: str, report: Report) -> None:
    bodies = [_body(f"Say hello to traveller {number}.", what.max_tokens) for number in range(what.crowd)]
    replies = await asyncio.gather(*(ask(url, body) for body in bodies))
    refused = [reply for reply in replies if reply.status == 429]
    report.figures |= {
        "crowd_completed": sum(reply.status == 200 and reply.error is None for reply in replies),
        "crowd_refused": len(refused),
        "crowd_refused_with_retry_after": sum(reply.retry_after_s is not None for reply in refused),
        "crowd_other": sum(reply.status not in (200, 429) for reply in replies),
    }


def _rate(replies: list[Reply]) -> float:
    """Tokens per second from the first request's begin to the last one's end."""
    seconds = max(r.ended_s for r in replies) - min(r.began_s for r in replies)
    return sum(reply.num_tokens for reply in replies) / seconds


def _body(prompt: str, max_tokens: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "isthmus": {"route": "local"},
    }

"""One session after another is cut and resumed, a thousand times: nothing lost, doubled or left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import psutil
import pytest

from isthmus.bench.recovery_clouds import CloudProcess, cloud_arguments
from isthmus.edge.agent import Agent
from isthmus.edge.requests import Finished, GenerateRequest, Token
from isthmus.protocol.sampling import SamplingParams
from isthmus.relay import Cut, LinkShape, Relay, parse_address
from isthmus.splitter.pack import Pack
from tests.packs import pack_checkpoint
from tests.tiny import make_tiny

pytestmark = pytest.mark.processes

LAYERS, CONTEXT = 4, 2048
PROMPT, TOKENS = 60, 1000
NUM_RESUMES = 1000
WARM_UP_RESUMES = 100
MAX_GROWTH_BYTES = 10_000_000
# Bytes that a decode step and its result take on the link, roughly: a cut falls anywhere within a few steps.
STEP_BYTES = 600


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resumes")
    sizes: dict[str, Any] = {"num_hidden_layers": LAYERS, "max_position_embeddings": CONTEXT}
    return make_tiny("llama", root / "source", seed=8, **sizes)


@pytest.fixture(scope="module")
def pack(source: Path) -> Pack:
    return pack_checkpoint(source, source.parent / "pack")


@pytest.fixture(scope="module")
def cloud(source: Path) -> Iterator[CloudProcess]:
    arguments = cloud_arguments(str(source), "--tenant-resumes-per-min", "1000000")
    with (source.parent / "cloud.log").open("w") as log, CloudProcess(*arguments, log=log) as process:
        yield process


@asynccontextmanager
async def cuttable(cloud: CloudProcess) -> AsyncIterator[Relay]:
    relay = Relay(("127.0.0.1", 0), parse_address(cloud.url, what="the cloud"), LinkShape())
    await relay.start()
    try:
        yield relay
    finally:
        await relay.aclose()


def ask(pack: Pack, way: dict[str, Any], seed: int) -> GenerateRequest:
    rng = random.Random(seed)
    return GenerateRequest(
        prompt_ids=tuple(rng.randrange(pack.spec.vocab_size) for _ in range(PROMPT)),
        max_tokens=TOKENS,
        sampling=SamplingParams(temperature=1.0, seed=seed),
        fallback="none" if way["route"] == "local" else "cloud",
        **way,
    )


WAYS: list[dict[str, Any]] = [
    {"route": "split", "split": 2, "shape": "prefix"},
    {"route": "split", "split": 1, "shape": "u"},
    {"route": "offload"},
]


async def unbroken_ids(agent: Agent, request: GenerateRequest) -> tuple[int, ...]:
    async with aclosing(agent.generate(request)) as events:
        async for event in events:
            if isinstance(event, Finished):
                assert event.events == ()
                return event.token_ids
    raise AssertionError("no last event")


async def cut_again_and_again(
    agent: Agent, request: GenerateRequest, relay: Relay, rng: random.Random
) -> Finished:
    """Cut the link at every few tokens, at once or at a byte of one of the next steps, never twice before the
    edge is back: in offload it may still be handing out tokens that came before."""
    faults = relay.faults
    indexes: list[int] = []
    next_cut = num_cuts = cut_line = 0
    num_before = len(faults.happened)
    async with aclosing(agent.generate(request)) as events:
        async for event in events:
            if isinstance(event, Finished):
                assert indexes == list(range(len(event.token_ids)))
                return event
            if not isinstance(event, Token):
                continue
            indexes.append(event.index)
            pending = num_cuts > len(faults.happened) - num_before or cut_line == faults.num_lines
            if next_cut <= event.index < TOKENS - 10 and faults.lines and not pending:
                next_cut = event.index + rng.randint(1, 5)
                num_cuts += 1
                cut_line = faults.num_lines
                if rng.random() < 0.5:
                    faults.cut()
                else:
                    faults.at_byte(faults.total_bytes + rng.randint(1, STEP_BYTES), "total", Cut())
    raise AssertionError("no last event")


def resident(pid: int) -> int:
    gc.collect()
    return int(psutil.Process(pid).memory_info().rss)


async def settled(cloud: CloudProcess) -> dict[str, Any]:
    """The cloud's counts once it holds nothing any more; as they are after 10 s."""
    until = monotonic() + 10
    async with httpx.AsyncClient() as client:
        while True:
            counts: dict[str, Any] = (await client.get(f"{cloud.http}/v1/stats")).json()
            held = counts["sessions"] + counts["detached"] + counts["pages_used"]
            if not held or monotonic() > until:
                return counts
            await asyncio.sleep(0.05)


async def test_a_thousand_resumes_lose_double_and_leave_nothing(pack: Pack, cloud: CloudProcess) -> None:
    rng = random.Random(4)
    requests = [ask(pack, way, seed) for seed, way in enumerate(WAYS)]
    async with cuttable(cloud) as relay:
        agent = Agent(pack, cloud_urls=["ws://{}:{}".format(*relay.listen)])
        await agent.start()
        try:
            expected = [await unbroken_ids(agent, request) for request in requests]
            happened: Counter[str] = Counter()
            before: dict[str, int] = {}
            processes = {"edge": os.getpid(), "cloud": cloud.pid}
            number = 0
            while happened["resumed"] < NUM_RESUMES:
                which = number % len(requests)
                got = await cut_again_and_again(agent, requests[which], relay, rng)
                assert got.token_ids == expected[which]
                happened.update(str(event["event"]) for event in got.events)
                number += 1
                assert number < 50, f"{number} generations were cut only {happened} times"
                if not before and happened["resumed"] >= WARM_UP_RESUMES:
                    before = {name: resident(pid) for name, pid in processes.items()}
            grown = {name: resident(pid) - before[name] for name, pid in processes.items()}
            assert agent.stats()["history_bytes"] == 0
            assert agent.stats()["running"] == 0
        finally:
            await agent.aclose()
    counts = await settled(cloud)
    assert (counts["sessions"], counts["detached"], counts["pages_used"]) == (0, 0, 0)
    assert max(grown.values()) < MAX_GROWTH_BYTES, grown
    assert happened["moved"] == 0, "a session whose cloud lives is resumed, not opened anew"

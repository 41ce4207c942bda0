"""The world of the chaos tests: one model, clouds that are killed, links that fail, runs that must not care.

Every run is compared with the reference's greedy ids. The prompts are chosen so that the reference never
comes near a tie: whoever computes a token, there is one right answer, and every difference is an error.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from isthmus.edge.agent import Agent
from isthmus.edge.recovery import RecoveryConfig
from isthmus.edge.requests import Finished, GenerateRequest, Started, Token
from isthmus.protocol.sampling import SamplingParams
from isthmus.relay import LinkShape, Relay
from isthmus.splitter.pack import Pack
from tests.chaos.nursery import NurseryCloud
from tests.oracle import NEAR_TIE, Greedy, greedy

FULL: Final = os.environ.get("CHAOS") == "full"
SEED: Final = int(os.environ.get("CHAOS_SEED", "1"))
TOKENS: Final = 48
LAYERS: Final = 4
CONTEXT: Final = 4096
END_IDS: Final = {0, 2}  # of both models
# A machine under load may need a while to bring a cloud back; nothing is measured here.
PATIENT: Final = RecoveryConfig(budget_s=60.0, refused_grace_s=0.2)
# A session whose OPENED was lost is nobody's: the cloud drops it after this.
DETACHED_S: Final = 5.0
SETTLE_S: Final = DETACHED_S + 10.0

WAYS: Final[dict[str, dict[str, Any]]] = {
    "prefix": {"route": "split", "split": 2, "shape": "prefix"},
    "u": {"route": "split", "split": 2, "shape": "u"},
    "offload": {"route": "offload"},
}

T = TypeVar("T")
Strike = Callable[[], Awaitable[None] | None]


def sweep(cases: Sequence[T], sample: int, name: str) -> list[T]:
    """All cases under CHAOS=full, else `sample` of them, drawn by CHAOS_SEED and `name`."""
    if FULL or sample >= len(cases):
        return list(cases)
    return random.Random(f"{SEED}/{name}").sample(cases, sample)


def prompt_of(length: int, start: int = 7) -> tuple[int, ...]:
    """A prompt of ordinary tokens, another one for every `start`."""
    return tuple(3 + (start * 53 + 31 * i + i * i) % 250 for i in range(length))


def clear_greedy(model: Any, length: int, tokens: int = TOKENS) -> Greedy:
    """The reference's answer to the first prompt of that length whose answer never comes near a tie, nor
    ends."""
    for start in range(1000):
        found = greedy(model, list(prompt_of(length, start)), tokens)
        if min(found.gaps) > 2 * NEAR_TIE and not END_IDS & set(found.ids):
            return found
    raise AssertionError(f"no prompt of {length} tokens without a near-tie")


def ask(reference: Greedy, way: Mapping[str, Any], **fields: Any) -> GenerateRequest:
    """The request that must give the reference's ids: greedy, fp32 rows, no end."""
    fields.setdefault("fallback", "cloud")
    return GenerateRequest(
        prompt_ids=reference.prompt,
        max_tokens=len(reference.ids),
        sampling=SamplingParams(temperature=0.0),
        row_format="f32",
        **way,
        **fields,
    )


@dataclass
class Run:
    """One run that has ended. `came_s`: when each token was there (monotonic)."""

    started: Started
    finished: Finished
    came_s: list[float] = field(default_factory=list)

    @property
    def events(self) -> list[str]:
        """The names of its events, without the canary's."""
        return [str(event["event"]) for event in self.finished.events if "at_index" in event]

    def only(self, name: str) -> dict[str, Any]:
        """The one event of that name."""
        found = [event for event in self.finished.events if event["event"] == name]
        assert len(found) == 1, self.finished.events
        return found[0]


async def run(
    agent: Agent, request: GenerateRequest, reference: Greedy, strikes: Mapping[int, Strike] | None = None
) -> Run:
    """Runs `request` and does `strikes[i]` when i tokens are out and the next was not asked for (0: before
    anything is sent). Asserts that every index comes once and that the ids are the reference's."""
    started: Started | None = None
    finished: Finished | None = None
    came_s: list[float] = []
    strikes = strikes or {}

    async def strike(at: int) -> None:
        if at in strikes and (waiting := strikes[at]()) is not None:
            await waiting

    async with aclosing(agent.generate(request)) as events:
        async for event in events:
            assert finished is None, "nothing follows Finished"
            if isinstance(event, Started):
                started = event
                await strike(0)
            elif isinstance(event, Token):
                assert event.index == len(came_s), f"token {event.index} came where {len(came_s)} was due"
                assert event.id == reference.ids[event.index], f"token {event.index} is {event.id}"
                came_s.append(time.monotonic())
                await strike(len(came_s))
            elif isinstance(event, Finished):
                finished = event
    assert started is not None
    assert finished is not None
    assert len(came_s) == len(reference.ids)
    assert finished.token_ids == reference.ids
    assert agent.stats()["running"] == 0
    return Run(started, finished, came_s)


@dataclass
class World:
    """Two clouds for one model, its pack, and reference answers by prompt length."""

    checkpoint: Path
    pack: Pack
    one: NurseryCloud
    other: NurseryCloud
    references: dict[int, Greedy]

    @property
    def clouds(self) -> tuple[NurseryCloud, NurseryCloud]:
        return self.one, self.other

    def settled(self) -> None:
        """Fails unless the clouds that are up soon hold no session and no page."""
        until = time.monotonic() + SETTLE_S
        for cloud in self.clouds:
            while cloud.is_up and any((counts := cloud.stats())[name] for name in HELD):
                assert time.monotonic() < until, counts
                time.sleep(0.02)


HELD: Final = ("sessions", "pages_used", "detached")


@contextmanager
def new_world(
    root: Path, make: Callable[[Path], tuple[Path, Pack]], lengths: Mapping[int, int]
) -> Iterator[World]:
    """Clouds of the model that `make` puts under `root`, started when a test first needs them. `lengths`:
    of the prompts, and how many tokens answer them."""
    from tests.oracle import load_reference

    checkpoint, pack = make(root)
    model = load_reference(checkpoint)
    references = {length: clear_greedy(model, length, tokens) for length, tokens in lengths.items()}
    arguments = ["--model", str(checkpoint), "--precision", "fp32", "--threads", "1"]
    arguments += ["--detached-s", str(DETACHED_S), "--tenant-resumes-per-min", "100000"]
    clouds = [NurseryCloud(arguments, root / f"{name}.log") for name in ("one", "other")]
    try:
        yield World(checkpoint, pack, clouds[0], clouds[1], references)
    finally:
        for cloud in clouds:
            cloud.stop()


@asynccontextmanager
async def agent_at(pack: Pack, *urls: str, **options: Any) -> AsyncIterator[Agent]:
    """A fresh agent: no cache, no memory of any cloud."""
    options.setdefault("recovery", PATIENT)
    agent = Agent(pack, cloud_urls=urls, **options)
    await agent.start()
    try:
        yield agent
    finally:
        await agent.aclose()


@asynccontextmanager
async def relay_to(cloud: NurseryCloud, shape: LinkShape | None = None) -> AsyncIterator[tuple[Relay, str]]:
    """A link to the cloud, in this event loop: nothing passes while the test does not wait."""
    relay = Relay(("127.0.0.1", 0), ("127.0.0.1", cloud.port), shape or LinkShape(), seed=SEED)
    host, port = await relay.start()
    try:
        yield relay, f"ws://{host}:{port}"
    finally:
        await relay.aclose()

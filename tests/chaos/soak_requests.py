"""What a soak asks for: a fixed mix of distinct requests, and what each yields when nothing interrupts it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from isthmus.bench.recovery_round import NEAR_TIE, Unbroken, unbroken
from isthmus.edge.agent import Agent
from isthmus.edge.requests import GenerateRequest, new_request_id
from isthmus.protocol.sampling import SamplingParams, TokenCounts, sample
from isthmus.splitter.pack import Pack

MIN_PROMPT, MAX_PROMPT = 3, 150
MIN_TOKENS, MAX_TOKENS = 16, 96
# Candidates per wanted request: long greedy answers of a random model come near a tie now and then.
MAX_TRIES = 20
# Two machines' logits differ by some 1e-5.
LOGIT_NOISE, NOISY_DRAWS = 1e-4, 8


@dataclass(frozen=True)
class Case:
    """One distinct request and its ids."""

    label: str
    request: GenerateRequest
    ids: tuple[int, ...]

    def again(self) -> GenerateRequest:
        """The request under an id of its own."""
        return replace(self.request, request_id=new_request_id())


def ways(num_layers: int) -> list[dict[str, Any]]:
    """Every kind of route, cut at the rim and in the middle."""
    shallow, middle, deep = 1, num_layers // 2, num_layers - 1
    return [
        *({"route": "split", "split": k, "shape": "prefix"} for k in (shallow, middle, deep)),
        *({"route": "split", "split": k, "shape": "u"} for k in (shallow, middle)),
        {"route": "split", "split": middle, "shape": "u", "privacy": "activations-only"},
        {"route": "offload"},
        {"route": "local"},
        {"route": "auto"},
    ]


def samplings(rng: random.Random) -> list[SamplingParams]:
    """Greedy twice as often as sampled; once with penalties, which need the history."""
    return [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.9, top_p=0.95, seed=rng.getrandbits(32)),
        SamplingParams(temperature=0.8, repetition_penalty=1.3, seed=rng.getrandbits(32)),
    ]


async def make_cases(agent: Agent, pack: Pack, rng: random.Random, num_each: int) -> list[Case]:
    """`num_each` requests for every way, and their unbroken answers.

    Recovery may compute a token elsewhere than the unbroken run did. So that every later difference is an
    error, a request is replaced by another if its unbroken run comes within a near-tie, or draws so near the
    border between two tokens that rounding could decide.
    """
    cases = []
    for number, way in enumerate(way for way in ways(pack.spec.num_layers) for _ in range(num_each)):
        sampling = rng.choice(samplings(rng))
        private = way.get("privacy") == "activations-only"
        if private and sampling.needs_context:
            sampling = SamplingParams(temperature=0.0)
        for _ in range(MAX_TRIES):
            request = GenerateRequest(
                prompt_ids=_prompt(pack, rng),
                max_tokens=rng.randint(MIN_TOKENS, MAX_TOKENS),
                sampling=sampling,
                priority=rng.choice((0, 0, 1)),
                **way,
            )
            found = await unbroken(agent, request)
            if _is_clear(found) if sampling.temperature == 0 else _draws_clearly(agent, request, found.ids):
                break
        else:
            raise AssertionError(f"{MAX_TRIES} prompts for {way} all came near a tie")
        label = " ".join(str(value) for value in way.values())
        cases.append(Case(f"{number}: {label}", request, found.ids))
    return cases


def _prompt(pack: Pack, rng: random.Random) -> tuple[int, ...]:
    length = rng.randint(MIN_PROMPT, MAX_PROMPT)
    return tuple(rng.randrange(pack.spec.vocab_size) for _ in range(length))


def _is_clear(found: Unbroken) -> bool:
    return min(found.margins) >= NEAR_TIE


def _draws_clearly(agent: Agent, request: GenerateRequest, ids: tuple[int, ...]) -> bool:
    """Are these the tokens even if every logit is off by more than rounding makes it? The agent is idle."""
    runner, prompt = agent._runner, request.prompt_ids
    assert runner is not None
    layers = range(agent.pack.spec.num_layers)
    runner.load(layers, embed=True, head=True)
    cache = runner.new_cache(layers, capacity=len(prompt) + len(ids))
    rows = runner.forward(cache, runner.embed([*prompt, *ids[:-1]]), start_layer=0, stop_layer=len(layers))
    cache.close()
    noise = np.random.default_rng(0)
    counts = TokenCounts(prompt)
    for index, (token, logits) in enumerate(zip(ids, runner.head(rows[len(prompt) - 1 :]), strict=True)):
        for _ in range(NOISY_DRAWS):
            off = (logits + noise.normal(0, LOGIT_NOISE, logits.shape)).astype(np.float32)
            drawn = sample(off, request.sampling, position=len(prompt) + index, counts=counts)
            if drawn.token != token:
                return False
        counts.add(token)
    return True

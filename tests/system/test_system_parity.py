"""SmolLM2-135M over real processes: greedy ids of every route equal transformers' (fp32 edge, fp32 cloud)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from isthmus.edge.agent import Agent
from isthmus.edge.requests import Finished, GenerateRequest, RouteAsk, Shape
from isthmus.protocol.sampling import SamplingParams
from isthmus.splitter.pack import Pack
from isthmus.splitter.provide import ensure_pack
from tests.oracle import Greedy, assert_same_tokens, greedy, load_reference
from tests.processes import serve

pytestmark = [pytest.mark.model, pytest.mark.processes]

NEW_TOKENS = 64
TEXTS = (
    "Hello",
    "The three primary colours are",
    "def fibonacci(n):\n    '''Return the n-th Fibonacci number.'''\n",
    "Im Jahr 1824 reiste ein junger Mann von Wien nach Triest, um das Meer zu sehen. " * 4,
    "A laptop holds the first layers of a model and a server the rest; every token crosses between them. "
    * 60,
)


@pytest.fixture(scope="module")
def pack() -> Pack:
    return ensure_pack("smollm2-135m", 32)


@pytest.fixture(scope="module")
def references(pack: Pack, smollm_dir: Path) -> list[Greedy]:
    tokenizer = pack.tokenizer()
    prompts = [tokenizer.encode(text) for text in TEXTS]
    assert len(prompts[-1]) > 1000
    model = load_reference(smollm_dir)
    return [greedy(model, prompt, NEW_TOKENS) for prompt in prompts]


@pytest.fixture(scope="module")
def cloud_url() -> Iterator[str]:
    with serve("cloud", "--port", "0", "--precision", "fp32") as service:
        yield service.url


ROUTES: list[tuple[RouteAsk, int | None, Shape | None]] = [
    ("local", None, None),
    ("offload", None, None),
    *[("split", k, shape) for k in (1, 8, 15, 29) for shape in ("prefix", "u")],
]


@pytest.mark.parametrize(("route", "split", "shape"), ROUTES)
async def test_greedy_ids_equal_transformers(
    pack: Pack,
    references: list[Greedy],
    cloud_url: str,
    route: RouteAsk,
    split: int | None,
    shape: Shape | None,
) -> None:
    """The five prompts run at once, so that the cloud also batches them."""
    agent = Agent(pack, cloud_urls=(cloud_url,), parallel=len(TEXTS))

    async def generate(prompt: list[int], tokens: int) -> list[int]:
        request = GenerateRequest(
            prompt_ids=tuple(prompt),
            max_tokens=tokens,
            sampling=SamplingParams(temperature=0.0),
            route=route,
            split=split,
            shape=shape,
            row_format="f32",
        )
        async with aclosing(agent.generate(request)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return list(event.token_ids)
        raise AssertionError("no last event")

    await agent.start()
    try:
        label = f"{route} K={split} {shape or ''}"
        ties = [assert_same_tokens(ref, generate, f"{label} prompt {i}") for i, ref in enumerate(references)]
        await asyncio.gather(*ties)
    finally:
        await agent.aclose()

"""Draft chains by CloudHalf on the real cloud: whatever the draft, the tokens are those of plain decoding."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from isthmus.edge.agent import Agent
from isthmus.edge.conversation import CachePool, CloudMemory
from isthmus.edge.half import EdgeHalf
from isthmus.edge.history import HistoryBudget
from isthmus.edge.link import CloudLink
from isthmus.edge.remote import CloudHalf, OfferContext
from isthmus.edge.requests import Decision, GenerateRequest
from isthmus.protocol.errors import SequenceError
from isthmus.protocol.events import ResultRows, ResultTokens, StreamTokens
from isthmus.protocol.frames import VERSION
from isthmus.protocol.messages import Hello
from isthmus.protocol.sampling import SamplingParams
from isthmus.splitter.cache import KVCache
from isthmus.splitter.runner import BlockRunner
from tests.edge.edge_world import GREEDY, TinyModel, ask, collect, prompt_of
from tests.edge.real_cloud import RealCloud, real_cloud

Draft = Callable[[int], Sequence[int]]
"""What to guess once there are that many tokens."""


@pytest.fixture(scope="module")
def cloud(tiny: TinyModel) -> Iterator[RealCloud]:
    with real_cloud(tiny) as running:
        yield running


class Drafting:
    """Both halves of one request, and the loop that a drafting edge runs."""

    def __init__(self, edge: EdgeHalf, cloud: CloudHalf, request: GenerateRequest) -> None:
        self.edge, self.cloud, self.request = edge, cloud, request
        self.tokens: list[int] = []
        self.brought: list[int] = []
        """Tokens of each chain."""

    @property
    def done(self) -> bool:
        last = self.tokens[-1:]
        return len(self.tokens) >= self.request.max_tokens or last[0] in self.request.end_ids

    async def start(self) -> None:
        """Prefill, and the first token."""
        prompt = self.request.prompt_ids
        await self.cloud.start()
        self.edge.prepare()
        await self.cloud.send_rows(self.edge.chunk(prompt), 0, final=True)
        first = await self.cloud.next()
        assert not isinstance(first, StreamTokens)
        if isinstance(first, ResultRows):
            self.tokens.append(self.edge.drawn(self.cloud.decode(first), 0).token)
        else:
            self.tokens += first.tokens

    async def run(self, draft: Draft) -> list[int]:
        """The whole answer, a draft chain at a time."""
        await self.start()
        while not self.done:
            left = self.request.max_tokens - len(self.tokens)  # of which the last is never fed: one too many
            self.brought.append(await self.chain([self.tokens[-1], *draft(len(self.tokens))[:left]]))
        return self.tokens

    async def chain(self, ids: list[int]) -> int:
        """Sends one draft chain; the number of tokens it brought."""
        pos = len(self.request.prompt_ids) + len(self.tokens) - 1
        self.edge.truncate(pos)
        chunk = self.edge.chunk(ids)
        result = await self.cloud.verify(ids, chunk, pos, truncate=pos < self.cloud.kv_len)
        before = len(self.tokens)
        if isinstance(result, ResultTokens):
            self.tokens += result.tokens
            assert result.kv_len == self.cloud.kv_len == pos + len(result.tokens)
            assert (result.finish is not None) == self.done
        else:
            assert result.shape == (len(ids), self.cloud.codec.hidden)
            assert self.cloud.kv_len == pos + len(ids)
            for at in range(len(ids)):
                self.tokens.append(self.edge.drawn(result[: at + 1], len(self.tokens)).token)
                if self.done or ids[at + 1 : at + 2] != self.tokens[-1:]:
                    break
        return len(self.tokens) - before


@asynccontextmanager
async def drafting(
    model: TinyModel, cloud: RealCloud, prompt: Sequence[int], max_tokens: int, *, shape: Any, **fields: Any
) -> AsyncIterator[Drafting]:
    """A request at K = 2, whose cloud keeps nothing of it afterwards."""
    request = ask(tuple(prompt), max_tokens, **fields)
    hello = Hello(
        versions=(VERSION,), identity=model.pack.identity, edge_precision="f32", row_formats=("f32", "int8o")
    )
    link = CloudLink(cloud.url, hello)
    offers = OfferContext(b"s" * 32, model.pack, CloudMemory(), HistoryBudget(1 << 20))
    decision = Decision("split", 2, shape, "asked")
    half = CloudHalf(link, await link.connect(), request, decision, "f32", offers)
    pool: CachePool[KVCache] = CachePool(1 << 20)
    edge = EdgeHalf(
        BlockRunner(model.pack),
        pool,
        2,
        prompt=request.prompt_ids,
        max_tokens=max_tokens,
        sampling=request.sampling,
        draws=shape == "u",
        codec=half.codec,
    )
    try:
        yield Drafting(edge, half, request)
        half.cancel()
        stats = await cloud.pages_settle(0)
        assert (stats.sessions, stats.pages_used) == (0, 0)
    finally:
        await link.aclose()
        edge.truncate(len(prompt))
        edge.release(request.prompt_ids)
        pool.clear()


async def plain(model: TinyModel, prompt: Sequence[int], max_tokens: int, **fields: Any) -> list[int]:
    """The tokens of plain decoding, by the route local."""
    agent = Agent(model.pack)
    await agent.start()
    try:
        return (await collect(agent, ask(tuple(prompt), max_tokens, **fields))).ids
    finally:
        await agent.aclose()


def spoilt(tokens: Sequence[int], length: int, *, right: int) -> Draft:
    """Drafts of `length`, wrong after the first `right`; beyond the last token they go on all the same."""

    def draft(count: int) -> list[int]:
        after = [*tokens[count : count + length], *[3] * length][:length]
        return [token if at < right else (token + 1) % 300 for at, token in enumerate(after)]

    return draft


@pytest.mark.parametrize("shape", ["prefix", "u"])
@pytest.mark.parametrize(
    ("right", "brought"),
    [(5, [6, 6, 6, 2]), (0, [1] * 20), (2, [3] * 6 + [2])],
    ids=["right", "wrong at the first", "wrong in the middle"],
)
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SamplingParams(temperature=1.1, top_k=50, top_p=0.95, seed=5),
        SamplingParams(temperature=0.7, repetition_penalty=1.3, frequency_penalty=0.4, seed=8),
    ],
    ids=["greedy", "sampled", "penalties"],
)
async def test_tokens_equal_plain_decoding(
    tiny: TinyModel,
    cloud: RealCloud,
    shape: str,
    right: int,
    brought: list[int],
    sampling: SamplingParams,
) -> None:
    prompt = prompt_of(40)
    reference = await plain(tiny, prompt, 21, sampling=sampling)
    async with drafting(tiny, cloud, prompt, 21, shape=shape, sampling=sampling) as generation:
        assert await generation.run(spoilt(reference, 5, right=right)) == reference
        assert generation.brought == brought


@pytest.mark.parametrize("shape", ["prefix", "u"])
async def test_a_chain_over_the_end_of_the_answer_stops_there(
    tiny: TinyModel, cloud: RealCloud, shape: str
) -> None:
    prompt = prompt_of(25)
    sampling = SamplingParams(temperature=1.5, seed=1)
    free = await plain(tiny, prompt, 12, sampling=sampling)
    at = next(i for i in range(3, 12) if free[i] not in free[:i])
    end = {"end_ids": (free[at],), "sampling": sampling}
    async with drafting(tiny, cloud, prompt, 30, shape=shape, **end) as generation:
        assert await generation.run(spoilt(free, 11, right=11)) == free[: at + 1]
        assert generation.brought == [at]
        assert generation.cloud.rows_sent == 25 + 12


@pytest.mark.parametrize("shape", ["prefix", "u"])
async def test_plain_steps_and_chains_may_take_turns(tiny: TinyModel, cloud: RealCloud, shape: str) -> None:
    prompt = prompt_of(17)
    reference = await plain(tiny, prompt, 16)
    wrong, none = spoilt(reference, 3, right=1), spoilt(reference, 0, right=0)
    async with drafting(tiny, cloud, prompt, 16, shape=shape) as generation:
        turns = iter([wrong, none] * 16)
        assert await generation.run(lambda count: next(turns)(count)) == reference
        assert generation.brought == [2, 1, 2, 1, 2, 1, 2, 1, 2, 1]


async def test_after_a_rejection_a_plain_step_truncates_too(tiny: TinyModel, cloud: RealCloud) -> None:
    prompt = prompt_of(12)
    reference = await plain(tiny, prompt, 4)
    async with drafting(tiny, cloud, prompt, 4, shape="u") as generation:
        await generation.start()
        assert await generation.chain([*reference[:2], 9]) == 2  # two right rows, one to be cut off
        assert generation.tokens == reference[:3]
        pos = 12 + 2
        assert generation.cloud.kv_len == 12 + 3
        generation.edge.truncate(pos)
        chunk = generation.edge.chunk(reference[2:3])
        with pytest.raises(SequenceError, match="expected 15"):
            await generation.cloud.send_rows(chunk, pos, final=True)
        await generation.cloud.send_rows(chunk, pos, final=True, truncate=True)
        output = await generation.cloud.next()
        assert isinstance(output, ResultRows)
        hidden = generation.cloud.decode(output)
        assert generation.edge.drawn(hidden, 3).token == reference[3]


async def test_a_chain_longer_than_a_step_is_refused_with_both_numbers(
    tiny: TinyModel, cloud: RealCloud
) -> None:
    async with drafting(tiny, cloud, prompt_of(5), 400, shape="prefix") as generation:
        with pytest.raises(SequenceError, match="chain of 301 rows, one step takes at most 256") as caught:
            await generation.run(lambda _count: [7] * 300)
        assert caught.value.code == "chain_too_long"

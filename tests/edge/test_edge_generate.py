"""The generation loop on the edge alone: parity with transformers, text, stops, reuse, fairness."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from isthmus.edge.agent import Agent
from isthmus.edge.requests import Token
from isthmus.protocol.sampling import SamplingParams
from tests.edge.edge_world import TinyModel, ask, collect, prompt_of
from tests.oracle import assert_same_tokens, greedy, load_reference


@asynccontextmanager
async def agent_of(model: TinyModel, **options: Any) -> AsyncIterator[Agent]:
    agent = Agent(model.pack, **options)
    await agent.start()
    try:
        yield agent
    finally:
        await agent.aclose()


@pytest.mark.parametrize("length", [1, 5, 128, 129, 300])
async def test_local_greedy_equals_transformers(tiny: TinyModel, length: int) -> None:
    prompt = list(prompt_of(length))
    reference = greedy(load_reference(tiny.checkpoint), prompt, 24)
    async with agent_of(tiny) as agent:

        async def generate(ids: list[int], count: int) -> list[int]:
            return (await collect(agent, ask(ids, count))).ids

        await assert_same_tokens(reference, generate, f"local, {length} tokens")


async def test_second_turn_computes_only_its_new_tokens(tiny: TinyModel) -> None:
    first_prompt = prompt_of(40)
    async with agent_of(tiny) as agent:
        first = await collect(agent, ask(first_prompt, 6))
        assert first.finished.counts["edge_rows_computed"] == 40 + 5
        assert first.finished.counts["edge_cached_rows"] == 0
        second_prompt = (*first_prompt, *first.ids, *prompt_of(10, start=3))
        second = await collect(agent, ask(second_prompt, 6))
    # All rows but that of the first turn's last token, which was never fed, are there already.
    assert second.finished.counts["edge_cached_rows"] == 45
    assert second.finished.counts["edge_rows_computed"] == 1 + 10 + 5
    async with agent_of(tiny) as fresh:
        assert (await collect(fresh, ask(second_prompt, 6))).ids == second.ids


async def test_end_ids_end_the_sequence_and_have_no_text(tiny: TinyModel) -> None:
    async with agent_of(tiny) as agent:
        free = await collect(agent, ask(prompt_of(20), 8))
        at = next(i for i in range(2, 8) if free.ids[i] not in free.ids[:i])
        ended = await collect(agent, ask(prompt_of(20), 8, end_ids=(free.ids[at],)))
    assert ended.ids == free.ids[: at + 1]
    assert ended.finished.finish_reason == "stop"
    assert ended.tokens[-1].text == ""
    assert free.finished.finish_reason == "length"


async def test_stop_string_cuts_the_text(tiny: TinyModel) -> None:
    async with agent_of(tiny) as agent:
        free = await collect(agent, ask(prompt_of(33), 16))
        whole = free.finished.text
        stop = whole[3:6]
        assert len(stop) == 3
        stopped = await collect(agent, ask(prompt_of(33), 16, stop=(stop,)))
    assert stopped.finished.finish_reason == "stop"
    assert stopped.finished.text == whole[: whole.index(stop)]
    assert len(stopped.ids) < len(free.ids)


async def test_sampling_is_keyed_by_seed_and_choice(tiny: TinyModel) -> None:
    def request(seed: int, choice: int = 0) -> Any:
        return ask(prompt_of(12), 16, sampling=SamplingParams(temperature=1.5, seed=seed, choice=choice))

    async with agent_of(tiny) as agent:
        one = (await collect(agent, request(1))).ids
        again = (await collect(agent, request(1))).ids
        other = (await collect(agent, request(2))).ids
        choice = (await collect(agent, request(1, choice=1))).ids
    assert one == again
    assert len({tuple(one), tuple(other), tuple(choice)}) == 3


async def test_logprobs_are_there_when_asked(tiny: TinyModel) -> None:
    params = SamplingParams(temperature=0.0, logprobs=3)
    async with agent_of(tiny) as agent:
        outcome = await collect(agent, ask(prompt_of(9), 4, sampling=params))
    for token in outcome.tokens:
        assert token.logprob is not None
        assert len(token.top) == 3
        assert token.top[0] == (token.id, token.logprob)


async def test_repetition_penalty_sees_prompt_and_output(tiny: TinyModel) -> None:
    params = SamplingParams(
        temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=50
    )
    async with agent_of(tiny) as agent:
        outcome = await collect(agent, ask(prompt_of(9), 24, sampling=params))
    assert len(set(outcome.ids)) == 24
    assert not set(outcome.ids) & set(prompt_of(9))


async def test_parallel_requests_interleave_by_step_and_keep_their_tokens(tiny: TinyModel) -> None:
    prompts = [prompt_of(20 + i, start=i) for i in range(4)]
    async with agent_of(tiny) as agent:
        alone = [(await collect(agent, ask(p, 12))).ids for p in prompts]
    order: list[int] = []

    async def run(agent: Agent, number: int) -> list[int]:
        ids = []
        async with aclosing(agent.generate(ask(prompts[number], 12))) as events:
            async for event in events:
                if isinstance(event, Token):
                    order.append(number)
                    ids.append(event.id)
        return ids

    async with agent_of(tiny, parallel=4) as agent:
        together = await asyncio.gather(*(run(agent, i) for i in range(4)))
    assert list(together) == alone
    # Between a request's first and last token each of the others got some, too.
    first, last = order.index(0), len(order) - 1 - order[::-1].index(0)
    assert {1, 2, 3} <= set(order[first:last])


async def test_closing_early_keeps_the_rows_computed_so_far(tiny: TinyModel) -> None:
    prompt = prompt_of(50)
    async with agent_of(tiny) as agent:
        events = agent.generate(ask(prompt, 64))
        seen = 0
        async for event in events:
            if isinstance(event, Token):
                seen += 1
                if seen == 3:
                    break
        await events.aclose()
        assert agent.stats()["running"] == 0
        assert agent.stats()["cancelled"] == 1
        again = await collect(agent, ask(prompt, 4))
        assert again.finished.counts["edge_cached_rows"] == 49
    async with agent_of(tiny) as fresh:
        assert (await collect(fresh, ask(prompt, 4))).ids == again.ids

"""The choices of one request (`n`) as one stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from isthmus.edge.requests import AgentEvent, Finished, GenerateRequest, Token

if TYPE_CHECKING:
    from isthmus.edge.agent import Agent

# An event and the index of the choice it belongs to.
Numbered = tuple[int, AgentEvent]


async def merge(agent: Agent, requests: list[GenerateRequest]) -> AsyncGenerator[Numbered, None]:
    """The events of all choices as they come, each with its choice's index.

    What comes before a choice's first token is held back until then: whoever waits for the first event of
    this generator knows that generation really runs. Closing it closes every choice. The first failure ends
    all.
    """
    if len(requests) == 1:
        async with aclosing(_proven(agent, requests[0])) as events:
            async for event in events:
                yield 0, event
        return
    # One place: a choice runs ahead of a slow reader by one event, no further.
    queue: asyncio.Queue[Numbered | Exception | None] = asyncio.Queue(maxsize=1)

    async def pump(index: int, request: GenerateRequest) -> None:
        end: Exception | None = None
        try:
            async with aclosing(_proven(agent, request)) as events:
                async for event in events:
                    await queue.put((index, event))
        except Exception as error:
            end = error
        await queue.put(end)

    tasks = [asyncio.create_task(pump(index, request)) for index, request in enumerate(requests)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _proven(agent: Agent, request: GenerateRequest) -> AsyncGenerator[AgentEvent, None]:
    """The agent's events with those before the first token held back until then."""
    held: list[AgentEvent] = []
    proven = False
    async with aclosing(agent.generate(request)) as events:
        async for event in events:
            held.append(event)
            proven = proven or isinstance(event, Token | Finished)
            while proven and held:
                yield held.pop(0)

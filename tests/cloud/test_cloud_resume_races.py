"""Many sessions, cut at random and resumed at once, while the old connections are still dying."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from isthmus.cloud.serve import Prepared
from isthmus.protocol.limits import Limits
from tests.cloud.cloud_clients import greedy_reference, is_idle, prompt_of
from tests.cloud.cloud_edges import RunningCloud, connected, open_of, running_cloud, settled
from tests.cloud.cloud_routes import MIXES
from tests.cloud.cloud_traveller import Traveller, until


async def travel(cloud: RunningCloud, edge: Traveller, chance: random.Random) -> int:
    """One answer over as many connections as it takes; how many resumes it took."""
    started, due, sent, resumes = False, False, 0, 0
    while len(edge.tokens) < edge.request.max_tokens:
        async with connected(cloud) as connection:
            if started:
                await edge.resume(connection)
                resumes += 1
            else:
                await edge.open(connection)
                started = True
            for _ in range(chance.randint(0, 3)):
                if sent < len(edge.prompt):
                    part = edge.prompt[sent : sent + chance.randint(1, 20)]
                    sent += len(part)
                    due = sent == len(edge.prompt)
                    edge.queue(sent - len(part), part, final=due)
                elif due:
                    await edge.take()
                    due = edge.request.streams
                else:
                    edge.rows = edge.rows[: len(edge.known) - 1]
                    edge.queue(len(edge.known) - 1, edge.tokens[-1:], final=True)
                    due = True
                if chance.random() < 0.7:
                    await connection.flush()
                if len(edge.tokens) >= edge.request.max_tokens:
                    await connection.close(edge.session)
                    return resumes
            before = len(edge.tokens)
            await edge.abort()
            if len(edge.tokens) > before:
                due = edge.request.streams
    # The last tokens came while the connection died: nobody is left to close the session.
    return resumes


@pytest.mark.parametrize("seed", range(3))
async def test_random_cuts_lose_and_repeat_nothing(prepared: Prepared, seed: int) -> None:
    limits = replace(Limits(), max_resumes_per_minute_per_tenant=10_000)
    options = replace(prepared.options, limits=limits)
    with running_cloud(replace(prepared, options=options)) as cloud:

        async def one(number: int) -> int:
            split, shape = MIXES[number]
            prompt = prompt_of(30 + number, 100 * seed + number)
            request = open_of(prompt, split=split, shape=shape, max_tokens=10)
            edge = Traveller(prepared, request, prompt)
            resumes = await travel(cloud, edge, random.Random(1000 * seed + number))
            assert edge.tokens == greedy_reference(prepared.model, prompt, 10)
            return resumes

        assert sum(await asyncio.gather(*(one(number) for number in range(len(MIXES))))) > 20
        sessions = cloud.hub.sessions
        await until(lambda: sessions.num_detached == len(sessions))
        cloud.loop.call_soon_threadsafe(sessions.evict_detached, "expired")
        assert (await settled(cloud))["pages_used"] == 0
        await until(lambda: is_idle(cloud.hub.engine) and not cloud.hub.peers)
        usage = cloud.hub.usage("local")
        assert (usage.num_sessions, usage.kv_bytes) == (0, 0)

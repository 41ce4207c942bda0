"""A hostile cloud against the pure edge, and over a real socket: a typed error, no hang, bounded memory."""

from __future__ import annotations

import asyncio
import dataclasses
import tracemalloc
from contextlib import aclosing
from dataclasses import replace

import psutil
import pytest

from isthmus.edge.agent import Agent
from isthmus.edge.link import CloudLink
from isthmus.edge.requests import AgentEvent, Finished, GenerateRequest
from isthmus.protocol.edge_connection import EdgeConnection
from isthmus.protocol.errors import IsthmusError
from isthmus.protocol.events import ConnectionFailed, EdgeEvent, ResultRows, ResultTokens, SessionFailed
from isthmus.protocol.frames import MsgType
from isthmus.protocol.sampling import SamplingParams
from isthmus.splitter.pack import Pack
from tests.attacks.bad_inputs import Attack, Stage
from tests.attacks.corpus_edge import EDGE_ATTACKS
from tests.attacks.hostile_cloud import (
    CODEC,
    HELLO,
    INFO,
    LIMITS,
    asked,
    first_rows,
    honest_messages,
    hostile_cloud,
)

MAX_ALLOCATED = 8 * 2**20
MAX_GROWTH_BYTES = 64 * 2**20
IN_TIME_S = 10.0


def play(attack: Attack) -> tuple[EdgeConnection, list[EdgeEvent], list[str]]:
    """The attack against an EdgeConnection; its events, and the codes of rows that did not decode."""
    edge = EdgeConnection(HELLO, LIMITS)
    edge.start(0.0)
    stages = list(Stage).index(attack.stage)
    honest = honest_messages(attack)
    if stages >= 1:
        edge.receive(honest[0], 0.0)
        session = edge.open(asked(attack))
        if stages >= 2:
            edge.receive(honest[1], 0.0)
        if stages >= 3:
            encoded, n = first_rows(session.open)
            session.step_rows(encoded, 0, n, final=True)
    edge.data_to_send()
    events: list[EdgeEvent] = []
    undecoded: list[str] = []
    for data in attack.messages:
        for event in edge.receive(data, 0.0):
            events.append(event)
            if isinstance(event, ResultRows):
                try:
                    CODEC.decode_frame(event.frame, max_raw=LIMITS.max_message_bytes)
                except IsthmusError as error:
                    undecoded.append(error.code)
    return edge, events, undecoded


@pytest.mark.parametrize("attack", EDGE_ATTACKS, ids=str)
def test_the_pure_edge_names_what_is_wrong_and_ends_no_more_than_it_must(attack: Attack) -> None:
    tracemalloc.start()
    try:
        edge, events, undecoded = play(attack)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MAX_ALLOCATED
    failures = [event for event in events if isinstance(event, ConnectionFailed | SessionFailed)]
    codes = [event.error.code for event in failures] + undecoded
    if attack.reply is MsgType.RESULT:
        assert codes == []
        (result,) = [event for event in events if isinstance(event, ResultTokens)]
        assert result.tokens == (7,)
    elif attack.code == "unknown_stream":
        assert events == []  # there is nobody to tell but the cloud
        assert b"unknown_stream" in b"".join(edge.data_to_send())
    else:
        assert set(codes) == {attack.code}
    assert edge.is_closed == attack.fatal == isinstance(events[-1] if events else None, ConnectionFailed)


async def ask(link: CloudLink, attack: Attack) -> tuple[int, ...]:
    """What an edge's owner does; the tokens, if it comes so far."""
    request = asked(attack)
    session = await link.open(request)
    await session.opened()
    encoded, n = first_rows(request)
    await session.send_rows(encoded, 0, n, final=True)
    output = await session.next()
    if isinstance(output, ResultRows):
        CODEC.decode_frame(output.frame, max_raw=LIMITS.max_message_bytes)
        return ()
    return tuple(output.tokens)


async def test_the_real_link_raises_a_typed_error_in_time() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    for attack in EDGE_ATTACKS:
        if attack.code == "unknown_stream":
            continue  # the session is not touched: nothing would end the wait for its answer
        async with hostile_cloud(attack) as url:
            link = CloudLink(url, HELLO, limits=LIMITS)
            try:
                async with asyncio.timeout(IN_TIME_S):
                    if attack.reply is MsgType.RESULT:
                        assert await ask(link, attack) == (7,)
                    else:
                        with pytest.raises(IsthmusError) as caught:
                            await ask(link, attack)
                        # A session whose connection died is told so in one of several ways.
                        assert attack.fatal or caught.value.code in (attack.code, "wrong_state")
            except BaseException as error:
                error.add_note(f"in {attack}")
                raise
            finally:
                await link.aclose()
    assert process.memory_info().rss - before < MAX_GROWTH_BYTES


async def test_the_real_agent_fails_the_request_with_a_typed_error_and_answers_the_next(pack: Pack) -> None:
    """One attack of each code, on requests that may not go on elsewhere."""
    info = replace(INFO, identity=pack.identity, hidden=pack.spec.hidden, context_length=512)
    one_each = {
        attack.code: attack
        for attack in EDGE_ATTACKS
        if attack.stage is Stage.STEPPED and attack.reply is MsgType.ERROR and not attack.opening
    }
    del one_each["unknown_stream"]  # the session is not touched
    request = GenerateRequest(
        prompt_ids=(5, 6, 7, 8),
        max_tokens=1,
        sampling=SamplingParams(temperature=0.0),
        route="split",
        split=1,
        shape="prefix",
        row_format="f32",
        fallback="none",
    )
    for attack in one_each.values():
        async with hostile_cloud(attack, info) as url:
            agent = Agent(pack, cloud_urls=(url,))
            await agent.start()
            try:
                async with asyncio.timeout(IN_TIME_S):
                    with pytest.raises(IsthmusError):
                        await last_event(agent, request)
                    local = dataclasses.replace(request, route="local", split=None, shape=None)
                    assert isinstance(await last_event(agent, local), Finished)
            except BaseException as error:
                error.add_note(f"in {attack}")
                raise
            finally:
                await agent.aclose()


async def last_event(agent: Agent, request: GenerateRequest) -> AgentEvent | None:
    last = None
    async with aclosing(agent.generate(request)) as events:
        async for event in events:
            last = event
    return last

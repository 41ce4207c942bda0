"""How busy a cloud says it is: recent step times, the wait of somebody new, and what each answer took."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from time import monotonic, sleep
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.cloud import load_meter
from isthmus.cloud.budget import rows_before
from isthmus.cloud.engine_core import StepRecord
from isthmus.cloud.load_meter import IDLE_S, LoadMeter
from isthmus.cloud.model import CloudModel
from isthmus.cloud.scheduler import Policy, SchedulerConfig
from isthmus.cloud.serve import Prepared
from isthmus.protocol.events import ResultTokens, SessionOpened, StatusReceived, StreamTokens, Welcomed
from isthmus.protocol.messages import Load
from tests.cloud.cloud_clients import Client, EdgeHalf, make_engine, prompt_of
from tests.cloud.cloud_edges import Edge, RunningCloud, connected, open_of, running_cloud
from tests.cloud.cloud_scheduling import World
from tests.cloud.cloud_traveller import Traveller, detached, held_engine, taken, until

NEWCOMER = 10**6


def step(rows: int, sessions: int, seconds: float, ended_s: float) -> StepRecord:
    return StepRecord(rows, sessions, 4 * rows, seconds, ended_s)


def test_step_s_is_the_mean_of_decode_only_steps() -> None:
    meter = LoadMeter()
    assert meter.step_s(0.0) == 0.0
    meter.note_step(step(8, 8, 0.02, 1.0))
    assert meter.step_s(1.0) == 0.02
    meter.note_step(step(130, 3, 0.5, 1.6))  # has a chunk of a prompt
    assert meter.step_s(1.6) == 0.02
    for number in range(40):
        meter.note_step(step(2, 2, 0.04, 1.7 + number * 0.04))
    assert meter.step_s(3.3) == pytest.approx(0.04, rel=0.01)
    assert meter.step_s(1.7 + 39 * 0.04 + IDLE_S) > 0
    assert meter.step_s(1.7 + 39 * 0.04 + IDLE_S + 0.01) == 0.0
    meter.note_step(step(1, 1, 0.009, 100.0))
    assert meter.step_s(100.0) == 0.009  # nothing is left of what was before the silence


def test_queue_s_is_half_a_step_and_the_rows_ahead_at_the_recent_rate() -> None:
    meter = LoadMeter()
    assert meter.queue_s(1000) == 0.0  # nothing is known yet
    meter.note_step(step(100, 1, 0.5, 1.0))
    assert meter.queue_s(0) == 0.0
    assert meter.queue_s(400) == pytest.approx(0.25 + 2.0)
    for number in range(60):
        meter.note_step(step(50, 2, 0.1, 1.1 + number / 10))
    assert meter.queue_s(400) == pytest.approx(0.05 + 0.8, rel=0.01)


def test_rows_before_a_newcomer() -> None:
    before: Callable[..., int] = lambda *ahead, short=0: rows_before(  # noqa: E731
        ahead, short, max_rows=256, max_chunk_rows=128
    )
    assert before() == 0
    assert before(short=5) == 5  # beside them in the next step
    assert before(1000) == 128  # one prompt leaves half the budget
    assert before(1000, 1000) == 2000  # two leave none, until they end
    assert before(128, 129) == 256 + 1
    assert before(1000, 1000, short=300) > before(1000, 1000)
    assert rows_before([1000], 0, max_rows=256, max_chunk_rows=None) == 1000


@settings(max_examples=30)
@given(
    st.sampled_from(["fcfs", "mlfq"]),
    st.lists(st.integers(2, 400), max_size=6),
    st.integers(0, 12),
    st.integers(1, 64),
    st.integers(24, 64),
)
def test_the_rows_ahead_are_those_then_computed_before_a_newcomer(
    policy: Policy, prompts: list[int], num_decoding: int, chunk: int, max_rows: int
) -> None:
    config = SchedulerConfig(policy=policy, max_rows=max_rows, max_chunk_rows=chunk, aging_s=1e9)
    world = World(pages=10_000, config=config)
    for session_id in range(num_decoding):
        world.join(session_id, 1, max_rows=500)
    for session_id, rows in enumerate(prompts, num_decoding):
        world.join(session_id, rows)
    expected = world.scheduler.num_rows_ahead
    world.join(NEWCOMER, 50)
    others = 0
    while not world.computed(NEWCOMER):
        plan = world.step()
        others += sum(pick.count for pick in plan.picks if pick.session_id != NEWCOMER)
        for pick in plan.picks:
            if pick.session_id < num_decoding:
                world.extend(pick.session_id)  # decoding goes on
    assert others == expected


def test_under_mlfq_long_prompts_are_not_ahead_of_a_short_one() -> None:
    world = World(config=SchedulerConfig(mlfq_quantum_s=0.05, max_rows=64, max_chunk_rows=64))
    world.join(1, 400)
    assert world.scheduler.num_rows_ahead > 300
    world.step(seconds=0.2)
    assert world.scheduler.num_rows_ahead == 0  # it has sunk below the level where others join
    world.join(2, 400, priority=1)
    assert world.scheduler.num_rows_ahead > 300


def test_an_idle_engine_has_no_load(model: CloudModel) -> None:
    ticks = itertools.count()
    jump = 0.0
    engine = make_engine(model, clock=lambda: next(ticks) * 0.01 + jump)
    assert (engine.stats().step_s, engine.stats().queue_s) == (0.0, 0.0)
    client = Client(engine, model, prompt_of(40), split=1, max_tokens=4).start()
    for _ in range(3):
        for output in engine.step():
            if output.session_id == client.session_id:
                client.take(output)
    engine._apply_commands()  # a row is on its way
    busy = engine.stats()
    assert 0 < busy.step_s < 1
    assert 0 < busy.queue_s < 1
    engine.cancel(client.session_id)
    engine.step()
    assert engine.stats().queue_s == 0.0
    jump = IDLE_S
    assert engine.stats().step_s == 0.0


async def newest_load(edge: Edge, wanted: Callable[[Load], bool]) -> Load:
    """The first load that is as wanted."""
    async with asyncio.timeout(20):
        while not wanted(load := (await edge.wait(StatusReceived)).status.load):
            pass
    return load


async def test_status_tells_the_load_and_when_it_is_over(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_meter, "IDLE_S", 0.3)
    with running_cloud(prepared) as cloud:
        forward = cloud.hub.engine.core.forward
        run = forward.run

        def slow(*arguments: Any) -> Any:
            sleep(0.02)
            return run(*arguments)

        monkeypatch.setattr(forward, "run", slow)
        async with connected(cloud) as edge:
            welcome = (await edge.wait(Welcomed)).welcome
            assert (welcome.load.step_s, welcome.load.queue_s) == (0.0, 0.0)
            edge.core.open(open_of([5, 6, 7]))  # waits for its edge, and has STATUS sent
            session = edge.core.open(open_of([5, 6, 7], max_tokens=150))
            await edge.send_ids(session, [5, 6, 7], final=True)
            load = await newest_load(edge, lambda load: load.step_s > 0 and load.queue_s > 0)
            assert 0.02 <= load.step_s < 2
            assert 0.02 <= load.queue_s < 4
            session.cancel()
            await edge.flush()
            await newest_load(edge, lambda load: load.step_s == load.queue_s == 0)


async def test_a_result_tells_what_the_cloud_took(prepared: Prepared) -> None:
    prompt = prompt_of(30)
    with running_cloud(prepared) as cloud:
        async with connected(cloud) as edge:
            await edge.wait(Welcomed)
            half = EdgeHalf(prepared.model, 2)
            session = edge.core.open(open_of(prompt, split=2, max_tokens=3))
            await edge.flush()
            await edge.wait(SessionOpened, session.stream)
            ids = prompt
            for _ in range(3):
                rows = half.rows(ids)
                begun = monotonic()
                await edge.send_rows(session, rows, final=True)
                result = await edge.wait(ResultTokens, session.stream)
                assert 0 < result.cloud_us <= (monotonic() - begun) * 1e6
                ids = list(result.tokens)


async def test_of_a_stream_only_the_first_tokens_tell_it(cloud: RunningCloud) -> None:
    prompt = prompt_of(30)
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        session = edge.core.open(open_of(prompt, max_tokens=20))
        begun = monotonic()
        await edge.send_ids(session, prompt, final=True)
        result = await edge.wait(ResultTokens, session.stream)
        streamed = [await edge.wait(StreamTokens, session.stream)]
        wall_us = (monotonic() - begun) * 1e6
        while streamed[-1].finish is None:
            streamed.append(await edge.wait(StreamTokens, session.stream))
    assert 0 < result.cloud_us <= streamed[0].cloud_us <= wall_us
    assert {one.cloud_us for one in streamed[1:]} == {0}


async def test_after_a_resume_nothing_is_claimed(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outage would count as the cloud's time."""
    prompt = prompt_of(20)
    traveller = Traveller(prepared, open_of(prompt, split=2), prompt)
    with running_cloud(prepared) as cloud:
        with held_engine(cloud, monkeypatch) as release:
            async with connected(cloud) as first:
                await traveller.open(first)
                await traveller.send_prompt()
                await taken(cloud, 2)
                await traveller.abort()
            await detached(cloud)
            release.set()
            await until(lambda: [live.core.outputs_due for live in cloud.hub.sessions] == [0])
        async with connected(cloud) as second:
            await traveller.resume(second)
            result = await second.wait(ResultTokens, traveller.session.stream)
            assert result.cloud_us == 0
            traveller.tokens += result.tokens
            await traveller.send_newest()
            assert (await second.wait(ResultTokens, traveller.session.stream)).cloud_us > 0

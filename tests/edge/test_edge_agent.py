"""The agent around the loop: slots and queue, limits, routing errors, memory, statistics."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing

import pytest

from isthmus.edge.agent import Agent
from isthmus.edge.requests import GenerateRequest, Token
from isthmus.edge.slots import Slots
from isthmus.protocol.errors import (
    CloudUnreachableError,
    ConfigError,
    IsthmusError,
    OverloadedError,
    RequestError,
    RouteInfeasibleError,
)
from tests.edge.edge_world import TinyModel, ask, collect, prompt_of

NOBODY = "ws://127.0.0.1:9"  # the discard port: nothing listens


async def start(model: TinyModel, **options: object) -> Agent:
    agent = Agent(model.pack, **options)  # type: ignore[arg-type]  # options are checked by the agent's tests
    await agent.start()
    return agent


# ---- slots


async def test_slots_are_first_come_first_served_and_refuse_beyond_the_queue() -> None:
    slots = Slots(parallel=1, queue=2)
    order: list[int] = []
    gate = asyncio.Event()

    async def work(number: int) -> None:
        async with slots.take():
            order.append(number)
            await gate.wait()

    tasks = [asyncio.create_task(work(i)) for i in range(3)]
    await asyncio.sleep(0)  # each task runs to where it waits
    assert slots.waiting == 2
    with pytest.raises(OverloadedError, match=r"1 requests run \(at most 1\) and 2 wait") as refused:
        async with slots.take():
            pass
    assert refused.value.retry_after_s > 0
    gate.set()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2]
    assert (slots.running, slots.waiting) == (0, 0)


async def test_a_higher_priority_gets_the_next_slot_and_equals_keep_their_order() -> None:
    slots = Slots(parallel=1, queue=9)
    order: list[tuple[int, int]] = []

    async def work(number: int, priority: int) -> None:
        async with slots.take(priority):
            order.append((priority, number))
            await asyncio.sleep(0)

    await asyncio.gather(*(work(number, p) for number, p in enumerate((0, 0, -3, 5, 0, 5))))
    assert order == [(0, 0), (5, 3), (5, 5), (0, 1), (0, 4), (-3, 2)]
    assert (slots.running, slots.waiting) == (0, 0)


async def test_who_leaves_the_queue_gives_up_no_slot() -> None:
    slots = Slots(parallel=1, queue=4)
    gate = asyncio.Event()
    done: list[int] = []

    async def work(number: int) -> None:
        async with slots.take():
            await gate.wait()
            done.append(number)

    tasks = [asyncio.create_task(work(i)) for i in range(3)]
    await asyncio.sleep(0)  # each task runs to where it waits
    assert slots.waiting == 2
    tasks[1].cancel()
    gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert done == [0, 2]
    assert (slots.running, slots.waiting) == (0, 0)


async def test_a_slot_handed_over_while_its_taker_is_cancelled_is_passed_on() -> None:
    slots = Slots(parallel=1, queue=4)
    first = slots.take()
    await first.__aenter__()

    async def hold() -> str:
        async with slots.take():
            return "ran"

    second, third = asyncio.create_task(hold()), asyncio.create_task(hold())
    await asyncio.sleep(0)  # each task runs to where it waits
    assert slots.waiting == 2
    await first.__aexit__(None, None, None)  # hands the slot to `second` …
    second.cancel()  # … which is cancelled before it could run
    assert await third == "ran"
    with pytest.raises(asyncio.CancelledError):
        await second
    assert (slots.running, slots.waiting) == (0, 0)


# ---- the agent


async def test_requests_beyond_the_queue_get_a_typed_error(tiny: TinyModel) -> None:
    agent = await start(tiny, parallel=1, queue=0)
    running = agent.generate(ask(prompt_of(8), 100))
    await anext(running)
    with pytest.raises(OverloadedError):
        await collect(agent, ask(prompt_of(8), 4))
    await running.aclose()
    assert len((await collect(agent, ask(prompt_of(8), 4))).ids) == 4
    assert agent.stats()["running"] == 0
    await agent.aclose()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask(prompt_of(500), 100), r"500 prompt tokens \+ 100 max_tokens = 600, the model's context is 512"),
        (ask((1, 320), 4), r"token id 320 is not in 0\.\.319"),
        (ask((1, -1), 4), r"token id -1 is not in 0\.\.319"),
    ],
)
async def test_what_the_model_cannot_do_is_refused_with_both_numbers(
    tiny: TinyModel, request_: GenerateRequest, message: str
) -> None:
    agent = await start(tiny)
    with pytest.raises(RequestError, match=message):
        await collect(agent, request_)
    with pytest.raises(RequestError, match=message):
        agent.decide(request_)
    await agent.aclose()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ()}, "0 tokens"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"stop": ("a",) * 17}, "17 stop strings"),
        ({"stop": ("",)}, "0 characters"),
        ({"route": "moon"}, "route is 'moon'"),
        ({"shape": "v"}, "shape is 'v'"),
        ({"privacy": "some"}, "privacy is 'some'"),
        ({"row_format": "f16"}, "row_format is 'f16'"),
        ({"route": "local", "split": 3}, "split=3"),
    ],
)
def test_bad_requests_are_refused_at_once(fields: dict[str, object], message: str) -> None:
    prompt = fields.pop("prompt", (1,))
    with pytest.raises(RequestError, match=message):
        ask(prompt, **fields)  # type: ignore[arg-type]  # wrong values on purpose


async def test_no_cloud_configured(tiny: TinyModel) -> None:
    agent = await start(tiny)
    for route in ("split", "offload"):
        with pytest.raises(RouteInfeasibleError, match="no cloud is configured"):
            await collect(agent, ask(prompt_of(4), 2, route=route))
    outcome = await collect(agent, ask(prompt_of(4), 2))
    assert outcome.started.route == "local"
    await agent.aclose()


async def test_cloud_down_is_a_typed_error_by_name_and_local_by_auto(tiny: TinyModel) -> None:
    agent = await start(tiny, cloud_urls=(NOBODY,), api_key="k")
    for _ in range(2):  # by name it tries each time
        with pytest.raises(CloudUnreachableError, match=r"127\.0\.0\.1:9 is not reachable"):
            await collect(agent, ask(prompt_of(4), 2, route="offload"))
    assert agent.stats()["clouds"][0]["state"] == "down"
    assert (await collect(agent, ask(prompt_of(4), 2))).started.route == "local"
    await agent.aclose()


async def test_auto_with_neither_memory_nor_cloud_says_that_the_cloud_is_down(tiny: TinyModel) -> None:
    agent = await start(tiny, cloud_urls=(NOBODY,), memory_mb=0.05)
    with pytest.raises(CloudUnreachableError):
        await collect(agent, ask(prompt_of(4), 2))
    with pytest.raises(CloudUnreachableError) as again:  # the failure is fresh: no second attempt
        await collect(agent, ask(prompt_of(4), 2))
    assert isinstance(again.value.__cause__, RouteInfeasibleError)
    assert "needs 0.7 MB, the limit is 0.0 MB" in again.value.__cause__.message
    await agent.aclose()


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("http://127.0.0.1:1", None),
        ("ws://", None),
        ("ws://user:pw@127.0.0.1:1", None),
        ("ws://192.0.2.1:1", "k"),
    ],
)
def test_bad_cloud_urls_are_refused(tiny: TinyModel, url: str, key: str | None) -> None:
    with pytest.raises(ConfigError):
        Agent(tiny.pack, cloud_urls=(url,), api_key=key)


async def test_closing_the_agent_ends_what_runs_with_a_typed_error(tiny: TinyModel) -> None:
    agent = await start(tiny)
    events = agent.generate(ask(prompt_of(8), 400))
    for _ in range(3):
        await anext(events)
    await agent.aclose()
    with pytest.raises(IsthmusError, match="the agent was closed"):
        [event async for event in events]
    assert agent.stats()["running"] == 0


async def test_layers_are_loaded_when_first_needed(tiny: TinyModel) -> None:
    agent = await start(tiny)
    assert agent.stats()["loaded_layers"] == []
    await collect(agent, ask(prompt_of(4), 2))
    assert agent.stats()["loaded_layers"] == [0, 1, 2, 3]
    await agent.aclose()
    assert agent.not_ready_reason() is not None


async def test_a_memory_limit_keeps_the_conversation_and_drops_the_others(tiny: TinyModel) -> None:
    """The limit holds the model and one and a half contexts: the older conversation goes, not the one
    that goes on."""
    agent = await start(tiny, memory_mb=1.0)
    older = await collect(agent, ask(prompt_of(200), 2))
    first = await collect(agent, ask(prompt_of(200, start=9), 2))
    turn = (*prompt_of(200, start=9), *first.ids, 1, 2)
    second = await collect(agent, ask(turn, 2))
    assert second.finished.counts["edge_cached_rows"] == 201
    again = await collect(agent, ask((*prompt_of(200), *older.ids, 1), 2))
    assert again.finished.counts["edge_cached_rows"] == 0
    await agent.aclose()


async def test_kept_caches_are_bounded(tiny: TinyModel) -> None:
    agent = await start(tiny, cache_mb=0)
    await collect(agent, ask(prompt_of(30), 2))
    again = await collect(agent, ask(prompt_of(30), 2))
    assert again.finished.counts["edge_cached_rows"] == 0
    assert agent.stats()["kept_caches"] == 0
    await agent.aclose()


async def test_cancelling_the_consumer_frees_the_slot(tiny: TinyModel) -> None:
    agent = await start(tiny)
    began = asyncio.Event()

    async def consume() -> None:
        async with aclosing(agent.generate(ask(prompt_of(8), 400))) as events:
            async for event in events:
                if isinstance(event, Token):
                    began.set()

    task = asyncio.create_task(consume())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert agent.stats()["running"] == 0
    assert len((await collect(agent, ask(prompt_of(8), 3))).ids) == 3
    await agent.aclose()


def test_the_edge_imports_neither_torch_nor_transformers_nor_the_cloud() -> None:
    import subprocess

    code = (
        "import sys, isthmus.edge.agent; "
        "bad = [m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers') "
        "or m.startswith('isthmus.cloud')]; print(bad); sys.exit(bool(bad))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

"""A tenant's rate: kept by waiting, at nobody else's expense."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from time import monotonic
from typing import Any

import pytest

from isthmus.cloud.serve import Prepared, tenant_limits
from isthmus.cloud.stream_meter import StreamMeter, first_limit
from isthmus.protocol.errors import ConfigError
from isthmus.protocol.events import ResultTokens, SessionClosed, SessionOpened, Welcomed
from isthmus.protocol.limits import Limits, TenantUsage, TokenBucket
from tests.cloud.cloud_clients import greedy_reference, prompt_of
from tests.cloud.cloud_edges import RunningCloud, connected, open_of, running_cloud, settled
from tests.cloud.cloud_traveller import Traveller, held_decoder, taken, until


def with_rate(prepared: Prepared, rate: float) -> Prepared:
    limits = replace(Limits(), max_tokens_per_s_per_tenant=rate)
    return replace(prepared, options=replace(prepared.options, limits=limits))


async def answer(cloud: RunningCloud, prepared: Prepared, *, split: int, max_tokens: int = 8) -> list[int]:
    prompt = prompt_of(30)
    edge = Traveller(prepared, open_of(prompt, split=split, max_tokens=max_tokens), prompt)
    async with connected(cloud) as connection:
        await edge.open(connection)
        await edge.send_prompt()
        return await edge.finish()


@pytest.mark.parametrize("split", [0, 2])
async def test_a_tenant_beyond_its_rate_waits_and_gets_the_same_tokens(
    prepared: Prepared, split: int
) -> None:
    """30 rows and 7 steps, or tokens streamed: 37 of a burst that is used up but for 30, at 20 per second."""
    with running_cloud(with_rate(prepared, 20)) as cloud:
        cloud.hub.usage("local").reserve_tokens(170, monotonic())
        begun = monotonic()
        tokens = await answer(cloud, prepared, split=split)
        waited = monotonic() - begun
        assert tokens == greedy_reference(prepared.model, prompt_of(30), 8)
        # The engine may be four streamed tokens ahead.
        assert waited > (7 if split else 3) / 20 - 0.15
        assert (await settled(cloud))["pages_used"] == 0


async def test_a_cancel_passes_what_waits(prepared: Prepared) -> None:
    with running_cloud(with_rate(prepared, 1)) as cloud:
        cloud.hub.usage("local").reserve_tokens(10_000, monotonic())
        async with connected(cloud) as edge:
            await edge.wait(Welcomed)
            session = edge.core.open(open_of([1, 2, 3]))
            await edge.send_ids(session, [1, 2, 3], final=True)
            await edge.wait(SessionOpened, session.stream)
            await taken(cloud, 1)
            assert await edge.rtt() < 30
            session.cancel()
            await edge.flush()
            await edge.wait(SessionClosed, session.stream)
            assert not any(isinstance(event, ResultTokens) for event in edge.events)
        assert len(cloud.hub.sessions) == 0


async def test_a_close_comes_after_the_rows_it_may_offer(prepared: Prepared) -> None:
    with running_cloud(with_rate(prepared, 200)) as cloud:
        usage = cloud.hub.usage("local")
        async with connected(cloud) as edge:
            await edge.wait(Welcomed)
            session = edge.core.open(open_of(prompt_of(20), max_tokens=1))
            await edge.flush()
            await edge.wait(SessionOpened, session.stream)
            begun = monotonic()
            usage.reserve_tokens(2000 + 20, begun)  # the burst and 20 more; the next 20 are due in 0.2 s
            await edge.send_ids(session, prompt_of(20), final=False)
            await edge.close(session)
            assert monotonic() - begun > 0.15
        assert (await settled(cloud))["pages_used"] == 0


async def test_one_session_that_waits_holds_up_no_other(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large body is being decoded: PINGs, small steps and CANCELs of the same connection go on."""
    with running_cloud(prepared) as cloud:
        prompt = prompt_of(20)
        slow = Traveller(prepared, open_of(prompt, split=2), prompt)
        quick = Traveller(prepared, open_of(prompt, split=0, shape="u"), prompt)
        async with connected(cloud) as edge:
            await slow.open(edge)
            with held_decoder(monkeypatch, inline=100):
                await slow.send(0, prompt[:10])
                await taken(cloud, 1)
                assert await edge.rtt() < 30
                quick.edge = edge
                quick.session = edge.core.open(quick.request)
                await quick.send_prompt(32)
                assert await quick.finish() == greedy_reference(prepared.model, prompt, 8)
                slow.session.cancel()
                await edge.flush()
                await edge.wait(SessionClosed, slow.session.stream)
        assert (await settled(cloud))["pages_used"] == 0


async def test_the_meter_follows_the_window_where_there_is_no_rate() -> None:
    limits: list[int] = []
    usage = TenantUsage.from_limits(Limits())
    meter = StreamMeter(usage, 16, limits.append, has_rate=False)
    assert first_limit(16, has_rate=False) == 16
    meter.count(10)
    assert limits == []
    meter.widen(16)
    meter.widen(3)  # a smaller window takes nothing back
    assert limits == [26]


async def test_the_meter_keeps_the_rate() -> None:
    limits: list[int] = []
    usage = replace(TenantUsage.from_limits(Limits()), tokens=TokenBucket(50.0, 6.0))
    meter = StreamMeter(usage, 16, limits.append, has_rate=True)
    assert first_limit(16, has_rate=True) == 4
    begun = monotonic()
    meter.count(4)
    assert limits == [8]
    meter.count(4)  # two more than the burst: 40 ms
    assert limits == [8]
    meter.widen(16)
    await until(lambda: limits == [8, 12])
    assert monotonic() - begun >= 0.035
    meter.count(4)
    meter.stop()
    await asyncio.sleep(0.12)
    assert limits == [8, 12]


def test_quotas_from_the_command_line() -> None:
    assert tenant_limits(detached_s=None, max_sessions_per_tenant=None) == Limits()
    assert tenant_limits(detached_s=0, max_sessions_per_tenant=3) == replace(
        Limits(), detached_s=0, max_sessions_per_tenant=3
    )
    bad: list[dict[str, Any]] = [
        {"detached_s": -1.0},
        {"detached_s": float("nan")},
        {"max_tokens_per_s_per_tenant": float("inf")},
        {"max_sessions_per_tenant": 0},
        {"max_resumes_per_minute_per_tenant": 0},
    ]
    for given in bad:
        with pytest.raises(ConfigError) as caught:
            tenant_limits(**given)
        assert caught.value.code == "bad_limit"

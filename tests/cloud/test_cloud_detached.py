"""What a session costs while nobody holds it, and that all of it comes back."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isthmus.cloud.serve import Prepared
from isthmus.protocol.errors import IsthmusError
from isthmus.protocol.events import SessionOpened, Welcomed
from isthmus.protocol.keys import KeyFile
from isthmus.protocol.limits import Limits
from tests.cloud.cloud_clients import greedy_reference, is_idle, prompt_of
from tests.cloud.cloud_edges import RunningCloud, connected, open_of, running_cloud, settled, stats
from tests.cloud.cloud_traveller import Traveller, detached, held_decoder, held_engine, taken, until


def with_limits(prepared: Prepared, **limits: Any) -> Prepared:
    return replace(prepared, options=replace(prepared.options, limits=replace(Limits(), **limits)))


async def left_alone(cloud: RunningCloud, prepared: Prepared, **more: Any) -> Traveller:
    """A session with a token drawn, whose connection is gone."""
    prompt = prompt_of(20, 1)
    edge = Traveller(prepared, open_of(prompt, split=1, **more), prompt)
    async with connected(cloud) as first:
        await edge.open(first)
        await edge.send_prompt()
        await edge.take()
        await edge.abort()
    return edge


def num_alive(*kinds: str) -> int:
    gc.collect()
    return sum(type(thing).__name__ in kinds for thing in gc.get_objects())


@pytest.mark.parametrize("detached_s", [0.0, 0.3])
async def test_its_time_is_bounded(prepared: Prepared, detached_s: float) -> None:
    with running_cloud(with_limits(prepared, detached_s=detached_s)) as cloud:
        edge = await left_alone(cloud, prepared)
        now = await settled(cloud)
        assert now["pages_used"] == now["detached"] == 0
        usage = cloud.hub.usage("local")
        assert (usage.num_sessions, usage.kv_bytes) == (0, 0)
        async with connected(cloud) as second:
            with pytest.raises(IsthmusError) as caught:
                await edge.resume(second)
            assert caught.value.code == "unknown_session"


async def test_it_is_charged_and_shown_until_it_ends(prepared: Prepared) -> None:
    with running_cloud(with_limits(prepared, max_sessions_per_tenant=1)) as cloud:
        edge = await left_alone(cloud, prepared)
        await detached(cloud)
        now = await stats(cloud)
        assert (now["sessions"], now["detached"]) == (1, 1)
        assert now["pages_used"] == 6
        assert cloud.hub.usage("local").num_sessions == 1
        async with connected(cloud) as third:
            await edge.resume(third)
            await edge.send_newest()
            assert await edge.finish() == greedy_reference(prepared.model, edge.prompt, 8)
        assert (await settled(cloud))["pages_used"] == 0
        text = cloud.hub.telemetry.render().decode()
        assert 'isthmus_resumes_total{outcome="ok"} 1.0' in text
        assert "isthmus_sessions_detached 0.0" in text


@pytest.mark.parametrize("limit", ["max_sessions_per_tenant", "max_sessions"])
async def test_it_makes_room_for_one_whose_edge_is_here(prepared: Prepared, limit: str) -> None:
    """Who loses its connection again and again must not lock itself, or others, out."""
    with running_cloud(with_limits(prepared, **{limit: 1})) as cloud:
        edge = await left_alone(cloud, prepared)
        await detached(cloud)
        async with connected(cloud) as second:
            await second.wait(Welcomed)
            other = second.core.open(open_of([1, 2, 3]))
            await second.flush()
            await second.wait(SessionOpened, other.stream)
            async with connected(cloud) as third:
                with pytest.raises(IsthmusError) as caught:
                    await edge.resume(third)
                assert caught.value.code == "unknown_session"
        assert (await settled(cloud))["pages_used"] == 0
        assert 'outcome="displaced"' in cloud.hub.telemetry.render().decode()


async def test_three_hundred_resumes_leave_nothing_behind(prepared: Prepared) -> None:
    limits = {"max_resumes_per_minute_per_tenant": 10_000}
    with running_cloud(with_limits(prepared, **limits)) as cloud:
        before = num_alive("Peer", "LiveSession")  # other tests' may not be gone yet
        prompt = prompt_of(12, 8)
        edge = Traveller(prepared, open_of(prompt, split=2, max_tokens=180), prompt)
        async with connected(cloud) as first:
            await edge.open(first)
            await edge.send_prompt()
            await edge.abort()
        due = True  # an output; a cut comes before each, and one more before each row
        for _ in range(300):
            await detached(cloud)
            async with connected(cloud) as again:
                await edge.resume(again)
                if due:
                    await edge.take()
                else:
                    await edge.send_newest()
                due = not due
                await edge.abort()
        assert edge.tokens == greedy_reference(prepared.model, prompt, 150)
        await detached(cloud)
        assert len(cloud.hub.sessions) == 1
        async with connected(cloud) as last:
            await edge.resume(last)
            await edge.edge.close(edge.session)
        assert (await settled(cloud))["pages_used"] == 0
        await until(lambda: is_idle(cloud.hub.engine) and not cloud.hub.peers)
        assert not cloud.hub.engine._sinks
        assert not cloud.hub.sessions._by_id
        assert num_alive("Peer", "LiveSession") <= before + 3


async def test_a_session_that_fails_while_nobody_listens(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine gives it up during the outage: quota and pages come back, the edge is told on return."""
    with running_cloud(prepared) as cloud:
        prompt = prompt_of(20, 1)
        edge = Traveller(prepared, open_of(prompt, split=1), prompt)
        with held_engine(cloud, monkeypatch) as release:
            async with connected(cloud) as first:
                await edge.open(first)
                await edge.send(0, prompt, final=True)
                await taken(cloud, 1)
                await edge.abort()
            await detached(cloud)
            (live,) = cloud.hub.sessions
            cloud.hub.engine.add_rows(live.number, edge.rows, truncate_to=10_000)
            release.set()
        assert (await settled(cloud))["pages_used"] == 0
        await until(lambda: cloud.hub.usage("local").num_sessions == 0)
        async with connected(cloud) as second:
            with pytest.raises(IsthmusError) as caught:
                await edge.resume(second)
            assert caught.value.code == "unknown_session"


async def test_a_body_that_does_not_decode_while_nobody_listens(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_cloud(prepared) as cloud:
        prompt = prompt_of(20, 1)
        edge = Traveller(prepared, open_of(prompt, split=1), prompt)
        with held_decoder(monkeypatch) as release:
            async with connected(cloud) as first:
                await edge.open(first)
                body = edge.codec.pack(edge.codec.encode_raw(edge.half.rows(prompt)))
                edge.session.step_rows(body._replace(body=b"x" * len(body.body)), 0, 20, final=True)
                await first.flush()
                await taken(cloud, 1)
                first.socket.transport.abort()
            await detached(cloud)
            release.set()
        assert (await settled(cloud))["pages_used"] == 0
        assert cloud.hub.usage("local").num_sessions == 0


async def test_a_revoked_key_ends_what_waits_for_its_edge(prepared: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alice:" + "a" * 20 + "\nbob:" + "b" * 20 + "\n")
    options = replace(prepared.options, keys=KeyFile(path))
    with running_cloud(replace(prepared, options=options)) as cloud:
        prompt = prompt_of(20, 1)
        for key in ("a" * 20, "b" * 20):
            edge = Traveller(prepared, open_of(prompt, split=1), prompt)
            async with connected(cloud, key=key) as first:
                await edge.open(first)
                await edge.abort()
        await detached(cloud, 2)
        path.write_text("bob:" + "b" * 20 + "\n")
        await detached(cloud, 1)
        assert cloud.hub.usage("alice").num_sessions == 0
        assert cloud.hub.usage("bob").num_sessions == 1


async def test_a_stopped_cloud_forgets_them(prepared: Prepared) -> None:
    with running_cloud(prepared) as cloud:
        await left_alone(cloud, prepared)
        await detached(cloud)
        cloud.stop(drain=False)
        assert len(cloud.hub.sessions) == 0

"""Sessions that outlive their connection: every kind of session, cut at every kind of moment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from isthmus.cloud.serve import Prepared
from isthmus.protocol.activations import choose_outliers
from isthmus.protocol.events import Welcomed
from isthmus.protocol.limits import Limits
from isthmus.protocol.prefix import PrefixOffer
from tests.cloud.cloud_clients import EdgeHalf, greedy_reference, offer_of, prompt_of
from tests.cloud.cloud_edges import RunningCloud, connected, open_of, running_cloud, settled
from tests.cloud.cloud_routes import MIXES, generate
from tests.cloud.cloud_traveller import Traveller, detached, held_engine, taken, until


@pytest.fixture
def cloud(prepared: Prepared) -> Iterator[RunningCloud]:
    """One for each test, whose sessions are then all its own."""
    with running_cloud(prepared) as running:
        yield running


@pytest.mark.parametrize(("split", "shape"), MIXES)
async def test_a_lost_connection_costs_no_token(
    cloud: RunningCloud, prepared: Prepared, split: int, shape: str
) -> None:
    prompt = prompt_of(37, split)
    edge = Traveller(prepared, open_of(prompt, split=split, shape=shape), prompt)
    async with connected(cloud) as first:
        await edge.open(first)
        await edge.send_prompt()
        await edge.take()
        await edge.abort()
    await detached(cloud)
    async with connected(cloud) as second:
        assert (await edge.resume(second)).action == "ok"
        if not edge.request.streams:
            await edge.send_newest()
        assert await edge.finish() == greedy_reference(prepared.model, prompt, 8)
    assert (await settled(cloud))["pages_used"] == 0
    assert cloud.hub.usage("local").num_sessions == 0


@pytest.mark.parametrize(("split", "shape"), [(0, "prefix"), (2, "prefix"), (0, "u"), (2, "u")])
async def test_a_prompt_cut_in_two_goes_on_where_the_cloud_stands(
    cloud: RunningCloud, prepared: Prepared, split: int, shape: str
) -> None:
    prompt = prompt_of(60, split)
    edge = Traveller(prepared, open_of(prompt, split=split, shape=shape), prompt)
    before = cloud.hub.engine.stats().rows_computed_total
    async with connected(cloud) as first:
        await edge.open(first)
        await edge.send(0, prompt[:25])
        await taken(cloud, 1)
        edge.queue(25, prompt[25:40])  # these two never leave
        edge.queue(40, prompt[40:], final=True)
        await edge.abort()
    await detached(cloud)
    async with connected(cloud) as second:
        resumed = await edge.resume(second)
        assert resumed.action == "replay"
        assert resumed.replay is not None
        assert (resumed.replay.start, resumed.replay.stop, resumed.replay.final) == (25, 60, True)
        assert await edge.finish() == greedy_reference(prepared.model, prompt, 8)
    assert cloud.hub.engine.stats().rows_computed_total - before == 60 + 7


@pytest.mark.parametrize("arrives", [False, True])
async def test_a_step_computed_while_nobody_listens_is_answered_once(
    cloud: RunningCloud, prepared: Prepared, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    """The connection dies after the step arrived; the answer comes during the outage, or after the RESUME."""
    prompt = prompt_of(20)
    edge = Traveller(prepared, open_of(prompt, split=2), prompt)
    with held_engine(cloud, monkeypatch) as release:
        async with connected(cloud) as first:
            await edge.open(first)
            await edge.send_prompt(32)
            await taken(cloud, 1)
            await edge.abort()
        await detached(cloud)
        if arrives:
            release.set()
            await until(lambda: not any(live.core.outputs_due for live in cloud.hub.sessions))
        async with connected(cloud) as second:
            assert (await edge.resume(second)).action == "ok"
            assert arrives or edge.session.awaiting_result
            release.set()
            assert await edge.finish() == greedy_reference(prepared.model, prompt, 8)


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("shape", ["prefix", "u"])
async def test_a_pending_draft_chain_survives(
    cloud: RunningCloud, prepared: Prepared, monkeypatch: pytest.MonkeyPatch, shape: str, lost: bool
) -> None:
    prompt = prompt_of(21, 3)
    expected = greedy_reference(prepared.model, prompt, 8)
    edge = Traveller(prepared, open_of(prompt, split=2, shape=shape), prompt)
    async with connected(cloud) as first:
        await edge.open(first)
        await edge.send_prompt()
        await edge.take()
        chain = [*expected[:3], (expected[3] + 1) % 320]  # the third draft is wrong
        with held_engine(cloud, monkeypatch) as release:
            edge.queue(21, chain, drafts=True)
            if not lost:
                await first.flush()
                await taken(cloud, 3)
            await edge.abort()
            await detached(cloud)
            async with connected(cloud) as second:
                assert (await edge.resume(second)).action == ("replay" if lost else "ok")
                release.set()
                if shape == "prefix":
                    await edge.take()
                else:
                    edge.tokens += await edge.judge(chain)
                assert edge.tokens == expected[:4]
                await edge.send_newest()
                assert await edge.finish() == expected


@pytest.mark.parametrize("lost", [False, True])
async def test_a_session_that_has_truncated(cloud: RunningCloud, prepared: Prepared, lost: bool) -> None:
    """Rows are cut off and others take their place; the cut may have reached the cloud or not."""
    prompt = prompt_of(30, 4)
    other = [*prompt[:12], *prompt_of(18, 5)]
    edge = Traveller(prepared, open_of(prompt, split=2), prompt)
    async with connected(cloud) as first:
        await edge.open(first)
        await edge.send(0, prompt[:28])
        await taken(cloud, 1)
        edge.prompt = other
        edge.rows = edge.rows[:12]
        edge.queue(12, other[12:24])
        if not lost:
            await first.flush()
            await taken(cloud, 2)
        await edge.abort()
    await detached(cloud)
    async with connected(cloud) as second:
        resumed = await edge.resume(second)
        assert resumed.action == ("replay" if lost else "ok")
        await edge.send(24, other[24:], final=True)
        assert await edge.finish() == greedy_reference(prepared.model, other, 8)


async def test_a_stream_fills_its_window_while_nobody_listens(prepared: Prepared) -> None:
    limits = replace(Limits(), stream_window_tokens=4)
    with running_cloud(replace(prepared, options=replace(prepared.options, limits=limits))) as cloud:
        prompt = prompt_of(9)
        edge = Traveller(prepared, open_of(prompt, max_tokens=30), prompt)
        async with connected(cloud, limits=limits) as first:
            await edge.open(first)
            await edge.send_prompt()
            await edge.take()
            await edge.abort()
        await detached(cloud)
        async with connected(cloud, limits=limits) as second:
            await edge.resume(second)
            assert await edge.finish() == greedy_reference(prepared.model, prompt, 30)
        assert (await settled(cloud))["pages_used"] == 0


async def test_a_cut_before_every_token(cloud: RunningCloud, prepared: Prepared) -> None:
    """Every output index, each on a connection of its own."""
    prompt = prompt_of(15, 7)
    edge = Traveller(prepared, open_of(prompt, split=1, max_tokens=12), prompt)
    async with connected(cloud) as first:
        await edge.open(first)
        await edge.send_prompt()
        await edge.abort()
    while True:
        await detached(cloud)
        async with connected(cloud) as again:
            await edge.resume(again)
            await edge.take()
            if len(edge.tokens) == 12:
                break
            await edge.send_newest()
            await edge.abort()
    assert edge.tokens == greedy_reference(prepared.model, prompt, 12)


async def test_behind_a_cached_prefix(cloud: RunningCloud, prepared: Prepared) -> None:
    prompt = prompt_of(37, 70)
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        await generate(edge, prepared, open_of(prompt, split=2), prompt)
    turn = [*prompt, *prompt_of(9, 71)]
    offer = PrefixOffer(entries=list(offer_of(turn, 37)))
    again = Traveller(prepared, open_of(turn, split=2, offer=offer), turn)
    async with connected(cloud) as first:
        await again.open(first)
        start = again.session.kv_len
        assert start >= 32
        again.half.rows(turn[:start])
        again.rows = EdgeHalf(prepared.model, 2).rows(turn[:start])
        again.queue(start, turn[start:], final=True)
        await again.abort()
    await detached(cloud)
    async with connected(cloud) as second:
        resumed = await again.resume(second)
        assert resumed.replay is not None
        assert resumed.replay.start == start
        assert await again.finish() == greedy_reference(prepared.model, turn, 8)


async def test_other_rows_than_the_cloud_has_are_all_sent_again(
    cloud: RunningCloud, prepared: Prepared
) -> None:
    """The two ends disagree on what was uploaded: the digests tell, and nothing wrong is computed."""
    prompt = prompt_of(24, 9)
    edge = Traveller(prepared, open_of(prompt, split=2), prompt)
    async with connected(cloud) as first:
        await edge.open(first)
        await edge.send(0, prompt[:20])
        await taken(cloud, 1)
        (live,) = cloud.hub.sessions
        live.core.digests.truncate(19)
        live.core.digests.append(edge.codec.encode_raw(edge.rows[:1]))
        await edge.abort()
    await detached(cloud)
    async with connected(cloud) as second:
        resumed = await edge.resume(second)
        assert resumed.action == "rebuild"
        await edge.send(20, prompt[20:], final=True)
        assert await edge.finish() == greedy_reference(prepared.model, prompt, 8)
    assert cloud.hub.telemetry.resumes.labels(outcome="rebuild")._value.get() == 1


async def test_chunks_may_differ_on_replay_and_are_compressed(
    cloud: RunningCloud, prepared: Prepared
) -> None:
    prompt = prompt_of(64, 11)
    outliers = choose_outliers(EdgeHalf(prepared.model, 2).rows(prompt))
    request = open_of(prompt, split=2, shape="u", row_format="int8o", outliers=outliers, max_tokens=1)
    plain = Traveller(prepared, request, prompt)
    async with connected(cloud) as only:
        await plain.open(only)
        await plain.send_prompt(64)
        await plain.take()
    edge = Traveller(prepared, request, prompt)
    async with connected(cloud) as first:
        await edge.open(first)
        await edge.send(0, prompt[:40])
        await taken(cloud, 1)
        edge.queue(40, prompt[40:], final=True)
        await edge.abort()
    await detached(cloud)
    async with connected(cloud) as second:
        assert (await edge.resume(second)).action == "replay"  # in chunks of 16
        assert await edge.finish() == plain.tokens

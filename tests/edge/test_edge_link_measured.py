"""What a link tells of itself: over the real relay, and from the steps, uploads and words of a toy cloud."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from time import monotonic
from typing import Any

import numpy as np
import pytest

from isthmus.edge.link import CloudLink
from isthmus.protocol.activations import RowCodec, RowFormat
from isthmus.protocol.cloud_connection import CloudConnection, ServerInfo
from isthmus.protocol.errors import CloudLostError, CloudUnreachableError
from isthmus.protocol.events import CloudEvent, ResultTokens, StepReceived
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import Load
from isthmus.protocol.prefix import PrefixOffer
from isthmus.protocol.profiles import Prices
from isthmus.relay import Cut, LinkShape, Relay, Stall
from tests.edge.test_edge_link import INFO, hello, opening
from tests.edge.toy_cloud import KEY, ToyCloud, toy_cloud
from tests.protocol.pairing import make_profile

MBIT = 125_000.0
CODEC = RowCodec(RowFormat.F32, 8, zstd=False)


@asynccontextmanager
async def relayed(
    shape: LinkShape, info: ServerInfo = INFO, **options: Any
) -> AsyncIterator[tuple[ToyCloud, Relay, CloudLink]]:
    """A toy cloud, a relay before it, and a link through both."""
    async with toy_cloud(info, **options) as cloud:
        relay = Relay(("127.0.0.1", 0), ("127.0.0.1", cloud.port), shape, seed=1)
        await relay.start()
        host, port = relay.listen
        link = CloudLink(f"ws://{host}:{port}", hello(), api_key=KEY)
        try:
            yield cloud, relay, link
        finally:
            await link.aclose()
            await relay.aclose()


SLOW = LinkShape(rtt_ms=20, up_mbps=10, down_mbps=20)
EMULATED = [0.020, 10 * MBIT, 20 * MBIT]


async def test_a_probe_finds_what_the_relay_emulates() -> None:
    found: list[float] = []
    for _ in range(3):  # whatever else this machine does may hold up a message
        async with relayed(SLOW) as (_, _, link):
            began = monotonic()
            await link.probe()
            assert monotonic() - began < 3
            assert link.bytes_up + link.bytes_down < 2**20
            view = link.estimate(monotonic())
        assert view.rtt is not None
        assert view.up is not None
        assert view.down is not None
        assert (view.up.source, view.down.source) == ("probe", "probe")
        found = [view.rtt.value, view.up.value, view.down.value]
        if found == pytest.approx(EMULATED, rel=0.2):
            break
    assert found == pytest.approx(EMULATED, rel=0.2)


async def test_what_is_known_is_not_measured_again_and_outlives_the_connection() -> None:
    async with relayed(LinkShape(rtt_ms=2)) as (_, _, link):
        assert link.needs_probe(monotonic())
        await link.probe()
        assert not link.needs_probe(monotonic())
        view = link.estimate(monotonic())
        assert view.rtt is not None
        assert view.up is not None
        assert link.rtt_s == pytest.approx(view.rtt.value)
        before = link.bytes_up
        await link.probe()
        assert link.bytes_up - before < 1000
        await link.aclose()
        assert link.rtt_s is None
        later = link.estimate(monotonic())
        assert later.up is not None
        assert later.up.value == view.up.value
        assert later.up.age_s > view.up.age_s


async def test_two_probes_at_once_are_one() -> None:
    async with relayed(LinkShape(rtt_ms=2)) as (cloud, _, link):
        await asyncio.gather(link.probe(), link.probe())
        assert sum(map(len, cloud.received)) < 400 * 1024
        assert link.num_connects == 1


async def test_a_link_in_use_is_not_probed() -> None:
    async with relayed(LinkShape(), mute=True) as (_, _, link):
        session = await link.open(opening(split=2))
        await session.opened()
        await link.probe()
        assert link.estimate(monotonic()).up is None
        assert link.bytes_up < 4096
        session.cancel()


async def test_a_session_that_opens_ends_the_probe() -> None:
    async with relayed(SLOW) as (_, _, link):
        await link.connect()
        probing = asyncio.create_task(link.probe())
        while link.bytes_up < 10_000:  # noqa: ASYNC110 - bytes are not an event
            await asyncio.sleep(0.005)
        session = await link.open(opening(split=2))
        await session.opened()
        await probing
        assert link.bytes_up < 100_000
        assert link.estimate(monotonic()).up is None


async def test_a_probe_of_a_link_that_hangs_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.edge.link.PROBE_S", 0.2)
    async with relayed(LinkShape()) as (_, relay, link):
        await link.connect()
        relay.faults.do(Stall(0.6))
        began = monotonic()
        await link.probe()
        assert 0.2 <= monotonic() - began < 0.5
        assert link.needs_probe(monotonic())
        await asyncio.sleep(0.6)  # what was stalled comes, and nobody waits for it
        assert link.state == "up"


async def test_a_connection_that_breaks_ends_the_probe_with_it() -> None:
    async with relayed(SLOW) as (_, relay, link):
        await link.connect()
        probing = asyncio.create_task(link.probe())
        await asyncio.sleep(0.05)
        relay.faults.do(Cut())
        with pytest.raises(CloudLostError):
            await probing
    with pytest.raises(CloudUnreachableError):
        await link.probe()


async def test_a_cloud_that_takes_no_probes_is_measured_by_its_round_trip_alone() -> None:
    async with relayed(LinkShape(rtt_ms=5), limits=Limits(max_probe_bytes=0)) as (_, _, link):
        await link.probe()
        view = link.estimate(monotonic())
        assert view.rtt is not None
        assert (view.up, view.down) == (None, None)


async def test_a_cloud_that_sends_no_padding_leaves_the_way_down_unknown() -> None:
    limits = Limits(probe_reply_burst_bytes=1)
    async with relayed(LinkShape(rtt_ms=5), limits=limits) as (_, _, link):
        await link.probe()
        view = link.estimate(monotonic())
        assert view.up is not None
        assert view.down is None


# ---- while sessions run


async def test_a_prompts_chunks_measure_the_way_up() -> None:
    wide = replace(INFO, hidden=128)
    rows = RowCodec(RowFormat.F32, 128, zstd=False).encode(np.zeros((500, 128), np.float32))
    async with relayed(LinkShape(rtt_ms=10, up_mbps=16), wide) as (_, _, link):
        await link.connect()
        while link.rtt_s is None:  # noqa: ASYNC110 - by the first heartbeat
            await asyncio.sleep(0.01)
        session = await link.open(opening(split=2, shape="prefix", prompt_tokens=500, max_context=512))
        for at in range(0, 2000, 500):
            assert await session.room(500)
            await session.send_rows(rows, 0, 500, final=at == 1500, truncate=at > 0)
        await session.next()
        up = link.estimate(monotonic()).up
        assert up is not None
        assert up.num_samples >= 3
        assert up.value == pytest.approx(16 * MBIT, rel=0.35)
        assert up.source == "passive"


def thinking(cloud: ToyCloud, cloud_us: int) -> Callable[[CloudConnection, CloudEvent], None]:
    """Steps are answered as by a cloud that says it took so long."""

    def react(core: CloudConnection, event: CloudEvent) -> None:
        if isinstance(event, StepReceived) and event.final:
            held = event.pos + event.n_tok
            core.result_tokens(event.stream, [held % 100], kv_len=held, cloud_us=cloud_us)
        else:
            ToyCloud.react(cloud, core, event)

    return react


async def decode(link: CloudLink, num_steps: int) -> Any:
    """A prompt of four rows, then steps of one; the session."""
    session = await link.open(opening(split=2, shape="prefix", max_tokens=40, max_context=44))
    for step in range(num_steps + 1):
        n, pos = (1, 3 + step) if step else (4, 0)
        await session.send_rows(CODEC.encode(np.zeros((n, 8), np.float32)), pos, n, final=True)
        assert isinstance(await session.next(), ResultTokens)
    return session


async def test_steps_tell_the_clouds_part_from_the_links(monkeypatch: pytest.MonkeyPatch) -> None:
    async with relayed(LinkShape(rtt_ms=30)) as (cloud, _, link):
        monkeypatch.setattr(cloud, "react", thinking(cloud, 10_000))
        began = monotonic()
        session = await decode(link, 10)
        took_s = monotonic() - began
        assert session.first_cloud_s == 0.01
        assert session.num_steps == 10
        assert session.cloud_s == pytest.approx(0.1)
        # Of 30 ms a step, 10 were the cloud's; more only where this machine had other things to do.
        assert 10 * 0.019 < session.link_s < took_s - session.cloud_s - 0.02
        rtt = link.estimate(monotonic()).rtt
        assert rtt is not None
        assert rtt.num_samples >= 10
        assert session.rtt_s == rtt.value
        assert 0.019 < rtt.value < session.link_s / 5
        session.close(PrefixOffer())


async def test_a_cloud_that_says_nothing_of_its_time_is_not_guessed_at() -> None:
    async with relayed(LinkShape()) as (_, _, link):
        session = await decode(link, 3)
        assert session.first_cloud_s is None
        assert (session.num_steps, session.cloud_s, session.link_s) == (0, 0.0, 0.0)


# ---- what the cloud says


async def test_load_profile_and_prices_come_with_welcome_and_load_with_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    info = replace(INFO, profile=make_profile(), prices=Prices(output_usd_per_mtok=2.0))
    busy = Load(queue=3, queue_s=1.5)

    async with toy_cloud(info) as cloud:

        def react(core: CloudConnection, event: CloudEvent) -> None:
            core.status(busy)
            ToyCloud.react(cloud, core, event)

        link = CloudLink(cloud.url, hello(), api_key=KEY)
        assert (link.load, link.load_age_s) == (None, None)
        welcome = await link.connect()
        assert (welcome.profile, welcome.prices) == (info.profile, info.prices)
        assert link.load == Load()
        monkeypatch.setattr(cloud, "react", react)
        session = await link.open(opening(split=2))
        await session.opened()
        assert link.load == busy
        assert link.load_age_s is not None
        assert 0 <= link.load_age_s < 2
        await link.aclose()

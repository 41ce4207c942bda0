"""The cloud as edges meet it: a real server over loopback, driven by the protocol's edge half."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from isthmus.cloud.serve import Prepared
from isthmus.protocol.activations import RowCodec, RowFormat, choose_outliers
from isthmus.protocol.events import (
    ResultRows,
    ResultTokens,
    SessionClosed,
    Welcomed,
)
from isthmus.protocol.frames import Dtype
from isthmus.protocol.limits import Limits
from isthmus.protocol.prefix import PrefixOffer
from tests.cloud.cloud_clients import EdgeHalf, greedy_reference, offer_of, prompt_of
from tests.cloud.cloud_edges import RunningCloud, connected, open_of, running_cloud, settled, stats
from tests.cloud.cloud_routes import MIXES, generate


@pytest.mark.parametrize(("split", "shape"), MIXES)
async def test_each_route_gives_the_models_tokens(
    cloud: RunningCloud, prepared: Prepared, split: int, shape: str
) -> None:
    prompt = prompt_of(37, split)
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        tokens = await generate(edge, prepared, open_of(prompt, split=split, shape=shape), prompt)
    assert tokens == greedy_reference(prepared.model, prompt, 8)
    assert (await settled(cloud))["pages_used"] == 0


async def test_eight_edges_at_once_get_the_tokens_they_get_alone(
    cloud: RunningCloud, prepared: Prepared
) -> None:
    async def one(number: int) -> tuple[list[int], list[int]]:
        split, shape = MIXES[number]
        prompt = prompt_of(10 + 11 * number, 40 + number)
        async with connected(cloud) as edge:
            await edge.wait(Welcomed)
            request = open_of(prompt, split=split, shape=shape, max_tokens=12)
            return prompt, await generate(edge, prepared, request, prompt, chunk=7 + number)

    for prompt, tokens in await asyncio.gather(*(one(number) for number in range(8))):
        assert tokens == greedy_reference(prepared.model, prompt, 12)


async def test_sessions_of_one_connection_do_not_mix(cloud: RunningCloud, prepared: Prepared) -> None:
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)

        async def one(number: int) -> None:
            split, shape = MIXES[number]
            prompt = prompt_of(20, number)
            tokens = await generate(edge, prepared, open_of(prompt, split=split, shape=shape), prompt)
            assert tokens == greedy_reference(prepared.model, prompt, 8)

        await asyncio.gather(*(one(number) for number in range(8)))


async def test_a_stream_longer_than_its_window_arrives_whole(prepared: Prepared) -> None:
    limits = replace(Limits(), stream_window_tokens=4)
    options = replace(prepared.options, limits=limits)
    with running_cloud(replace(prepared, options=options)) as cloud:
        async with connected(cloud, limits=limits) as edge:
            await edge.wait(Welcomed)
            prompt = prompt_of(9)
            tokens = await generate(edge, prepared, open_of(prompt, max_tokens=30), prompt)
    assert tokens == greedy_reference(prepared.model, prompt, 30)


async def test_the_next_turn_uploads_and_computes_only_its_new_rows(
    cloud: RunningCloud, prepared: Prepared
) -> None:
    prompt = prompt_of(37, 77)
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        tokens = await generate(edge, prepared, open_of(prompt, split=2), prompt)
        before = (await stats(cloud))["rows_computed_total"]
        turn = [*prompt, *tokens, *prompt_of(5, 78)]
        offer = PrefixOffer(entries=list(offer_of(turn, 37 + 7)))
        request = open_of(turn, split=2, max_tokens=3, offer=offer)
        again = await generate(edge, prepared, request, turn)
    assert again == greedy_reference(prepared.model, turn, 3)
    assert (await stats(cloud))["rows_computed_total"] - before == len(turn) - (37 + 7) + 2


async def test_int8_rows_in_large_chunks(cloud: RunningCloud, prepared: Prepared) -> None:
    """A body beyond the inline limit is decoded off the loop, in order."""
    prompt = prompt_of(190, 5)
    rows = EdgeHalf(prepared.model, 2).rows(prompt)
    codec = RowCodec(RowFormat.INT8, 64, choose_outliers(rows), zstd=False)
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        session = edge.core.open(
            open_of(prompt, split=2, shape="u", row_format="int8o", outliers=codec.outliers, max_tokens=1)
        )
        await edge.send_rows(session, rows[:150], final=False, codec=codec)
        await edge.send_rows(session, rows[150:], final=True, codec=codec)
        result = await edge.wait(ResultRows, session.stream)
    assert result.kv_len == 190
    assert result.frame.dtype is Dtype.BF16


async def test_large_bodies_are_decoded_in_order_by_a_thread(
    cloud: RunningCloud, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.cloud.feed.INLINE_BYTES", 1000)
    prompt = prompt_of(60, 6)
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        tokens = await generate(edge, prepared, open_of(prompt, split=2), prompt, chunk=20)
    assert tokens == greedy_reference(prepared.model, prompt, 8)


async def test_cancel_frees_the_pages_and_says_how_many(cloud: RunningCloud, prepared: Prepared) -> None:
    prompt = prompt_of(40, 8)
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        session = edge.core.open(open_of(prompt, split=1, max_tokens=50))
        await edge.send_rows(session, EdgeHalf(prepared.model, 1).rows(prompt), final=True)
        await edge.wait(ResultTokens, session.stream)
        assert (await stats(cloud))["pages_used"] == 9
        session.cancel()
        await edge.flush()
        closed = await edge.wait(SessionClosed, session.stream)
        assert closed.closed.pages_freed == 9
        now = await stats(cloud)
        assert now["pages_used"] == now["sessions"] == 0


async def test_an_edge_that_says_goodbye_frees_its_sessions(cloud: RunningCloud, prepared: Prepared) -> None:
    """A close frame with 1000: it will not come back."""
    prompt = prompt_of(20, 9)
    async with connected(cloud) as edge:
        await edge.wait(Welcomed)
        session = edge.core.open(open_of(prompt, split=1, max_tokens=50))
        await edge.send_rows(session, EdgeHalf(prepared.model, 1).rows(prompt), final=True)
        await edge.wait(ResultTokens, session.stream)
    assert (await settled(cloud))["pages_used"] == 0

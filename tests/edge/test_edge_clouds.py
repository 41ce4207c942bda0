"""Several clouds: who is asked first, whose circuit is open, and a search that is bounded in time."""

from __future__ import annotations

import asyncio
from time import monotonic

import pytest

from isthmus.edge.clouds import Clouds
from isthmus.edge.link import NobodyListensError
from isthmus.edge.recovery import CloudSearch, RecoveryConfig
from isthmus.protocol.errors import CloudUnreachableError, RejectedError
from tests.edge.test_edge_link import INFO, hello
from tests.edge.toy_cloud import KEY, toy_cloud

HELLO = hello()
DEAD = "ws://127.0.0.1:1"
"""Nothing listens on port 1."""


def clouds_at(*urls: str) -> Clouds:
    return Clouds(urls, HELLO, api_key=KEY)


@pytest.mark.parametrize(
    ("alternative", "expected"),
    [
        ("", ["b", "a", "c"]),
        ("ws://127.0.0.1:3", ["c", "b", "a"]),
        ("ws://127.0.0.1:3/", ["c", "b", "a"]),
        ("ws://127.0.0.1:2", ["b", "a", "c"]),  # it names itself
        ("ws://stranger.example:9", ["b", "a", "c"]),
        ("http://127.0.0.1:3", ["b", "a", "c"]),
        ("no URL at all", ["b", "a", "c"]),
    ],
)
def test_only_clouds_of_our_own_list_are_gone_to(alternative: str, expected: list[str]) -> None:
    clouds = clouds_at(*(f"ws://127.0.0.1:{port}" for port in (1, 2, 3)))
    names = dict(zip("abc", clouds.links, strict=True))
    order = clouds.in_order(names["b"], alternative)
    assert order == [names[name] for name in expected]


async def test_a_dead_cloud_is_left_alone_and_tried_again_by_one() -> None:
    clouds = clouds_at(DEAD)
    assert clouds.best_state(by_name=False)[0] == "unknown"
    with pytest.raises(CloudUnreachableError):
        await clouds.reach()
    assert clouds.best_state(by_name=False)[0] == "down"
    assert clouds.best_state(by_name=True)[0] == "unknown", "who names it may try"
    assert clouds.stats()[0]["circuit"] == "open"
    clouds.links[0].breaker.failed(monotonic() - 60)  # long ago
    assert clouds.best_state(by_name=False)[0] == "unknown"


async def test_the_one_that_stands_is_taken_before_those_whose_circuit_is_open() -> None:
    async with toy_cloud(INFO) as toy:
        clouds = clouds_at(DEAD, toy.url)
        assert (await clouds.reach()).url == toy.url
        await clouds.links[1].aclose()
        attempts = clouds.links[0].breaker.failures
        assert (await clouds.reach()).url == toy.url
        assert clouds.links[0].breaker.failures == attempts, "the dead one was not asked again"
        await clouds.aclose()


async def test_a_search_waits_no_longer_than_it_may() -> None:
    clouds = clouds_at(DEAD)
    config = RecoveryConfig(budget_s=0.6, refused_grace_s=0.2, first_pause_s=0.05)
    link = clouds.links[0]
    for can_do_without, attempts in ((False, 3), (True, 1)):
        tried_before = link.breaker.failures
        search = CloudSearch(clouds.links, config, can_do_without=can_do_without)
        began = monotonic()
        assert [link async for link in search.found()] == []
        assert monotonic() - began < 0.6 + 5.0
        assert link.breaker.failures - tried_before >= attempts
        assert isinstance(search.error, NobodyListensError)


async def test_a_search_finds_a_cloud_that_comes_back_and_forgets_one_that_refuses_for_good() -> None:
    async with toy_cloud(INFO) as toy:
        stranger = Clouds((toy.url,), HELLO, api_key="wrong")
        search = CloudSearch(stranger.links, RecoveryConfig(budget_s=5.0), can_do_without=False)
        assert [link async for link in search.found()] == []
        assert isinstance(search.error, RejectedError)
        clouds = clouds_at(DEAD, toy.url)
        search = CloudSearch(clouds.links, RecoveryConfig(budget_s=5.0), can_do_without=False)
        rounds = []
        async with asyncio.timeout(5):
            async for link in search.found():
                rounds.append(link.url)
                if len(rounds) == 2:
                    search.give_up(link)
                    break
        assert rounds == [toy.url, toy.url], "one that proved useless is offered again in the next round"
        await clouds.aclose()

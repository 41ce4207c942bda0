"""Attacks on sessions' ways back and ends: a real cloud process with two tenants, and one that is killed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed

from isthmus.protocol.frames import MsgType, parse_json
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import ErrorBody
from isthmus.splitter.pack import Pack
from tests.attacks.live_cloud import Bystander, Target, attacked_cloud, next_frame
from tests.attacks.messages import FIRST_STEP, LAST_STEP
from tests.attacks.peers import Peer
from tests.attacks.resumes import (
    RESUMES,
    greeted,
    left_behind,
    opened,
    refused,
    token_of,
    undisturbed_token,
)
from tests.cloud.cloud_edges import prepare_cloud, running_cloud

pytestmark = pytest.mark.processes

BOTH = "alice:one\nbob:two\n"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(BOTH)
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def target(source: Path, pack: Pack, keys: Path) -> Iterator[Target]:
    with attacked_cloud(source, pack.identity, "--api-key-file", str(keys), key="one") as running:
        yield running


@pytest.mark.parametrize("attack", RESUMES, ids=str)
async def test_a_session_is_resumed_by_its_edge_alone_and_once(attack: Peer, target: Target) -> None:
    bystander = Bystander(replace(target, key="two"))
    async with bystander.generating():
        await attack.play(target)
    stats = await target.settled()
    assert (stats["pages_used"], stats["sessions"]) == (0, 0)


async def test_a_key_revoked_in_mid_stream_ends_its_tenant_only(target: Target, keys: Path) -> None:
    """item: key revoked in mid-stream"""
    bystander = Bystander(replace(target, key="two"))
    async with bystander.generating():
        held = await left_behind(target, FIRST_STEP)
        async with greeted(target) as alice:
            await opened(alice, FIRST_STEP)
            rewrite(keys, "bob:two\n", 1)
            error = parse_json(await next_frame(alice, MsgType.ERROR), ErrorBody)
            assert (error.code, error.fatal) == ("key_revoked", True)
            with pytest.raises(ConnectionClosed):
                await alice.recv()
            assert alice.close_code == 1008
        rewrite(keys, BOTH, 2)
        async with greeted(await known_again(target)) as alice:
            await refused(alice, held.resume(), "unknown_session")
    assert bystander.rounds > 0
    assert (await target.settled())["pages_used"] == 0


def rewrite(keys: Path, text: str, time_ns: int) -> None:
    keys.write_text(text)
    os.utime(keys, ns=(time_ns, time_ns))


async def known_again(target: Target) -> Target:
    """The same, once the cloud has read the key file anew."""
    while (await target.get("/v1/stats")).status_code == 401:
        pass
    return target


async def test_an_expired_token_is_refused(source: Path, pack: Pack) -> None:
    """item: RESUME by another tenant, expired, tampered. In this process: no option sets so short a time."""
    prepared = prepare_cloud(source, threads=1, kv_mb=8)
    options = replace(prepared.options, limits=Limits(resume_token_s=0.05, detached_s=1.0))
    with running_cloud(replace(prepared, options=options)) as cloud:
        target = Target(cloud.url, os.getpid(), pack.identity)
        held = await left_behind(target, FIRST_STEP)
        await asyncio.sleep(0.1)
        async with greeted(target) as socket:
            await refused(socket, held.resume(), "resume_expired")
        # Nobody came back in time: the session itself is given up, pages and all.
        assert (await target.settled())["pages_used"] == 0


async def test_a_cloud_killed_between_append_and_result_repeats_nothing(source: Path, pack: Pack) -> None:
    """item: SIGKILL between KV append and RESULT. The rows are sent anew and give the same token."""
    with attacked_cloud(source, pack.identity) as first:
        expected = await undisturbed_token(first)
        async with greeted(first) as socket:
            await opened(socket, FIRST_STEP, LAST_STEP)
            first.process.kill()
            with pytest.raises(ConnectionClosed):
                await next_frame(socket, MsgType.ERROR)  # there is none: the socket just ends
    with attacked_cloud(source, pack.identity) as second:
        async with greeted(second) as socket:
            await opened(socket, FIRST_STEP)
            assert await token_of(socket, 1) == expected

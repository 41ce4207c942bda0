"""The corpus over real sockets, against a cloud process with limited memory and another session beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from isthmus.splitter.pack import Pack
from tests.attacks.corpus import ATTACKS
from tests.attacks.live_cloud import Bystander, Target, attacked_cloud, play
from tests.attacks.peers import PEERS

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not hasattr(psutil, "RLIMIT_AS"), reason="no way to limit a process's memory here"),
]

MAX_GROWTH_BYTES = 64 * 2**20


@pytest.fixture(scope="module")
def target(source: Path, pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """With two tenants. Sessions of connections that broke the rules are not kept for a return: they count
    in their tenant's quota, which the corpus would fill in half a second."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("attacker:one\nbystander:two\n")
    keys.chmod(0o600)
    settings = ("--api-key-file", str(keys), "--detached-s", "0")
    with attacked_cloud(source, pack.identity, *settings, key="one") as running:
        yield running


async def test_every_attack_is_answered_and_harms_nobody(target: Target) -> None:
    bystander = Bystander(replace(target, key="two"))
    async with bystander.generating():
        before = target.rss
        for attack in ATTACKS:
            try:
                await play(target, attack)
            except BaseException as error:
                error.add_note(f"in {attack}")
                raise
        for peer in PEERS:
            try:
                await peer.play(target)
            except BaseException as error:
                error.add_note(f"in {peer}")
                raise
        grown = target.rss - before
    print(
        f"{len(ATTACKS)} attacks, {len(PEERS)} peers, {bystander.rounds} answers beside them, "
        f"{grown / 2**20:.1f} MB more"
    )
    assert grown < MAX_GROWTH_BYTES
    assert bystander.rounds > 0
    assert (await target.get("/readyz")).status_code == 200
    stats = await target.settled()
    assert (stats["pages_used"], stats["sessions"], stats["connections"]) == (0, 0, 0)


async def test_the_memory_limit_is_one(target: Target) -> None:
    """Were it none, the test above would prove less: the process's limit is what psutil reports."""
    soft, _ = target.process.rlimit(psutil.RLIMIT_AS)
    assert 0 < soft < target.process.memory_info().vms + 2**30

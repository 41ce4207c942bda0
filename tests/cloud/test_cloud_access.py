"""Who is let in: keys, models, canaries, browsers."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from isthmus.cloud.serve import Prepared
from isthmus.cloud.server import SESSION_PATH, SUBPROTOCOL
from isthmus.protocol.errors import RejectedError
from isthmus.protocol.events import (
    CanaryDone,
    ConnectionFailed,
    Rejected,
    Welcomed,
)
from isthmus.protocol.identity import canary_ids
from isthmus.protocol.keys import KeyFile
from tests.cloud.cloud_clients import EdgeHalf, greedy_reference, prompt_of
from tests.cloud.cloud_edges import RunningCloud, connected, get, open_of, running_cloud, stats
from tests.cloud.cloud_routes import generate


async def test_a_wrong_key_is_refused_before_the_upgrade(prepared: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alice:one\nbob:two\n")
    with running_cloud(replace(prepared, options=replace(prepared.options, keys=KeyFile(path)))) as cloud:
        for key in ("three", None):
            with pytest.raises(InvalidStatus) as caught:
                async with connected(cloud, key=key):
                    pass
            response = caught.value.response
            assert response.status_code == 401
            assert b'"code":"unauthorized"' in response.body
        assert (await get(cloud, "/v1/stats")).status_code == 401
        assert (await get(cloud, "/livez")).status_code == 200
        async with connected(cloud, key="two") as edge:
            await edge.wait(Welcomed)
            assert (await stats(cloud, Authorization="Bearer two"))["connections"] == 1
            (peer,) = cloud.hub.peers
            assert peer.tenant == "bob"


async def test_a_revoked_key_ends_its_connections_only(prepared: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alice:one\nbob:two\n")
    with running_cloud(replace(prepared, options=replace(prepared.options, keys=KeyFile(path)))) as cloud:
        async with connected(cloud, key="one") as alice, connected(cloud, key="two") as bob:
            await alice.wait(Welcomed)
            await bob.wait(Welcomed)
            path.write_text("bob:two\n")
            os.utime(path, ns=(1, 1))
            failed = await alice.wait(ConnectionFailed)
            assert failed.error.code == "key_revoked"
            prompt = prompt_of(5)
            assert len(await generate(bob, prepared, open_of(prompt), prompt)) == 8


async def denied(cloud: RunningCloud, **options: Any) -> int:
    with pytest.raises(InvalidStatus) as caught:
        async with connect(cloud.url + SESSION_PATH, **options):
            pass
    return int(caught.value.response.status_code)


async def test_browsers_and_other_subprotocols_are_refused(cloud: RunningCloud) -> None:
    ours = [Subprotocol(SUBPROTOCOL)]
    assert await denied(cloud, subprotocols=ours, origin="http://evil.example") == 403
    assert await denied(cloud) == 400
    assert await denied(cloud, subprotocols=[Subprotocol("isthmus.v9")]) == 400


def test_health_metrics_and_foreign_hosts(cloud: RunningCloud) -> None:
    assert httpx.get(f"{cloud.http}/livez").text == "ok"
    assert httpx.get(f"{cloud.http}/readyz").json() == {"ready": True}
    text = httpx.get(f"{cloud.http}/metrics").text
    for name in (
        "isthmus_time_to_first_token_seconds", "isthmus_inter_token_latency_seconds",
        "isthmus_e2e_request_latency_seconds", "isthmus_num_requests_running", "isthmus_num_requests_waiting",
        "isthmus_kv_cache_usage_perc", "isthmus_link_bytes_total", "isthmus_step_seconds",
        "isthmus_step_rows",
        "isthmus_kv_pages_used", "isthmus_kv_pages_cached", "isthmus_kv_pages_free",
        "isthmus_preemptions_total", "isthmus_prefix_hits_total", "isthmus_batch_wait_seconds_total",
    ):  # fmt: skip
        assert name in text
    rebound = httpx.get(f"{cloud.http}/v1/stats", headers={"Host": "evil.example"})
    assert rebound.status_code == 403
    assert rebound.json()["error"]["code"] == "foreign_host"


async def test_another_model_is_rejected(cloud: RunningCloud) -> None:
    other = cloud.hub.info.identity.model_copy(update={"tokenizer_hash": "other"})
    async with connected(cloud, identity=other) as edge:
        rejected = await edge.wait(Rejected)
        assert isinstance(rejected.error, RejectedError)
        assert rejected.error.code == "model_mismatch"


async def test_other_weights_need_a_canary_that_agrees(prepared: Prepared) -> None:
    ids = canary_ids(320)
    with running_cloud(prepared) as cloud:
        other = cloud.hub.info.identity.model_copy(update={"weights_hash": "requantised"})
        async with connected(cloud, identity=other) as edge:
            assert (await edge.wait(Welcomed)).welcome.match == "canary"
            rows = EdgeHalf(prepared.model, 2).rows(ids)
            edge.core.canary(2, rows * 1.001)
            await edge.flush()
            agreed = (await edge.wait(CanaryDone)).result
            assert agreed.ok
            assert 0 < agreed.error < agreed.tolerance
            edge.core.canary(3, EdgeHalf(prepared.model, 3).rows(ids) * 2)
            await edge.flush()
            assert not (await edge.wait(CanaryDone)).result.ok
            prompt = prompt_of(9)
            tokens = await generate(edge, prepared, open_of(prompt, split=2), prompt)
            assert tokens == greedy_reference(prepared.model, prompt, 8)
        async with connected(cloud, identity=other) as again:
            assert (await again.wait(Welcomed)).welcome.canary_passed == (2,)

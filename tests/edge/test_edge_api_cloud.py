"""HTTP requests in which a cloud has a part: a client gone ends both halves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from tests.edge.edge_world import TinyModel, make_model
from tests.edge.live_edge import live_edge
from tests.edge.real_cloud import RealCloud, real_cloud

COMPLETIONS = "/v1/completions"
WAYS = [
    {"route": "split", "split": 2, "shape": "u"},
    {"route": "split", "split": 2, "shape": "prefix"},
    {"route": "offload"},
]


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A model with a long context."""
    return make_model(tmp_path_factory.mktemp("endless"), max_position_embeddings=8192, seed=0)


@pytest.fixture(scope="module")
def cloud(endless: TinyModel) -> Iterator[RealCloud]:
    with real_cloud(endless) as cloud:
        yield cloud


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_client_gone_in_mid_stream_ends_both_halves(
    endless: TinyModel, cloud: RealCloud, way: dict[str, object]
) -> None:
    body = {"prompt": "hello 2", "temperature": 0, "max_tokens": 8_000, "stream": True, "isthmus": way}
    with live_edge(endless.pack, cloud_urls=(cloud.url,)) as edge:
        with edge.http.stream("POST", COMPLETIONS, json=body) as answer:
            assert answer.status_code == 200
            assert answer.headers["x-isthmus-route"] == way["route"]
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            assert cloud.stats.sessions == 1
        short = {"prompt": "hello", "max_tokens": 2, "isthmus": {"route": "local"}}
        assert edge.http.post(COMPLETIONS, json=short).status_code == 200  # there is one slot: it got it
        stats = asyncio.run(cloud.pages_settle(0))
        assert (stats.sessions, stats.pages_used) == (0, 0)
        assert (edge.stats()["cancelled"], edge.stats()["running"]) == (1, 0)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_loss_in_mid_stream_is_told_in_the_stream(
    endless: TinyModel, cloud: RealCloud, way: dict[str, object]
) -> None:
    # So long that the cloud is not done before it is lost.
    body = {"prompt": "hello 2", "temperature": 0, "max_tokens": 400, "stream": True, "isthmus": way}
    with live_edge(endless.pack, cloud_urls=(cloud.url,)) as edge:
        whole = edge.http.post(COMPLETIONS, json={**body, "stream": False, "isthmus": {"route": "local"}})
        chunks = []
        with edge.http.stream("POST", COMPLETIONS, json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    chunks.append(json.loads(line.removeprefix("data: ")))
                    if len(chunks) == 4:
                        cloud.drop_connections()
    *told, final = [chunk["isthmus"] for chunk in chunks if "isthmus" in chunk][1:]
    assert [each["event"] for how in told for each in how["events"]] == ["link_lost", "resumed"]
    assert [each for how in told for each in how["events"]] == final["events"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole.json()["choices"][0]["text"]


def test_a_cloud_that_is_not_there_is_told(endless: TinyModel) -> None:
    with live_edge(endless.pack, cloud_urls=("ws://127.0.0.1:9",)) as edge:
        body = {"prompt": "hello", "max_tokens": 2, "isthmus": {"route": "offload"}}
        answer = edge.http.post(COMPLETIONS, json=body)
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "cloud_unreachable")
        assert "127.0.0.1:9" in error["message"]

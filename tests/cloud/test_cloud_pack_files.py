"""The cloud's pack over HTTP: names, ranges, keys, how many at once; and an edge that fetches it."""

from __future__ import annotations

import asyncio
import http.client
import os
import shutil
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.responses import JSONResponse, Response

from isthmus.cloud import pack_files
from isthmus.cloud.pack_files import PackFiles, pack_route
from isthmus.cloud.serve import Prepared, pack_of_model
from isthmus.protocol.errors import IsthmusError, RejectedError
from isthmus.protocol.keys import KeyFile
from isthmus.splitter.download import Access, RetryPolicy
from isthmus.splitter.pack import Pack
from isthmus.splitter.pack_fetch import PackSource, blocks_for, fetch_pack
from tests.cloud.cloud_edges import RunningCloud, running_cloud
from tests.packs import pack_checkpoint

ONCE = RetryPolicy(attempts=1, first_wait_s=0.001, timeout_s=5.0)


@dataclass(frozen=True)
class Offering:
    """A cloud that offers `pack`, and its weights."""

    cloud: RunningCloud
    pack: Pack
    weights: bytes
    http: httpx.Client

    @property
    def url(self) -> str:
        return f"{self.cloud.http}/v1/pack/"

    def get(self, name: str, **headers: str) -> httpx.Response:
        return self.http.get(self.url + name, headers=headers)


@pytest.fixture(scope="module")
def pack(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return pack_checkpoint(tiny_path, tmp_path_factory.mktemp("offered") / "pack")


@pytest.fixture(scope="module")
def offering(prepared: Prepared, pack: Pack) -> Iterator[Offering]:
    with running_cloud(prepared, pack=pack) as cloud, httpx.Client() as client:
        yield Offering(cloud, pack, pack.weights_path.read_bytes(), client)


def test_every_file_of_the_manifest_is_there(offering: Offering) -> None:
    etags = set()
    for name in ("manifest.json", "blocks/embed.onnx", "tokenizer.json", "weights.bin"):
        reply = offering.get(name)
        assert (reply.status_code, reply.content) == (200, (offering.pack.path / name).read_bytes())
        etags.add(reply.headers["etag"])
        head = offering.http.head(offering.url + name)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(reply.content))
    assert len(etags) == 1


@pytest.mark.parametrize(
    "name",
    [
        "", "blocks", "build.json", "nothing.bin", "/etc/passwd", "../../../../../etc/passwd",
        "%2e%2e/%2e%2e/%2e%2e/etc/passwd", "..%2f..%2fsource%2fconfig.json", "blocks/../manifest.json",
        "blocks/embed.onnx/", "manifest.json%00",
    ],
)  # fmt: skip
def test_nothing_else_is(offering: Offering, name: str) -> None:
    """Over a bare connection: an HTTP library would tidy the path up first."""
    parts = urlsplit(offering.url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=5)
    connection.putrequest("GET", parts.path + name)
    connection.endheaders()
    reply = connection.getresponse()
    assert (reply.status, b'"code":"no_such_file"' in reply.read()) == (404, True)
    connection.close()


SIZE_HINTS = st.integers(-3, 3) | st.integers(0, 2_000_000)


@settings(max_examples=50, deadline=None)
@given(first=SIZE_HINTS | st.none(), last=SIZE_HINTS | st.none(), from_end=st.booleans())
def test_ranges_are_those_bytes(
    offering: Offering, first: int | None, last: int | None, from_end: bool
) -> None:
    weights = offering.weights
    size = len(weights)
    if from_end:
        first, last = (None if one is None else size + one for one in (first, last))
    said = f"{'' if first is None else max(0, first)}-{'' if last is None else max(0, last)}"
    reply = offering.get("weights.bin", Range=f"bytes={said}")
    begin, _, end = said.partition("-")
    if begin:
        expected = weights[int(begin) : int(end) + 1 if end else size]
    else:
        expected = weights[max(0, size - int(end)) :] if end else b""
    backwards = bool(begin and end) and int(end) < int(begin) < size
    if backwards or said == "-":
        assert reply.status_code == 400
    elif not expected:
        assert (reply.status_code, reply.headers["content-range"]) == (416, f"bytes */{size}")
    else:
        at = int(begin) if begin else size - len(expected)
        assert reply.status_code == 206
        assert reply.headers["content-range"] == f"bytes {at}-{at + len(expected) - 1}/{size}"
        assert reply.content == expected


def test_a_range_of_another_version_is_the_whole_file(offering: Offering) -> None:
    etag = offering.get("manifest.json").headers["etag"]
    same = offering.get("weights.bin", Range="bytes=5-9", **{"If-Range": etag})
    assert (same.status_code, same.content) == (206, offering.weights[5:10])
    other = offering.get("weights.bin", Range="bytes=5-9", **{"If-Range": f'"{"0" * 64}"'})
    assert (other.status_code, len(other.content)) == (200, len(offering.weights))


def test_keys_and_hosts_are_checked_and_bytes_counted(
    prepared: Prepared, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "keys"
    path.write_text("alice:one\n")
    with_keys = replace(prepared, options=replace(prepared.options, keys=KeyFile(path)))
    with running_cloud(with_keys, pack=pack) as cloud:
        url = f"{cloud.http}/v1/pack/"
        assert httpx.get(url + "manifest.json").status_code == 401
        assert httpx.get(url + "manifest.json", headers={"Host": "evil.example"}).status_code == 403

        def pull(key: str) -> Pack:
            source = PackSource(url, cloud.url, Access({"Authorization": f"Bearer {key}"}))
            return fetch_pack([source], blocks_for(2, head=False), retry=ONCE)

        with pytest.raises(RejectedError) as caught:
            pull("two")
        assert caught.value.code == "unauthorized"
        assert not (tmp_path / "cache").exists()
        pulled = pull("one")
        assert pulled.layers_here == 2
        (line,) = (
            line for line in httpx.get(f"{cloud.http}/metrics").text.splitlines()
            if line.startswith("isthmus_pack_bytes_total ")
        )  # fmt: skip
        names = ["manifest.json", *pack.manifest.files]
        names += [f"blocks/{name}.onnx" for name in ("embed", "layer.0", "layer.1")]
        small = sum((pack.path / name).stat().st_size for name in names)
        assert float(line.split()[1]) == small + sum(pack.bytes_per_block[:3])


def test_without_a_pack_it_says_so(cloud: RunningCloud) -> None:
    for name in ("manifest.json", "nothing"):
        reply = httpx.get(f"{cloud.http}/v1/pack/{name}")
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "no_pack_offered")
        assert "--offer-pack" in reply.json()["error"]["hint"]


def test_another_models_pack_is_not_offered(prepared: Prepared, pack: Pack) -> None:
    assert pack_of_model(pack, prepared.info) is pack
    other = prepared.info.identity.model_copy(update={"weights_hash": "other"})
    assert pack_of_model(pack, replace(prepared.info, identity=other)) is None


# ---- without a server: what clients do that don't read -------------------------------------------------


class Client:
    """One request to the route itself; `gate` open: it takes what it is sent."""

    def __init__(self, files: PackFiles, name: str = "weights.bin") -> None:
        self.gate = asyncio.Event()
        self.waits = asyncio.Event()
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self._route = pack_route(files, lambda request: None, refuse)
        self._scope: dict[str, Any] = {
            "type": "http", "method": "GET", "path": f"/v1/pack/{name}", "raw_path": b"", "root_path": "",
            "headers": [], "query_string": b"", "path_params": {"name": name}, "scheme": "http",
            "server": ("127.0.0.1", 1),
        }  # fmt: skip

    async def run(self) -> None:
        await self._route.app(self._scope, self._receive, self._send)

    async def _receive(self) -> MutableMapping[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
            return
        self.waits.set()
        await self.gate.wait()


def refuse(error: IsthmusError, status: int) -> Response:
    return JSONResponse({"error": error.to_dict()}, status_code=status)


async def test_more_downloads_than_allowed_are_told_to_wait(pack: Pack) -> None:
    files = PackFiles(pack, CollectorRegistry(), max_downloads=1)
    slow, second, third = Client(files), Client(files), Client(files)
    running = asyncio.create_task(slow.run())
    await slow.waits.wait()
    second.gate.set()
    await second.run()
    assert (second.status, second.headers[b"retry-after"]) == (429, b"5")
    slow.gate.set()
    await running
    third.gate.set()
    await third.run()
    assert (slow.status, third.status, files.num_running) == (200, 200, 0)


async def test_who_reads_nothing_loses_the_place(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_files, "STALL_S", 0.01)
    files = PackFiles(pack, CollectorRegistry(), max_downloads=1)
    await Client(files).run()
    assert files.num_running == 0


async def test_a_pack_that_was_rebuilt_is_not_mixed(pack: Pack, tmp_path: Path) -> None:
    copy = Pack.open(shutil.copytree(pack.path, tmp_path / "pack"))
    files = PackFiles(copy, CollectorRegistry())
    os.utime(copy.weights_path, ns=(1, 1))
    (copy.path / "tokenizer.json").unlink()
    for name in ("weights.bin", "tokenizer.json"):
        client = Client(files, name)
        client.gate.set()
        await client.run()
        assert client.status == 404

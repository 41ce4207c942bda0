"""A pack fetched block by block from a server that cuts, lies, is busy, or is another one next time."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.protocol.errors import ConfigError, IsthmusError, ModelFileError, NotFoundError
from isthmus.splitter.download import Access, RetryPolicy
from isthmus.splitter.pack import Pack
from isthmus.splitter.pack_fetch import PackSource, blocks_for, fetch_pack
from isthmus.splitter.provide import describe
from isthmus.splitter.runner import BlockRunner
from isthmus.splitter.store import list_models, remove
from tests.splitter.file_server import Behaviour, serving
from tests.splitter.packs import tiny_pack

QUICK = RetryPolicy(attempts=3, first_wait_s=0.001, timeout_s=5.0)
ONCE = RetryPolicy(attempts=1, first_wait_s=0.001, timeout_s=5.0)
BASE = "/v1/pack/"
WEIGHTS = f"{BASE}weights.bin"

pytestmark = pytest.mark.usefixtures("cache")


def offered() -> Behaviour:
    """A server that offers the tiny pack."""
    root = tiny_pack()
    names = ["manifest.json", "weights.bin", *Pack.open(root).manifest.files]
    names += [f"blocks/{file.name}" for file in (root / "blocks").iterdir()]
    return Behaviour(files={BASE + name: (root / name).read_bytes() for name in names})


@pytest.fixture
def cloud() -> Behaviour:
    return offered()


@pytest.fixture
def source(cloud: Behaviour) -> Iterator[PackSource]:
    with serving(cloud) as base:
        yield source_at(base)


def source_at(base: str, name: str = "ws://cloud") -> PackSource:
    return PackSource(base + BASE, name, Access({"Authorization": "Bearer key"}))


def pull(source: PackSource, split: int | None, *, head: bool = False, retry: RetryPolicy = QUICK) -> Pack:
    return fetch_pack([source], blocks_for(split, head=head), retry=retry)


def lengths(*names: str) -> int:
    pack = Pack.open(tiny_pack())
    return sum(pack.block(name).length for name in names)


def edit_manifest(cloud: Behaviour, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads(cloud.files[f"{BASE}manifest.json"])
    change(manifest)
    cloud.files[f"{BASE}manifest.json"] = json.dumps(manifest).encode()


def refused(source: PackSource, code: str, split: int | None = None) -> IsthmusError:
    with pytest.raises(IsthmusError) as caught:
        pull(source, split)
    assert caught.value.code == code, caught.value
    return caught.value


def test_only_the_needed_blocks_come_and_they_run(cloud: Behaviour, source: PackSource) -> None:
    seen: list[tuple[str, float]] = []
    wanted = blocks_for(2, head=False)
    pack = fetch_pack([source], wanted, progress=lambda *told: seen.append(told), retry=QUICK)
    assert cloud.num_sent[WEIGHTS] == lengths("embed", "layer.0", "layer.1")
    graphs = {path for path in cloud.num_sent if path.endswith(".onnx")}
    assert graphs == {f"{BASE}blocks/{name}.onnx" for name in ("embed", "layer.0", "layer.1")}
    assert (pack.layers_here, pack.has("head"), pack.is_whole) == (2, False, False)
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert seen[-1] == ("pulling from ws://cloud", 1.0)

    ours, theirs = BlockRunner(pack), BlockRunner(Pack.open(tiny_pack()))
    rows = []
    for runner in (ours, theirs):
        runner.load(range(2), embed=True)
        rows.append(runner.forward(runner.new_cache(range(2)), runner.embed([5, 6, 7])))
    np.testing.assert_array_equal(rows[0], rows[1])
    with pytest.raises(ModelFileError) as caught:
        ours.load(range(3))
    assert caught.value.code == "block_missing"
    assert "--split" in caught.value.hint
    pack.verify()


@pytest.mark.parametrize("tied", [False, True])
def test_the_u_shape_brings_the_head_and_what_it_reads(tied: bool) -> None:
    root = tiny_pack(tied=True) if tied else tiny_pack()
    files = {
        BASE + str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()
    }
    with serving(Behaviour(files=files)) as base:
        pack = pull(source_at(base), 1, head=True)
    assert (pack.layers_here, pack.has("head")) == (1, True)
    pack.verify(["head"])


def test_a_deeper_cut_fetches_what_is_missing_and_all_is_the_same_pack(
    cloud: Behaviour, source: PackSource
) -> None:
    pull(source, 0)
    assert cloud.num_sent[WEIGHTS] == 0
    pull(source, 1)
    cloud.num_sent.clear()
    pull(source, 3)
    assert cloud.num_sent[WEIGHTS] == lengths("layer.1", "layer.2")
    whole = pull(source, None)
    assert whole.is_whole
    whole.verify()
    assert whole.weights_path.read_bytes() == (tiny_pack() / "weights.bin").read_bytes()
    assert not (whole.path / ".parts").exists()
    cloud.num_sent.clear()
    assert pull(source, None).path == whole.path
    assert set(cloud.num_sent) == {f"{BASE}manifest.json"}


def test_a_cut_block_goes_on_where_it_stopped(cloud: Behaviour, source: PackSource) -> None:
    pull(source, 0)  # the small files
    cloud.requests.clear()
    graph = len(cloud.files[f"{BASE}blocks/embed.onnx"])
    manifest = len(cloud.files[f"{BASE}manifest.json"])
    cloud.cut_after = [manifest // 2, manifest, graph, 1000, 1]
    pull(source, 1)
    embed = Pack.open(tiny_pack()).block("embed")
    begins = [
        int(re.findall(r"\d+", wanted)[0]) for _, path, wanted in cloud.requests if path == WEIGHTS and wanted
    ]
    assert begins[:3] == [embed.offset, embed.offset + 1000, embed.offset + 1001]
    assert cloud.num_sent[WEIGHTS] == lengths("embed", "layer.0")


def test_the_next_start_and_the_next_cloud_go_on_too(cloud: Behaviour, source: PackSource) -> None:
    pull(source, 1)
    small = len(cloud.files[f"{BASE}manifest.json"]), len(cloud.files[f"{BASE}blocks/layer.1.onnx"])
    cloud.cut_after = [*small, 1500, 0]
    with pytest.raises(ModelFileError) as caught:
        pull(source, 2, retry=ONCE)
    assert caught.value.code == "download_failed"
    cloud.num_sent.clear()
    cloud.cut_after = [*small, 500, 0]  # once more, and now another cloud is asked
    other = offered()
    with serving(other) as base:
        pack = fetch_pack([source, source_at(base, "ws://other")], blocks_for(2, head=False), retry=ONCE)
    assert pack.layers_here == 2
    assert cloud.num_sent[WEIGHTS] == 500
    assert other.num_sent[WEIGHTS] == lengths("layer.1") - 2000
    assert pack.fetched is not None
    assert pack.fetched.source == "ws://cloud"


def test_a_cloud_with_another_pack_does_not_go_on(cloud: Behaviour, source: PackSource) -> None:
    cloud.files.pop(WEIGHTS)
    other = offered()
    edit_manifest(other, lambda manifest: manifest.update(source="another"))
    with serving(other) as base, pytest.raises(NotFoundError):
        fetch_pack([source, source_at(base)], blocks_for(1, head=False), retry=ONCE)
    assert other.num_sent[WEIGHTS] == 0


def test_the_first_cloud_that_offers_one_is_taken() -> None:
    with serving(Behaviour()) as empty, serving(offered()) as base:
        pack = fetch_pack([source_at(empty), source_at(base)], blocks_for(1, head=False), retry=ONCE)
    assert pack.layers_here == 1


def test_altered_bytes_are_not_taken(cloud: Behaviour, source: PackSource) -> None:
    block = Pack.open(tiny_pack()).block("layer.1")
    weights = bytearray(cloud.files[WEIGHTS])
    weights[block.offset + 77] ^= 1
    cloud.files[WEIGHTS] = bytes(weights)
    error = refused(source, "hash_mismatch")
    assert "layer.1" in error.message
    (stored,) = list_models()
    pack = Pack.open(stored.path)
    assert pack.layers_here == 1
    hole = pack.weights_path.read_bytes()[block.offset : block.offset + block.length]
    assert hole == bytes(block.length)


@pytest.mark.parametrize("name", ["blocks/embed.onnx", "tokenizer.json"])
def test_altered_files_are_not_taken(cloud: Behaviour, source: PackSource, name: str) -> None:
    cloud.files[BASE + name] += b" "
    refused(source, "hash_mismatch")
    assert all(Pack.open(stored.path).layers_here == 0 for stored in list_models())


def test_a_graph_that_reads_other_files_is_not_taken(
    cloud: Behaviour, source: PackSource, cache: Path
) -> None:
    """Forged with its hash: the manifest is the cloud's too."""
    path = f"{BASE}blocks/embed.onnx"
    graph = cloud.files[path] = cloud.files[path].replace(b"weights.bin", b"/etc/passwd")

    def fit(manifest: dict[str, Any]) -> None:
        manifest["blocks"][0]["graph_sha256"] = hashlib.sha256(graph).hexdigest()

    edit_manifest(cloud, fit)
    refused(source, "path_outside_pack")
    assert not list(cache.rglob("*.onnx"))


def hostile(field: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        match field:
            case "graph":
                manifest["blocks"][0]["graph"] = "../../outside.onnx"
            case "file":
                manifest["files"]["../outside"] = "0" * 64
            case "block":
                manifest["blocks"][0]["name"] = "../outside"
            case "huge":
                manifest["blocks"][-1]["length"] += 1 << 41
                manifest["weights_bytes"] += 1 << 41

    return change


@pytest.mark.parametrize(
    ("field", "code"),
    [("graph", "path_outside_pack"), ("file", "bad_pack"), ("block", "bad_pack"), ("huge", "bad_pack")],
)
def test_a_hostile_manifest_leaves_no_trace(
    cloud: Behaviour, source: PackSource, cache: Path, field: str, code: str
) -> None:
    edit_manifest(cloud, hostile(field))
    refused(source, code)
    assert not cache.exists()
    assert set(cloud.num_sent) == {f"{BASE}manifest.json"}


def test_a_hostile_name_stays_in_the_cache(cloud: Behaviour, source: PackSource, cache: Path) -> None:
    edit_manifest(cloud, lambda manifest: manifest["identity"].update(base_name="../../../etc/x"))
    pack = pull(source, 0)
    assert pack.path.parent == cache / "packs"


def test_the_disk_is_asked_first(
    cloud: Behaviour, source: PackSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = lengths("embed", "layer.0")
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr("isthmus.splitter.pack_fetch.shutil.disk_usage", lambda path: usage)
    error = refused(source, "disk_full", 1)
    assert f"{free + lengths('layer.0')} bytes are needed" in error.message
    assert f"{free} are free" in error.message
    assert cloud.num_sent[WEIGHTS] == 0


def test_more_bytes_than_asked_for_are_not_taken(cloud: Behaviour, source: PackSource, cache: Path) -> None:
    cloud.range_ends = False
    assert "more than" in refused(source, "download_failed").message
    cloud.ranges = False
    assert "byte ranges" in refused(source, "download_failed").message
    longest = max(file.stat().st_size for file in cache.rglob("embed.part"))
    assert longest <= lengths("embed")


def test_a_busy_cloud_is_waited_for(
    cloud: Behaviour, source: PackSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("isthmus.splitter.download.time.sleep", waits.append)
    cloud.headers = lambda path: {"Retry-After": "7"}
    cloud.statuses = [429] * 5
    assert pull(source, 0).layers_here == 0
    assert waits == [7.0] * 5
    cloud.statuses = [429] * 100
    refused(source, "download_failed")
    assert sum(waits[5:]) <= 300 + 1


def test_a_redirect_does_not_get_the_key(cloud: Behaviour, source: PackSource) -> None:
    elsewhere = Behaviour()
    with serving(elsewhere) as base:
        cloud.headers = lambda path: {"Location": f"{base}/manifest.json"}
        cloud.statuses = [302]
        refused(source, "download_failed")
    assert elsewhere.requests == []


def test_a_cloud_that_is_away_is_not_needed_for_what_is_here(cloud: Behaviour) -> None:
    with serving(cloud) as base:
        source = source_at(base)
        pulled = pull(source, 2)
    assert pull(source, 1, retry=ONCE).path == pulled.path
    refused(source, "download_failed", 3)
    with pytest.raises(ModelFileError):  # from another cloud: not what was asked for
        pull(source_at(base, "ws://other"), 1, retry=ONCE)
    with pytest.raises(ConfigError):
        fetch_pack([], blocks_for(1, head=False))


def test_two_at_once_fetch_once(cloud: Behaviour, source: PackSource) -> None:
    packs: list[Pack] = []
    threads = [threading.Thread(target=lambda: packs.append(pull(source, None))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [pack.is_whole for pack in packs] == [True, True]
    assert cloud.num_sent[WEIGHTS] == sum(Pack.open(tiny_pack()).bytes_per_block)


@pytest.mark.parametrize("file", ["manifest.json", "fetched.json", "weights.bin", "blocks/embed.onnx"])
def test_a_damaged_folder_is_begun_anew(source: PackSource, file: str) -> None:
    pack = pull(source, 1)
    (pack.path / file).unlink()
    again = pull(source, 1)
    again.verify()
    assert again.layers_here == 1


def test_a_pulled_pack_is_listed_shown_and_removed(source: PackSource) -> None:
    pack = pull(source, 1)
    (stored,) = list_models()
    assert (stored.kind, stored.path) == ("pack", pack.path)
    assert lengths("embed", "layer.0") < stored.bytes < pack.weights_bytes
    (shown,) = describe(stored.name)["packs"]
    assert (shown["layers_here"], shown["head_here"], shown["pulled_from"]) == (1, False, "ws://cloud")
    assert remove(stored.name) == [pack.path]
    assert list_models() == []

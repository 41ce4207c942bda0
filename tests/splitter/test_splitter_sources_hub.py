"""Pulling a model from a hub: files, revisions, checksums, refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.protocol.errors import (
    ConfigError,
    IsthmusError,
    ModelFileError,
    NotFoundError,
    UnsupportedModelError,
)
from isthmus.splitter.catalog import CATALOG, HubModel
from isthmus.splitter.checkpoint import open_checkpoint
from isthmus.splitter.sources import pull
from isthmus.splitter.store import list_models, model_path
from tests.splitter.file_server import Behaviour, serving

pytestmark = pytest.mark.usefixtures("cache")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The parts of the hub's HTTP interface that pulling uses, over a folder's files."""

    def __init__(self, folder: Path, repo_id: str) -> None:
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.repo_id, self.lies = repo_id, dict[str, str]()
        self.names_errors = True
        self.behaviour = Behaviour(routes=self.route, headers=self.headers)

    def etag(self, name: str) -> str:
        data = self.files[name]
        large = name.endswith(".safetensors")
        return sha256(data) if large else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def route(self, path: str) -> bytes | None:
        if path.startswith(f"/api/models/{self.repo_id}/revision/"):
            if path.rpartition("/")[2].partition("?")[0] not in ("main", "v1"):
                return None
            siblings: list[dict[str, Any]] = []
            for name, data in self.files.items():
                entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": self.etag(name)}
                if name.endswith(".safetensors"):
                    digest = self.lies.get(name, self.etag(name))
                    entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
                siblings.append(entry)
            return json.dumps({"id": self.repo_id, "sha": COMMIT, "siblings": siblings}).encode()
        prefix = f"/{self.repo_id}/resolve/{COMMIT}/"
        return self.files.get(path.removeprefix(prefix)) if path.startswith(prefix) else None

    def headers(self, path: str) -> dict[str, str]:
        name = path.rpartition("/")[2]
        if self.route(path) is None and self.names_errors:
            return {"X-Error-Code": "RevisionNotFound" if self.repo_id in path else "RepoNotFound"}
        if name not in self.files:
            return {"Content-Type": "application/json"}
        return {"ETag": f'"{self.etag(name)}"', "X-Repo-Commit": COMMIT}

    def transfers(self) -> list[str]:
        return [
            path.rpartition("/")[2]
            for verb, path, _ in self.behaviour.requests
            if verb == "GET" and "/resolve/" in path
        ]


@pytest.fixture
def hub(folder: Path) -> Hub:
    return Hub(folder, "tester/tiny-llama")


@pytest.fixture
def endpoint(hub: Hub) -> Iterator[str]:
    with serving(hub.behaviour) as base:
        yield base


def test_a_hub_repository(hub: Hub, endpoint: str, folder: Path, cache: Path) -> None:
    seen: list[float] = []
    hub.files["README.md"] = b"not needed"
    hub.files["pytorch_model.bin"] = b"not wanted"
    pulled = pull("tester/tiny-llama", endpoint=endpoint, progress=lambda label, share: seen.append(share))
    assert pulled.path == cache / "models" / "tester--tiny-llama"
    with open_checkpoint(pulled.path) as copy, open_checkpoint(folder) as original:
        assert copy.source_hash == original.source_hash
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert hub.transfers()[0] == "config.json"
    assert sorted(hub.transfers()) == sorted(path.name for path in folder.iterdir())
    assert [entry.name for entry in list_models()] == ["tester/tiny-llama"]
    requests = len(hub.behaviour.requests)
    assert pull("tester/tiny-llama", endpoint=endpoint) == pulled
    assert len(hub.behaviour.requests) == requests


def test_revisions_are_separate_models(hub: Hub, endpoint: str) -> None:
    assert pull("tester/tiny-llama@v1", endpoint=endpoint).path.name == "tester--tiny-llama@v1"
    marker = json.loads((model_path("tester/tiny-llama@v1") / "pulled.json").read_text())
    assert (marker["revision"], marker["commit"]) == ("v1", COMMIT)
    for hub.names_errors in (True, False):  # the hub itself; a plain mirror
        with pytest.raises(NotFoundError, match="revision 'nowhere'"):
            pull("tester/tiny-llama@nowhere", endpoint=endpoint)


def test_a_catalog_name_of_a_hub_repository(hub: Hub, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOG, "tiny", HubModel("tiny", "", "tester/tiny-llama"))
    assert pull("tiny", endpoint=endpoint).path == model_path("tiny")


def test_a_missing_file_is_fetched_and_the_rest_kept(hub: Hub, endpoint: str) -> None:
    path = pull("tester/tiny-llama", endpoint=endpoint).path
    (path / "tokenizer.json").unlink()
    hub.behaviour.requests.clear()
    pull("tester/tiny-llama", endpoint=endpoint)
    assert hub.transfers() == ["tokenizer.json"]


def test_contents_that_do_not_match_the_hubs_hash(hub: Hub, endpoint: str) -> None:
    hub.lies["model.safetensors"] = "0" * 64
    with pytest.raises(ModelFileError, match=r"model\.safetensors") as caught:
        pull("tester/tiny-llama", endpoint=endpoint)
    assert caught.value.code == "checksum_mismatch"
    assert not (model_path("tester/tiny-llama") / "model.safetensors").exists()
    assert list_models() == []


def test_a_model_we_cannot_run_is_refused_before_its_weights(hub: Hub, endpoint: str) -> None:
    config = json.loads(hub.files["config.json"]) | {"model_type": "mamba"}
    hub.files["config.json"] = json.dumps(config).encode()
    with pytest.raises(UnsupportedModelError, match="mamba"):
        pull("tester/tiny-llama", endpoint=endpoint)
    assert hub.transfers() == ["config.json"]


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_repositories_of_other_kinds(missing: str, hub: Hub, endpoint: str) -> None:
    del hub.files[missing]
    with pytest.raises(UnsupportedModelError, match="tester/tiny-llama"):
        pull("tester/tiny-llama", endpoint=endpoint)


def test_no_such_repository(endpoint: str) -> None:
    with pytest.raises(NotFoundError, match="tester/other"):
        pull("tester/other", endpoint=endpoint)


def test_a_gated_repository(hub: Hub, endpoint: str) -> None:
    plain = hub.behaviour.headers
    hub.behaviour.statuses = [403]
    hub.behaviour.headers = lambda path: {**plain(path), "X-Error-Code": "GatedRepo"}
    with pytest.raises(ConfigError, match="gated") as caught:
        pull("tester/tiny-llama", endpoint=endpoint)
    assert "HF_TOKEN" in caught.value.hint


def test_a_hub_that_cannot_be_reached() -> None:
    with pytest.raises(IsthmusError) as caught:
        pull("tester/tiny-llama", endpoint="http://127.0.0.1:9")
    assert caught.value.code == "download_failed"


def test_sharded_weights(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shards = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(shards, max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, shards)
    hub = Hub(shards, "tester/sharded")
    with serving(hub.behaviour) as base:
        path = pull("tester/sharded", endpoint=base).path
    with open_checkpoint(folder) as original, open_checkpoint(path) as copy:
        assert copy.source_hash == original.source_hash

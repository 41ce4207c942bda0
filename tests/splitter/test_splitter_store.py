"""The cache's layout: where things lie, what is listed, what removal touches."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.protocol.errors import ModelFileError, NotFoundError
from isthmus.splitter import store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.cache_root() == tmp_path / "cache"
    monkeypatch.setenv("ISTHMUS_CACHE", "~/own")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.cache_root() == tmp_path / "own"
    monkeypatch.delenv("ISTHMUS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.cache_root() == tmp_path / "xdg" / "isthmus"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.cache_root() == tmp_path / ".cache" / "isthmus"


def test_names_of_folders(tmp_path: Path) -> None:
    assert store.slug("smollm2-135m") == "smollm2-135m"
    assert store.slug("Qwen/Qwen3-0.6B") == "Qwen--Qwen3-0.6B"
    assert store.slug("owner/name@v1/x") == "owner--name@v1--x"
    first, second = tmp_path / "a" / "model", tmp_path / "b" / "model"
    for folder in (first, second):
        folder.mkdir(parents=True)
    assert store.slug(str(first)) != store.slug(str(second))
    assert store.slug(str(first)) == store.slug(str(first) + "/")
    assert store.slug(str(first)).startswith("model-")
    assert store.slug("./my model (1).gguf").startswith("my-model-1-")


def test_no_name_leads_out_of_the_cache(cache: Path) -> None:
    for word in ("../../etc", "..", "/etc/passwd", "a/../../b", "~/x", "a\\b"):
        assert store.model_path(word).parent == cache / "models", word
        assert store.model_path(word).resolve().parent == (cache / "models").resolve(), word


def test_packs_by_bits(cache: Path) -> None:
    assert store.pack_path("smollm2-135m") == cache / "packs" / "smollm2-135m-auto"
    assert store.pack_path("Qwen/Qwen3-0.6B", 8) == cache / "packs" / "Qwen--Qwen3-0.6B-8"
    with pytest.raises(NotFoundError, match="3"):
        store.pack_path("smollm2-135m", 3)


def fill(cache: Path) -> None:
    files = {
        "models/smollm2-135m/m.gguf": 100,
        "models/o--n/pulled.json": 10,
        "models/o--n/model.safetensors": 50,
        "models/half/.x.whl.part": 7,
        "models/.smollm2-135m.lock": 0,
        "packs/smollm2-135m-auto/manifest.json": 5,
        "packs/smollm2-135m-auto/blocks/embed.onnx": 6,
        "packs/smollm2-135m-8/manifest.json": 5,
        "packs/.smollm2-135m-4.building-1/manifest.json": 5,
        "packs/unfinished-4/weights.bin": 5,
    }
    for name, size in files.items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(b"x" * size)


def test_listing_shows_what_is_whole(cache: Path) -> None:
    assert store.list_models() == []
    fill(cache)
    assert [(entry.name, entry.kind, entry.bytes) for entry in store.list_models()] == [
        ("o/n", "model", 60),
        ("smollm2-135m", "model", 100),
        ("smollm2-135m-8", "pack", 5),
        ("smollm2-135m-auto", "pack", 11),
    ]


def test_removal_takes_a_models_files_and_packs_and_no_others(cache: Path) -> None:
    fill(cache)
    removed = store.remove("smollm2-135m")
    assert [str(path.relative_to(cache)) for path in removed] == [
        "models/smollm2-135m",
        "packs/smollm2-135m-auto",
        "packs/smollm2-135m-8",
    ]
    assert [entry.name for entry in store.list_models()] == ["o/n"]
    assert not list(cache.rglob("*.removed-*"))
    with pytest.raises(NotFoundError, match="smollm2-135m"):
        store.remove("smollm2-135m")
    store.remove("o/n")
    assert store.list_models() == []


def test_removing_a_local_model_leaves_its_source(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "mine.gguf"
    source.write_bytes(b"weights")
    pack = store.pack_path(str(source))
    pack.mkdir(parents=True)
    assert store.remove(str(source)) == [pack]
    assert source.read_bytes() == b"weights"


def test_hashes_are_remembered_until_the_file_changes(tmp_path: Path, cache: Path) -> None:
    import hashlib

    file = tmp_path / "f"
    file.write_bytes(b"one")
    steps: list[float] = []
    assert store.file_sha256(file, steps.append) == hashlib.sha256(b"one").hexdigest()
    assert steps == [1.0]
    assert store.file_sha256(file, steps.append) == hashlib.sha256(b"one").hexdigest()
    assert steps == [1.0]
    file.write_bytes(b"three")
    assert store.file_sha256(file) == hashlib.sha256(b"three").hexdigest()


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b'{"x": 1}', b"\xff"])
def test_a_damaged_memory_of_hashes_is_no_obstacle(damage: bytes, tmp_path: Path, cache: Path) -> None:
    cache.mkdir()
    (cache / "hashes.json").write_bytes(damage)
    file = tmp_path / "f"
    file.write_bytes(b"")
    assert store.file_sha256(file).startswith("e3b0c44298fc")


def test_a_cache_that_cannot_be_written_only_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"no folder")
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "file"))
    assert len(store.file_sha256(tmp_path / "file")) == 64
    with pytest.raises(ModelFileError, match="nothing"):
        store.file_sha256(tmp_path / "nothing")


def test_small_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "x.json"
    store.write_atomically(target, b"1")
    store.write_atomically(target, b"22")
    assert target.read_bytes() == b"22"
    assert [path.name for path in target.parent.iterdir()] == ["x.json"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        store.write_atomically(tmp_path / "folder", b"3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "folder"]

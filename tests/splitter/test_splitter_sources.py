"""What MODEL means, and models on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from isthmus.protocol.errors import (
    ModelFileError,
    NotFoundError,
    UnsupportedModelError,
    UsageError,
)
from isthmus.splitter.catalog import CATALOG, DEFAULT_MODEL, HubModel, WheelModel
from isthmus.splitter.sources import pull, resolve
from isthmus.splitter.tokenizer import Tokenizer
from tests.tiny import TINY_CHAT_TEMPLATE, tiny_tokenizer_json

pytestmark = pytest.mark.usefixtures("cache")


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

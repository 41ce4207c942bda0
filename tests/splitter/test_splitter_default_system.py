"""A catalog's default system message: from the entry into the pack, and noticed when the entry changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from isthmus.edge.chat import ChatTemplate
from isthmus.splitter.catalog import CATALOG, DEFAULT_MODEL, HubModel
from isthmus.splitter.hub import MARKER
from isthmus.splitter.pack import Pack
from isthmus.splitter.provide import ensure_pack
from isthmus.splitter.sources import pull
from isthmus.splitter.store import model_path
from tests.splitter.packs import tiny_source

Enter = Callable[[str | None], None]


@pytest.fixture
def enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Enter:
    """Puts a model `tiny` with this default system message into the catalog; it is pulled already."""
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))

    def enter(system: str | None) -> None:
        entry = HubModel("tiny", "a tiny one", "nobody/tiny", default_system=system)
        monkeypatch.setitem(CATALOG, "tiny", entry)
        if not model_path("tiny").exists():
            folder = Path(shutil.copytree(tiny_source(), model_path("tiny")))
            sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
            (folder / MARKER).write_text(json.dumps({"sha256": "0" * 64, "files": sizes}))

    return enter


def built_at(pack: Pack) -> int:
    return (pack.path / "manifest.json").stat().st_mtime_ns


def first_words(pack: Pack) -> str:
    return ChatTemplate.from_pack(pack).render([{"role": "user", "content": "hello"}]).split("hello")[0]


def test_it_travels_from_the_catalog_into_the_prompt(enter: Enter) -> None:
    enter("Be brief.")
    assert pull("tiny").generation["default_system"] == "Be brief."
    pack = ensure_pack("tiny", 8)
    assert pack.generation()["default_system"] == "Be brief."
    assert first_words(pack) == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"


def test_an_empty_one_is_one(enter: Enter) -> None:
    enter("")
    assert first_words(ensure_pack("tiny", 8)) == "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n"


def test_without_one_the_template_decides(enter: Enter) -> None:
    enter(None)
    pack = ensure_pack("tiny", 8)
    assert "default_system" not in pack.generation()
    assert first_words(pack) == "<|im_start|>user\n"


def test_a_pack_of_an_older_entry_is_built_anew_once(enter: Enter) -> None:
    enter(None)
    before = ensure_pack("tiny", 8)
    built_before = built_at(before)
    enter("Be brief.")
    after = ensure_pack("tiny", 8)
    assert first_words(after).startswith("<|im_start|>system\nBe brief.")
    built_after = built_at(after)
    assert built_after > built_before
    assert built_at(ensure_pack("tiny", 8)) == built_after
    # The weights are the same: so is the model's identity, and the cloud need not change.
    assert after.identity == before.identity


def test_a_pack_from_before_entries_were_noted_is_kept_and_noted(enter: Enter) -> None:
    enter(None)
    pack = ensure_pack("tiny", 8)
    built = built_at(pack)
    path = pack.path / "build.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "source_files": []}))
    assert built_at(ensure_pack("tiny", 8)) == built
    assert json.loads(path.read_text())["source_files"] != []


def test_the_default_model_has_an_empty_one() -> None:
    assert CATALOG[DEFAULT_MODEL].default_system == ""

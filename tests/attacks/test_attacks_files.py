"""Model files as input: every damaged checkpoint is refused by name at each door, and nothing is left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from isthmus.protocol.errors import IsthmusError
from isthmus.splitter.checkpoint import open_checkpoint
from isthmus.splitter.provide import build_model
from isthmus.splitter.sources import pull
from tests.attacks.corpus_files import FILE_ATTACKS, FileAttack
from tests.tiny import make_tiny, make_tiny_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("hf") / "tiny", num_hidden_layers=2)


@pytest.fixture(scope="module")
def gguf(folder: Path) -> Path:
    return make_tiny_gguf(folder, folder.parent / "tiny.gguf")


@pytest.mark.parametrize("attack", FILE_ATTACKS, ids=str)
def test_a_bad_checkpoint_is_refused_at_every_door(
    attack: FileAttack, folder: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    if attack.file == "gguf":
        model = file = tmp_path / "bad.gguf"
        good = gguf.read_bytes()
    else:
        model = Path(shutil.copytree(folder, tmp_path / "bad"))
        file = model / attack.file
        good = file.read_bytes()
    bad = attack.damage(good)
    assert bad != good
    file.write_bytes(bad)
    codes = []
    for door in (open_checkpoint, pull, lambda path: build_model(str(path), 32, out=tmp_path / "pack")):
        with pytest.raises(IsthmusError) as caught:
            door(str(model))
        codes.append(caught.value.code)
        assert any(name in caught.value.message for name in (file.name, model.name, "config", "architecture"))
    assert codes == [attack.code] * 3
    assert not (tmp_path / "pack").exists()

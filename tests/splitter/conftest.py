"""Fixtures of the splitter's tests: tiny models on disk, an empty cache, and tokenisers."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.splitter.tokenizer import Tokenizer
from tests.splitter.tokenizer_files import from_gguf, sentencepiece_gguf
from tests.tiny import make_tiny, make_tiny_gguf, tiny_tokenizer_json


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no settings of this machine's hub or pip."""
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_CERT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of two layers; never written to."""
    return make_tiny("llama", tmp_path_factory.mktemp("m") / "tiny-llama", num_hidden_layers=2)


@pytest.fixture(scope="session")
def gguf_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as the one GGUF file of a folder."""
    return make_tiny_gguf(folder, tmp_path_factory.mktemp("g") / "tiny.gguf")


@pytest.fixture(scope="session")
def smollm(smollm_gguf: Path) -> Tokenizer:
    return from_gguf(smollm_gguf, bos_id=1, eos_ids=(2,))


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return Tokenizer.from_bytes(tiny_tokenizer_json().encode(), bos_id=0, eos_ids=(2,))


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return from_gguf(sentencepiece_gguf(tmp_path_factory.mktemp("sp") / "t.gguf"))

"""Fixtures of the attacks: a tiny model, and what its cloud calls it."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.splitter.pack import Pack
from tests.packs import pack_checkpoint
from tests.tiny import make_tiny


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama: 4 layers, hidden size 64, 320 token ids, a context of 512."""
    return make_tiny("llama", tmp_path_factory.mktemp("attacked") / "tiny")


@pytest.fixture(scope="session")
def pack(source: Path) -> Pack:
    return pack_checkpoint(source, source.parent / "pack")

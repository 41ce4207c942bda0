"""Fixtures of the chaos tests. They run a seeded sample; `make chaos` (CHAOS=full) runs all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.splitter.pack import Pack
from tests.chaos.world import CONTEXT, LAYERS, TOKENS, World, new_world
from tests.packs import pack_checkpoint
from tests.tiny import make_tiny


def _tiny(root: Path) -> tuple[Path, Pack]:
    source = make_tiny(
        "llama", root / "tiny", seed=5, num_hidden_layers=LAYERS, max_position_embeddings=CONTEXT
    )
    return source, pack_checkpoint(source, root / "pack")


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The tiny model: prompts of 20, of 300 (several chunks) and of 3,900 tokens (a long upload)."""
    with new_world(tmp_path_factory.mktemp("chaos"), _tiny, {20: TOKENS, 300: TOKENS, 3900: 8}) as world:
        yield world


@pytest.fixture
def world(tiny_world: World) -> Iterator[World]:
    """Both clouds are up at the start; at the end, those that are hold nothing."""
    for cloud in tiny_world.clouds:
        cloud.be_up()
    yield tiny_world
    tiny_world.settled()

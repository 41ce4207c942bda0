"""Fixtures of the edge's tests."""

from __future__ import annotations

import pytest

from tests.edge.edge_world import TinyModel, make_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A tiny Llama: 4 layers, f32 pack."""
    return make_model(tmp_path_factory.mktemp("tiny"))

"""Fixtures of the command line's tests: a tiny model, and an environment with its own cache and settings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.tiny import make_tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny checkpoint folder with a chat template and a context of 4,096."""
    return str(make_tiny("llama", tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=4096))


@pytest.fixture(scope="session")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """No settings and an empty cache, shared by the tests: what one has built the next finds."""
    return clean_env(tmp_path_factory.mktemp("home"))


def clean_env(home: Path) -> dict[str, str]:
    """This process's environment without Isthmus's variables, and `home` for everything it stores."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ISTHMUS_", "XDG_"))}
    return {
        **kept,
        "ISTHMUS_CACHE": str(home / "cache"),
        "XDG_CONFIG_HOME": str(home / "config"),
        "HOME": str(home),
        "COLUMNS": "200",  # so that no table breaks a line
        "TERM": "dumb",
    }

"""Shared fixtures: where the real checkpoint lies, and a cache that survives between test runs."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm_dir() -> Path:
    """The folder with SmolLM2-135M-Instruct.Q4_1.gguf, pulled once into the cache."""
    from isthmus.splitter.sources import pull

    return Path(pull("smollm2-135m").path).parent


@pytest.fixture(scope="session")
def smollm_gguf(smollm_dir: Path) -> Path:
    """The checkpoint file itself."""
    return next(smollm_dir.glob("*.gguf"))

"""Shared fixtures: where the real checkpoint lies, and a cache that survives between test runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before any test imports torch: tests share few cores with the services they start (see isthmus.cloud).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# No deadline: these machines are shared, and a slow example is no wrong one.
settings.register_profile("isthmus", deadline=None)
settings.load_profile("isthmus")


@pytest.fixture(scope="session")
def smollm_dir() -> Path:
    """The folder with SmolLM2-135M-Instruct.Q4_1.gguf, pulled once into the cache."""
    from isthmus.splitter.sources import pull

    return Path(pull("smollm2-135m").path).parent


@pytest.fixture(scope="session")
def smollm_gguf(smollm_dir: Path) -> Path:
    """The checkpoint file itself."""
    return next(smollm_dir.glob("*.gguf"))

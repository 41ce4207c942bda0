"""Shared fixtures: where the real checkpoint lies; and which tests may run beside which."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parent

# Before any test imports torch: tests share few cores with the services they start (see isthmus.cloud).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# No deadline: these machines are shared, and a slow example is no wrong one.
settings.register_profile("isthmus", deadline=None)
settings.load_profile("isthmus")


# Tests that start processes, or wait for what a clock says: one after the other, in one worker. The rest of
# the suite, file by file, keeps the other workers busy meanwhile.
TIMED_FOLDERS = {"attacks", "bench", "chaos", "cli", "system", "web"}
# They lie there and compute, minutes of it, whatever the clock says.
LONG_FILES = {"test_system_parity.py", "test_system_tiny_parity.py", "test_system_openai.py"}


def is_timed(path: Path) -> bool:
    """Does the test file at `path`, from the folder of tests on, belong to the chain?"""
    return path.parts[0] in TIMED_FOLDERS and path.name not in LONG_FILES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The chain comes first, then the long files, so that nobody waits for them at the end."""

    def place(item: pytest.Item) -> tuple[bool, bool]:
        return not is_timed(item.path.relative_to(ROOT)), item.path.name not in LONG_FILES

    items.sort(key=place)


class Chained(LoadScopeScheduling):  # type: ignore[misc]  # it has no annotations
    """How `pytest -n N` hands tests out: files stay whole, since their fixtures are made once, and what is
    timed stays together."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "timed" if is_timed(Path(file).relative_to(ROOT.name)) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Chained:
    """Of every run with workers."""
    return Chained(config, log)


@pytest.fixture(scope="session")
def smollm_dir() -> Path:
    """The folder with SmolLM2-135M-Instruct.Q4_1.gguf, pulled once into the cache."""
    from isthmus.splitter.sources import pull

    return Path(pull("smollm2-135m").path).parent


@pytest.fixture(scope="session")
def smollm_gguf(smollm_dir: Path) -> Path:
    """The checkpoint file itself."""
    return next(smollm_dir.glob("*.gguf"))

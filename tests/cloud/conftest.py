"""Fixtures of the cloud's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from isthmus.cloud.model import CloudModel
from isthmus.cloud.serve import Prepared
from isthmus.splitter.checkpoint import open_checkpoint
from tests.cloud.cloud_edges import RunningCloud, prepare_cloud, running_cloud
from tests.tiny import make_tiny


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama: 4 layers, hidden size 64, 320 token ids."""
    return make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def model(tiny_path: Path) -> CloudModel:
    """The tiny Llama in fp32."""
    # One thread: on a busy machine OpenMP's barriers cost more than these products.
    torch.set_num_threads(1)
    return CloudModel.load(open_checkpoint(tiny_path), device="cpu", precision="fp32")


@pytest.fixture(scope="session")
def prepared(tiny_path: Path) -> Prepared:
    """The tiny Llama, ready to be served in fp32."""
    return prepare_cloud(tiny_path, threads=1, kv_mb=64)


@pytest.fixture(scope="module")
def cloud(prepared: Prepared) -> Iterator[RunningCloud]:
    """A cloud that a module's tests share."""
    with running_cloud(prepared) as running:
        yield running

"""Fixtures of the cloud's tests."""

from __future__ import annotations

import pytest
import torch

from isthmus.cloud.model import CloudModel
from isthmus.splitter.checkpoint import open_checkpoint
from tests.tiny import make_tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> CloudModel:
    """A tiny Llama in fp32: 4 layers, hidden size 64, 320 token ids."""
    # One thread: on a busy machine OpenMP's barriers cost more than these products.
    torch.set_num_threads(1)
    path = make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")
    return CloudModel.load(open_checkpoint(path), device="cpu", precision="fp32")

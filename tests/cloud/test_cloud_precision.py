"""Which precision is served, how much KV memory is taken, and what is remembered of the measurement."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.cloud.model import CloudModel
from isthmus.cloud.precision import Measured, choose, measured_or_known, sample_ids
from isthmus.cloud.serve import kv_pages
from isthmus.protocol.errors import ConfigError
from isthmus.splitter.checkpoint import open_checkpoint
from isthmus.splitter.tokenizer import Tokenizer
from tests.cloud.cloud_edges import prepare_cloud
from tests.tiny import make_tiny

FP32, BF16 = Measured(0.0, 0.040), Measured(1e-3, 0.016)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(
        "llama", tmp_path_factory.mktemp("tiny") / "llama", hidden_size=256, intermediate_size=256
    )


def test_auto_takes_the_fastest_that_is_faithful() -> None:
    choice = choose("auto", {"fp32": FP32, "bf16": BF16, "int8": Measured(7e-3, 0.006)}, device="cpu")
    assert choice.precision == "int8"
    assert choice.kl == {"fp32": 0.0, "bf16": 1e-3, "int8": 7e-3}
    assert "6.0 ms" in choice.reason


def test_auto_leaves_out_what_is_fast_but_not_faithful() -> None:
    assert (
        choose("auto", {"fp32": FP32, "bf16": BF16, "int8": Measured(2e-2, 0.006)}, device="cpu").precision
        == "bf16"
    )
    assert choose("auto", {"fp32": FP32, "bf16": Measured(0.5, 0.01)}, device="cpu").precision == "fp32"


def test_auto_without_figures_is_bf16_and_says_why() -> None:
    choice = choose("auto", {}, device="cuda")
    assert choice.precision == "bf16"
    assert "too large to measure" in choice.reason


def test_what_was_asked_for_is_taken_and_its_kl_told() -> None:
    choice = choose("int8", {"int8": Measured(0.3, 0.006)}, device="cpu")
    assert choice.precision == "int8"
    assert choice.kl == {"fp32": 0.0, "int8": 0.3}


def test_measuring_once_is_enough(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    tokenizer = Tokenizer.from_bytes((path / "tokenizer.json").read_bytes())
    with open_checkpoint(path) as checkpoint:
        assert all(len(ids) == 48 for ids in sample_ids(tokenizer, checkpoint.spec))
        first = measured_or_known(checkpoint, tokenizer, "auto", device="cpu")
        assert first["fp32"].kl == 0
        assert 0 < first["bf16"].kl < 1e-2
        assert 0 < first["int8"].kl < 1e-1
        assert all(one.decode_s > 0 for one in first.values())

        def not_again(*_: object, **__: object) -> None:
            raise AssertionError("measured again")

        monkeypatch.setattr(CloudModel, "load", not_again)
        assert measured_or_known(checkpoint, tokenizer, "auto", device="cpu") == first
        (stored,) = (tmp_path / "cloud").iterdir()
        stored.write_bytes(b"{")
        with pytest.raises(AssertionError, match="measured again"):
            measured_or_known(checkpoint, tokenizer, "int8", device="cpu")


def test_an_unwritable_cache_only_costs_time(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "file"))
    tokenizer = Tokenizer.from_bytes((path / "tokenizer.json").read_bytes())
    with open_checkpoint(path) as checkpoint:
        assert set(measured_or_known(checkpoint, tokenizer, "int8", device="cpu")) == {"int8"}


def test_kv_memory_is_what_was_asked_or_a_few_contexts(path: Path) -> None:
    prepared = prepare_cloud(path, kv_mb=1)
    spec, model = prepared.model.spec, prepared.model
    assert prepared.num_pages == 1024 * 1024 // model.page_bytes
    assert kv_pages(model, spec, None) == 3 * (512 // 16) * spec.num_layers
    with pytest.raises(ConfigError, match="0 MiB"):
        kv_pages(model, spec, 0)


def test_options_out_of_range_are_refused(path: Path) -> None:
    for options in ({"threads": 0}, {"device": "tpu"}, {"precision": "int4"}):
        with pytest.raises(ConfigError):
            prepare_cloud(path, **options)

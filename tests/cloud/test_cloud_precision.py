"""Which precision is served, how much KV memory is taken, and what is remembered of the measurement."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from isthmus.cloud.cpu_watch import CpuSample, missing_cores
from isthmus.cloud.model import CloudModel
from isthmus.cloud.precision import Measured, choose, measured_or_known, sample_ids
from isthmus.cloud.serve import kv_pages
from isthmus.protocol.errors import ConfigError
from isthmus.splitter.checkpoint import open_checkpoint
from isthmus.splitter.tokenizer import Tokenizer
from tests.cloud.cloud_edges import prepare_cloud
from tests.cloud.cloud_load import busy_for
from tests.tiny import make_tiny

FP32, BF16 = Measured(0.0, 0.040, 0.200), Measured(1e-3, 0.016, 0.064)
INT8, INT4 = Measured(7e-3, 0.006, 0.050), Measured(3e-3, 0.005, 0.049)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(
        "llama", tmp_path_factory.mktemp("tiny") / "llama", hidden_size=256, intermediate_size=256
    )


@pytest.mark.parametrize(
    ("measured", "best"),
    [
        ({"fp32": FP32, "bf16": BF16, "int8": INT8}, "int8"),
        ({"fp32": FP32, "bf16": BF16, "int8": INT8, "int4": INT4}, "int4"),
        # Fast, but not faithful.
        ({"fp32": FP32, "bf16": BF16, "int8": Measured(2e-2, 0.006, 0.05)}, "bf16"),
        ({"fp32": FP32, "bf16": BF16, "int8": INT8, "int4": Measured(1.1e-2, 0.001, 0.01)}, "int8"),
        ({"fp32": FP32, "bf16": Measured(0.5, 0.01, 0.01)}, "fp32"),
        ({"bf16": Measured(0.5, 0.01, 0.01)}, "fp32"),
        # One row alone does not decide, nor does the batch.
        ({"int8": Measured(5e-3, 0.006, 0.05), "int4": Measured(4e-3, 0.005, 0.10)}, "int8"),
        ({"int8": Measured(5e-3, 0.012, 0.05), "int4": Measured(4e-3, 0.005, 0.06)}, "int4"),
        # A busy machine: not all could be timed.
        ({"fp32": Measured(0.0), "bf16": BF16, "int8": INT8, "int4": INT4}, "int4"),
        ({"fp32": FP32, "bf16": Measured(1e-3), "int8": INT8, "int4": Measured(0.02)}, "int8"),
        # As fast within 10 %: the lower KL. Beyond: the faster.
        ({"bf16": Measured(1e-3, 0.0065, 0.054), "int8": INT8}, "bf16"),
        ({"bf16": Measured(1e-3, 0.0070, 0.055), "int8": INT8}, "int8"),
    ],
)
def test_auto_takes_the_fastest_that_is_faithful(measured: dict[str, Measured], best: str) -> None:
    choice = choose("auto", measured, device="cpu")
    assert choice.precision == best
    assert choice.kl == {"fp32": 0.0} | {name: one.kl for name, one in measured.items()}
    for name, one in measured.items():
        assert f"{name} {one}" in choice.reason


def test_a_measured_precision_in_words() -> None:
    assert str(INT8) == "6.0/50.0 ms KL 7.0e-03"
    assert str(Measured(0.02, 0.0012, 0.1)) == "1.2/100.0 ms KL 2.0e-02 (refused)"
    assert str(Measured(1e-3)) == "not timed KL 1.0e-03"
    busy = choose("auto", {"int8": Measured(1e-3)}, device="cpu")
    assert busy.reason.startswith("fewest bits with KL <= 0.01, since the machine was too busy")


def test_auto_without_figures_is_bf16_and_says_why() -> None:
    choice = choose("auto", {}, device="cuda")
    assert choice.precision == "bf16"
    assert "too large to measure" in choice.reason


def test_what_was_asked_for_is_taken_and_its_kl_told() -> None:
    choice = choose("int4", {"int8": INT8, "int4": Measured(0.3, 0.006, 0.05)}, device="cpu")
    assert choice.precision == "int4"
    assert choice.kl == {"fp32": 0.0, "int8": 7e-3, "int4": 0.3}
    assert choice.reason == "asked for; its KL 3.0e-01 is above 0.01, which auto would not take"
    assert choose("int8", {"int8": INT8}, device="cpu").reason == "asked for"
    assert choose("fp32", {}, device="cpu").reason == "asked for"
    assert choose("int4", {}, device="cpu").reason == "asked for; too large to measure its KL here"


def not_again(*_: object, **__: object) -> None:
    raise AssertionError("measured again")


def test_measuring_once_is_enough(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    busy_for(monkeypatch, 0)
    tokenizer = Tokenizer.from_bytes((path / "tokenizer.json").read_bytes())
    with open_checkpoint(path) as checkpoint:
        assert all(len(ids) == 48 for ids in sample_ids(tokenizer, checkpoint.spec))
        first = measured_or_known(checkpoint, tokenizer, "auto", device="cpu")
        assert first["fp32"].kl == 0
        assert 0 < first["bf16"].kl < 1e-2
        assert 0 < first["int8"].kl < first["int4"].kl < 1
        assert set(first) == {"fp32", "bf16", "int8", "int4"}
        assert all((one.speed_s or 0) > 0 for one in first.values())
        monkeypatch.setattr(CloudModel, "load", not_again)
        for asked in ("auto", "int4"):
            assert measured_or_known(checkpoint, tokenizer, asked, device="cpu") == first
        (stored,) = (tmp_path / "cloud").glob("precision-*.json")
        for damage in (b"{", b"[]", b'{"int8": 3}', b'{"int2": {"kl": 0}}'):
            stored.write_bytes(damage)
            with pytest.raises(AssertionError, match="measured again"):
                measured_or_known(checkpoint, tokenizer, "int8", device="cpu")


def test_a_busy_machine_is_not_timed_and_its_fidelity_is_remembered(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    busy_for(monkeypatch, 1000)
    tokenizer = Tokenizer.from_bytes((path / "tokenizer.json").read_bytes())
    with open_checkpoint(path) as checkpoint:
        busy = measured_or_known(checkpoint, tokenizer, "auto", device="cpu")
        assert all(one.speed_s is None for one in busy.values())
        assert not list((tmp_path / "cloud").glob("widening-*.json"))
        with monkeypatch.context() as patch:
            patch.setattr(CloudModel, "load", not_again)
            assert measured_or_known(checkpoint, tokenizer, "int8", device="cpu") == busy
        busy_for(monkeypatch, 0)
        monkeypatch.setattr("isthmus.cloud.precision.kl_per_position", not_again)
        quiet = measured_or_known(checkpoint, tokenizer, "auto", device="cpu")
        assert {name: one.kl for name, one in quiet.items()} == {name: one.kl for name, one in busy.items()}
        assert all((one.speed_s or 0) > 0 for one in quiet.values())
        assert list((tmp_path / "cloud").glob("widening-*.json"))


@pytest.mark.parametrize(
    ("busy_s", "own_s", "threads", "cores", "missing"),
    [
        (20.0, 20.0, 2, 2, 0.0),  # all ours
        (20.0, 10.0, 2, 2, 1.0),  # half of it others'
        (30.0, 20.0, 2, 4, 0.0),  # one core's worth of others, and two to spare
        (70.0, 40.0, 4, 8, 0.0),
        (75.0, 20.0, 4, 8, 1.5),
        (5.0, 10.0, 8, 4, 0.0),  # more threads than cores, and the counts not quite in step
        (15.0, 10.0, 8, 4, 0.5),
        (0.02, 0.0, 2, 2, 0.0),  # a tick of each core
    ],
)
def test_cores_that_others_held(
    busy_s: float, own_s: float, threads: int, cores: int, missing: float
) -> None:
    begun, ended = CpuSample(100.0, 7.0, 3.0), CpuSample(110.0, 7.0 + busy_s, 3.0 + own_s)
    assert missing_cores(begun, ended, threads=threads, cores=cores) == pytest.approx(missing, abs=1e-2)


def test_our_own_work_is_not_that_of_others() -> None:
    """Both counts grow by what this process computes; nobody else's is charged to it."""
    begun = CpuSample.now()
    while (ended := CpuSample.now()).own_s < begun.own_s + 0.3:
        pass
    grown_s, wall_s = ended.busy_s - begun.busy_s, ended.wall_s - begun.wall_s
    assert 0.3 - 0.05 <= grown_s <= (os.cpu_count() or 1) * wall_s + 0.05


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
    for options in ({"threads": 0}, {"device": "tpu"}, {"precision": "int2"}):
        with pytest.raises(ConfigError):
            prepare_cloud(path, **options)

"""Fidelity measures on tiny packs, and the promises about SmolLM2 (marked `model`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from isthmus.protocol.activations import RowCodec, RowFormat
from isthmus.quant.measure import kl_divergence
from isthmus.splitter.fidelity import (
    MAX_TOKENS_PER_TEXT,
    codec_kl,
    kl_between,
    logits_of,
    measure_speed,
    run_sample,
    sample_ids,
)
from isthmus.splitter.pack import Pack
from isthmus.splitter.sample_text import SAMPLE_TEXTS
from tests.splitter.packs import build, tiny_pack

TEXTS = SAMPLE_TEXTS[:2]


def test_the_sample_has_several_registers_and_no_duplicates() -> None:
    assert len(set(SAMPLE_TEXTS)) == len(SAMPLE_TEXTS) >= 6
    ids = sample_ids(Pack.open(tiny_pack()))
    assert [len(text) for text in ids] == [MAX_TOKENS_PER_TEXT] * len(ids)


def test_a_pack_is_at_no_distance_from_itself() -> None:
    pack = Pack.open(tiny_pack(32))
    assert kl_between(pack, pack, TEXTS) == pytest.approx(0.0, abs=1e-12)


def test_kl_between_is_the_kl_of_the_logits() -> None:
    exact, rounded = Pack.open(tiny_pack(32)), Pack.open(tiny_pack(8))
    ids = sample_ids(exact, TEXTS[:1])[0]
    expected = kl_divergence(logits_of(exact, ids), logits_of(rounded, ids))
    assert kl_between(exact, rounded, TEXTS[:1]) == pytest.approx(expected, rel=1e-6)
    assert 0 < expected < 1e-2


def test_layer_by_layer_equals_all_at_once() -> None:
    from isthmus.splitter.runner import BlockRunner

    pack = Pack.open(tiny_pack(32))
    ids = sample_ids(pack, TEXTS[:1])
    runner = BlockRunner(pack)
    runner.load(range(4), embed=True, head=True)
    cache = runner.new_cache(range(4), capacity=len(ids[0]))
    whole = runner.forward(cache, runner.embed(ids[0]), start_layer=0, stop_layer=4)
    np.testing.assert_array_equal(run_sample(pack, ids).rows[0], whole)


def test_outliers_are_the_channels_with_the_largest_residuals() -> None:
    from isthmus.splitter.runner import BlockRunner

    pack = Pack.open(tiny_pack(32))
    ids = sample_ids(pack)
    run = run_sample(pack, ids)
    runner = BlockRunner(pack)
    runner.load(range(2), embed=True)
    peak = np.zeros(pack.spec.hidden)
    for text in ids:
        cache = runner.new_cache(range(2), capacity=len(text))
        rows = runner.forward(cache, runner.embed(text), start_layer=0, stop_layer=2)
        peak = np.maximum(peak, np.abs(rows).max(axis=0))
    assert run.outliers[2] == tuple(sorted(np.argsort(-peak, kind="stable")[:8].tolist()))
    assert pack.outliers(2) == run.outliers[2]


def test_codecs_cost_what_they_should() -> None:
    pack = Pack.open(tiny_pack(32))
    hidden = pack.spec.hidden
    raw = codec_kl(pack, 2, RowCodec(RowFormat.F32, hidden), TEXTS)
    bf16 = codec_kl(pack, 2, RowCodec(RowFormat.BF16, hidden), TEXTS)
    int8 = codec_kl(pack, 2, RowCodec(RowFormat.INT8, hidden, pack.outliers(2)), TEXTS)
    plain = codec_kl(pack, 2, RowCodec(RowFormat.INT8, hidden), TEXTS)
    assert raw == pytest.approx(0.0, abs=1e-12)
    assert 0 < bf16 < plain
    assert 0 < int8 < plain < 1e-2


def test_speed_is_measured_for_each_pack() -> None:
    packs = {"f32": Pack.open(tiny_pack(32)), "q8-affine": Pack.open(tiny_pack(8))}
    shares: list[float] = []
    speeds = measure_speed(packs, list(range(20)), rounds=1, steps=4, progress=shares.append)
    assert speeds.keys() == packs.keys()
    assert all(s.prefill_tokens_per_s > 0 and s.decode_tokens_per_s > 0 for s in speeds.values())
    assert shares == [0.5, 1.0]


@pytest.fixture(scope="module")
def smollm_f32(smollm_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """SmolLM2 without any rounding."""
    return Pack.open(build(smollm_gguf, tmp_path_factory.mktemp("smollm") / "pack", 32).pack)


@pytest.mark.model
def test_smollms_default_is_close_to_its_source(smollm_gguf: Path, tmp_path: Path) -> None:
    smollm = Pack.open(build(smollm_gguf, tmp_path / "pack", "auto").pack)
    assert smollm.kl_to_source is not None
    assert smollm.kl_to_source <= 1e-2
    measured = {c["scheme"]: c for c in smollm.build_info["choice"]["candidates"]}
    assert measured["q8-affine"]["kl"] <= 6e-3
    assert measured["q4-native"]["kl"] <= 6e-3


@pytest.mark.model
@pytest.mark.parametrize("split", [2, 8, 15, 24])
def test_smollms_int8_codec_adds_little(smollm_f32: Pack, split: int) -> None:
    codec = RowCodec(RowFormat.INT8, smollm_f32.spec.hidden, smollm_f32.outliers(split))
    assert codec_kl(smollm_f32, split, codec, SAMPLE_TEXTS[:3]) <= 1e-3

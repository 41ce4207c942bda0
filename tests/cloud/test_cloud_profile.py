"""The cloud's profile: figures out of step times, a real measurement, what is kept, what edges are told."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud import profile as profile_module
from isthmus.cloud.model import CloudModel
from isthmus.cloud.profile import DISTURBED, kept_or_measured, measure_cloud, power_meter
from isthmus.cloud.serve import Prepared
from isthmus.cloud.step_figures import BATCHES, DECODE_CONTEXTS, PREFILL_ROWS, Probe, probes, step_figures
from isthmus.protocol.events import Welcomed
from isthmus.protocol.profiles import FIGURES, DeviceProfile, Prices
from isthmus.splitter.power import SampledMeter
from tests.cloud.cloud_edges import connected, prepare_cloud, running_cloud
from tests.cloud.cloud_load import busy_for
from tests.logged import process_log

PAGES = 600
seconds = st.floats(1e-6, 1e-2)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, on a machine that says it has nothing else to do."""
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    busy_for(monkeypatch, 0)
    return tmp_path


@pytest.fixture(scope="module")
def measured(model: CloudModel) -> DeviceProfile:
    return measure_cloud(model, num_pages=PAGES, context_length=512, load_s=0.4, kl=0.001)


def step_s(
    probe: Probe, layer_s: dict[int, float], step: float, embed: float, head: float, layers: int
) -> float:
    """What the formula says the step of one session takes."""
    ((first, _, rows),) = probe.mix
    return step + (embed * rows if first == 0 else 0.0) + (layers - first) * layer_s[probe.x] + head


@given(st.integers(1, 40), st.integers(2, 5000), seconds, seconds, seconds, st.lists(seconds, min_size=12))
def test_the_figures_are_those_that_the_steps_were_made_of(
    num_layers: int, context_length: int, step: float, embed: float, head: float, times: list[float]
) -> None:
    asked = probes(num_layers, context_length)
    time_of = itertools.cycle(times)
    decode: dict[int, float] = {}
    prefill: dict[int, float] = {}
    timed: dict[Probe, float] = {}
    for probe in asked:
        if probe.kind in ("decode", "prefill"):
            layer_s = decode if probe.kind == "decode" else prefill
            layer_s[probe.x] = next(time_of)
            timed[probe] = step_s(probe, layer_s, step, embed, head, num_layers)
        elif probe.kind == "deep":
            timed[probe] = step_s(probe, decode, step, embed, head, num_layers)
        elif probe.kind == "behind":
            rows, context = probe.mix[0][2], probe.mix[0][1]
            behind = {rows: prefill[rows] + 1e-7 * rows * context}
            timed[probe] = step_s(probe, behind, step, embed, head, num_layers)
        else:
            timed[probe] = 0.5 + 0.25 * probe.x
    found = step_figures(timed, num_layers=num_layers, embed_row_s=embed, head_s=head)
    if num_layers > 1:  # else a step cannot be told from its only layer
        assert found.step_s == pytest.approx(step, rel=1e-6, abs=1e-9)
        assert dict(found.decode) == pytest.approx(decode, rel=1e-6)
        assert dict(found.prefill) == pytest.approx(prefill, rel=1e-6)
        has_context = any(probe.kind == "behind" for probe in asked)
        assert found.prefill_context_s == pytest.approx(1e-7 if has_context else 0.0, rel=1e-3)
    assert found.batch == ((1, 1.0), (2, 1 / 0.75), (4, 2.0), (8, 2.5 / 0.75), (16, 4.5 / 0.75))


@given(st.integers(1, 1024), st.integers(1, 100_000))
def test_no_probe_leaves_the_model(num_layers: int, context_length: int) -> None:
    asked = probes(num_layers, context_length)
    assert [probe.kind for probe in asked[:3]] == ["decode", "deep", "prefill"]
    assert len(asked) == len(set(asked))
    for probe in asked:
        for first, start, rows in probe.mix:
            assert 0 <= first < num_layers
            assert start >= 0
            assert rows >= 1
            assert start + rows <= context_length
    if context_length > max(DECODE_CONTEXTS):
        assert {probe.x for probe in asked if probe.kind == "prefill"} == {1, *PREFILL_ROWS}


def test_noise_makes_nothing_free() -> None:
    """The deep step took longer than the whole one."""
    decode, deep, prefill = probes(4, 16)[:3]
    found = step_figures({decode: 0.1, deep: 0.3, prefill: 0.05}, num_layers=4, embed_row_s=0, head_s=0.1)
    assert found.step_s == pytest.approx(0.2)
    assert all(layer_s > 0 for _, layer_s in (*found.decode, *found.prefill))
    assert found.batch == ((1.0, 1.0),)


def test_every_figure_of_a_real_model_is_there_and_labelled(
    model: CloudModel, measured: DeviceProfile
) -> None:
    assert set(measured.labels) == set(FIGURES)
    assert measured.labels == dict.fromkeys(FIGURES, "measured") | {
        "layer_share": "modelled",
        "memory": "modelled",
        "power": "unavailable",
    }
    assert (measured.side, measured.provider, measured.precision) == ("cloud", "torch cpu", "fp32")
    assert (measured.model, measured.num_layers, measured.hidden) == (model.spec.base_name, 4, 64)
    assert measured.threads == torch.get_num_threads()
    assert measured.device
    assert [rows for rows, _ in measured.prefill] == [1, 16, 64, 128, 256, 512]
    assert [context for context, _ in measured.decode] == [15, 255]
    assert [sessions for sessions, _ in measured.batch] == sorted(BATCHES)
    for _, layer_s in (*measured.prefill, *measured.decode):
        assert 0 < layer_s < 1
    assert measured.embed_row_s > 0
    assert measured.head_s > 0
    assert measured.codec_row_s > 0
    assert measured.load_s == 0.1
    whole = measured.num_layers * measured.layer_bytes + measured.embed_bytes + measured.head_bytes
    assert whole == model.weight_bytes
    assert measured.idle_w is None
    assert DeviceProfile.from_json(measured.to_json(), name="again") == measured


def test_more_rows_take_longer(measured: DeviceProfile) -> None:
    prefill = dict(measured.prefill)
    assert prefill[512] > prefill[64] > prefill[1]
    assert dict(measured.batch)[16] > 1


def test_what_does_not_fit_the_pages_or_the_time_is_left_out(model: CloudModel) -> None:
    small = measure_cloud(model, num_pages=4, context_length=512)
    assert [rows for rows, _ in small.prefill] == [1, 16]
    assert [context for context, _ in small.decode] == [15]
    assert small.batch == ((1.0, 1.0),)
    assert {small.labels[name] for name in ("load", "kl", "batch")} == {"unavailable"}
    hurried = measure_cloud(model, num_pages=PAGES, context_length=512, budget_s=0.0)
    assert len(hurried.prefill) == len(hurried.decode) == 1


def test_a_meter_tells_the_power(model: CloudModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "_IDLE_S", 0.05)
    meter = SampledMeter("a test", 0.0, lambda: 12.5)
    measured = measure_cloud(model, num_pages=PAGES, context_length=64, meter=meter, budget_s=0.0)
    assert measured.idle_w == pytest.approx(12.5, rel=0.1)
    assert measured.active_w == pytest.approx(12.5, rel=0.1)
    assert measured.labels["power"] == "measured"
    broken = SampledMeter("a test", 0.0, lambda: None)
    measured = measure_cloud(model, num_pages=PAGES, context_length=64, meter=broken, budget_s=0.0)
    assert (measured.active_w, measured.labels["power"]) == (None, "unavailable")


def test_a_meter_that_needs_minutes_is_no_use_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    battery = SampledMeter("a battery", 10.0, lambda: 9.0)
    monkeypatch.setattr(profile_module, "find_meter", lambda: battery)
    assert power_meter(cpu) is None
    battery.settle_s = 0.2
    assert power_meter(cpu) is battery


def kept(model: CloudModel, **more: Any) -> DeviceProfile:
    return kept_or_measured(
        model, source_hash="a" * 8, **({"num_pages": PAGES, "context_length": 64, "budget_s": 0.0} | more)
    )


def test_a_second_start_does_not_measure_again(
    model: CloudModel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = kept(model)
    (file,) = (own_cache / "cloud").glob("profile-*.json")
    with monkeypatch.context() as patch:
        patch.delattr(profile_module, "measure_cloud")
        assert kept(model) == first
    file.write_text('{"format": 1, "side": "moon"}')
    assert kept(model).side == "cloud"
    assert DeviceProfile.from_json(file.read_bytes(), name=str(file)).side == "cloud"


def test_a_disturbed_profile_says_so_and_is_not_kept(
    model: CloudModel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy_for(monkeypatch, 64)
    assert kept(model).note == DISTURBED
    assert not list(own_cache.glob("cloud/profile-*"))


def test_a_start_that_cannot_be_profiled_serves_without(
    tiny_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> DeviceProfile:
        raise RuntimeError("no memory for the measurement")

    monkeypatch.setattr(profile_module, "measure_cloud", broken)
    with process_log() as stderr:
        prepared = prepare_cloud(tiny_path, threads=1, kv_mb=8)
    assert prepared.info.profile is None
    assert len(stderr.events("not_profiled")) == 1


async def test_welcome_tells_profile_and_prices(prepared: Prepared) -> None:
    prices = Prices(input_usd_per_mtok=0.1, gpu_usd_per_h=2.5, utilisation=0.4, dated="2026-11-01")
    info = replace(prepared.info, prices=prices)
    with running_cloud(replace(prepared, info=info)) as cloud:
        async with connected(cloud) as edge:
            welcome = (await edge.wait(Welcomed)).welcome
    assert welcome.prices == prices
    assert prepared.info.profile is not None
    assert welcome.profile == prepared.info.profile
    assert welcome.profile.labels["decode"] == "measured"


def test_prices_asked_for_are_those_told(tiny_path: Path) -> None:
    prices = Prices(egress_usd_per_gb=0.09)
    assert prepare_cloud(tiny_path, threads=1, kv_mb=8, prices=prices).info.prices == prices
    assert prepare_cloud(tiny_path, threads=1, kv_mb=8).info.prices is None

"""Profiles as files: kept ones, damaged ones, and the examples, which are what the roofline yields."""

from __future__ import annotations

import os
from pathlib import Path
from typing import get_args

import pytest

from isthmus.protocol.errors import ConfigError, NotFoundError
from isthmus.protocol.profiles import FIGURES, DeviceProfile
from isthmus.splitter import profiling
from isthmus.splitter.example_devices import DEVICES, MODELS, example_profiles
from isthmus.splitter.pack import Pack
from isthmus.splitter.profile_store import (
    EXAMPLES,
    edge_profile,
    example,
    load_profile,
    profile_path,
    save_profile,
    with_watts,
)
from isthmus.splitter.profiling import DISTURBED
from isthmus.splitter.roofline import modelled_profile
from tests.packs import tiny_pack

JETSON = "jetson-orin-nano-llama-3.2-1b"


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return tiny_pack(tmp_path_factory.mktemp("p"))


# --- files


def test_a_profile_survives_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "p.json"
    save_profile(path, example(JETSON))
    assert load_profile(path) == example(JETSON)
    assert [file.name for file in path.parent.iterdir()] == ["p.json"]


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[1, 2]", b"\xff\xfe", b'{"format": 2}', b"[" * 100_000, b" " * 2_000_000]
)
def test_a_file_that_is_no_profile(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as error:
        load_profile(path)
    assert error.value.code == "bad_profile"
    assert str(path) in error.value.message
    assert "isthmus profile" in error.value.hint


def test_a_profile_with_a_figure_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    text = example(JETSON).to_json()
    for old, new in (('"step_s": 0.0002', '"step_s": NaN'), ('"threads": 6', '"threads": -6')):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(ConfigError) as error:
            load_profile(path)
        assert error.value.code == "bad_profile"


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as error:
        load_profile(tmp_path / "p.json")
    assert error.value.code == "no_profile"


def test_a_file_per_pack_provider_and_threads(pack: Pack, tmp_path: Path, cache: Path) -> None:
    other = tiny_pack(tmp_path / "other", seed=1)
    quantised = tiny_pack(tmp_path / "q8", scheme="q8-affine")
    paths = [
        profile_path(pack, "cpu", 1),
        profile_path(pack, "cpu", 3),
        profile_path(pack, "cuda", 1),
        profile_path(other, "cpu", 1),
        profile_path(quantised, "cpu", 1),
    ]
    assert len(set(paths)) == len(paths)
    assert profile_path(Pack.open(pack.path), "cpu", 1) == paths[0]
    assert all(path.parent == cache / "profiles" for path in paths)


# --- this machine's


def test_a_profile_is_measured_once(pack: Pack, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = edge_profile(pack)
    assert load_profile(profile_path(pack, "cpu", None)) == first
    monkeypatch.setattr(profiling, "measure_edge", None)  # nothing is left to measure with
    assert edge_profile(pack) == first


def test_a_profile_of_a_busy_hour_is_measured_again_later(pack: Pack, cache: Path) -> None:
    path = profile_path(pack, "cpu", None)
    busy = edge_profile(pack).model_copy(update={"note": f"{DISTURBED}: …", "step_s": 123.0})
    save_profile(path, busy)
    assert edge_profile(pack) == busy
    os.utime(path, (0, path.stat().st_mtime - 3700))
    assert edge_profile(pack).step_s < 123
    save_profile(path, busy.model_copy(update={"note": ""}))
    os.utime(path, (0, 0))
    assert edge_profile(pack).step_s == 123


@pytest.mark.parametrize("kept", ["damaged", "of another model"])
def test_a_kept_file_that_is_not_right_is_measured_again(pack: Pack, cache: Path, kept: str) -> None:
    path = profile_path(pack, "cpu", None)
    path.parent.mkdir(parents=True)
    path.write_text("{" if kept == "damaged" else example(JETSON).to_json())
    profile = edge_profile(pack)
    assert profile.num_layers == pack.spec.num_layers
    assert load_profile(path) == profile


def test_a_cache_that_cannot_be_written_only_keeps_nothing(pack: Pack, cache: Path) -> None:
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file where the folder should be")
    assert edge_profile(pack).num_layers == pack.spec.num_layers


def test_declared_watts_stand_where_nothing_was_measured(pack: Pack, cache: Path) -> None:
    profile = edge_profile(pack)
    declared = edge_profile(pack, watts=(1.0, 8.0))
    if profile.labels["power"] == "measured":
        assert declared == profile
    else:
        assert (declared.idle_w, declared.active_w, declared.labels["power"]) == (1, 8, "modelled")
        assert edge_profile(pack).labels["power"] == "unavailable"  # what was declared once is not kept
    with pytest.raises(ConfigError):
        edge_profile(pack, watts=(8.0, 1.0))


def test_measured_watts_stay() -> None:
    modelled = example(JETSON)
    measured = modelled.model_copy(update={"labels": {**modelled.labels, "power": "measured"}})
    assert with_watts(measured, (1.0, 2.0)) == measured
    assert with_watts(modelled, None) == modelled
    assert with_watts(modelled, (1.0, 2.0)).active_w == 2


# --- examples


def test_the_examples_are_what_the_roofline_yields() -> None:
    """After a change: python -m isthmus.splitter.example_devices"""
    profiles = example_profiles()
    assert set(profiles) == set(EXAMPLES)
    for name, profile in profiles.items():
        assert example(name) == profile


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_modelled_dated_and_sourced(name: str) -> None:
    profile = example(name)
    labels = dict(profile.labels)
    assert labels.pop("kl") == "unavailable"
    assert set(labels.values()) == {"modelled"}
    assert "sheet" in profile.note or "specifications" in profile.note
    assert "Assumed" in profile.note
    assert set(profile.labels) == set(FIGURES)


def test_the_devices_asked_for_are_there_on_both_sides() -> None:
    sides = get_args(DeviceProfile.model_fields["side"].annotation)
    assert {device.side for device, _ in DEVICES.values()} == set(sides)
    assert len(EXAMPLES) == len(DEVICES) * len(MODELS)


def test_an_example_that_is_none() -> None:
    with pytest.raises(NotFoundError) as error:
        example("../secrets")
    assert error.value.code == "no_profile"
    assert JETSON in error.value.hint


def test_decode_is_bound_by_bandwidth_and_prefill_by_operations() -> None:
    model, (device, _) = MODELS[1], DEVICES["jetson-orin-nano"]
    profile = modelled_profile(model, device, dated="2026-01-01", note="")
    # Llama 3.2 1B: 2048 · (2 · 2048 + 2 · 512) + 3 · 2048 · 8192 weights in a layer
    assert model.layer_weights == 60_817_408
    streamed = model.layer_weights * device.bytes_per_weight / (68e9 * 0.6)
    assert profile.decode[0][1] == pytest.approx(device.layer_overhead_s + streamed, rel=1e-3)
    computed = 512 * 2 * model.layer_weights / (5e12 * 0.4)
    assert profile.prefill[-1][0] == 512
    assert profile.prefill[-1][1] == pytest.approx(computed, rel=0.1)  # and the attention
    assert profile.prefill[-1][1] > computed
    seconds = [s for _, s in profile.decode]
    assert seconds == sorted(set(seconds))


def test_only_who_batches_has_sessions_in_common() -> None:
    model = MODELS[0]
    cloud, edge = (
        modelled_profile(model, DEVICES[name][0], dated="2026-01-01", note="")
        for name in ("h100-sxm", "laptop-8-core")
    )
    assert edge.batch[-1] == (64.0, 64.0)
    ratios = [ratio for _, ratio in cloud.batch]
    assert ratios == sorted(ratios)
    assert ratios[0] == 1
    assert ratios[-1] < 4
    assert cloud.head_bytes == 0

"""`measure_edge` on tiny packs: every figure is there, says where it comes from, and behaves like a time."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from isthmus.protocol.errors import ConfigError, ModelFileError
from isthmus.protocol.profiles import FIGURES, DeviceProfile
from isthmus.splitter import profiling
from isthmus.splitter.pack import Pack
from isthmus.splitter.power import find_meter
from isthmus.splitter.profile_memory import model_memory
from isthmus.splitter.profiling import DISTURBED, measure_edge
from isthmus.splitter.runner import BlockRunner
from isthmus.splitter.sessions import default_threads
from tests.packs import tiny_pack
from tests.splitter.test_profile_power import ina, write

LAYERS = 4


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return tiny_pack(tmp_path_factory.mktemp("p"), scheme="q8-affine", max_position_embeddings=8192)


@pytest.fixture(scope="module")
def full(pack: Pack) -> DeviceProfile:
    return measure_edge(pack)


@pytest.fixture
def no_sensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device whose /sys is this empty folder."""
    monkeypatch.setattr(profiling, "find_meter", partial(find_meter, tmp_path))
    return tmp_path


def test_a_profile_says_what_it_is_of(full: DeviceProfile, pack: Pack) -> None:
    assert (full.side, full.provider, full.precision) == ("edge", "cpu", "q8-affine")
    assert (full.num_layers, full.hidden) == (LAYERS, 64)
    assert full.threads == default_threads()
    assert full.model == pack.spec.base_name
    assert full.device


def test_every_figure_has_its_label(full: DeviceProfile) -> None:
    measured = {name for name in FIGURES if full.labels[name] == "measured"}
    assert measured - {"power"} == set(FIGURES) - {"power", "batch", "kl"}
    assert full.labels["batch"] == "modelled"
    assert full.labels["kl"] == "unavailable"
    assert (full.kl, full.batch[-1]) == (None, (64.0, 64.0))
    assert (full.labels["power"] == "measured") == (full.active_w is not None)


def test_times_grow_with_rows_and_context(full: DeviceProfile) -> None:
    assert [rows for rows, _ in full.prefill] == [1, 8, 32, 64, 128, 256, 512]
    assert [context for context, _ in full.decode] == [16, 256, 1024, 4096]
    for curve in (full.prefill, full.decode):
        seconds = [s for _, s in curve]
        assert seconds == sorted(seconds)
        assert seconds[0] > 0
    assert full.prefill[-1][1] > 4 * full.prefill[0][1]
    assert full.decode[-1][1] > 1.2 * full.decode[0][1]
    assert full.prefill_context_s > 0
    assert min(full.step_s, full.embed_row_s, full.head_s, full.codec_row_s, full.load_s) > 0
    assert full.codec_row_s < full.load_s
    assert sum(full.layer_share) == pytest.approx(LAYERS, rel=1e-3)


def test_a_step_takes_about_as_long_as_told(full: DeviceProfile, pack: Pack) -> None:
    runner = BlockRunner(pack)
    runner.load(range(LAYERS), embed=True, head=True)
    cache = runner.new_cache(range(LAYERS), capacity=256)
    runner.forward(cache, runner.embed([5] * 16))
    seconds = []
    for token in range(101):
        started = time.perf_counter()
        runner.head(runner.forward(cache, runner.embed([token])))
        seconds.append(time.perf_counter() - started)
    told = full.step_s + LAYERS * full.decode[0][1] + full.head_s
    # Wide, for what else runs on the machine; a forgotten layer count or unit is beyond.
    assert told / 4 < statistics.median(seconds) < told * 4


def test_memory_is_measured_in_a_process_of_its_own(full: DeviceProfile, pack: Pack) -> None:
    assert full.layer_bytes > 0.5 * pack.bytes_per_block[1]
    assert full.embed_bytes + full.scratch_bytes > 1_000_000  # the runtime's own buffers


def test_threads_that_others_hold_up_are_told_of(pack: Pack, no_sensor: Path) -> None:
    """The times are too long then, and a profile says so. Other work: three that spin for every core."""
    script = "import time\nprint(flush=True)\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    command, cores = [sys.executable, "-c", script], len(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        rivals = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3 * cores)]
        for rival in rivals:
            stack.enter_context(rival)
            stack.callback(rival.kill)
        for rival in rivals:
            assert rival.stdout is not None
            rival.stdout.readline()  # it spins
        assert DISTURBED in measure_edge(pack, quick=True).note


def test_quick_models_the_memory(pack: Pack, no_sensor: Path) -> None:
    quick = measure_edge(pack, quick=True)
    assert quick.labels["memory"] == "modelled"
    size = model_memory(pack)
    assert (quick.layer_bytes, quick.head_bytes) == (size.layer_bytes, size.head_bytes)
    assert quick.layer_bytes > pack.bytes_per_block[1]
    assert quick.labels["power"] == "unavailable"
    assert (quick.idle_w, quick.active_w) == (None, None)


def test_the_source_of_the_power(pack: Pack, no_sensor: Path) -> None:
    declared = measure_edge(pack, quick=True, watts=(2.0, 9.0))
    assert declared.labels["power"] == "modelled"
    assert (declared.idle_w, declared.active_w) == (2, 9)
    write(no_sensor, ina(1, "VDD_IN", 5000, 1400))
    measured = measure_edge(pack, quick=True, watts=(2.0, 9.0))
    assert measured.labels["power"] == "measured"
    assert measured.active_w == pytest.approx(7, rel=0.01)  # joules over a time that was measured
    assert "INA3221" in measured.note
    write(no_sensor, ina(1, "VDD_IN", 5000, 0))  # a sensor that stands still
    assert measure_edge(pack, quick=True).labels["power"] == "unavailable"
    write(no_sensor, ina(1, "VDD_IN", "nan", 1400))
    assert measure_edge(pack, quick=True).labels["power"] == "unavailable"


def test_a_model_that_does_not_fit_is_measured_in_groups(pack: Pack, no_sensor: Path) -> None:
    said: list[tuple[str, float]] = []
    small = measure_edge(pack, quick=True, memory_mb=1, progress=lambda *what: said.append(what))
    assert [share for _, share in said] == [0, 0.25, 0.5, 0.75, 1]  # layer by layer
    assert len(small.layer_share) == LAYERS
    assert small.decode[0][1] > 0


def test_the_measured_kl_is_passed_on(tmp_path: Path, no_sensor: Path) -> None:
    pack = tiny_pack(tmp_path, num_hidden_layers=1, max_position_embeddings=8)
    (pack.path / "build.json").write_text(json.dumps({"kl_to_source": 0.25}))
    profile = measure_edge(Pack.open(pack.path), quick=True)
    assert (profile.kl, profile.labels["kl"]) == (0.25, "measured")
    # A context of 8 tokens leaves little to measure, and one layer no line to fit.
    assert (profile.decode[0][0], profile.prefill[-1][0], profile.precision) == (0, 8, "f32")
    (pack.path / "build.json").write_text('{"kl_to_source": NaN}')
    assert measure_edge(Pack.open(pack.path), quick=True).labels["kl"] == "unavailable"


def test_what_cannot_be_measured(pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        measure_edge(pack, quick=True, watts=(5.0, float("nan")))
    assert error.value.code == "bad_watts"
    with pytest.raises(ConfigError) as error:
        measure_edge(pack, quick=True, provider="abacus")
    assert error.value.code == "unknown_provider"
    damaged = tiny_pack(tmp_path, num_hidden_layers=2)
    weights = bytearray(damaged.weights_path.read_bytes())
    weights[damaged.block("layer.1").offset] ^= 1
    damaged.weights_path.write_bytes(weights)
    with pytest.raises(ModelFileError) as damage:
        measure_edge(damaged, quick=True)
    assert damage.value.code == "hash_mismatch"

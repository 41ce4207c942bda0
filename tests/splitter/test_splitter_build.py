"""Building: the same bytes every time, no half pack ever, no second rounding, a report by the contract."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.protocol.errors import ConfigError, IsthmusError, ModelFileError, UnsupportedModelError
from isthmus.quant.measure import relative_rms_error
from isthmus.quant.schemes import Kind, Packed
from isthmus.splitter.atomic import exclusive, file_errors, publish, work_directory
from isthmus.splitter.build import build_pack
from isthmus.splitter.checkpoint import Checkpoint, open_checkpoint
from isthmus.splitter.pack import Pack
from isthmus.splitter.packing import candidate_schemes, pack_block, parse_bits
from isthmus.splitter.sources import pull
from tests.splitter.packs import build, tiny_pack, tiny_source
from tests.tiny import make_tiny

REPORT_FIELDS = {
    "pack", "model_identity", "num_layers", "bits", "scheme",
    "weights_bytes", "bytes_per_block", "kl_to_source",
}  # fmt: skip


def contents(pack: Path) -> dict[str, bytes]:
    """Every file of a pack but build.json, which holds timings."""
    files = [path for path in sorted(pack.rglob("*")) if path.is_file() and path.name != "build.json"]
    return {str(path.relative_to(pack)): path.read_bytes() for path in files}


def stored_matrix(pack: Pack, block: str, key: str) -> Packed:
    """One matrix as the pack's bytes hold it."""
    weights = pack.weights_path.read_bytes()
    arrays: dict[str, Any] = {}
    for name, entry in pack.manifest.tensors[block].items():
        if name.startswith(f"{key}."):
            flat = np.frombuffer(weights, entry.dtype, int(np.prod(entry.shape)), entry.offset)
            arrays[name.removeprefix(f"{key}.")] = flat.reshape(entry.shape)
    if "W" in arrays:
        return Packed("f32", arrays["W"].shape, {"weight": arrays["W"]})
    rows, groups, width = arrays["B"].shape
    kind: Kind = "q8" if width == 32 else "q4_sum" if "C" in arrays else "q4"
    return Packed(kind, (rows, groups * 32), arrays)


def dense_rows(source: Checkpoint, names: tuple[str, ...]) -> np.ndarray[Any, Any]:
    return np.concatenate([source.dense(name) for name in names])


QKV = tuple(f"layers.1.{part}.weight" for part in "qkv")


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_the_same_source_gives_the_same_bytes(tmp_path: Path, bits: Any) -> None:
    again = build(tiny_source(), tmp_path / "again", bits)
    assert not again.reused
    first, second = contents(tiny_pack(bits)), contents(again.pack)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_auto_and_asked_bits_give_the_same_bytes_for_the_same_scheme(tmp_path: Path) -> None:
    auto = build(tiny_source(), tmp_path / "auto", "auto")
    asked = build(tiny_source(), tmp_path / "asked", auto.bits)  # type: ignore[arg-type]  # 4, 8 or 32
    assert asked.scheme == auto.scheme
    assert contents(auto.pack) == contents(asked.pack)
    assert auto.choice["reason"] != asked.choice["reason"]


def test_the_report_has_the_contracts_fields(tmp_path: Path) -> None:
    report = build(tiny_source(), tmp_path / "pack", "auto")
    loaded = json.loads(json.dumps(report.to_json()))
    assert loaded.keys() >= REPORT_FIELDS
    assert loaded["pack"] == str(tmp_path / "pack")
    assert loaded["num_layers"] == 4
    assert len(loaded["bytes_per_block"]) == 6
    assert sum(loaded["bytes_per_block"]) <= loaded["weights_bytes"]
    assert loaded["kl_to_source"] <= 1e-2
    assert loaded["choice"]["reason"]
    measured = {candidate["scheme"]: candidate for candidate in loaded["choice"]["candidates"]}
    assert set(measured) == {"q8-affine", "q4-affine", "f32"}
    assert measured["f32"]["kl"] == 0.0
    assert 0 < measured["q8-affine"]["kl"] < measured["q4-affine"]["kl"]
    for candidate in measured.values():
        assert candidate["passes"] == (candidate["kl"] <= 1e-2)
        assert ("decode_tokens_per_s" in candidate) <= candidate["passes"]


def test_a_wider_source_at_4_bits_is_fitted_and_its_kl_reported(tmp_path: Path) -> None:
    report = build(tiny_source(), tmp_path / "pack", 4)
    assert (report.scheme, report.bits) == ("q4-affine", 4)
    assert report.kl_to_source > 0
    assert "4 bits were asked for" in report.choice["reason"]


def test_the_f32_pack_holds_the_source(tmp_path: Path) -> None:
    pack = Pack.open(tiny_pack(32))
    assert pack.kl_to_source == 0.0
    with open_checkpoint(tiny_source()) as source:
        np.testing.assert_array_equal(
            stored_matrix(pack, "layer.1", "layers.1.qkv").dequantize(), dense_rows(source, QKV)
        )


@pytest.mark.parametrize("gguf", ["Q4_0", "Q4_1"])
def test_4_bits_of_a_4_bit_source_are_its_own_integers(gguf: str) -> None:
    pack = Pack.open(tiny_pack(4, gguf=gguf))
    assert pack.scheme == "q4-native"
    assert pack.manifest.quant["qkv"] == [f"{'q4' if gguf == 'Q4_0' else 'q4_sum'} from {gguf}"]
    matrix = stored_matrix(pack, "layer.1", "layers.1.qkv")
    with open_checkpoint(tiny_source(gguf=gguf)) as source:
        integers = []
        for name in QKV:
            blocks = source.blocks(name)
            assert blocks is not None
            integers.append(blocks.to_affine()[0])
        np.testing.assert_array_equal(matrix.integers(), np.concatenate(integers))
        np.testing.assert_allclose(matrix.dequantize(), dense_rows(source, QKV), rtol=1e-5, atol=1e-7)


def test_embedding_and_head_stay_at_8_bits_at_4() -> None:
    pack = Pack.open(tiny_pack(4, gguf="Q4_1"))
    assert stored_matrix(pack, "embed", "embed").bits == 8
    assert stored_matrix(pack, "head", "head").bits == 8


@pytest.mark.parametrize("gguf", ["Q4_0", "Q4_1"])
def test_a_4_bit_source_is_never_rounded_to_another_4_bit_grid(gguf: str) -> None:
    with open_checkpoint(tiny_source(gguf=gguf)) as source:
        assert candidate_schemes(source, 4) == ["q4-native"]
        assert candidate_schemes(source, "auto") == ["q8-affine", "q4-native", "f32"]


def test_q8_0_is_taken_raw() -> None:
    pack = Pack.open(tiny_pack(8, gguf="Q8_0"))
    with open_checkpoint(tiny_source(gguf="Q8_0")) as source:
        matrix = stored_matrix(pack, "embed", "embed")
        np.testing.assert_array_equal(matrix.dequantize(), source.dense("embed.weight"))


def test_5_bit_sources_take_the_searched_8_bits() -> None:
    with open_checkpoint(tiny_source(gguf="Q5_1")) as source:
        packed, described = pack_block(source, "q8-affine", "layer.1")
        matrix = packed["layers.1.qkv"]
        assert isinstance(matrix, Packed)
        assert described["qkv"] == "q8 from Q5_1"
        assert relative_rms_error(dense_rows(source, QKV), matrix.dequantize()) < 0.003


def test_a_whole_pack_is_kept_and_a_damaged_one_replaced(tmp_path: Path) -> None:
    out = tmp_path / "pack"
    shutil.copytree(tiny_pack(8), out)
    kept = build(tiny_source(), out, 8)
    assert kept.reused
    assert kept.kl_to_source == Pack.open(out).kl_to_source

    damaged = bytearray((out / "weights.bin").read_bytes())
    damaged[100] ^= 1
    (out / "weights.bin").write_bytes(damaged)
    assert not build(tiny_source(), out, 8).reused
    Pack.open(out, verify=True)

    assert build(tiny_source(), out, 32).scheme == "f32"
    assert Pack.open(out, verify=True).bits == 32


def test_a_directory_that_is_no_pack_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is no pack") as caught:
        build(tiny_source(), tmp_path, 8)
    assert caught.value.code == "not_a_pack"
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def leftovers(folder: Path) -> list[str]:
    """What a build left beside its pack, the (empty) lock file not counted."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_failure_in_mid_build_leaves_nothing(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_source(), tmp_path / "model"))
    pulled = pull(str(copy))
    with open_checkpoint(copy) as source:
        # The last layer's weights vanish after the header was checked, as on a failing disk.
        dense = source.dense

        def failing(name: str) -> Any:
            if name == "layers.3.down.weight":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(copy))
            return dense(name)

        source.dense = failing  # type: ignore[method-assign]  # a disk cannot be made to fail on demand
        (tmp_path / "out").mkdir()
        with pytest.raises(ModelFileError) as caught:
            build_pack(source, pulled, tmp_path / "out" / "pack", bits=8)
    assert caught.value.code == "io_error"
    assert leftovers(tmp_path / "out") == []


KILLED_BUILD = """
import os, sys
from pathlib import Path
from isthmus.splitter.build import build_pack
from isthmus.splitter.checkpoint import open_checkpoint
from isthmus.splitter.sources import pull

def die_at_layer_2(what, share):
    if what.startswith("writing weights") and share >= 0.6:
        os._exit(9)

source, out = sys.argv[1:]
pulled = pull(source)
build_pack(open_checkpoint(pulled.path), pulled, Path(out), bits=8, progress=die_at_layer_2)
"""


@pytest.mark.processes
def test_a_killed_build_leaves_no_half_pack_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    out = tmp_path / "packs" / "tiny"
    killed = subprocess.run([sys.executable, "-c", KILLED_BUILD, str(tiny_source()), str(out)], timeout=120)
    assert killed.returncode == 9
    assert not out.exists()
    assert [name for name in leftovers(out.parent) if name.startswith(".tiny.building-")] != []
    build(tiny_source(), out, 8)
    assert leftovers(out.parent) == ["tiny"]
    assert contents(out) == contents(tiny_pack(8))


def test_concurrent_builds_all_get_one_whole_pack(tmp_path: Path) -> None:
    out, reports = tmp_path / "pack", []
    start = threading.Barrier(3)

    def one() -> None:
        start.wait()
        reports.append(build(tiny_source(), out, 8))

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(report.reused for report in reports) == [False, True, True]
    assert {report.kl_to_source for report in reports} == {Pack.open(out, verify=True).kl_to_source}
    assert leftovers(tmp_path) == ["pack"]


def test_the_lock_is_held_until_the_end(tmp_path: Path) -> None:
    order = []
    entered = threading.Event()

    def second() -> None:
        entered.wait()
        with exclusive(tmp_path / "x"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with exclusive(tmp_path / "x"), work_directory(tmp_path / "x") as work:
        entered.set()
        (work / "new").mkdir()
        publish(work / "new", tmp_path / "x", work)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert leftovers(tmp_path) == ["x"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_a_typed_error() -> None:
    with (
        pytest.raises(ModelFileError, match="disk is full") as caught,
        file_errors("the pack"),
        open("/dev/full", "wb", buffering=0) as handle,
    ):
        handle.write(b"x")
    assert caught.value.code == "disk_full"


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1 << 18))
    with pytest.raises(ModelFileError, match="0 MiB are free") as caught:
        build(tiny_source(), tmp_path / "pack", 32)
    assert caught.value.code == "disk_full"
    assert leftovers(tmp_path) == []


def test_no_permission_is_a_typed_error() -> None:
    with pytest.raises(ConfigError) as caught, file_errors("the pack"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/root/pack")
    assert caught.value.code == "no_write_permission"


def test_odd_widths_only_build_in_fp32(tmp_path: Path) -> None:
    odd = make_tiny("llama", tmp_path / "odd", intermediate_size=72)
    with pytest.raises(UnsupportedModelError, match="72 columns") as caught:
        build(odd, tmp_path / "pack8", 8)
    assert "--bits 32" in caught.value.hint
    report = build(odd, tmp_path / "pack", "auto")
    assert report.scheme == "f32"
    assert set(report.choice["left_out"]) == {"q8-affine", "q4-affine"}


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_every_family_builds(tmp_path: Path, family: str) -> None:
    report = build(tiny_source(family), tmp_path / "pack", 8)
    assert 0 < report.kl_to_source <= 1e-2
    Pack.open(report.pack, verify=True)


def test_bits_are_parsed_from_the_command_line() -> None:
    assert [parse_bits(text) for text in ("auto", "4", "8", "32", 8)] == ["auto", 4, 8, 32, 8]
    with pytest.raises(IsthmusError, match="'5'"):
        parse_bits("5")

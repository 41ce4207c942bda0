"""An intact pack opens and verifies; every kind of damage is a typed error that says what is wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.protocol.errors import IsthmusError, ModelFileError, NotFoundError
from isthmus.splitter.blocks import block_names
from isthmus.splitter.manifest import ALIGNMENT
from isthmus.splitter.pack import Pack
from tests.splitter.packs import tiny_pack


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A pack of its own for the test to damage."""
    return Path(shutil.copytree(tiny_pack(), tmp_path / "pack"))


def edit_manifest(pack: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((pack / "manifest.json").read_text())
    change(manifest)
    (pack / "manifest.json").write_text(json.dumps(manifest))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def replace_graph(pack: Path, graph: bytes) -> None:
    """Another graph for layer 1, with the manifest's hash made to fit: a deliberate forgery."""
    (pack / "blocks/layer.1.onnx").write_bytes(graph)

    def rehash(manifest: dict[str, Any]) -> None:
        manifest["blocks"][2]["graph_sha256"] = hashlib.sha256(graph).hexdigest()

    edit_manifest(pack, rehash)


def test_an_intact_pack_opens_and_verifies() -> None:
    pack = Pack.open(tiny_pack(), verify=True)
    assert (pack.scheme, pack.bits, pack.spec.num_layers) == ("q8-affine", 8, 4)
    assert len(pack.bytes_per_block) == 6
    assert pack.tokenizer().encode("hello") != []
    assert "<|im_start|>" in (pack.chat_template() or "")
    assert pack.generation()["eos_token_id"] == [2]
    assert pack.kl_to_source is not None
    assert pack.identity.weights_hash == pack.manifest.source_hash
    assert [entry.offset % ALIGNMENT for entry in pack.manifest.blocks] == [0] * 6


def test_outlier_channels_cover_the_inner_boundaries() -> None:
    pack = Pack.open(tiny_pack())
    assert sorted(pack.manifest.outlier_channels) == ["1", "2", "3"]
    for boundary in (1, 2, 3):
        channels = pack.outliers(boundary)
        assert len(channels) == 8
        assert list(channels) == sorted(set(channels))
    assert pack.outliers(0) == pack.outliers(4) == ()


def test_a_tied_head_reads_the_embeddings_bytes() -> None:
    pack = Pack.open(tiny_pack(tied=True), verify=True)
    assert pack.block("head").needs == ("embed",)
    assert pack.bytes_per_block[-1] == pack.spec.hidden * 4  # only the final norm


def test_nothing_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no pack"):
        Pack.open(tmp_path)


def test_an_unknown_block_is_not_found() -> None:
    with pytest.raises(NotFoundError, match=r"layer\.4"):
        Pack.open(tiny_pack()).graph_bytes("layer.4")


@pytest.mark.parametrize("index", range(6))
def test_a_flipped_bit_in_any_blocks_weights_is_found(copy: Path, index: int) -> None:
    pack = Pack.open(copy)
    entry = pack.manifest.blocks[index]
    flip(copy / "weights.bin", entry.offset + entry.length // 2)
    with pytest.raises(ModelFileError, match=rf"block {entry.name}") as caught:
        pack.graph_bytes(entry.name)
    assert caught.value.code == "hash_mismatch"
    for other in set(block_names(pack.spec)) - {entry.name}:
        pack.graph_bytes(other)


def test_a_flipped_bit_in_the_embedding_also_stops_a_tied_head(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_pack(tied=True), tmp_path / "pack"))
    flip(copy / "weights.bin", 5)
    with pytest.raises(ModelFileError, match="block embed"):
        Pack.open(copy).graph_bytes("head")


def test_weights_cut_short_are_found_at_opening(copy: Path) -> None:
    size = (copy / "weights.bin").stat().st_size
    with open(copy / "weights.bin", "r+b") as handle:
        handle.truncate(size - 1)
    with pytest.raises(ModelFileError, match=f"{size - 1} bytes, the manifest says {size}") as caught:
        Pack.open(copy)
    assert caught.value.code == "pack_truncated"


def test_weights_cut_short_after_opening_are_found(copy: Path) -> None:
    pack = Pack.open(copy)
    with open(copy / "weights.bin", "r+b") as handle:
        handle.truncate(100)
    with pytest.raises(ModelFileError) as caught:
        pack.graph_bytes("head")
    assert caught.value.code == "pack_truncated"


@pytest.mark.parametrize("name", ["weights.bin", "blocks/head.onnx", "tokenizer.json"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ModelFileError, match=name):
        Pack.open(copy)


def test_a_cut_manifest_is_refused(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(ModelFileError, match="not JSON"):
        Pack.open(copy)


def test_a_manifest_nested_without_end_is_refused(copy: Path) -> None:
    (copy / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(ModelFileError, match="not JSON"):
        Pack.open(copy)


@pytest.mark.parametrize(
    ("name", "data"),
    [("generation.json", b"[1]"), ("generation.json", b"{"), ("chat_template.jinja", b"\xff")],
)
def test_side_files_that_are_not_what_they_should_be_are_refused(copy: Path, name: str, data: bytes) -> None:
    (copy / name).write_bytes(data)
    edit_manifest(copy, lambda m: m["files"].update({name: hashlib.sha256(data).hexdigest()}))
    pack = Pack.open(copy)
    with pytest.raises(ModelFileError, match=name):
        pack.generation() if name == "generation.json" else pack.chat_template()


def test_a_damaged_build_record_only_loses_the_figures(copy: Path) -> None:
    (copy / "build.json").write_text("{")
    assert Pack.open(copy, verify=True).kl_to_source is None


def set_graph(path: str) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["blocks"][1].update(graph=path)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (set_graph("../outside.onnx"), "path_outside_pack"),
        (set_graph("/etc/passwd"), "path_outside_pack"),
        (set_graph("blocks/layer.1.onnx"), "path_outside_pack"),
        (lambda m: m["blocks"].pop(), "bad_pack"),
        (lambda m: m["blocks"][1].update(offset=0), "bad_pack"),
        (lambda m: m["blocks"][2].update(length=m["blocks"][2]["length"] + ALIGNMENT), "bad_pack"),
        (lambda m: m["blocks"][1].update(length=-1), "bad_pack"),
        (lambda m: m["blocks"][1].update(needs=["head"]), "bad_pack"),
        (lambda m: m.update(weights_bytes=m["weights_bytes"] + 1), "bad_pack"),
        (lambda m: m["tensors"].pop("layer.1"), "bad_pack"),
        (lambda m: m["tensors"]["layer.1"]["layers.1.o.B"].update(offset=0), "bad_pack"),
        (lambda m: m["tensors"]["layer.1"]["layers.1.o.B"].update(shape=[1 << 40, 32]), "bad_pack"),
        (lambda m: m["tensors"]["layer.1"]["layers.1.o.B"].update(dtype="float16"), "bad_pack"),
        (lambda m: m["outlier_channels"].update({"1": [64]}), "bad_pack"),
        (lambda m: m["outlier_channels"].update({"1": [3, 3]}), "bad_pack"),
        (lambda m: m["outlier_channels"].update({"9": [3]}), "bad_pack"),
        (lambda m: m["files"].update({"../secret": "0" * 64}), "bad_pack"),
        (lambda m: m["files"].pop("tokenizer.json"), "bad_pack"),
        (lambda m: m["identity"].pop("tokenizer_hash"), "bad_pack"),
        (lambda m: m.update(surprise=1), "bad_pack"),
        (lambda m: m["spec"].update(num_layers=1000), "bad_pack"),
        (lambda m: m["spec"].update(num_layers=10**9), "bad_model_file"),
    ],
)
def test_a_forged_manifest_is_refused(
    copy: Path, change: Callable[[dict[str, Any]], None], code: str
) -> None:
    edit_manifest(copy, change)
    with pytest.raises(ModelFileError) as caught:
        Pack.open(copy)
    assert caught.value.code == code


def test_a_graph_that_reads_another_blocks_bytes_is_refused(copy: Path) -> None:
    replace_graph(copy, (copy / "blocks/layer.0.onnx").read_bytes())
    with pytest.raises(ModelFileError, match="gives to no tensor of the block") as caught:
        Pack.open(copy).graph_bytes("layer.1")
    assert caught.value.code == "bad_graph"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_manifest_never_gives_an_untyped_error(copy: Path, data: st.DataObject) -> None:
    original = (tiny_pack() / "manifest.json").read_bytes()
    at = data.draw(st.integers(0, len(original) - 1))
    damaged = original[:at] + data.draw(st.binary(min_size=1, max_size=3)) + original[at + 1 :]
    (copy / "manifest.json").write_bytes(damaged)
    code, layers = "none", 4
    try:
        layers = Pack.open(copy).spec.num_layers
    except IsthmusError as error:
        code = error.code
    assert code in ("none", "bad_pack", "bad_model_file", "pack_version", "path_outside_pack")
    assert layers == 4

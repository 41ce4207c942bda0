"""Safetensors checkpoints: canonical names and values, and every kind of damage a typed error."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.protocol.errors import IsthmusError, ModelFileError, NotFoundError, UnsupportedModelError
from isthmus.splitter.checkpoint import open_checkpoint
from isthmus.splitter.safetensors_reader import SafetensorsFile
from tests.tiny import make_tiny

HF_NAMES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{name: f"self_attn.{name}_proj" for name in "qkvo"},
    **{name: f"self_attn.{name}" for name in ("q_norm", "k_norm")},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def hf_name(canonical: str) -> str:
    *place, stem, kind = canonical.split(".")
    return ".".join([*(["model.layers", place[1]] if place else []), HF_NAMES[stem], kind])


def write_safetensors(
    path: Path, tensors: dict[str, tuple[str, list[int], bytes]], **header_changes: Any
) -> None:
    """A file from (dtype, shape, bytes); `header_changes` replace entries to make it lie."""
    header: dict[str, Any] = {}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    header |= header_changes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("m") / "llama", num_hidden_layers=2)


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("family", "tied", "extra"),
    [
        ("llama", False, {"attention_bias": True, "mlp_bias": True}),
        ("llama", True, {}),
        ("mistral", False, {}),
        ("qwen2", True, {}),
        ("qwen3", False, {}),
    ],
)
def test_every_tensor_is_there_under_its_canonical_name(
    family: str, tied: bool, extra: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    path = make_tiny(family, tmp_path / family, tied=tied, **extra)
    state = AutoModelForCausalLM.from_pretrained(path).state_dict()
    with open_checkpoint(path) as checkpoint:
        names = checkpoint.names()
        assert {hf_name(name) for name in names} == set(state) - ({"lm_head.weight"} if tied else set())
        assert len(names) == len(set(names))
        for name in names:
            values, info = checkpoint.dense(name), checkpoint.info(name)
            np.testing.assert_array_equal(values, state[hf_name(name)].numpy())
            assert (values.shape, values.nbytes, info.storage) == (info.shape, info.nbytes, "F32")
            owner = values if values.base is None else values.base
            assert owner.flags.owndata
            assert checkpoint.blocks(name) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_widened_exactly(dtype: str, tiny_llama: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.info("embed.weight").storage == {"bfloat16": "BF16", "float16": "F16"}[dtype]
        for name in checkpoint.names():
            np.testing.assert_array_equal(
                checkpoint.dense(name), model.state_dict()[hf_name(name)].float().numpy()
            )


def test_sharded_equals_single(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with open_checkpoint(tmp_path) as shards, open_checkpoint(tiny_llama) as single:
        assert shards.names() == single.names()
        for name in single.names():
            np.testing.assert_array_equal(shards.dense(name), single.dense(name))
        assert shards.source_hash == single.source_hash


def test_source_hash_follows_the_weights(copy: Path, tiny_llama: Path) -> None:
    with open_checkpoint(tiny_llama) as original, open_checkpoint(copy) as other:
        assert original.source_hash == other.source_hash
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with open_checkpoint(tiny_llama) as original, open_checkpoint(copy) as other:
        assert original.source_hash != other.source_hash


def test_reading_is_lazy_and_arrays_outlive_the_checkpoint(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama)
    values = checkpoint.dense("embed.weight")
    expected = values.copy()
    checkpoint.close()
    checkpoint.close()
    np.testing.assert_array_equal(values, expected)
    with pytest.raises(ValueError, match="closed"):
        checkpoint.dense("embed.weight")


def test_unknown_name_is_not_found(tiny_llama: Path) -> None:
    with open_checkpoint(tiny_llama) as checkpoint:
        for call in (checkpoint.info, checkpoint.dense, checkpoint.blocks):
            with pytest.raises(NotFoundError, match=r"layers\.99\.q"):
                call("layers.99.q.weight")


def test_a_tied_copy_of_the_head_is_not_used(copy: Path) -> None:
    edit_config(copy, tie_word_embeddings=True)
    with open_checkpoint(copy) as checkpoint:
        assert "head.weight" not in checkpoint.names()


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"vocab_size": 321}, "embed.weight"),
        ({"intermediate_size": 97}, r"layers\.0\.gate\.weight"),
        ({"num_key_value_heads": 4}, r"layers\.0\.k\.weight"),
    ],
)
def test_shapes_must_be_the_configs(copy: Path, changes: dict[str, Any], tensor: str) -> None:
    edit_config(copy, **changes)
    with pytest.raises(ModelFileError, match=tensor):
        open_checkpoint(copy)


def test_a_missing_tensor_is_named(copy: Path) -> None:
    edit_config(copy, num_hidden_layers=3)
    with pytest.raises(ModelFileError, match=r"layers\.2\.attn_norm\.weight' is missing"):
        open_checkpoint(copy)


def test_tensors_without_a_place_are_refused(copy: Path) -> None:
    edit_config(copy, num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\."):
        open_checkpoint(copy)


def test_old_rotary_tables_beside_the_weights_are_no_weights(copy: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, copy / "model.safetensors")
    with open_checkpoint(copy) as checkpoint:
        assert len(checkpoint.names()) == len(tensors) - 1


def test_cut_short_anywhere(copy: Path) -> None:
    file = copy / "model.safetensors"
    data = file.read_bytes()
    header = 8 + struct.unpack_from("<Q", data)[0]
    for length in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(ModelFileError):
            open_checkpoint(copy)
    file.write_bytes(data + b"\0")
    with pytest.raises(ModelFileError, match=f"the file has {len(data) + 1}"):
        open_checkpoint(copy)


FOUR = b"\0" * 16


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}, ModelFileError, "takes 16 bytes"),
        ({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}, ModelFileError, "takes"),
        ({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, ModelFileError, "shape"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, ModelFileError, "shape"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, ModelFileError, "takes"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 3]}}, ModelFileError, "shape"),
        ({"b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}, ModelFileError, "but 'a' ends at"),
        ({"b": {"dtype": "F32", "shape": [4], "data_offsets": [32, 48]}}, ModelFileError, "cut short"),
        ({"b": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]}}, ModelFileError, "unclaimed"),
        ({"b": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]}}, ModelFileError, "end at byte"),
        ({"a": {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]}}, UnsupportedModelError, "X9"),
        ({"a": {"shape": [4], "data_offsets": [0, 16]}}, ModelFileError, "lacks"),
        ({"a": []}, ModelFileError, "lacks"),
    ],
)
def test_lying_headers(change: dict[str, Any], error: type[Exception], match: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": ("F32", [4], FOUR), "b": ("F32", [4], FOUR)}, **change)
    with pytest.raises(error, match=match):
        SafetensorsFile(path)


@pytest.mark.parametrize("text", [b"[]", b"{", b'{"a":1,"a":2}', b"\xff\xfe", b"[" * 5000])
def test_header_that_is_no_json_object(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ModelFileError):
        SafetensorsFile(path)


def test_header_length_beyond_the_file_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(ModelFileError, match=str(2**63)):
        SafetensorsFile(path)


def test_integer_tensors_are_refused_when_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": ("I8", [4], b"abcd"), "empty": ("F32", [0], b"")})
    file = SafetensorsFile(path)
    with pytest.raises(UnsupportedModelError, match="I8"):
        file.dense("a")
    assert file.dense("empty").shape == (0,)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_in_the_header_never_escape_the_error_tree(
    flips: list[tuple[int, int]], tiny_llama: Path, tmp_path: Path
) -> None:
    data = bytearray((tiny_llama / "model.safetensors").read_bytes())
    for at, mask in flips:
        data[at] ^= mask
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    try:
        file = SafetensorsFile(path)
        for name in file.tensors:
            file.dense(name)
    except IsthmusError:
        return
    # It still parsed: then the flips hit names or values, and sizes are what the bytes hold.
    assert sum(tensor.nbytes for tensor in file.tensors.values()) < len(data)


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ({}, "weight_map"),
        ({"weight_map": {"a": 1}}, "weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, "plain"),
        ({"weight_map": {"a": "gone.safetensors"}}, "cannot open"),
        ({"weight_map": {"a": "model.safetensors"}}, "'a' is not in"),
    ],
)
def test_bad_shard_indexes(index: dict[str, Any], match: str, copy: Path) -> None:
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFileError, match=match):
        open_checkpoint(copy)


def test_paths_that_hold_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(NotFoundError, match=r"0 \.gguf files"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelFileError, match="expected a JSON object"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"neither model\.safetensors"):
        open_checkpoint(copy)


def test_the_declared_name_is_that_of_the_repository(tiny_llama: Path, tmp_path: Path) -> None:
    places = {
        tmp_path / "Tiny-1B-Instruct": "tiny-1b",
        tmp_path / "models--owner--Tiny-1B" / "snapshots" / "0123abcd": "tiny-1b",
        tmp_path / "owner--Tiny-1B@v2": "tiny-1b",
    }
    for place, name in places.items():
        shutil.copytree(tiny_llama, place)
        if "@" in place.name:
            (place / "pulled.json").write_text('{"repo_id": "owner/Tiny-1B"}')
        with open_checkpoint(place) as checkpoint:
            assert checkpoint.spec.base_name == name

"""GGUF checkpoints: values equal transformers', and every kind of damage a typed error."""

from __future__ import annotations

import contextlib
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.protocol.errors import IsthmusError, ModelFileError, UnsupportedModelError
from isthmus.splitter.checkpoint import open_checkpoint
from isthmus.splitter.gguf_reader import TYPES, GGUFFile, dequantize
from tests.splitter.test_splitter_checkpoint import hf_name
from tests.tiny import LLAMA3_ROPE, make_tiny, make_tiny_gguf

U32, STRING, ARRAY = 4, 8, 9


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf_bytes(
    tensors: list[tuple[str, list[int], int, int]],
    body: bytes = b"",
    *,
    keys: list[bytes] | None = None,
    version: int = 3,
    num_tensors: int | None = None,
) -> bytes:
    """A file from (name, dims innermost first, type, offset) entries and raw key/value bytes."""
    keys = keys or []
    head = b"GGUF" + struct.pack(
        "<IQQ", version, len(tensors) if num_tensors is None else num_tensors, len(keys)
    )
    head += b"".join(keys)
    for name, dims, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return head + b"\0" * (-len(head) % 32) + body


def transformers_state(path: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    # Its GGUF path draws a progress bar on stderr.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state: dict[str, Any] = model.state_dict()
    return state


@pytest.fixture(scope="module")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("m") / "llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def tiny_file(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gguf(tiny_source, tmp_path_factory.mktemp("g") / "tiny.gguf", quantisation="Q4_1")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("quantisation", ["F16", "Q4_0", "Q8_0"])
def test_values_equal_transformers_loading(family: str, quantisation: str, tmp_path: Path) -> None:
    # transformers ignores GGUF's key_length for Qwen3 and takes its default of 128.
    extra = {"head_dim": 128} if family == "qwen3" else {}
    source = make_tiny(family, tmp_path / family, tied=family == "qwen2", num_hidden_layers=2, **extra)
    path = make_tiny_gguf(source, tmp_path / "tiny.gguf", quantisation=quantisation)
    state = transformers_state(path)
    with open_checkpoint(path) as checkpoint:
        for name in checkpoint.names():
            np.testing.assert_array_equal(checkpoint.dense(name), state[hf_name(name)].numpy(), err_msg=name)


@pytest.mark.model
def test_values_of_the_real_model_equal_transformers_loading(smollm_gguf: Path) -> None:
    state = transformers_state(smollm_gguf)
    with open_checkpoint(smollm_gguf) as checkpoint:
        assert len(checkpoint.names()) == 272
        assert checkpoint.spec.base_name == "smollm2-135m"
        for name in checkpoint.names():
            np.testing.assert_array_equal(checkpoint.dense(name), state[hf_name(name)].numpy(), err_msg=name)


@pytest.mark.parametrize(
    ("quantisation", "error"),
    [
        ("F32", 0),
        ("F16", 1e-3),
        ("BF16", 5e-3),
        ("Q8_0", 0.01),
        ("Q5_1", 0.06),
        ("Q5_0", 0.07),
        ("Q4_1", 0.12),
        ("Q4_0", 0.14),
    ],
)
def test_values_are_near_the_source_and_rows_in_its_order(
    quantisation: str, error: float, tiny_source: Path, tmp_path: Path
) -> None:
    """A permutation left in would show as an error of 1.4."""
    path = make_tiny_gguf(tiny_source, tmp_path / "tiny.gguf", quantisation=quantisation)
    with open_checkpoint(tiny_source) as source, open_checkpoint(path) as checkpoint:
        assert checkpoint.names() == source.names()
        assert checkpoint.info("layers.0.q.weight").storage == quantisation
        for name in source.names():
            expected, values = source.dense(name), checkpoint.dense(name)
            relative = np.linalg.norm(values - expected) / np.linalg.norm(expected)
            assert relative <= error, name


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_biases_and_llama3_scaling_survive_the_trip(family: str, tmp_path: Path) -> None:
    extra = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    rope = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}
    source = make_tiny(family, tmp_path / family, rope_parameters=rope, **extra)
    path = make_tiny_gguf(source, tmp_path / "tiny.gguf", quantisation="F32")
    with open_checkpoint(source) as hf, open_checkpoint(path) as gguf:
        assert gguf.spec.rope_scaling == hf.spec.rope_scaling is not None
        assert "layers.0.k.bias" in gguf.names()
        for name in hf.names():
            np.testing.assert_array_equal(gguf.dense(name), hf.dense(name), err_msg=name)


@pytest.mark.parametrize("quantisation", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_are_the_stored_ones_in_canonical_row_order(
    quantisation: str, tiny_source: Path, tmp_path: Path
) -> None:
    path = make_tiny_gguf(tiny_source, tmp_path / "tiny.gguf", quantisation=quantisation)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.blocks("final_norm.weight") is None
        for name in ("layers.1.q.weight", "layers.1.k.weight", "layers.1.down.weight", "embed.weight"):
            blocks = checkpoint.blocks(name)
            assert blocks is not None
            assert (blocks.type, (blocks.rows, blocks.cols)) == (quantisation, checkpoint.info(name).shape)
            assert blocks.raw.nbytes == checkpoint.info(name).nbytes
            np.testing.assert_array_equal(dequantize(blocks.raw, blocks.type), checkpoint.dense(name))


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_dequantisation_agrees_with_transformers_own(type_name: str) -> None:
    """Random bytes as blocks: every bit pattern counts, which quantised weights would not show."""
    import torch
    from transformers.integrations.gguf.dequant import dequantize as reference

    number, (_, columns, nbytes) = next((n, t) for n, t in TYPES.items() if t[0] == type_name)
    raw = np.random.default_rng(0).integers(0, 256, (6, 4 * nbytes), dtype=np.uint8)
    values = dequantize(raw, type_name)
    assert values.shape == (6, 4 * columns)
    expected = reference(torch.from_numpy(raw.reshape(-1)), number).reshape(values.shape).numpy()
    finite = np.isfinite(expected)
    assert finite.mean() > 0.8
    np.testing.assert_allclose(
        values[finite], expected[finite], rtol=1e-5, atol=1e-6 * np.abs(expected[finite]).max()
    )


@pytest.mark.parametrize("type_name", ["Q5_0", "Q5_1"])
def test_five_bit_blocks_by_hand(type_name: str) -> None:
    """transformers has no dequantiser of its own for these; the layout is ggml's block_q5_0/q5_1."""
    rng = np.random.default_rng(1)
    q = rng.integers(0, 32, 32)
    low, high = q & 15, int(sum(int(bit) << i for i, bit in enumerate(q >> 4)))
    nibbles = (low[:16] | (low[16:] << 4)).astype(np.uint8).tobytes()
    d, m = np.float16(0.25), np.float16(-3.5)
    head = d.tobytes() + (m.tobytes() if type_name == "Q5_1" else b"")
    raw = np.frombuffer(head + struct.pack("<I", high) + nibbles, np.uint8)[None]
    expected = 0.25 * q - 3.5 if type_name == "Q5_1" else 0.25 * (q - 16.0)
    np.testing.assert_array_equal(dequantize(raw, type_name)[0], expected)


def test_k_quants_in_a_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    raw = rng.integers(0, 120, (8, 2 * 144), dtype=np.uint8)
    path = tmp_path / "k.gguf"
    path.write_bytes(gguf_bytes([("w", [512, 8], 12, 0)], raw.tobytes()))
    file = GGUFFile(path)
    assert (file.tensors["w"].type, file.tensors["w"].shape) == ("Q4_K", (8, 512))
    np.testing.assert_array_equal(file.raw("w"), raw)
    np.testing.assert_array_equal(file.dense("w"), dequantize(raw, "Q4_K"))
    file.close()


def test_metadata_values_of_every_kind(tmp_path: Path) -> None:
    def key(name: str, kind: int, data: bytes) -> bytes:
        return text(name) + struct.pack("<I", kind) + data

    keys = [
        key("u8", 0, b"\xff"),
        key("i8", 1, b"\xff"),
        key("u16", 2, b"\xff\xff"),
        key("i16", 3, b"\xff\xff"),
        key("u32", 4, b"\xff" * 4),
        key("i32", 5, b"\xff" * 4),
        key("f32", 6, struct.pack("<f", 0.5)),
        key("bool", 7, b"\1"),
        key("string", STRING, text("grüß")),
        key("u64", 10, b"\xff" * 8),
        key("i64", 11, b"\xff" * 8),
        key("f64", 12, struct.pack("<d", 0.1)),
        key("strings", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("")),
        key("numbers", ARRAY, struct.pack("<IQ2i", 5, 2, 1, -2)),
    ]
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes([], keys=keys))
    assert GGUFFile(path).metadata == {
        "u8": 255, "i8": -1, "u16": 65535, "i16": -1, "u32": 2**32 - 1, "i32": -1, "f32": 0.5, "bool": True,
        "string": "grüß", "u64": 2**64 - 1, "i64": -1, "f64": 0.1, "strings": ["a", ""], "numbers": [1, -2],
    }  # fmt: skip


A64 = b"\0" * 64
ONE_KEY = text("k") + struct.pack("<I", U32) + struct.pack("<I", 1)


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (b"", ModelFileError, "empty"),
        (b"GGUF", ModelFileError, "cut short"),
        (b"GGML" + gguf_bytes([])[4:], ModelFileError, "not a GGUF file"),
        (gguf_bytes([], version=1), UnsupportedModelError, "version 1"),
        (gguf_bytes([], version=0x03000000), UnsupportedModelError, "little-endian"),
        (gguf_bytes([], num_tensors=2**60), ModelFileError, "cut short"),
        (gguf_bytes([("a", [16], 0, 0)], A64[:63]), ModelFileError, "ends at byte"),
        (gguf_bytes([("a", [16], 0, 0), ("b", [16], 0, 32)], A64 * 2), ModelFileError, "but 'a' ends at"),
        (gguf_bytes([("a", [16], 0, 0), ("a", [16], 0, 64)], A64 * 2), ModelFileError, "twice"),
        (gguf_bytes([("a", [16], 0, 4)], A64 * 2), ModelFileError, "not aligned"),
        (gguf_bytes([("a", [16], 0, 2**62)], A64), ModelFileError, "ends at byte"),
        (gguf_bytes([("a", [16], 99, 0)], A64), UnsupportedModelError, "type 99"),
        (gguf_bytes([("a", [16], 10, 0)], A64), UnsupportedModelError, "type 10"),
        (gguf_bytes([("a", [33, 2], 2, 0)], A64), ModelFileError, "whole Q4_0 blocks"),
        (gguf_bytes([("a", [0], 0, 0)], A64), ModelFileError, "shape"),
        (gguf_bytes([("a", [2**40, 2**40], 0, 0)], A64), ModelFileError, "shape"),
        (gguf_bytes([("a", [1] * 9, 0, 0)], A64), ModelFileError, "9 dimensions"),
        (gguf_bytes([], keys=[ONE_KEY, ONE_KEY]), ModelFileError, "occurs twice"),
        (gguf_bytes([], keys=[text("k") + struct.pack("<I", 77)]), ModelFileError, "value type 77"),
        (gguf_bytes([], keys=[struct.pack("<Q", 2**63) + b"k"]), ModelFileError, "cut short"),
        (
            gguf_bytes([], keys=[struct.pack("<Q", 4) + b"\xff\xff\xff\xff" + b"\0" * 8]),
            ModelFileError,
            "UTF-8",
        ),
        (
            gguf_bytes([], keys=[text("k") + struct.pack("<IIQ", ARRAY, STRING, 2**40)]),
            ModelFileError,
            f"{2**40} strings",
        ),
        (
            gguf_bytes([], keys=[text("k") + struct.pack("<IIQ", ARRAY, 5, 2**40)]),
            ModelFileError,
            f"{2**40} values",
        ),
        (gguf_bytes([], keys=[text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1)]), ModelFileError, "type 9"),
        (
            gguf_bytes([], keys=[text("general.alignment") + struct.pack("<II", U32, 3)]),
            ModelFileError,
            "power of two",
        ),
        (
            gguf_bytes([], keys=[text("general.alignment") + struct.pack("<II", U32, 0)]),
            ModelFileError,
            "power of two",
        ),
    ],
)
def test_damage_is_named(data: bytes, error: type[Exception], match: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(error, match=match):
        GGUFFile(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 14000), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_in_the_header_never_escape_the_error_tree(
    flips: list[tuple[int, int]], tiny_file: Path, tmp_path: Path
) -> None:
    data = bytearray(tiny_file.read_bytes())
    for at, mask in flips:
        data[at] ^= mask
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    try:
        with open_checkpoint(path) as checkpoint:
            shapes = [checkpoint.dense(name).shape for name in checkpoint.names()]
            expected = list(checkpoint.spec.tensor_shapes().values())
    except IsthmusError:
        return
    assert shapes == expected


@pytest.mark.parametrize(
    ("key", "old", "new", "error", "match"),
    [
        ("general.architecture", b"llama", b"mamba", UnsupportedModelError, "mamba"),
        ("llama.embedding_length", struct.pack("<I", 64), struct.pack("<I", 32), ModelFileError, "shape"),
        ("llama.block_count", struct.pack("<I", 2), struct.pack("<I", 3), ModelFileError, "missing"),
        ("llama.block_count", struct.pack("<I", 2), struct.pack("<I", 1), UnsupportedModelError, "no place"),
    ],
)
def test_metadata_that_contradicts_the_tensors(
    key: str, old: bytes, new: bytes, error: type[Exception], match: str, tiny_file: Path, tmp_path: Path
) -> None:
    data = tiny_file.read_bytes()
    at = data.index(old, data.index(key.encode()) + len(key))
    path = tmp_path / "x.gguf"
    path.write_bytes(data[:at] + new + data[at + len(old) :])
    with pytest.raises(error, match=match):
        open_checkpoint(path)


def test_opening_is_light(tiny_file: Path) -> None:
    """The cloud opens checkpoints too: no tokeniser, no gguf package until blocks are dequantised."""
    import subprocess
    import sys

    code = (
        "import sys; from isthmus.splitter.checkpoint import open_checkpoint; "
        f"open_checkpoint({str(tiny_file)!r}).source_hash; "
        "print(sorted(set(sys.modules) & {'gguf', 'tokenizers', 'torch', 'onnxruntime', 'huggingface_hub'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

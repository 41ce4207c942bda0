"""Cases of damaged and lying checkpoints: what is done to a good file's bytes, and which error names it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

BAD, UNSUPPORTED = "bad_model_file", "unsupported_model"
Damage = Callable[[bytes], bytes]


@dataclass(frozen=True)
class FileAttack:
    """`damage` makes the bytes of `file` bad; `code` is the error of whoever opens the model then.

    `file`: "gguf" for the one file of that format, else the name of one in a Hugging Face folder.
    """

    item: str
    name: str
    file: str
    damage: Damage
    code: str = BAD

    def __str__(self) -> str:
        return f"{self.item}: {self.name}"


_SAFE, _CONFIG = "model.safetensors", "config.json"


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _swap(old: bytes, new: bytes) -> Damage:
    """The first `old` becomes `new`, which is as long."""
    assert len(old) == len(new)

    def damage(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new, 1)

    return damage


def _put(at: int, new: bytes) -> Damage:
    return lambda data: data[:at] + new + data[at + len(new) :]


def _value(key: str, kind: int, new: bytes) -> Damage:
    """The value of a GGUF key, which has type `kind`."""
    head = _text(key) + struct.pack("<I", kind)

    def damage(data: bytes) -> bytes:
        at = data.index(head) + len(head)
        return data[:at] + new + data[at + len(new) :]

    return damage


def _entry(change: Callable[[list[int]], None], tensor: str = "blk.0.attn_q.weight") -> Damage:
    """The numbers of a matrix in GGUF's table: [dimensions, inner, outer, type, offset]."""
    layout = struct.Struct("<IQQIQ")

    def damage(data: bytes) -> bytes:
        at = data.index(_text(tensor)) + len(_text(tensor))
        numbers = list(layout.unpack_from(data, at))
        change(numbers)
        return data[:at] + layout.pack(*numbers) + data[at + layout.size :]

    return damage


def _set(index: int, value: int) -> Damage:
    def change(numbers: list[int]) -> None:
        numbers[index] = value

    return _entry(change)


def _onto_its_neighbour(data: bytes) -> bytes:
    """attn_q's offset becomes attn_k's: both are whole, and the same bytes."""
    layout = struct.Struct("<IQQIQ")
    name = _text("blk.0.attn_k.weight")
    offset = layout.unpack_from(data, data.index(name) + len(name))[4]
    return _set(4, offset)(data)


def _header(change: Callable[[dict[str, Any]], None]) -> Damage:
    """A safetensors header changed as JSON, padded to its old length so that the offsets stay true."""

    def damage(data: bytes) -> bytes:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header, separators=(",", ":")).encode()
        size = max(length, len(text))
        return struct.pack("<Q", size) + text.ljust(size) + data[8 + length :]

    return damage


_Q = "model.layers.0.self_attn.q_proj.weight"
_K = "model.layers.0.self_attn.k_proj.weight"


def _field(name: str, value: Any, tensor: str = _Q) -> Damage:
    return _header(lambda header: header[tensor].update({name: value}))


def _config(**fields: Any) -> Damage:
    return lambda data: json.dumps({**json.loads(data), **fields}).encode()


def _upto(share: float, less: int = 0) -> Damage:
    return lambda data: data[: int(len(data) * share) - less]


_cut = partial(FileAttack, "GGUF or safetensors cut short")
_lie = partial(FileAttack, "header lying about sizes")
_overlap = partial(FileAttack, "overlapping tensors")
_quant = partial(FileAttack, "unknown quant type", code=UNSUPPORTED)
_arch = partial(FileAttack, "unknown architecture", code=UNSUPPORTED)
_missing = partial(FileAttack, "tensor missing")
_shape = partial(FileAttack, "shape ≠ config")

FILE_ATTACKS: tuple[FileAttack, ...] = (
    *(
        _cut(f"{file} to {n} bytes", file, partial(lambda n, data: data[:n], n))
        for file in ("gguf", _SAFE)
        for n in (0, 1, 3, 4, 7, 8, 9, 23, 24, 25, 60, 100, 500, 1000, 2000)
    ),
    *(
        _cut(f"{file} to {share:.0%}", file, _upto(share))
        for file in ("gguf", _SAFE)
        for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
    ),
    _cut("gguf without its last 64 bytes", "gguf", _upto(1, 64)),
    _cut("safetensors without its last byte", _SAFE, _upto(1, 1)),
    _cut("safetensors with a byte too many", _SAFE, lambda data: data + b"\0"),
    _cut("config to half", _CONFIG, _upto(0.5)),
    _cut("config to nothing", _CONFIG, lambda _: b""),
    _cut("config nested without end", _CONFIG, lambda _: b"[" * 200_000),
    _cut("not GGUF at all", "gguf", _put(0, b"GGML")),
    # ---- sizes
    *(_lie(f"{n} tensors", "gguf", _put(8, struct.pack("<Q", n))) for n in (2**60, 2**64 - 1, 10**6)),
    *(_lie(f"{n} keys", "gguf", _put(16, struct.pack("<Q", n))) for n in (2**60, 2**64 - 1, 10**6)),
    *(_lie(f"a key of {n} bytes", "gguf", _put(24, struct.pack("<Q", n))) for n in (2**63, 2**40, 10**7)),
    _lie("an array of 2⁴⁰ strings", "gguf", _value("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2**40))),
    _lie(
        "an array of 2⁶⁴−1 numbers",
        "gguf",
        _value("tokenizer.ggml.token_type", 9, struct.pack("<IQ", 5, 2**64 - 1)),
    ),
    _lie("an array of arrays", "gguf", _value("tokenizer.ggml.token_type", 9, struct.pack("<IQ", 9, 1))),
    _lie("a tensor of 2⁴⁰ rows", "gguf", _set(2, 2**40)),
    _lie(
        "a tensor whose size wraps at 64 bits",
        "gguf",
        _entry(lambda n: n.__setitem__(slice(1, 3), [2**32, 2**33])),
    ),
    _lie("a tensor of no rows", "gguf", _set(2, 0)),
    _lie("a tensor of 99 dimensions", "gguf", _set(0, 99)),
    _lie("rows that are no whole blocks", "gguf", _set(1, 63)),
    _lie("a tensor far behind the end", "gguf", _set(4, 2**62)),
    _lie("a tensor that wraps around", "gguf", _set(4, 2**64 - 32)),
    _lie("a tensor between two places", "gguf", _set(4, 7)),
    _lie("2³¹ layers", "gguf", _value("llama.block_count", 4, struct.pack("<I", 2**31))),
    _lie("a header of 2⁶³ bytes", _SAFE, _put(0, struct.pack("<Q", 2**63))),
    _lie("a header of 100 MB", _SAFE, _put(0, struct.pack("<Q", 10**8))),
    _lie("a header of no bytes", _SAFE, _put(0, struct.pack("<Q", 0))),
    _lie("twice the elements", _SAFE, _field("shape", [128, 64])),
    _lie("a product that wraps", _SAFE, _field("shape", [2**32, 2**32])),
    _lie("a negative size", _SAFE, _field("shape", [-64, -64])),
    _lie("a size that is no number", _SAFE, _field("shape", ["64", 64])),
    _lie("an end before the begin", _SAFE, _field("data_offsets", [2**20, 0])),
    _lie("an end behind the file", _SAFE, _field("data_offsets", [2**40, 2**40 + 16384])),
    _lie("offsets that are none", _SAFE, _field("data_offsets", None)),
    _lie("a tensor that is a list", _SAFE, _header(lambda h: h.update({_Q: []}))),
    _lie("10⁹ layers", _CONFIG, _config(num_hidden_layers=10**9)),
    _lie("layers below zero", _CONFIG, _config(num_hidden_layers=-1)),
    _lie("a vocabulary that is no number", _CONFIG, _config(vocab_size="many")),
    # ---- places
    _overlap("two GGUF tensors in one place", "gguf", _onto_its_neighbour),
    _overlap("a GGUF tensor at the begin of another", "gguf", _set(4, 0)),
    _overlap(
        "two safetensors in one place",
        _SAFE,
        _header(
            lambda h: h[_K].update(data_offsets=[h[_Q]["data_offsets"][0], h[_Q]["data_offsets"][0] + 8192])
        ),
    ),
    _overlap("a hole between two tensors", _SAFE, _header(lambda h: h.pop(_Q))),
    # ---- kinds
    *(_quant(f"GGUF type {n}", "gguf", _set(3, n)) for n in (4, 5, 10, 16, 36, 99, 2**32 - 1)),
    *(_quant(f"dtype {name}", _SAFE, _field("dtype", name)) for name in ("X9", "F4", "")),
    _quant("GGUF version 9", "gguf", _put(4, struct.pack("<I", 9))),
    _quant("big-endian GGUF", "gguf", _put(4, struct.pack(">I", 3))),
    _arch("mamba as GGUF", "gguf", _value("general.architecture", 8, _text("mamba"))),
    _arch("mamba as a folder", _CONFIG, _config(model_type="mamba", architectures=["MambaForCausalLM"])),
    _arch("no type", _CONFIG, _config(model_type=None)),
    _arch(
        "code of its own",
        _CONFIG,
        _config(auto_map={"AutoModelForCausalLM": "evil.Model"}, model_type="evil"),
    ),
    _arch("another activation", _CONFIG, _config(hidden_act="gelu")),
    # ---- tensors
    _missing("GGUF, under another name", "gguf", _swap(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight")),
    _missing("GGUF, the embedding", "gguf", _swap(b"token_embd.weight", b"token_xxxx.weight")),
    _missing(
        "safetensors, under another name", _SAFE, _swap(_Q.encode(), _Q.replace("q_proj", "x_proj").encode())
    ),
    _missing("a layer more in the config", _CONFIG, _config(num_hidden_layers=3)),
    _missing("a layer more in GGUF", "gguf", _value("llama.block_count", 4, struct.pack("<I", 3))),
    _missing("a layer less in the config", _CONFIG, _config(num_hidden_layers=1), UNSUPPORTED),
    _missing(
        "a layer less in GGUF", "gguf", _value("llama.block_count", 4, struct.pack("<I", 1)), UNSUPPORTED
    ),
    _missing("the same name twice in GGUF", "gguf", _swap(b"blk.0.attn_q.weight", b"blk.1.attn_q.weight")),
    _shape("hidden size halved", _CONFIG, _config(hidden_size=32)),
    _shape("hidden size halved in GGUF", "gguf", _value("llama.embedding_length", 4, struct.pack("<I", 32))),
    _shape("vocabulary doubled", _CONFIG, _config(vocab_size=640)),
    _shape("more heads than channels", _CONFIG, _config(num_attention_heads=128, head_dim=None)),
    _shape("no heads", _CONFIG, _config(num_attention_heads=0)),
    _shape("intermediate size of another model", _CONFIG, _config(intermediate_size=128)),
    _shape(
        "rows and columns exchanged",
        "gguf",
        _entry(lambda n: n.__setitem__(slice(1, 3), n[2:0:-1]), "blk.0.ffn_up.weight"),
    ),
)

"""Which tensors each block of the decoder holds, and the exact arrays a pack stores for them.

A block is one ONNX graph: "embed", "layer.0" … "layer.<N-1>", "head". Its weights are known by *keys*:

    embed                       matrix [vocab, hidden]
    layers.<i>.qkv              matrix, rows q then k then v          layers.<i>.qkv.bias       vector
    layers.<i>.o                matrix                                layers.<i>.o.bias         vector
    layers.<i>.gate_up          matrix, rows gate then up             layers.<i>.gate_up.bias   vector
    layers.<i>.down             matrix                                layers.<i>.down.bias      vector
    layers.<i>.attn_norm, .mlp_norm, .q_norm, .k_norm                 vectors
    final_norm                  vector
    head                        matrix [vocab, hidden]; absent when tied: the head block reads `embed`

Matrices are [out, in] (checkpoint orientation) in every scheme. A matrix key becomes one to four stored
tensors: `<key>.W` (f32) or `<key>.B`, `<key>.scales`, `<key>.zero_points`, `<key>.C`; a vector is `<key>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from isthmus.protocol.errors import ModelFileError, UnsupportedModelError

if TYPE_CHECKING:
    from isthmus.quant.schemes import Packed
    from isthmus.splitter.spec import ModelSpec

Array = npt.NDArray[Any]

BLOCK = 32  # elements that share one scale, in every quantised scheme


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one stored tensor lies in weights.bin. `dtype` is numpy's name; `offset`, `length` in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """What one block stores: `(name, array)` in file order, and the blocks whose tensors it reads as well."""

    name: str
    tensors: list[tuple[str, Array]]
    needs: tuple[str, ...] = field(default=())

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for _, array in self.tensors)


def block_names(spec: ModelSpec) -> list[str]:
    """All blocks in the order of execution and of storage."""
    return ["embed", *(f"layer.{i}" for i in range(spec.num_layers)), "head"]


def block_needs(spec: ModelSpec, block: str) -> tuple[str, ...]:
    """Other blocks whose stored tensors `block` reads: a tied head reads the embedding's."""
    return ("embed",) if block == "head" and spec.tied_embedding else ()


def block_sources(spec: ModelSpec, block: str) -> dict[str, tuple[str, ...]]:
    """Key -> the canonical checkpoint tensors to put one under the other (rows) to make it, in storage order.

    Only the keys the block itself stores. Raises UnsupportedModelError for a block the model does not have.
    """
    if block == "embed":
        return {"embed": ("embed.weight",)}
    if block == "head":
        tied: dict[str, tuple[str, ...]] = {"final_norm": ("final_norm.weight",)}
        return tied if spec.tied_embedding else {**tied, "head": ("head.weight",)}
    kind, _, index = block.partition(".")
    if kind != "layer" or not index.isdigit() or int(index) >= spec.num_layers:
        raise UnsupportedModelError(
            f"no block {block!r} in a model of {spec.num_layers} layers",
            code="unknown_block",
            hint=f"blocks are embed, layer.0 … layer.{spec.num_layers - 1}, head",
        )
    p = f"layers.{int(index)}"
    sources: dict[str, tuple[str, ...]] = {f"{p}.attn_norm": (f"{p}.attn_norm.weight",)}
    sources[f"{p}.qkv"] = (f"{p}.q.weight", f"{p}.k.weight", f"{p}.v.weight")
    if spec.qkv_bias:
        sources[f"{p}.qkv.bias"] = (f"{p}.q.bias", f"{p}.k.bias", f"{p}.v.bias")
    if spec.qk_norm:
        sources[f"{p}.q_norm"] = (f"{p}.q_norm.weight",)
        sources[f"{p}.k_norm"] = (f"{p}.k_norm.weight",)
    sources[f"{p}.o"] = (f"{p}.o.weight",)
    if spec.o_bias:
        sources[f"{p}.o.bias"] = (f"{p}.o.bias",)
    sources[f"{p}.mlp_norm"] = (f"{p}.mlp_norm.weight",)
    sources[f"{p}.gate_up"] = (f"{p}.gate.weight", f"{p}.up.weight")
    if spec.mlp_bias:
        sources[f"{p}.gate_up.bias"] = (f"{p}.gate.bias", f"{p}.up.bias")
    sources[f"{p}.down"] = (f"{p}.down.weight",)
    if spec.mlp_bias:
        sources[f"{p}.down.bias"] = (f"{p}.down.bias",)
    return sources


def key_shape(spec: ModelSpec, key: str) -> tuple[int, ...]:
    """The shape a key must have: (out, in) for matrices, (n,) for vectors."""
    qkv = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    role = key.split(".", 2)[2] if key.startswith("layers.") else key
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (spec.vocab_size, spec.hidden),
        "head": (spec.vocab_size, spec.hidden),
        "final_norm": (spec.hidden,),
        "attn_norm": (spec.hidden,),
        "mlp_norm": (spec.hidden,),
        "q_norm": (spec.head_dim,),
        "k_norm": (spec.head_dim,),
        "qkv": (qkv, spec.hidden),
        "qkv.bias": (qkv,),
        "o": (spec.hidden, spec.num_heads * spec.head_dim),
        "o.bias": (spec.hidden,),
        "gate_up": (2 * spec.intermediate, spec.hidden),
        "gate_up.bias": (2 * spec.intermediate,),
        "down": (spec.hidden, spec.intermediate),
        "down.bias": (spec.hidden,),
    }
    return shapes[role]


def plan_block(spec: ModelSpec, block: str, packed: Mapping[str, Packed | Array]) -> BlockPlan:
    """The arrays to store for `block`, exactly as they go to disk, in order.

    `packed` maps every key of `block_sources(spec, block)` to a `Packed` matrix, or for vectors (and plain
    f32 matrices) a float32 array. Raises ModelFileError where a key is missing or its shape is off.
    """
    tensors: list[tuple[str, Array]] = []
    for key in block_sources(spec, block):
        if key not in packed:
            raise ModelFileError(
                f"block {block!r} needs {key!r}, which the source does not give",
                code="missing_tensor",
                hint="the checkpoint is incomplete",
            )
        tensors += _stored(key, packed[key], key_shape(spec, key))
    return BlockPlan(block, tensors, block_needs(spec, block))


def _stored(key: str, value: Packed | Array, shape: tuple[int, ...]) -> list[tuple[str, Array]]:
    """One key as the list of tensors a pack stores for it; shapes are normalised here, and only here."""
    if tuple(value.shape) != shape:
        raise ModelFileError(
            f"{key!r} has shape {tuple(value.shape)}, the model needs {shape}",
            code="bad_tensor_shape",
            hint="checkpoint and config disagree",
        )
    if isinstance(value, np.ndarray):
        name = key if len(shape) == 1 else f"{key}.W"
        return [(name, np.ascontiguousarray(value, dtype=np.float32))]
    if value.kind == "f32":
        return [(f"{key}.W", np.ascontiguousarray(value.arrays["weight"], dtype=np.float32))]
    rows, cols = shape
    if cols % BLOCK or value.block != BLOCK:
        raise UnsupportedModelError(
            f"{key!r} has {cols} columns in blocks of {value.block}; the graph needs blocks of {BLOCK}",
            code="unsupported_block_size",
            hint="build with --bits 32",
        )
    groups = cols // BLOCK
    arrays = value.arrays
    out: list[tuple[str, Array]] = []
    want = np.dtype(np.uint8), (rows, groups, BLOCK * value.bits // 8)
    out.append((f"{key}.B", _shaped(key, "B", arrays["B"], *want)))
    out.append(
        (f"{key}.scales", _shaped(key, "scales", arrays["scales"], np.dtype(np.float32), (rows, groups)))
    )
    zero_points = arrays.get("zero_points")
    if zero_points is not None:
        shape_zp = (rows, (groups * value.bits + 7) // 8)
        out.append(
            (f"{key}.zero_points", _shaped(key, "zero_points", zero_points, np.dtype(np.uint8), shape_zp))
        )
    block_sums = arrays.get("C")
    if block_sums is not None:
        out.append((f"{key}.C", _shaped(key, "C", block_sums, np.dtype(np.float32), (groups, rows))))
    return out


def _shaped(key: str, part: str, array: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    if array.dtype != dtype or array.size != int(np.prod(shape)):
        raise ModelFileError(
            f"{key}.{part} is {array.dtype}{list(array.shape)}, expected {dtype}{list(shape)}",
            code="bad_tensor_shape",
            hint="the quantiser's layout does not match the graph's",
        )
    return np.ascontiguousarray(array).reshape(shape)

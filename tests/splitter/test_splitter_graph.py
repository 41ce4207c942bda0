"""Blocks and their graphs: what is stored, where it points, reproducibly, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from isthmus.protocol.errors import ModelFileError, UnsupportedModelError
from isthmus.quant.schemes import Packed, pack_f32, pack_q4_affine, pack_q8_affine, pack_q8_symmetric
from isthmus.splitter.blocks import (
    Placement,
    block_names,
    block_needs,
    block_sources,
    key_shape,
    plan_block,
)
from isthmus.splitter.graph import WEIGHTS_FILE, emit_block, emit_whole
from isthmus.splitter.spec import ModelSpec
from tests.tiny import FAMILY_EXTRAS, TINY_SIZES


def spec_of(family: str = "llama", **fields: Any) -> ModelSpec:
    config = {
        **TINY_SIZES,
        **FAMILY_EXTRAS[family],
        "model_type": family,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "num_hidden_layers": 2,
    }
    return dataclasses.replace(ModelSpec.from_hf(config), **fields)


def weights_for(spec: ModelSpec, block: str, packer: Any) -> dict[str, Packed | np.ndarray]:
    noise = np.random.default_rng(0)
    packed: dict[str, Packed | np.ndarray] = {}
    for key in block_sources(spec, block):
        values = noise.normal(size=key_shape(spec, key)).astype(np.float32)
        packed[key] = packer(values) if values.ndim == 2 else values
    return packed


def place(spec: ModelSpec, packer: Any = pack_f32) -> dict[str, Placement]:
    """Placements of all blocks one after another, as a pack writer would lay them out."""
    placements: dict[str, Placement] = {}
    offset = 0
    for block in block_names(spec):
        for name, array in plan_block(spec, block, weights_for(spec, block, packer)).tensors:
            placements[name] = Placement(array.dtype.name, array.shape, offset, array.nbytes)
            offset += array.nbytes
    return placements


def model_of(graph: bytes) -> ir.Model:
    import onnx

    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(graph))
    return model


def operators(graph: bytes) -> list[str]:
    return [node.op_type for node in model_of(graph).graph]


def externals(graph: bytes) -> Mapping[str, tuple[str, int, int]]:
    found = {}
    for name, value in model_of(graph).graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            tensor = value.const_value
            found[name] = (str(tensor.location), tensor.offset or 0, tensor.length or 0)
    return found


# --- blocks


def test_blocks_come_in_order_of_execution() -> None:
    assert block_names(spec_of()) == ["embed", "layer.0", "layer.1", "head"]


@pytest.mark.parametrize("family", FAMILY_EXTRAS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_blocks_hold_every_tensor_of_the_checkpoint_once(family: str, tied: bool) -> None:
    spec = spec_of(family, tied_embedding=tied)
    sources = [
        name for block in block_names(spec) for names in block_sources(spec, block).values() for name in names
    ]
    assert sorted(sources) == sorted(spec.tensor_shapes())


@pytest.mark.parametrize("bias", ["qkv_bias", "o_bias", "mlp_bias"])
def test_each_bias_is_stored_where_the_model_has_it(bias: str) -> None:
    fields: dict[str, Any] = {bias: True}
    with_bias = set(block_sources(spec_of(**fields), "layer.1"))
    without = set(block_sources(spec_of(), "layer.1"))
    assert {key.removeprefix("layers.1.") for key in with_bias - without} == {
        "qkv_bias": {"qkv.bias"},
        "o_bias": {"o.bias"},
        "mlp_bias": {"gate_up.bias", "down.bias"},
    }[bias]


def test_fused_shapes_are_the_sums_of_their_parts() -> None:
    for family in FAMILY_EXTRAS:
        spec = spec_of(family)
        shapes = spec.tensor_shapes()
        for block in block_names(spec):
            for key, names in block_sources(spec, block).items():
                parts = [shapes[name] for name in names]
                assert key_shape(spec, key) == (sum(part[0] for part in parts), *parts[0][1:])


@pytest.mark.parametrize("name", ["layer.2", "layer.-1", "layer.x", "layer", "tail", ""])
def test_unknown_blocks_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        block_sources(spec_of(), name)
    assert caught.value.code == "unknown_block"


def test_a_plan_stores_what_it_is_given() -> None:
    spec = spec_of(tied_embedding=True)
    for block in block_names(spec):
        packed = weights_for(spec, block, pack_q4_affine)
        plan = plan_block(spec, block, packed)
        assert plan.needs == block_needs(spec, block)
        assert plan.nbytes == sum(value.nbytes for value in packed.values())
        assert all(array.flags.c_contiguous for _, array in plan.tensors)
        stored = dict(plan.tensors)
        for key, value in packed.items():
            if isinstance(value, Packed):
                for part in ("B", "scales", "C"):
                    np.testing.assert_array_equal(stored[f"{key}.{part}"].ravel(), value.arrays[part].ravel())
            else:
                np.testing.assert_array_equal(stored[key], value)


def test_a_missing_tensor_is_named() -> None:
    packed = weights_for(spec_of(), "layer.0", pack_f32)
    del packed["layers.0.gate_up"]
    with pytest.raises(ModelFileError, match=r"layers\.0\.gate_up") as caught:
        plan_block(spec_of(), "layer.0", packed)
    assert caught.value.code == "missing_tensor"


@pytest.mark.parametrize("packer", [pack_f32, pack_q8_affine])
def test_a_shape_that_is_not_the_models_is_refused(packer: Any) -> None:
    packed = weights_for(spec_of(), "head", packer)
    packed["head"] = packer(np.ones((320, 96), dtype=np.float32))
    with pytest.raises(ModelFileError, match=r"\(320, 96\).*\(320, 64\)") as caught:
        plan_block(spec_of(), "head", packed)
    assert caught.value.code == "bad_tensor_shape"


def test_arrays_in_a_layout_the_graph_does_not_know_are_refused() -> None:
    packed = weights_for(spec_of(), "embed", pack_q8_affine)
    whole = packed["embed"]
    assert isinstance(whole, Packed)
    for part, wrong in (("B", whole.arrays["B"][:-1]), ("scales", whole.arrays["scales"].astype(np.float64))):
        broken = dataclasses.replace(whole, arrays={**whole.arrays, part: wrong})
        with pytest.raises(ModelFileError, match=rf"embed\.{part}"):
            plan_block(spec_of(), "embed", {"embed": broken})


def test_blocks_of_another_size_are_refused() -> None:
    whole = pack_q8_affine(np.ones((320, 64), dtype=np.float32))
    with pytest.raises(UnsupportedModelError) as caught:
        plan_block(spec_of(), "embed", {"embed": dataclasses.replace(whole, block=64)})
    assert caught.value.code == "unsupported_block_size"


# --- graphs


@pytest.mark.parametrize("packer", [pack_f32, pack_q8_affine, pack_q8_symmetric])
def test_equal_arguments_give_equal_bytes(packer: Any) -> None:
    spec = spec_of("qwen3", tied_embedding=True)
    placements = place(spec, packer)
    shuffled = dict(reversed(list(placements.items())))
    for block in block_names(spec):
        assert emit_block(spec, block, placements) == emit_block(spec, block, shuffled)
    assert emit_whole(spec, placements) == emit_whole(spec, shuffled)


def test_graphs_hold_no_weights_and_point_only_into_the_weights_file() -> None:
    spec = spec_of("qwen2")
    placements = place(spec)
    seen: set[tuple[int, int]] = set()
    for block in block_names(spec):
        graph = emit_block(spec, block, placements)
        assert len(graph) < 8192
        for location, offset, length in externals(graph).values():
            assert location == WEIGHTS_FILE
            seen.add((offset, length))
    assert seen == {(where.offset, where.length) for where in placements.values()}


@pytest.mark.parametrize("packer", [pack_f32, pack_q8_affine, pack_q8_symmetric])
def test_a_tied_head_reads_the_embeddings_bytes(packer: Any) -> None:
    spec = spec_of(tied_embedding=True)
    placements = place(spec, packer)
    embed, head = (externals(emit_block(spec, block, placements)) for block in ("embed", "head"))
    assert set(embed.values()) < set(head.values())
    assert len(head) == len(embed) + 1  # and the norm
    assert not [name for name in placements if name.startswith("head")]


def test_the_block_sum_term_is_in_the_graph_where_it_is_stored() -> None:
    spec = spec_of()
    sums = operators(emit_block(spec, "layer.0", place(spec, pack_q4_affine))).count("ReduceSum")
    plain = operators(emit_block(spec, "layer.0", place(spec, pack_q8_affine))).count("ReduceSum")
    assert (sums, plain) == (4, 0)


def test_the_boundary_is_the_residual_stream() -> None:
    spec = spec_of("qwen3")
    placements = place(spec)
    graphs = {block: model_of(emit_block(spec, block, placements)).graph for block in block_names(spec)}
    assert [value.name for value in graphs["embed"].inputs] == ["ids"]
    layer = graphs["layer.0"]
    assert [value.name for value in layer.outputs] == ["y", "present_key", "present_value"]
    for value in (graphs["embed"].outputs[0], layer.inputs[0], layer.outputs[0], graphs["head"].inputs[0]):
        assert str(value.shape) == "[1,seq,64]"
        assert value.dtype == ir.DataType.FLOAT


@pytest.mark.parametrize(
    ("family", "fields", "count"),
    [("llama", {}, 0), ("qwen3", {}, 2), ("qwen2", {}, 0), ("mistral", {"sliding_window": 8}, 0)],
)
def test_options_of_the_model_reach_the_graph(family: str, fields: dict[str, Any], count: int) -> None:
    spec = spec_of(family, **fields)
    graph = model_of(emit_block(spec, "layer.1", place(spec))).graph
    norms = [node for node in graph if node.op_type == "SimplifiedLayerNormalization"]
    assert len(norms) == 1 + count  # one before attention, Qwen3's two inside it
    attention = next(node for node in graph if node.op_type == "GroupQueryAttention")
    window = attention.attributes.get("local_window_size")
    assert (window.as_int() if window else None) == spec.sliding_window
    assert sum(node.op_type == "Add" for node in graph) == 1 + spec.qkv_bias


def test_a_missing_placement_is_named() -> None:
    spec = spec_of()
    placements = place(spec)
    del placements["layers.0.mlp_norm"]
    with pytest.raises(ModelFileError, match=r"layers\.0\.mlp_norm") as caught:
        emit_block(spec, "layer.0", placements)
    assert caught.value.code == "missing_tensor"


def test_an_unknown_block_has_no_graph() -> None:
    with pytest.raises(UnsupportedModelError):
        emit_block(spec_of(), "layer.2", place(spec_of()))


def test_an_embedding_with_block_sums_is_refused() -> None:
    spec = spec_of()
    with pytest.raises(UnsupportedModelError) as caught:
        emit_block(spec, "embed", place(spec, pack_q4_affine))
    assert caught.value.code == "unsupported_scheme"


def test_weights_of_a_width_the_graph_does_not_know_are_refused() -> None:
    spec = spec_of()
    placements = place(spec, pack_q8_affine)
    wrong = placements["layers.0.o.B"]
    placements["layers.0.o.B"] = dataclasses.replace(wrong, shape=(*wrong.shape[:2], 12))
    with pytest.raises(ModelFileError, match="3 bits"):
        emit_block(spec, "layer.0", placements)

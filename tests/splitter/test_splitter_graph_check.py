"""Graphs are walked without onnx: references are found, hiding places refused, garbage survived."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.protocol.errors import ModelFileError
from isthmus.splitter.graph_check import ExternalTensor, external_tensors


def field(number: int, payload: bytes | int) -> bytes:
    """One protobuf field."""
    if isinstance(payload, int):
        return varint(number << 3) + varint(payload)
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def entry(key: str, value: str) -> bytes:
    return field(13, field(1, key.encode()) + field(2, value.encode()))


ELSEWHERE = field(8, b"w") + entry("location", "../../secret") + entry("offset", "0") + entry("length", "4")
EXTERNAL = ELSEWHERE + field(14, 1)


def test_onnx_irs_own_output_is_read() -> None:
    tensor = ir.ExternalTensor(
        "weights.bin", 4096, 64, ir.DataType.FLOAT, shape=ir.Shape((4, 4)), name="layers.0.o.W"
    )
    weight = ir.Value(name="layers.0.o.W", shape=ir.Shape((4, 4)), const_value=tensor)
    small = ir.Tensor(np.array([1, 2], dtype=np.int64), name="small")
    inside = ir.Value(name="small", shape=ir.Shape((2,)), const_value=small)
    node = ir.node("Reshape", [weight, inside])
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=[weight, inside], name="g")
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    assert external_tensors(model) == [ExternalTensor("layers.0.o.W", "weights.bin", 4096, 64)]


@pytest.mark.parametrize(
    ("graph", "what"),
    [
        (field(15, field(1, EXTERNAL)), "sparse"),
        (field(1, field(5, field(5, EXTERNAL))), "attribute"),
        (field(1, field(5, field(10, EXTERNAL))), "attribute"),
        (field(1, field(5, field(6, field(5, EXTERNAL)))), "subgraph"),
        (field(1, field(5, field(11, field(5, EXTERNAL)))), "subgraphs"),
        (field(5, field(8, b"w") + field(14, 1)), "without a usable file reference"),
        (field(5, ELSEWHERE.replace(b"offset", b"offsex") + field(14, 1)), "without a usable"),
    ],
)
def test_weights_in_odd_places_are_refused(graph: bytes, what: str) -> None:
    with pytest.raises(ModelFileError, match=what):
        external_tensors(field(7, graph))


def test_a_reference_without_the_external_flag_is_still_seen() -> None:
    assert external_tensors(field(7, field(5, ELSEWHERE)))[0].location == "../../secret"


@pytest.mark.parametrize("extra", [field(20, b""), field(25, b"")])
def test_training_and_functions_are_refused(extra: bytes) -> None:
    with pytest.raises(ModelFileError, match="holds"):
        external_tensors(field(7, b"") + extra)


@pytest.mark.parametrize("model", [b"", field(7, b"") * 2, field(7, b"\x0a\xff"), b"\xff" * 12, b"\x3b"])
def test_damaged_bytes_are_refused(model: bytes) -> None:
    with pytest.raises(ModelFileError):
        external_tensors(model)


@given(st.binary(max_size=200))
def test_any_bytes_give_an_answer_or_a_typed_error(data: bytes) -> None:
    code = "bad_graph"
    try:
        found = external_tensors(data)
    except ModelFileError as error:
        found, code = [], error.code
    assert isinstance(found, list)
    assert code == "bad_graph"

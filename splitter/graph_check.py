"""Reads, without the onnx package, where a block's graph takes weights from, and refuses odd ones.

A pack may come from anywhere, and ONNX lets a tensor name any file as its data. So the protobuf is walked and
only the places where Isthmus itself puts tensors may hold one. Field numbers: onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from isthmus.protocol.errors import ModelFileError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# Fields that can carry weights or code our graphs never use: model.training_info, .functions,
# .configuration; graph.sparse_initializer; attribute.g, .graphs, .sparse_tensor(s).
_MODEL_REFUSED = {20: "training info", 25: "local functions", 26: "a device configuration"}
_GRAPH_REFUSED = {15: "sparse initializers"}
_ATTRIBUTE_REFUSED = {6: "a subgraph", 11: "subgraphs", 22: "a sparse tensor", 23: "sparse tensors"}


@dataclass(frozen=True, slots=True)
class ExternalTensor:
    """An initializer whose `length` bytes lie at `offset` of the file `location`."""

    name: str
    location: str
    offset: int
    length: int


def external_tensors(model: bytes) -> list[ExternalTensor]:
    """All external initializers of a serialised ONNX model, in order.

    Raises ModelFileError where the bytes are no protobuf, or hold tensors or code elsewhere than in
    graph.initializer and plain node attributes.
    """
    found: list[ExternalTensor] = []
    graphs = 0
    for field, value in _fields(memoryview(model)):
        _refuse(field, _MODEL_REFUSED)
        if field == 7 and isinstance(value, memoryview):
            graphs += 1
            found += _graph(value)
    if graphs != 1:
        raise _damaged(f"a model with {graphs} graphs")
    return found


def _graph(graph: memoryview) -> list[ExternalTensor]:
    found: list[ExternalTensor] = []
    for field, value in _fields(graph):
        _refuse(field, _GRAPH_REFUSED)
        if not isinstance(value, memoryview):
            continue
        if field == 1:
            _check_node(value)
        elif field == 5:
            tensor = _external(value)
            if tensor is not None:
                found.append(tensor)
    return found


def _check_node(node: memoryview) -> None:
    for field, attribute in _fields(node):
        if field != 5 or not isinstance(attribute, memoryview):
            continue
        for part, value in _fields(attribute):
            _refuse(part, _ATTRIBUTE_REFUSED)
            if part in (5, 10) and isinstance(value, memoryview) and _external(value) is not None:
                raise _damaged("an attribute that reads another file")


def _external(tensor: memoryview) -> ExternalTensor | None:
    """The tensor's reference to a file, or None where its data is inside the graph."""
    name, entries, external = "", {}, False
    for field, value in _fields(tensor):
        if field == 8 and isinstance(value, memoryview):
            name = _text(value)
        elif field == 14:
            external = value == 1
        elif field == 13 and isinstance(value, memoryview):
            pair = {part: _text(text) for part, text in _fields(value) if isinstance(text, memoryview)}
            entries[pair.get(1, "")] = pair.get(2, "")
    if not external and not entries:
        return None
    try:
        return ExternalTensor(name, entries["location"], int(entries["offset"]), int(entries["length"]))
    except (KeyError, ValueError) as error:
        raise _damaged(f"tensor {name!r} without a usable file reference") from error


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """(field number, payload) of one protobuf message: bytes for length-delimited fields, else an integer."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if wire == _BYTES:
            size, at = _varint(message, at)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise _damaged(f"wire type {wire}")
        if at + size > len(message):
            raise _damaged(f"a field of {size} bytes where {len(message) - at} are left")
        payload = message[at : at + size]
        at += size
        yield tag >> 3, payload if wire == _BYTES else int.from_bytes(payload, "little")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _damaged("a number that does not end")


def _text(raw: memoryview) -> str:
    try:
        return bytes(raw).decode()
    except UnicodeDecodeError as error:
        raise _damaged("text that is not UTF-8") from error


def _refuse(field: int, refused: dict[int, str]) -> None:
    if field in refused:
        raise _damaged(refused[field])


def _damaged(what: str) -> ModelFileError:
    return ModelFileError(
        f"a block's graph holds {what}",
        code="bad_graph",
        hint="the pack is damaged or was not built by isthmus; build it again",
    )

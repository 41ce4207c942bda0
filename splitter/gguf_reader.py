"""Parses and validates GGUF files (versions 2 and 3) without loading them.

Own parser rather than `gguf.GGUFReader`: that one checks nothing, and takes 2.2 s and 150 MB to
open a 98 MB file, because it makes one numpy view per token. Its dequantiser is used as it is.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from isthmus.protocol.errors import ModelFileError, UnsupportedModelError
from isthmus.splitter.mapped import MappedFile

# Type id -> (name, elements per block, bytes per block).
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
_TYPE_IDS = {name: number for number, (name, _, _) in TYPES.items()}
_MAX_DIMS = 4
_SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING, _ARRAY = 8, 9
_NUMPY_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies. `shape` is [rows, cols] as stored: GGUF lists dimensions innermost first."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class _Cursor:
    """Reads the header; never past the end of the file, never a loop longer than the bytes allow."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.pos = data, path, 0

    def fail(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.path.name}: {what} at byte {self.pos}", hint="pull the model again")

    def need(self, count: int, what: str) -> None:
        left = len(self.data) - self.pos
        if count > left:
            raise self.fail(f"cut short: {what} needs {count} bytes, {left} left,")

    def scalar(self, fmt: struct.Struct, what: str) -> Any:
        self.need(fmt.size, what)
        (value,) = fmt.unpack_from(self.data, self.pos)
        self.pos += fmt.size
        return value

    def string(self, what: str) -> str:
        length = self.scalar(_U64, what)
        self.need(length, what)
        raw = self.data[self.pos : self.pos + length]
        self.pos += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8") from error

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise self.fail(f"{what} has unknown value type {kind}")
        item_kind, count = self.scalar(_U32, what), self.scalar(_U64, what)
        if item_kind == _STRING:
            self.need(8 * count, f"{what} ({count} strings)")
            return [self.string(what) for _ in range(count)]
        if item_kind not in _NUMPY_SCALARS:
            raise self.fail(f"{what} is an array of unsupported type {item_kind}")
        dtype = np.dtype(_NUMPY_SCALARS[item_kind])
        self.need(count * dtype.itemsize, f"{what} ({count} values)")
        items = np.frombuffer(self.data[self.pos : self.pos + count * dtype.itemsize], dtype)
        self.pos += count * dtype.itemsize
        return items.tolist()


class GGUFFile(MappedFile):
    """An open, validated GGUF file: `.metadata` (plain Python values) and `.tensors` by name.

    Raises `ModelFileError` for anything damaged and `UnsupportedModelError` for tensor types we
    can't read. Nothing of the tensors' contents is read until `raw` or `dense` asks for it.
    """

    def _parse(self) -> None:
        cursor = _Cursor(self._map, self.path)
        cursor.need(24, "the header")
        if self._map[:4] != b"GGUF":
            raise cursor.fail(f"not a GGUF file, it begins with {self._map[:4]!r},")
        cursor.pos = 4
        version = cursor.scalar(_U32, "version")
        if version not in (2, 3):
            # A big-endian file shows its version in the upper bytes.
            raise UnsupportedModelError(
                f"{self.path.name}: GGUF version {version} is not supported",
                hint="supported: 2 and 3, little-endian",
            )
        num_tensors, num_keys = cursor.scalar(_U64, "tensor count"), cursor.scalar(_U64, "key count")
        # The smallest key/value takes 13 bytes, the smallest tensor entry 32.
        cursor.need(13 * num_keys + 32 * num_tensors, f"{num_keys} keys and {num_tensors} tensors")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = cursor.string("a key")
            if key in self.metadata:
                raise cursor.fail(f"key {key!r} occurs twice")
            self.metadata[key] = cursor.value(cursor.scalar(_U32, key), key)
        entries = [self._entry(cursor) for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise cursor.fail(f"general.alignment = {alignment!r} is not a power of two")
        start = -(-cursor.pos // alignment) * alignment
        self.tensors = self._place(entries, start, alignment)

    def _entry(self, cursor: _Cursor) -> GGUFTensor:
        name = cursor.string("a tensor name")
        num_dims = cursor.scalar(_U32, name)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise cursor.fail(f"tensor {name!r} has {num_dims} dimensions")
        dims = [cursor.scalar(_U64, name) for _ in range(num_dims)]
        kind, offset = cursor.scalar(_U32, name), cursor.scalar(_U64, name)
        if kind not in TYPES:
            raise UnsupportedModelError(
                f"{self.path.name}: tensor {name!r} has unsupported type {kind}",
                hint="supported: " + ", ".join(sorted(_TYPE_IDS)),
            )
        type_name, block, block_bytes = TYPES[kind]
        elements = math.prod(dims)
        if elements == 0 or elements >= 2**48:
            raise cursor.fail(f"tensor {name!r} has shape {dims}")
        if dims[0] % block:
            raise cursor.fail(
                f"tensor {name!r}: rows of {dims[0]} are not whole {type_name} blocks of {block}"
            )
        return GGUFTensor(name, type_name, tuple(reversed(dims)), offset, elements // block * block_bytes)

    def _place(self, entries: list[GGUFTensor], start: int, alignment: int) -> dict[str, GGUFTensor]:
        """Absolute offsets; every tensor aligned, inside the file and overlapping no other."""
        size, name = len(self._map), self.path.name
        tensors: dict[str, GGUFTensor] = {}
        end, previous = start, "the header"
        for entry in sorted(entries, key=lambda entry: entry.offset):
            offset = start + entry.offset
            if entry.offset % alignment:
                raise ModelFileError(
                    f"{name}: tensor {entry.name!r} at offset {entry.offset}, not aligned to {alignment}"
                )
            if offset < end:
                raise ModelFileError(
                    f"{name}: tensor {entry.name!r} begins at byte {offset}, but {previous} ends at {end}"
                )
            end, previous = offset + entry.nbytes, repr(entry.name)
            if end > size:
                raise ModelFileError(
                    f"{name}: cut short: tensor {entry.name!r} ends at byte {end}, the file has {size}",
                    hint="pull the model again",
                )
            if entry.name in tensors:
                raise ModelFileError(f"{name}: tensor {entry.name!r} occurs twice")
            tensors[entry.name] = GGUFTensor(entry.name, entry.type, entry.shape, offset, entry.nbytes)
        return tensors

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The stored bytes, uint8[rows, bytes per row] (one row for vectors): a view of the mapped file."""
        tensor = self.tensors[name]
        flat = np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset)
        return flat.reshape(math.prod(tensor.shape[:-1]), -1)

    def dense(self, name: str) -> npt.NDArray[np.float32]:
        """The values as f32[shape], in memory of their own."""
        tensor = self.tensors[name]
        return dequantize(self.raw(name), tensor.type).reshape(tensor.shape)


def dequantize(raw: npt.NDArray[np.uint8], type_name: str) -> npt.NDArray[np.float32]:
    """uint8[rows, bytes per row] of a GGUF type -> f32[rows, cols], freshly allocated."""
    if type_name == "F32":
        return np.array(raw.view("<f4"), np.float32)
    if type_name == "F16":
        return raw.view("<f2").astype(np.float32)
    if type_name == "BF16":
        return bf16_to_f32(raw.view("<u2"))
    import gguf

    values: npt.NDArray[np.float32] = gguf.quants.dequantize(
        raw, gguf.GGMLQuantizationType(_TYPE_IDS[type_name])
    )
    return np.ascontiguousarray(values, np.float32)


def bf16_to_f32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)

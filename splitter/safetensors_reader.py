"""Reads safetensors checkpoints, single file or sharded, lazily and with every header claim checked.

Own reader rather than `safetensors.safe_open`: bfloat16 without torch, and errors that name the tensor
and both numbers. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from isthmus.protocol.errors import ModelFileError, UnsupportedModelError
from isthmus.splitter.gguf_reader import dequantize
from isthmus.splitter.mapped import MappedFile

_ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_READABLE = ("F32", "F16", "BF16")
# The reference implementation's own limit.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: `offset` and `nbytes` in bytes from the file's begin."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile(MappedFile):
    """An open, validated `.safetensors` file. Raises `ModelFileError` for anything damaged."""

    def _fail(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.path.name}: {what}", hint="pull the model again")

    def _parse(self) -> None:
        size = len(self._map)
        if size < 8:
            raise self._fail(f"cut short: {size} bytes, the header's length alone takes 8")
        (length,) = struct.unpack_from("<Q", self._map)
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise self._fail(f"header claims {length} bytes, {size - 8} left in the file")
        try:
            header = json.loads(self._map[8 : 8 + length], object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise self._fail(f"header is not valid JSON: {error}") from error
        if not isinstance(header, dict):
            raise self._fail("header is not a JSON object")
        header.pop("__metadata__", None)
        start = 8 + length
        tensors: dict[str, StoredTensor] = {}
        for name, entry in header.items():
            tensors[name] = self._entry(name, entry, start, size)
        end, previous = start, "the header"
        # Sorted by both ends: an empty tensor may begin where the next one does.
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
            if tensor.offset < end:
                raise self._fail(
                    f"tensor {tensor.name!r} begins at byte {tensor.offset}, but {previous} ends at {end}"
                )
            if tensor.offset > end:
                raise self._fail(f"{tensor.offset - end} unclaimed bytes before tensor {tensor.name!r}")
            end, previous = tensor.offset + tensor.nbytes, repr(tensor.name)
        if end != size:
            raise self._fail(f"tensors end at byte {end}, the file has {size}")
        self.tensors = tensors

    def _entry(self, name: str, entry: Any, start: int, size: int) -> StoredTensor:
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
            raise self._fail(f"tensor {name!r} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in _ITEMSIZE:
            raise UnsupportedModelError(f"{self.path.name}: tensor {name!r} has unknown dtype {dtype!r}")
        if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
            raise self._fail(f"tensor {name!r} has shape {shape} at {offsets}")
        nbytes = math.prod(shape) * _ITEMSIZE[dtype]
        begin, end = offsets
        if end - begin != nbytes:
            raise self._fail(
                f"tensor {name!r}: {dtype} {shape} takes {nbytes} bytes, the header gives it {end - begin}"
            )
        if start + end > size:
            raise self._fail(f"cut short: tensor {name!r} ends at byte {start + end}, the file has {size}")
        return StoredTensor(name, dtype, tuple(shape), start + begin, nbytes)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The stored bytes, uint8[nbytes]: a view of the mapped file."""
        tensor = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset)

    def dense(self, name: str) -> npt.NDArray[np.float32]:
        """The values as f32[shape], in memory of their own."""
        tensor = self.tensors[name]
        if tensor.dtype not in _READABLE:
            raise UnsupportedModelError(
                f"{self.path.name}: tensor {name!r} is {tensor.dtype}",
                hint=f"supported: {', '.join(_READABLE)}",
            )
        return dequantize(self.raw(name), tensor.dtype).reshape(tensor.shape)


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**48 for v in values)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def open_shards(directory: Path) -> dict[str, SafetensorsFile]:
    """Tensor name -> open file holding it, for `model.safetensors` or its sharded form in `directory`."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if index.is_file():
        return _open_index(directory, index)
    if not single.is_file():
        raise ModelFileError(f"{directory}: neither model.safetensors nor model.safetensors.index.json")
    file = SafetensorsFile(single)
    return dict.fromkeys(file.tensors, file)


def _open_index(directory: Path, index: Path) -> dict[str, SafetensorsFile]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelFileError(f"{index.name}: no weight_map of tensor names to file names")
    files: dict[str, SafetensorsFile] = {}
    placed: dict[str, SafetensorsFile] = {}
    try:
        for shard in sorted(set(weight_map.values())):
            # A shard named "../../x" would read outside the checkpoint.
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ModelFileError(f"{index.name}: shard {shard!r} is not a plain .safetensors file name")
            files[shard] = SafetensorsFile(directory / shard)
        for name, shard in weight_map.items():
            if name not in files[shard].tensors:
                raise ModelFileError(
                    f"{index.name}: tensor {name!r} is not in {shard}", hint="pull the model again"
                )
            placed[name] = files[shard]
    except BaseException:
        for file in files.values():
            file.close()
        raise
    return placed


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object from a file; `ModelFileError` if it is absent, unreadable or something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelFileError(f"{path}: expected a JSON object")
    return data

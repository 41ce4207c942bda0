"""The manifest of a pack: what is in it, where, under which hashes. Checked whole: packs can be anyone's."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from isthmus.protocol.errors import ModelFileError
from isthmus.protocol.identity import ModelIdentity
from isthmus.splitter.blocks import Placement, block_names, block_needs
from isthmus.splitter.spec import ModelSpec

FORMAT = 1
ALIGNMENT = 4096
"""Blocks and large tensors start at multiples of this, so that a layer range is a range of whole pages."""

ITEM_BYTES = {"float32": 4, "uint8": 1}

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Size = Annotated[int, Field(ge=0, lt=2**53)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorEntry(_Strict):
    """One stored tensor: numpy dtype name, shape, absolute byte offset in weights.bin."""

    dtype: Literal["float32", "uint8"]
    shape: tuple[_Size, ...]
    offset: _Size

    @property
    def length(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def placement(self) -> Placement:
        """The same as the graph emitter takes it."""
        return Placement(self.dtype, self.shape, self.offset, self.length)


class BlockEntry(_Strict):
    """One block: its bytes in weights.bin, its graph, and the blocks whose bytes it reads as well."""

    name: str
    offset: _Size
    length: _Size
    sha256: Sha256
    graph: str
    graph_sha256: Sha256
    needs: tuple[str, ...] = ()


class Manifest(_Strict):
    """manifest.json. Holds only what follows from the source and the scheme.

    Timings and the measured KL differ from machine to machine: they are in build.json.
    """

    format: int = FORMAT
    isthmus_version: str
    spec: dict[str, Any]
    identity: ModelIdentity
    scheme: str
    bits: Literal[4, 8, 32]
    quant: dict[str, list[str]]
    source: str
    source_hash: str
    weights_bytes: _Size
    blocks: tuple[BlockEntry, ...]
    tensors: dict[str, dict[str, TensorEntry]]
    outlier_channels: dict[str, list[_Size]]
    files: dict[str, Sha256]

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal manifests give equal bytes."""
        return (self.model_dump_json(indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Parses and checks everything that can be checked without the other files.

        Raises ModelFileError (`pack_version` for another format) naming the first thing that is off.
        """
        import json

        try:
            loose = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise _damaged(f"manifest.json is not JSON: {error}") from error
        if not isinstance(loose, dict) or loose.get("format") != FORMAT:
            version = loose.get("format") if isinstance(loose, dict) else None
            raise ModelFileError(
                f"the pack has format {version!r}, this version of isthmus reads format {FORMAT}",
                code="pack_version",
                hint="build the pack again with `isthmus build`",
            )
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise _damaged(f"manifest.json: {where}: {first['msg']}") from error
        manifest._check()
        return manifest

    def _check(self) -> None:
        spec = ModelSpec.from_json(self.spec)
        names = [entry.name for entry in self.blocks]
        # Counted before they are named: a forged spec may claim a billion layers.
        if len(names) != spec.num_layers + 2 or names != block_names(spec):
            raise _damaged(f"the manifest lists {len(names)} blocks, the model has {spec.num_layers + 2}")
        if set(self.tensors) != set(names):
            raise _damaged(f"tensors of {len(self.tensors)} blocks, the model has {len(names)}")
        end = 0
        for entry in self.blocks:
            if entry.graph != f"blocks/{entry.name}.onnx":
                raise ModelFileError(
                    f"block {entry.name} has its graph at {entry.graph!r}, not at blocks/{entry.name}.onnx",
                    code="path_outside_pack",
                    hint="the pack was tampered with; build it again",
                )
            if entry.offset < end or entry.offset % ALIGNMENT:
                raise _damaged(
                    f"block {entry.name} starts at byte {entry.offset}, the one before ends at {end}"
                )
            end = entry.offset + entry.length
            if entry.needs != block_needs(spec, entry.name):
                raise _damaged(f"block {entry.name} needs {list(entry.needs)}")
            self._check_tensors(entry)
        if end != self.weights_bytes:
            raise _damaged(f"the blocks end at byte {end} of {self.weights_bytes} in weights.bin")
        for boundary, channels in self.outlier_channels.items():
            if not boundary.isdigit() or not 0 < int(boundary) < spec.num_layers:
                raise _damaged(
                    f"outlier channels for boundary {boundary!r} of a model of {spec.num_layers} layers"
                )
            if channels != sorted(set(channels)) or any(c >= spec.hidden for c in channels):
                raise _damaged(
                    f"outlier channels {channels} at boundary {boundary}, hidden size {spec.hidden}"
                )
        if "tokenizer.json" not in self.files or not set(self.files) <= set(SIDE_FILES):
            raise _damaged(f"the manifest lists the files {sorted(self.files)}, expected {list(SIDE_FILES)}")

    def _check_tensors(self, entry: BlockEntry) -> None:
        end = entry.offset
        for name, tensor in self.tensors[entry.name].items():
            if tensor.offset < end or tensor.offset + tensor.length > entry.offset + entry.length:
                raise _damaged(
                    f"tensor {name} has bytes {tensor.offset}..{tensor.offset + tensor.length}, its block "
                    f"{entry.name} leaves {end}..{entry.offset + entry.length}"
                )
            end = tensor.offset + tensor.length


SIDE_FILES = ("tokenizer.json", "chat_template.jinja", "generation.json")


def make_identity(spec: ModelSpec, tokenizer_hash: str, weights_hash: str) -> ModelIdentity:
    """The identity both ends compare: `weights_hash` is the source checkpoint's, whatever the precision."""
    return ModelIdentity(
        architecture=spec.identity_fields(),
        tokenizer_hash=tokenizer_hash,
        base_name=spec.base_name or "unnamed",
        weights_hash=weights_hash,
    )


def _damaged(message: str) -> ModelFileError:
    return ModelFileError(
        message, code="bad_pack", hint="the pack is damaged; build it again with `isthmus build`"
    )

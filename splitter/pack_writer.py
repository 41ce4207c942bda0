"""Writes one pack's files into a directory, reproducibly: weights, graphs, side files, manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from isthmus import __version__
from isthmus.quant.schemes import SCHEMES
from isthmus.splitter.blocks import block_names, block_needs
from isthmus.splitter.checkpoint import Checkpoint
from isthmus.splitter.manifest import ALIGNMENT, BlockEntry, Manifest, TensorEntry, make_identity
from isthmus.splitter.pack import BUILD_FILE, MANIFEST_FILE, WEIGHTS_FILE
from isthmus.splitter.packing import pack_block

Progress = Callable[[str, float], None]

_SMALL_ALIGNMENT = 64  # a cache line; for tensors below one page, so that norms don't each take a page


class TokenizerFiles(Protocol):
    """What a pack needs besides weights; `sources.PulledModel` is one."""

    @property
    def tokenizer_json(self) -> bytes: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def generation(self) -> Mapping[str, Any]: ...


def write_pack(
    source: Checkpoint,
    files: TokenizerFiles,
    directory: Path,
    scheme: str,
    *,
    outliers: Mapping[int, tuple[int, ...]] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Manifest:
    """Fills the existing, empty `directory`. Equal source, scheme and outliers give equal bytes.

    `progress` gets the share done, 0..1. Raises OSError as the file system does (the caller gives it a name),
    ModelFileError and UnsupportedModelError for a source that cannot be packed.
    """
    from isthmus.splitter.graph import emit_block

    spec = source.spec
    names = block_names(spec)
    (directory / "blocks").mkdir()
    entries: list[BlockEntry] = []
    tensors: dict[str, dict[str, TensorEntry]] = {}
    quant: dict[str, set[str]] = {}
    with open(directory / WEIGHTS_FILE, "wb") as weights:
        for index, name in enumerate(names):
            offset, length, digest, tensors[name], how = _write_block(source, scheme, name, weights)
            for kind, description in how.items():
                quant.setdefault(kind, set()).add(description)
            needs = block_needs(spec, name)
            placements = {
                key: tensor.placement() for owner in (*needs, name) for key, tensor in tensors[owner].items()
            }
            graph = emit_block(spec, name, placements)
            graph_path = f"blocks/{name}.onnx"
            (directory / graph_path).write_bytes(graph)
            entries.append(
                BlockEntry(
                    name=name,
                    offset=offset,
                    length=length,
                    sha256=digest,
                    graph=graph_path,
                    graph_sha256=hashlib.sha256(graph).hexdigest(),
                    needs=needs,
                )
            )
            if progress is not None:
                progress((index + 1) / len(names))
        weights_bytes = weights.tell()
    manifest = Manifest(
        isthmus_version=__version__,
        spec=spec.to_json(),
        identity=make_identity(spec, _tokenizer_hash(files), source.source_hash),
        scheme=scheme,
        bits=_bits(scheme),
        quant={kind: sorted(descriptions) for kind, descriptions in sorted(quant.items())},
        source=spec.base_name,
        source_hash=source.source_hash,
        weights_bytes=weights_bytes,
        blocks=tuple(entries),
        tensors=tensors,
        outlier_channels={},
        files=_write_side_files(files, directory),
    )
    return write_manifest(directory, manifest, outliers or {})


def write_manifest(directory: Path, manifest: Manifest, outliers: Mapping[int, tuple[int, ...]]) -> Manifest:
    """Writes manifest.json with these outlier channels per boundary, and returns it."""
    channels = {str(boundary): list(outliers[boundary]) for boundary in sorted(outliers)}
    complete = manifest.model_copy(update={"outlier_channels": channels})
    (directory / MANIFEST_FILE).write_bytes(complete.to_bytes())
    return complete


def write_build_info(directory: Path, info: Mapping[str, Any]) -> None:
    """Writes build.json: what was measured here, outside everything that is hashed."""
    (directory / BUILD_FILE).write_text(json.dumps(info, indent=1) + "\n")


def _write_block(
    source: Checkpoint, scheme: str, name: str, weights: IO[bytes]
) -> tuple[int, int, str, dict[str, TensorEntry], dict[str, str]]:
    """Appends one block; (offset, length, sha256, tensors, how each matrix was packed)."""
    from isthmus.splitter.graph import plan_block

    packed, described = pack_block(source, scheme, name)
    plan = plan_block(source.spec, name, packed)
    _pad(weights, ALIGNMENT, None)
    start = weights.tell()
    digest = hashlib.sha256()
    placed: dict[str, TensorEntry] = {}
    for key, array in plan.tensors:
        _pad(weights, ALIGNMENT if array.nbytes >= ALIGNMENT else _SMALL_ALIGNMENT, digest)
        data = _little_endian(array)
        placed[key] = TensorEntry(dtype=_dtype(array), shape=array.shape, offset=weights.tell())
        weights.write(data)
        digest.update(data)
    return start, weights.tell() - start, digest.hexdigest(), placed, described


def _pad(weights: IO[bytes], alignment: int, digest: Any) -> None:
    """Zeros up to the next multiple of `alignment`; they count into the block's hash where one is given."""
    zeros = bytes(-weights.tell() % alignment)
    weights.write(zeros)
    if digest is not None:
        digest.update(zeros)


def _little_endian(array: npt.NDArray[Any]) -> memoryview:
    """The bytes to store, without a copy where the machine is little-endian."""
    ordered = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return ordered.reshape(-1).view(np.uint8).data


def _dtype(array: npt.NDArray[Any]) -> Any:
    return array.dtype.name  # the manifest refuses all but float32 and uint8


def _bits(scheme: str) -> Any:
    return SCHEMES[scheme]


def _write_side_files(files: TokenizerFiles, directory: Path) -> dict[str, str]:
    """Tokeniser, chat template and generation defaults; name → sha256."""
    contents = {"tokenizer.json": files.tokenizer_json}
    if files.chat_template is not None:
        contents["chat_template.jinja"] = files.chat_template.encode()
    if files.generation:
        contents["generation.json"] = (json.dumps(files.generation, indent=1, sort_keys=True) + "\n").encode()
    for name, data in contents.items():
        (directory / name).write_bytes(data)
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}


def _tokenizer_hash(files: TokenizerFiles) -> str:
    from isthmus.splitter.tokenizer import Tokenizer

    return Tokenizer(files.tokenizer_json).canonical_hash

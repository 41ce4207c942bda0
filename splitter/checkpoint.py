"""One view of a model's weights, tensor by tensor and under canonical names, whatever file they lie in.

embed.weight   layers.{i}.attn_norm.weight   layers.{i}.{q,k,v,o}.{weight,bias}
layers.{i}.{q_norm,k_norm}.weight   layers.{i}.mlp_norm.weight
layers.{i}.{gate,up,down}.{weight,bias}   final_norm.weight   head.weight (absent when tied)
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from isthmus.protocol.errors import ModelFileError, NotFoundError, UnsupportedModelError
from isthmus.quant.gguf_blocks import BLOCK_TYPES, GGUFBlocks
from isthmus.splitter.gguf_reader import GGUFFile, dequantize
from isthmus.splitter.safetensors_reader import SafetensorsFile, open_shards, read_json
from isthmus.splitter.spec import ModelSpec

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`shape` is [out, in] for matrices; `storage` the file's type ("BF16", "Q4_1", …); sizes in bytes."""

    shape: tuple[int, ...]
    storage: str
    nbytes: int


class Checkpoint(ABC):
    """A validated checkpoint. Reading is lazy and thread-safe; arrays handed out own their memory."""

    spec: ModelSpec
    path: Path

    def __init__(self, path: Path, spec: ModelSpec, infos: dict[str, TensorInfo]) -> None:
        self.path, self.spec, self._infos = path, spec, infos
        self._source_hash: str | None = None
        _check_shapes(path, spec, infos)

    def names(self) -> list[str]:
        """Canonical names of all tensors, in execution order."""
        return list(self.spec.tensor_shapes())

    def info(self, name: str) -> TensorInfo:
        """Shape, storage type and size of one tensor; `NotFoundError` if there is no such tensor."""
        try:
            return self._infos[name]
        except KeyError:
            raise NotFoundError(f"{self.path}: no tensor {name!r}") from None

    @property
    def source_hash(self) -> str:
        """sha256 hex over names, types, shapes and stored bytes of all tensors: equal weights, equal hash.

        Reads the whole checkpoint once (about 1 s per GB), then remembers.
        """
        if self._source_hash is None:
            digest = hashlib.sha256()
            for name in self.names():
                info = self.info(name)
                digest.update(f"{name}\0{info.storage}\0{info.shape}\0".encode())
                digest.update(self._raw(name).data)
            self._source_hash = digest.hexdigest()
        return self._source_hash

    @abstractmethod
    def dense(self, name: str) -> F32:
        """The values as f32, [out, in] for matrices, q and k rows in rotate-half order."""

    @abstractmethod
    def blocks(self, name: str) -> GGUFBlocks | None:
        """The quantised blocks as stored (rows as in `dense`), or None for types without an exact
        affine form (plain floats, Q6_K), which `dense` reads."""

    @abstractmethod
    def _raw(self, name: str) -> U8:
        """The stored bytes, contiguous; a view."""

    @abstractmethod
    def close(self) -> None:
        """Closes the files. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a `.gguf` file, a folder with `config.json` + safetensors, or a folder with one `.gguf`.

    Raises `NotFoundError`, `ModelFileError` (damaged) or `UnsupportedModelError`.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "config.json").is_file():
            return SafetensorsCheckpoint(path)
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise NotFoundError(
                f"{path}: no config.json, and {len(files)} .gguf files", hint="name the .gguf file itself"
            )
        path = files[0]
    if not path.is_file():
        raise NotFoundError(f"{path}: no such file or folder")
    return GGUFCheckpoint(path)


def _check_shapes(path: Path, spec: ModelSpec, infos: dict[str, TensorInfo]) -> None:
    expected = spec.tensor_shapes()
    for name, shape in expected.items():
        if name not in infos:
            raise ModelFileError(f"{path.name}: tensor {name!r} is missing", hint="pull the model again")
        if infos[name].shape != shape:
            raise ModelFileError(
                f"{path.name}: tensor {name!r} has shape {infos[name].shape}, the config says {shape}"
            )
    if extra := sorted(set(infos) - set(expected)):
        raise UnsupportedModelError(
            f"{path.name}: tensors the config has no place for: {', '.join(extra[:4])}",
            hint=f"{len(extra)} in all; ignoring weights would change the model's answers",
        )


_HF_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
_GGUF_LAYER = {
    "attn_norm": "attn_norm",
    "ffn_norm": "mlp_norm",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
_HF_TOP = {"model.embed_tokens": "embed", "model.norm": "final_norm", "lm_head": "head"}
_GGUF_TOP = {"token_embd": "embed", "output_norm": "final_norm", "output": "head"}
# Tables older exporters saved beside the weights; they follow from the config.
_DERIVED = re.compile(r"(?:rope_freqs\.weight|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq)")


def _canonical(
    names: Iterable[str], prefix: str, top: dict[str, str], layer: dict[str, str]
) -> dict[str, str]:
    """Canonical name -> stored name. Names outside the tables stay, for `_check_shapes` to refuse."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(0|[1-9]\d*)\.(.+)")
    result: dict[str, str] = {}
    for name in names:
        if _DERIVED.fullmatch(name):
            continue
        stem, _, kind = name.rpartition(".")
        if stem in top:
            result[f"{top[stem]}.{kind}"] = name
        elif (match := pattern.fullmatch(stem)) and match[2] in layer:
            result[f"layers.{match[1]}.{layer[match[2]]}.{kind}"] = name
        else:
            result[name] = name
    return result


def _declared_name(directory: Path) -> str:
    """The model's name: of the repository it was pulled from where that is known, else of the folder."""
    marker = directory / "pulled.json"  # written by `hub.fetch_from_hub`
    if marker.is_file():
        return str(read_json(marker).get("repo_id") or directory.name)
    for parent in directory.resolve().parents:
        # The hub library's own cache: models--owner--name/snapshots/<commit>.
        if parent.name.startswith("models--"):
            return parent.name.rpartition("--")[2]
    return directory.resolve().name


class SafetensorsCheckpoint(Checkpoint):
    """A folder with `config.json` and one or several safetensors files."""

    def __init__(self, directory: Path) -> None:
        generation = directory / "generation_config.json"
        spec = ModelSpec.from_hf(
            read_json(directory / "config.json"),
            read_json(generation) if generation.is_file() else None,
            base_name=_declared_name(directory),
        )
        self._files = open_shards(directory)
        try:
            self._stored = _canonical(self._files, "model.layers", _HF_TOP, _HF_LAYER)
            if spec.tied_embedding:
                self._stored.pop("head.weight", None)  # some exporters save the tied copy too
            infos = {
                name: TensorInfo(entry.shape, entry.dtype, entry.nbytes)
                for name, stored in self._stored.items()
                for entry in [self._files[stored].tensors[stored]]
            }
            super().__init__(directory, spec, infos)
        except BaseException:
            self.close()
            raise

    def dense(self, name: str) -> F32:
        self.info(name)
        return self._file(name).dense(self._stored[name])

    def blocks(self, name: str) -> GGUFBlocks | None:
        self.info(name)
        return None

    def _file(self, name: str) -> SafetensorsFile:
        return self._files[self._stored[name]]

    def _raw(self, name: str) -> U8:
        return self._file(name).raw(self._stored[name])

    def close(self) -> None:
        for file in set(self._files.values()):
            file.close()


class GGUFCheckpoint(Checkpoint):
    """One `.gguf` file. `metadata` holds its key/values, the tokeniser among them."""

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        try:
            if self._file.metadata.get("split.count", 1) > 1:
                raise UnsupportedModelError(
                    f"{path.name}: split GGUF files are not supported", hint="merge them"
                )
            self.metadata = self._file.metadata
            tensors = self._file.tensors
            divisors = self._file.dense("rope_freqs.weight") if "rope_freqs.weight" in tensors else None
            spec = ModelSpec.from_gguf(self.metadata, tensors.keys(), divisors)
            self._stored = _canonical(tensors, "blk", _GGUF_TOP, _GGUF_LAYER)
            infos = {
                name: TensorInfo(tensors[stored].shape, tensors[stored].type, tensors[stored].nbytes)
                for name, stored in self._stored.items()
            }
            super().__init__(path, spec, infos)
        except BaseException:
            self.close()
            raise

    def _row_order(self, name: str) -> npt.NDArray[np.intp] | None:
        """Which stored row is each canonical row of q and k in llama files, None where order is kept.

        llama.cpp's converter interleaves the two rotated halves of every head for the llama
        architecture only; this undoes it.
        """
        match = re.fullmatch(r"layers\.\d+\.([qk])\.(?:weight|bias)", name)
        if self.spec.family != "llama" or match is None:
            return None
        heads = self.spec.num_heads if match[1] == "q" else self.spec.num_kv_heads
        rows = np.arange(heads * self.spec.head_dim)
        return rows.reshape(heads, self.spec.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)

    def _rows(self, name: str) -> U8:
        """The stored rows in canonical order, in memory of their own."""
        raw, order = self._file.raw(self._stored[name]), self._row_order(name)
        if order is None:
            return raw.copy()
        if len(self.info(name).shape) == 1:  # a bias: its elements are what is reordered
            raw = raw.reshape(len(order), -1)
        return raw[order]

    def dense(self, name: str) -> F32:
        info = self.info(name)
        rows = self._rows(name)
        return dequantize(rows, info.storage).reshape(info.shape)

    def blocks(self, name: str) -> GGUFBlocks | None:
        info = self.info(name)
        if info.storage not in BLOCK_TYPES or len(info.shape) != 2:
            return None
        rows, cols = info.shape
        return GGUFBlocks(type=info.storage, rows=rows, cols=cols, raw=self._rows(name))

    def _raw(self, name: str) -> U8:
        return self._file.raw(self._stored[name])

    def close(self) -> None:
        self._file.close()

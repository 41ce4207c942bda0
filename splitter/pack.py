"""A pack: the built model on disk, opened and checked; hands out graphs, byte ranges and the tokeniser.

<pack>/manifest.json  weights.bin  blocks/*.onnx  tokenizer.json  chat_template.jinja  generation.json
       build.json     how it was built here: measured KL, timings, the choice (not part of the identity)
       fetched.json   in a pack pulled from a cloud: which blocks are here (see `pack_parts`)
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus.protocol.errors import ModelFileError, NotFoundError
from isthmus.protocol.identity import ModelIdentity
from isthmus.splitter.blocks import block_names
from isthmus.splitter.graph_check import external_tensors
from isthmus.splitter.manifest import BlockEntry, Manifest
from isthmus.splitter.pack_parts import Fetched, read_fetched
from isthmus.splitter.spec import ModelSpec

if TYPE_CHECKING:
    from isthmus.splitter.tokenizer import Tokenizer

MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.bin"
BUILD_FILE = "build.json"
MAX_JSON = 64 << 20
"""Bytes of a manifest or tokeniser. None comes near; keeps a hostile pack from filling the memory."""
MAX_GRAPH = 16 << 20
_CHUNK = 1 << 20


class Pack:
    """An opened pack; safe to share between threads.

    Opening checks the manifest, sizes and paths. Contents are hashed block by block, as `graph_bytes` is
    asked for them, or all at once with `verify=True`. `fetched`: of a pack pulled from a cloud, what of it is
    here; None: all.
    """

    def __init__(self, path: Path, manifest: Manifest, fetched: Fetched | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.fetched = fetched
        self.spec = ModelSpec.from_json(manifest.spec)
        self.identity: ModelIdentity = manifest.identity
        self.weights_path = path / WEIGHTS_FILE
        self._blocks = {entry.name: entry for entry in manifest.blocks}
        self._whole: set[str] = set()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = False) -> Pack:
        """Opens the pack at `path`.

        Raises NotFoundError where there is none, and ModelFileError with a stable code where it is damaged
        (`bad_pack`), cut short (`pack_truncated`), of another version (`pack_version`), reaches out of itself
        (`path_outside_pack`) or, with `verify`, was altered (`hash_mismatch`).
        """
        root = Path(path)
        if not (root / MANIFEST_FILE).is_file():
            raise NotFoundError(
                f"no pack at {root}: it has no {MANIFEST_FILE}",
                code="no_pack",
                hint="make one: `isthmus build`",
            )
        manifest = Manifest.from_bytes(_read(root, MANIFEST_FILE, MAX_JSON))
        pack = cls(root, manifest, read_fetched(root))
        pack._check_files()
        if verify:
            pack.verify()
        return pack

    @property
    def bits(self) -> int:
        """Nominal bits per weight: 4, 8 or 32."""
        return self.manifest.bits

    @property
    def scheme(self) -> str:
        """Name of the weight scheme, see `isthmus.quant.schemes.SCHEMES`."""
        return self.manifest.scheme

    @property
    def bytes_per_block(self) -> list[int]:
        """Bytes of weights of each block in order: embed, layers, head."""
        return [entry.length for entry in self.manifest.blocks]

    @property
    def weights_bytes(self) -> int:
        """Size of weights.bin."""
        return self.manifest.weights_bytes

    def has(self, name: str) -> bool:
        """Whether block `name` and all that it reads is here. NotFoundError for an unknown name."""
        return all(self.fetched is None or owner in self.fetched.blocks for owner in self._owners(name))

    @cached_property
    def layers_here(self) -> int:
        """How many layers, from the first on, this device can run: all of a pack built here."""
        return next(
            (i for i in range(self.spec.num_layers) if not self.has(f"layer.{i}")), self.spec.num_layers
        )

    @property
    def is_whole(self) -> bool:
        """Whether every block is here."""
        return all(self.has(entry.name) for entry in self.manifest.blocks)

    def _owners(self, name: str) -> tuple[str, ...]:
        return (name, *self.block(name).needs)

    def block(self, name: str) -> BlockEntry:
        """The entry of one block; NotFoundError for a name the model does not have."""
        entry = self._blocks.get(name)
        if entry is None:
            raise NotFoundError(
                f"the pack has no block {name!r}",
                code="unknown_block",
                hint=f"blocks are embed, layer.0 … layer.{self.spec.num_layers - 1}, head",
            )
        return entry

    def graph_bytes(self, name: str) -> bytes:
        """The ONNX model of block `name`, after it and every weight it points to were found unaltered.

        Each block's weights are hashed once per opened pack. Raises ModelFileError (`hash_mismatch`,
        `bad_graph`, `path_outside_pack`; `block_missing` where it was not pulled).
        """
        if not self.has(name):
            raise ModelFileError(
                f"block {name} is not on this device: {self.path} was pulled in part",
                code="block_missing",
                hint="start with --pull-from-cloud and a larger --split, or without --split for all blocks",
            )
        entry = self.block(name)
        graph = _read(self.path, entry.graph, MAX_GRAPH)
        check_graph(self.manifest, entry, graph)
        for owner in self._owners(name):
            self.verify_block(owner)
        return graph

    def verify_block(self, name: str) -> None:
        """Hashes the block's range of weights.bin unless that was done before. Raises ModelFileError."""
        entry = self.block(name)
        with self._lock:
            if name in self._whole:
                return
        digest = hashlib.sha256()
        try:
            with open(self.weights_path, "rb") as handle:
                handle.seek(entry.offset)
                left = entry.length
                while left:
                    piece = handle.read(min(left, _CHUNK))
                    if not piece:
                        raise _truncated(
                            self.weights_path, entry.offset + entry.length - left, self.weights_bytes
                        )
                    digest.update(piece)
                    left -= len(piece)
        except OSError as error:
            raise _unreadable(self.weights_path, error) from error
        _expect_hash(f"block {name} of {WEIGHTS_FILE}", digest.hexdigest(), entry.sha256)
        with self._lock:
            self._whole.add(name)

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Checks all hashes of what is here, or of the named blocks. ModelFileError at the first wrong
        one."""
        for name in names if names is not None else filter(self.has, block_names(self.spec)):
            self.graph_bytes(name)
        if names is None:
            for file in self.manifest.files:
                self.side_file(file)

    def side_file(self, name: str) -> bytes:
        """tokenizer.json, chat_template.jinja or generation.json, hash checked; NotFoundError if absent."""
        expected = self.manifest.files.get(name)
        if expected is None:
            raise NotFoundError(f"the pack has no {name}", code="no_such_file", hint="the source had none")
        data = _read(self.path, name, MAX_JSON)
        _expect_hash(name, hashlib.sha256(data).hexdigest(), expected)
        return data

    def tokenizer(self) -> Tokenizer:
        """The model's tokeniser, built anew at each call."""
        from isthmus.splitter.tokenizer import Tokenizer

        return Tokenizer(self.side_file("tokenizer.json"), bos_id=self.spec.bos_id, eos_ids=self.spec.eos_ids)

    def chat_template(self) -> str | None:
        """The jinja source, or None where the model has none."""
        if "chat_template.jinja" not in self.manifest.files:
            return None
        try:
            return self.side_file("chat_template.jinja").decode()
        except UnicodeDecodeError as error:
            raise _side_damaged("chat_template.jinja", error) from error

    def generation(self) -> dict[str, Any]:
        """The checkpoint's generation defaults (may be empty)."""
        if "generation.json" not in self.manifest.files:
            return {}
        try:
            loaded = json.loads(self.side_file("generation.json"))
        except (ValueError, RecursionError) as error:
            raise _side_damaged("generation.json", error) from error
        if not isinstance(loaded, dict):
            raise _side_damaged("generation.json", f"a {type(loaded).__name__} where an object belongs")
        return loaded

    def outliers(self, boundary: int) -> tuple[int, ...]:
        """The outlier channels of the rows that enter layer `boundary` (0 < K < N); empty if not known."""
        return tuple(self.manifest.outlier_channels.get(str(boundary), ()))

    @cached_property
    def build_info(self) -> dict[str, Any]:
        """build.json: how the pack was built on this machine; empty where the file is missing or no JSON."""
        try:
            loaded = json.loads((self.path / BUILD_FILE).read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return loaded if isinstance(loaded, dict) else {}

    @property
    def kl_to_source(self) -> float | None:
        """Mean KL of the logits to the fp32 source, in nats, as measured at build; None where unknown."""
        value = self.build_info.get("kl_to_source")
        return float(value) if isinstance(value, (int, float)) else None

    def _check_files(self) -> None:
        root = self.path.resolve()
        graphs = [entry.graph for entry in self.manifest.blocks if self.has(entry.name)]
        for name in (WEIGHTS_FILE, *graphs, *self.manifest.files):
            file = self.path / name
            if not file.resolve().is_relative_to(root):
                raise ModelFileError(
                    f"{file} leads to {file.resolve()}, outside the pack",
                    code="path_outside_pack",
                    hint="a pack holds no links; copy it with its files",
                )
            if not file.is_file():
                raise ModelFileError(f"the pack lacks {name}", code="bad_pack", hint="build the pack again")
        size = self.weights_path.stat().st_size
        if size != self.weights_bytes:
            raise _truncated(self.weights_path, size, self.weights_bytes)


def check_graph(manifest: Manifest, entry: BlockEntry, graph: bytes) -> None:
    """Raises ModelFileError unless `graph` is the one of the manifest (`hash_mismatch`), and each of its
    external tensors one that the manifest places in this block or its needs (`bad_graph`,
    `path_outside_pack`)."""
    _expect_hash(entry.graph, hashlib.sha256(graph).hexdigest(), entry.graph_sha256)
    allowed = {
        (tensor.offset, tensor.length)
        for owner in (entry.name, *entry.needs)
        for tensor in manifest.tensors[owner].values()
    }
    for tensor in external_tensors(graph):
        if tensor.location != WEIGHTS_FILE:
            raise ModelFileError(
                f"{entry.graph} takes {tensor.name!r} from {tensor.location!r}, not from {WEIGHTS_FILE}",
                code="path_outside_pack",
                hint="the pack was tampered with; build it again",
            )
        if (tensor.offset, tensor.length) not in allowed:
            raise ModelFileError(
                f"{entry.graph} takes {tensor.name!r} from bytes {tensor.offset}.."
                f"{tensor.offset + tensor.length}, which the manifest gives to no tensor of the block",
                code="bad_graph",
                hint="the pack is damaged; build it again",
            )


def _read(root: Path, name: str, limit: int) -> bytes:
    try:
        with open(root / name, "rb") as handle:
            data = handle.read(limit + 1)
    except OSError as error:
        raise _unreadable(root / name, error) from error
    if len(data) > limit:
        raise ModelFileError(
            f"{root / name} is larger than {limit} bytes", code="bad_pack", hint="not a pack"
        )
    return data


def _expect_hash(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise ModelFileError(
            f"{what} has sha256 {found[:16]}…, the manifest says {expected[:16]}…",
            code="hash_mismatch",
            hint="it was altered or damaged on disk: build the pack again with `isthmus build`, or, if it"
            " was pulled from a cloud, `isthmus rm` it and start again",
        )


def _side_damaged(name: str, why: object) -> ModelFileError:
    return ModelFileError(f"{name} of the pack: {why}", code="bad_pack", hint="build the pack again")


def _truncated(path: Path, size: int, expected: int) -> ModelFileError:
    return ModelFileError(
        f"{path} has {size} bytes, the manifest says {expected}",
        code="pack_truncated",
        hint="the pack was cut short; build it again with `isthmus build`",
    )


def _unreadable(path: Path, error: OSError) -> ModelFileError:
    return ModelFileError(
        f"{path} cannot be read: {error.strerror}", code="io_error", hint="check the file and its permissions"
    )

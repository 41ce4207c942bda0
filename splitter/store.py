"""Where models and packs lie on disk, and what is there.

    <cache>/models/<slug>/…      pulled checkpoints
    <cache>/packs/<slug>-<bits>/ built packs
    <cache>/packs/<slug>@<hash>/ packs pulled from a cloud, by the sha256 of their manifest
    <cache>/hashes.json          sha256 of files already hashed, by path, size and time of change

`<cache>` is `$ISTHMUS_CACHE`, else `$XDG_CACHE_HOME/isthmus`, else `~/.cache/isthmus`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.protocol.errors import NotFoundError
from isthmus.splitter.atomic import exclusive, file_errors
from isthmus.splitter.catalog import CATALOG

BITS = ("auto", "4", "8", "32")
FETCHED_FILE = "fetched.json"
"""In the folder of a pack pulled from a cloud: what of it is here (see `pack_parts`)."""


def cache_root() -> Path:
    """The cache directory, not necessarily existing."""
    if own := os.environ.get("ISTHMUS_CACHE"):
        return Path(own).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "isthmus"
    return Path.home() / ".cache" / "isthmus"


def is_path(model: str) -> bool:
    """Whether MODEL means a file or folder rather than a catalog name or repository."""
    if not model or model in CATALOG:
        return False
    return model.startswith(("/", ".", "~")) or model.endswith(".gguf") or Path(model).exists()


def slug(model: str) -> str:
    """The folder name for MODEL: equal for equal models, safe on every file system."""
    if model in CATALOG:
        return model
    if is_path(model):
        path = Path(model).expanduser().resolve()
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem if path.suffix == ".gguf" else path.name)
        # Two folders of one name are two models.
        return f"{stem or 'model'}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    return slug_of_name(model)


def slug_of_name(name: str) -> str:
    """`name` as a folder name that is safe on every file system."""
    return re.sub(r"[^A-Za-z0-9._@-]+", "--", name)


def model_path(model: str) -> Path:
    """Where a pulled MODEL lies (for local paths: nowhere, they stay where they are)."""
    return cache_root() / "models" / slug(model)


def pack_path(model: str, bits: str | int = "auto") -> Path:
    """Where the pack of MODEL built with `--bits` lies or would lie."""
    if str(bits) not in BITS:
        raise NotFoundError(f"no packs with bits {bits!r}", hint=f"choose one of {', '.join(BITS)}")
    return cache_root() / "packs" / f"{slug(model)}-{bits}"


def pulled_pack_path(base_name: str, manifest_sha256: str) -> Path:
    """Where a pack pulled from a cloud lies or would lie."""
    return cache_root() / "packs" / f"{slug_of_name(base_name)[:64].lstrip('.')}@{manifest_sha256[:16]}"


def named_pulled_pack(name: str) -> Path | None:
    """The folder of a pack pulled from a cloud by its name in `list_models`; None where there is none."""
    path = cache_root() / "packs" / name
    return path if path.name == name and "@" in name and (path / FETCHED_FILE).is_file() else None


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One folder of the cache. `kind` is "model" or "pack"; `bytes` on disk."""

    name: str
    kind: str
    bytes: int
    path: Path


def list_models() -> list[StoredModel]:
    """Pulled models, then built packs, each by name. Unfinished downloads and builds are not listed."""
    found: list[StoredModel] = []
    for kind, marker in (("model", None), ("pack", "manifest.json")):
        folder = cache_root() / f"{kind}s"
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.name.startswith(".") or not path.is_dir() or (marker and not (path / marker).is_file()):
                continue
            if kind == "model" and not _complete(path):
                continue
            name = path.name.replace("--", "/") if kind == "model" else path.name
            found.append(StoredModel(name, kind, _tree_bytes(path), path))
    return found


def _complete(path: Path) -> bool:
    return any(path.glob("*.gguf")) or (path / "pulled.json").is_file()


def _tree_bytes(root: Path) -> int:
    """Of a pack pulled in part, without the holes where its other blocks would be."""
    files = [file for file in root.rglob("*") if file.is_file() and not file.is_symlink()]
    sizes = {file: file.stat().st_size for file in files}
    if (fetched := root / FETCHED_FILE) in sizes:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            sizes[root / "weights.bin"] = sum(json.loads(fetched.read_bytes())["blocks"].values())
    return sum(sizes.values())


def remove(model: str) -> list[Path]:
    """Deletes the pulled files and packs of MODEL from the cache and returns the folders removed. MODEL may
    be the name of a pack pulled from a cloud, as `list_models` has it.

    A local checkpoint itself is never touched. `NotFoundError` if the cache holds nothing of MODEL.
    """
    removed: list[Path] = []
    pulled = named_pulled_pack(model)
    paths = [pulled] if pulled else [model_path(model), *(pack_path(model, bits) for bits in BITS)]
    for path in paths:
        if not path.is_dir():
            continue
        with file_errors(str(path)), exclusive(path):
            # Renamed first: whoever looks meanwhile finds the whole folder or none.
            doomed = path.with_name(f".{path.name}.removed-{secrets.token_hex(4)}")
            path.rename(doomed)
            shutil.rmtree(doomed)
        removed.append(path)
    if not removed:
        raise NotFoundError(f"nothing of {model!r} is in the cache", hint="see: isthmus list")
    return removed


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a small file so that readers see the old or the new contents, never half. May raise OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        work.write_bytes(data)
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def file_sha256(path: Path, progress: Callable[[float], None] | None = None) -> str:
    """sha256 hex of a file; remembered by (path, size, time of change), so that asking again is free."""
    with file_errors(str(path)):
        status = path.stat()
    key, stamp = str(path.resolve()), [status.st_size, status.st_mtime_ns]
    known = _hashes()
    if isinstance(entry := known.get(key), list) and entry[:2] == stamp and isinstance(entry[-1], str):
        return entry[-1]
    digest, done = hashlib.sha256(), 0
    with file_errors(str(path)), path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            done += len(chunk)
            if progress:
                progress(done / max(1, status.st_size))
    # Only a convenience: a cache we may not write to, or a lost race, costs hashing again.
    with contextlib.suppress(OSError):
        data = {**_hashes(), key: [*stamp, digest.hexdigest()]}
        write_atomically(cache_root() / "hashes.json", json.dumps(data, indent=1).encode())
    return digest.hexdigest()


def _hashes() -> dict[str, Any]:
    try:
        data = json.loads((cache_root() / "hashes.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}

"""From MODEL to an opened pack: pulls, builds, and keeps both in the cache."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from isthmus.protocol.errors import ConfigError, ModelFileError, NotFoundError, UsageError
from isthmus.splitter.build import BuildReport, build_pack
from isthmus.splitter.catalog import CATALOG
from isthmus.splitter.checkpoint import open_checkpoint
from isthmus.splitter.pack import Pack
from isthmus.splitter.pack_writer import Progress
from isthmus.splitter.packing import parse_bits
from isthmus.splitter.sources import pull, resolve
from isthmus.splitter.store import model_path, named_pulled_pack, pack_path


def ensure_pack(model: str, bits: str | int = "auto", *, progress: Progress | None = None) -> Pack:
    """The pack of MODEL, opened; pulled and built first where it is missing, damaged or of an older source.

    A pack directory given as MODEL is opened as it is. Idempotent, and safe to call from several processes at
    once. Raises what `pull` and `build_pack` raise; ConfigError (`pack_bits`) for a pack of other bits.
    """
    resolved, wanted = resolve(model), parse_bits(bits)
    if resolved.kind == "pack" and resolved.path is not None:
        pack = Pack.open(resolved.path)
        if wanted not in ("auto", pack.bits):
            raise ConfigError(
                f"{resolved.path} is a pack of {pack.bits} bits, {bits} were asked for",
                code="pack_bits",
                hint="name the model it was built from instead of the pack",
            )
        return pack
    built = built_pack(model, bits)
    if built is not None:
        return built
    return Pack.open(build_model(model, bits, progress=progress).pack)  # which repairs a damaged pack


def built_pack(model: str, bits: str | int = "auto") -> Pack | None:
    """The pack of MODEL in the cache, opened; None where it is missing, damaged or of an older source."""
    pack = _cached(pack_path(model, parse_bits(bits)))
    if pack is None or pack.build_info.get("source_files") != _stamp(model, resolve(model).path):
        return None
    return pack


def build_model(
    model: str, bits: str | int = "auto", *, out: Path | None = None, progress: Progress | None = None
) -> BuildReport:
    """`isthmus build`: pulls MODEL where needed and builds its pack into `out` (default: the cache).

    A whole pack of the same source and bits that is there is kept. `progress` gets (what is being done,
    share of that done). Raises what `pull` and `build_pack` raise; UsageError where MODEL is a pack.
    """
    resolved, wanted = resolve(model), parse_bits(bits)
    if resolved.kind == "pack":
        raise UsageError(
            f"{resolved.path} is a pack already",
            code="already_a_pack",
            hint="name the model it was built from",
        )
    stamp = _stamp(model, resolved.path)
    pulled = pull(model, progress=progress)
    with open_checkpoint(pulled.path) as source:
        return build_pack(
            source,
            pulled,
            out or pack_path(model, wanted),
            bits=wanted,
            progress=progress,
            extra_info={"model": model, "source_files": stamp},
        )


def describe(model: str) -> dict[str, Any]:
    """`isthmus show`: what is known of MODEL without fetching anything.

    {"model", "kind", "path", "spec", "packs": [{"pack", "scheme", "bits", "weights_bytes", "kl_to_source",
    "why", "layers_here", "head_here", "pulled_from"}]}; `path` and `spec` are None where it was neither
    pulled nor built. MODEL may be the name of a pack pulled from a cloud, as `list_models` has it.
    """
    pulled = named_pulled_pack(model)
    resolved = resolve(str(pulled or model))
    if resolved.kind == "pack" and resolved.path is not None:
        packs, path = [Pack.open(resolved.path)], None
    else:
        packs = [pack for bits in ("auto", 4, 8, 32) if (pack := _cached(pack_path(model, bits)))]
        path = resolved.path or model_path(model)
    spec: dict[str, Any] | None = None
    if packs:
        spec = packs[0].spec.to_json()
    elif path is not None and path.exists():
        with open_checkpoint(path) as source:
            spec = source.spec.to_json()
    return {
        "model": model,
        "kind": resolved.kind,
        "path": str(path) if path is not None and path.exists() else None,
        "spec": spec,
        "packs": [
            {
                "pack": str(pack.path),
                "scheme": pack.scheme,
                "bits": pack.bits,
                "weights_bytes": pack.weights_bytes,
                "kl_to_source": pack.kl_to_source,
                "why": pack.build_info.get("choice", {}).get("reason", ""),
                "layers_here": pack.layers_here,
                "head_here": pack.has("head"),
                "pulled_from": None if pack.fetched is None else pack.fetched.source,
            }
            for pack in packs
        ],
    }


def _cached(path: Path) -> Pack | None:
    try:
        return Pack.open(path)
    except (NotFoundError, ModelFileError):
        return None


def _stamp(model: str, path: Path | None) -> list[list[Any]]:
    """A cheap sign that the source is still the same one: name, size and time of change of a local source's
    files; the entry of a model from the catalog. Empty for one from the hub, whose cached files don't change.
    """
    if (entry := CATALOG.get(model)) is not None:
        return [[key, value] for key, value in asdict(entry).items() if key != "summary"]
    if path is None or not path.exists():
        return []
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]

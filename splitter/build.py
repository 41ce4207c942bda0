"""`isthmus build`: candidates are written, judged by KL and speed, and the chosen one is published."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus import __version__
from isthmus.protocol.errors import ConfigError, IsthmusError, ModelFileError, UnsupportedModelError
from isthmus.quant.schemes import SCHEMES
from isthmus.splitter.atomic import exclusive, file_errors, publish, work_directory
from isthmus.splitter.checkpoint import Checkpoint
from isthmus.splitter.choice import KL_LIMIT, TYPICAL_PROMPT, Candidate, choose
from isthmus.splitter.fidelity import SampleRun, kl_of_runs, measure_speed, run_sample, sample_ids
from isthmus.splitter.manifest import Manifest
from isthmus.splitter.pack import BUILD_FILE, MANIFEST_FILE, Pack
from isthmus.splitter.pack_writer import (
    Progress,
    TokenizerFiles,
    write_build_info,
    write_manifest,
    write_pack,
)
from isthmus.splitter.packing import Bits, candidate_schemes
from isthmus.splitter.store import write_atomically


@dataclass(frozen=True)
class BuildReport:
    """What `isthmus build --json` prints. Sizes in bytes, `kl_to_source` in nats."""

    pack: Path
    model_identity: dict[str, Any]
    num_layers: int
    bits: int
    scheme: str
    weights_bytes: int
    bytes_per_block: list[int]
    kl_to_source: float
    choice: dict[str, Any]
    reused: bool

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, by the names of the contract."""
        return {**dataclasses.asdict(self), "pack": str(self.pack)}


def build_pack(
    source: Checkpoint,
    files: TokenizerFiles,
    out: Path,
    *,
    bits: Bits = "auto",
    progress: Progress | None = None,
    extra_info: Mapping[str, Any] | None = None,
) -> BuildReport:
    """Builds `source` into the pack directory `out` and reports its fidelity.

    A whole pack of the same source, files and bits that is already there is kept. Otherwise the new one
    appears at `out` complete or not at all; concurrent builders of the same `out` wait for each other.
    `progress` gets (what is being done, share of that done 0..1). `extra_info` is kept in build.json.
    Raises UnsupportedModelError, ModelFileError (also `disk_full`), ConfigError (`not_a_pack`,
    `no_write_permission`).
    """
    tell: Progress = progress or (lambda _what, _share: None)
    out = Path(out).absolute()
    if out.exists() and not (out / MANIFEST_FILE).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out} exists and is no pack",
            code="not_a_pack",
            hint="give --out a new or empty directory; nothing was touched",
        )
    with file_errors(f"the pack {out}"), exclusive(out):
        tell("looking for an existing pack", 0.0)
        kept = _existing(source, files, out, bits)
        tell("looking for an existing pack", 1.0)
        if kept is not None:
            _update_info(out, extra_info or {})
            return kept
        with work_directory(out) as work:
            manifest, chosen, choice = _build(source, files, work, bits, tell)
            info = {
                "asked_bits": bits,
                "kl_to_source": chosen.kl,
                "choice": choice,
                "built_at_unix_s": int(time.time()),
                **(extra_info or {}),
            }
            write_build_info(work / chosen.scheme, info)
            publish(work / chosen.scheme, out, work)
    return _report(out, manifest, info, reused=False)


def _existing(source: Checkpoint, files: TokenizerFiles, out: Path, bits: Bits) -> BuildReport | None:
    """The report of the pack at `out` if it is whole, of this source and version, and answers `bits`."""
    try:
        pack = Pack.open(out, verify=True)
    except IsthmusError:
        return None
    manifest, info = pack.manifest, pack.build_info
    same_bits = info.get("asked_bits") == bits or (bits != "auto" and manifest.bits == bits)
    same_files = pack.side_file("tokenizer.json") == files.tokenizer_json
    same_files &= pack.chat_template() == files.chat_template
    same_files &= pack.generation() == json.loads(json.dumps(dict(files.generation)))
    if not (same_bits and same_files and manifest.source_hash == source.source_hash):
        return None
    if manifest.isthmus_version != __version__ or pack.kl_to_source is None:
        return None
    return _report(out, manifest, info, reused=True)


def _update_info(out: Path, extra_info: Mapping[str, Any]) -> None:
    """Notes what the caller now says of a pack that was kept, so that it need not ask again."""
    path = out / BUILD_FILE
    info = json.loads(path.read_bytes())  # whole: the pack's KL was just read from it
    if info != (updated := {**info, **extra_info}):
        with contextlib.suppress(OSError):  # a pack we may only read serves as well
            write_atomically(path, (json.dumps(updated, indent=1) + "\n").encode())


def _build(
    source: Checkpoint, files: TokenizerFiles, work: Path, bits: Bits, tell: Progress
) -> tuple[Manifest, Candidate, dict[str, Any]]:
    """Writes the reference and every candidate below `work`; (manifest, measurements, why) of the chosen."""
    schemes, left_out = _packable(source, candidate_schemes(source, bits))
    everything = list(dict.fromkeys(["f32", *schemes]))
    _check_disk(source, everything, work)
    manifests: dict[str, Manifest] = {}
    for scheme in everything:
        (work / scheme).mkdir()
        what = f"writing weights as {scheme}" if scheme in schemes else "writing the fp32 reference"
        manifests[scheme] = write_pack(
            source, files, work / scheme, scheme, progress=functools.partial(tell, what)
        )

    packs = {scheme: Pack.open(work / scheme) for scheme in everything}
    ids = sample_ids(packs["f32"])
    what = "running the fp32 reference on the sample text"
    reference = run_sample(packs["f32"], ids, progress=functools.partial(tell, what))
    candidates = [_judge(scheme, packs[scheme], reference, ids, tell) for scheme in schemes]

    timed = {c.scheme: packs[c.scheme] for c in candidates if c.passes and _fits_memory(packs[c.scheme])}
    if len(schemes) > 1 and len(timed) > 1:
        prompt = (ids[0] * TYPICAL_PROMPT)[: min(TYPICAL_PROMPT, source.spec.context_length // 2)]
        what = f"timing {', '.join(timed)}"
        speeds = measure_speed(timed, prompt, progress=functools.partial(tell, what))
        candidates = [dataclasses.replace(c, speed=speeds.get(c.scheme)) for c in candidates]
    chosen, reason = choose(candidates, asked=bits)
    choice = {
        "reason": reason,
        "kl_limit": KL_LIMIT,
        "candidates": [candidate.to_json() for candidate in candidates],
        "left_out": left_out,
    }
    manifest = write_manifest(work / chosen.scheme, manifests[chosen.scheme], reference.outliers)
    return manifest, chosen, choice


def _check_disk(source: Checkpoint, schemes: list[str], work: Path) -> None:
    """Refuses early what would fill the disk: the fp32 reference alone is 4 bytes per weight."""
    weights = sum(math.prod(source.info(name).shape) for name in source.names())
    needed = sum(weights * (SCHEMES[scheme] + (0 if scheme == "f32" else 1)) // 8 for scheme in schemes)
    free = shutil.disk_usage(work).free
    if free < needed:
        raise ModelFileError(
            f"building in {work.parent} takes about {needed >> 20} MiB, {free >> 20} MiB are free",
            code="disk_full",
            hint="free some space, or point ISTHMUS_CACHE or --out at a larger disk",
        )


def _judge(scheme: str, pack: Pack, reference: SampleRun, ids: list[list[int]], tell: Progress) -> Candidate:
    if scheme == "f32":  # the reference itself: 0 by definition
        return Candidate(scheme, 0.0, pack.weights_bytes)
    what = f"measuring the KL of {scheme}"
    run = run_sample(pack, ids, progress=functools.partial(tell, what))
    return Candidate(scheme, kl_of_runs(reference, run), pack.weights_bytes)


def _fits_memory(pack: Pack) -> bool:
    """Whether all of the pack can be held for timing without pushing other programs out of memory."""
    import psutil

    return pack.weights_bytes < int(psutil.virtual_memory().available) // 4


def _packable(source: Checkpoint, schemes: list[str]) -> tuple[list[str], dict[str, str]]:
    """The schemes whose block size fits this model's matrices, and why the others don't."""
    odd = sorted(
        name for name in source.names() if len(shape := source.info(name).shape) == 2 and shape[1] % 32
    )
    if not odd:
        return schemes, {}
    why = f"{odd[0]} has {source.info(odd[0]).shape[1]} columns, no multiple of 32"
    if schemes != ["f32"] and "f32" not in schemes:
        raise UnsupportedModelError(why, code="unsupported_shape", hint="build this model with --bits 32")
    return ["f32"], {scheme: why for scheme in schemes if scheme != "f32"}


def _report(out: Path, manifest: Manifest, info: Mapping[str, Any], *, reused: bool) -> BuildReport:
    return BuildReport(
        pack=out,
        model_identity={"key": manifest.identity.key, **manifest.identity.model_dump()},
        num_layers=int(manifest.spec["num_layers"]),
        bits=manifest.bits,
        scheme=manifest.scheme,
        weights_bytes=manifest.weights_bytes,
        bytes_per_block=[entry.length for entry in manifest.blocks],
        kl_to_source=float(info["kl_to_source"]),
        choice=dict(info.get("choice", {})),
        reused=reused,
    )

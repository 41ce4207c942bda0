"""An edge without model files: the blocks it needs of a cloud's pack, fetched by byte range into the cache.

Whoever runs the cloud chooses the weights, the tokeniser and the chat template that then run here; TLS and
the key say who that is. Beyond that choice nothing is taken on trust: the manifest is checked whole before
anything else is asked for, no name of the cloud's becomes a path, every file and block must have the
manifest's sha256 before it counts, graphs pass the same checks as those of any pack, and no more bytes are
taken than the manifest says and the disk has.

    <pack>/weights.bin   of full size from the start, with holes where blocks are missing
           fetched.json  the blocks that are there, written after each of them
           .parts/       a block on its way; the next attempt, of any cloud with the same pack, goes on there
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from isthmus.protocol.errors import ConfigError, IsthmusError, ModelFileError, NotFoundError, RejectedError
from isthmus.splitter.atomic import exclusive, file_errors
from isthmus.splitter.blocks import block_names
from isthmus.splitter.download import DEFAULT_RETRY, Access, Progress, RetryPolicy, Span, download, fetch
from isthmus.splitter.manifest import BlockEntry, Manifest
from isthmus.splitter.pack import MANIFEST_FILE, MAX_GRAPH, MAX_JSON, WEIGHTS_FILE, Pack, check_graph
from isthmus.splitter.pack_parts import Fetched, read_fetched, write_fetched
from isthmus.splitter.spec import ModelSpec
from isthmus.splitter.store import FETCHED_FILE, cache_root, pulled_pack_path, write_atomically

MAX_WEIGHTS_BYTES: Final = 1 << 40
_PARTS: Final = ".parts"
# What another cloud may do better.
_ELSEWHERE: Final = ("download_failed", "hash_mismatch", "bad_graph", "path_outside_pack")

Wanted = Callable[[ModelSpec], frozenset[str]]
"""The blocks to fetch of a model, by name; what they read of others comes along."""


@dataclass(frozen=True, slots=True)
class PackSource:
    """A cloud. `url`: where its pack lies, with http(s) and a slash at its end; `name`: what it is called."""

    url: str
    name: str
    access: Access


@dataclass(frozen=True, slots=True)
class _Offer:
    source: PackSource
    manifest: Manifest
    data: bytes
    sha256: str


def blocks_for(split: int | None, *, head: bool) -> Wanted:
    """The first `split` layers with the embedding, and the `head` where the edge samples; None: all."""

    def wanted(spec: ModelSpec) -> frozenset[str]:
        everything = block_names(spec)
        if split is None or split >= spec.num_layers:
            return frozenset(everything)
        if split == 0:
            return frozenset()
        return frozenset((*everything[: 1 + split], *(["head"] if head else [])))

    return wanted


def fetch_pack(
    sources: Sequence[PackSource],
    wanted: Wanted,
    *,
    progress: Progress | None = None,
    retry: RetryPolicy = DEFAULT_RETRY,
) -> Pack:
    """The pack of the first cloud that offers one, with the `wanted` blocks; opened.

    What is there is not fetched again, and what was cut goes on where it stopped, at the next cloud that has
    the same pack where the first one fails. Where no cloud can be reached, a pack pulled from one of them
    before serves, if it has the blocks. Safe to call from several processes at once.

    Raises the first cloud's trouble: NotFoundError (`no_pack_offered`), RejectedError (`unauthorized`),
    ModelFileError (`download_failed`, `hash_mismatch`, `bad_pack`, …); at once ModelFileError `disk_full` and
    ConfigError `no_write_permission`.
    """
    errors: list[IsthmusError] = []
    begun: str | None = None
    first = RetryPolicy(min(3, retry.attempts), retry.first_wait_s, retry.timeout_s, retry.busy_s)
    for source in sources:
        try:
            offer = _offer(source, first)
        except (NotFoundError, RejectedError, ModelFileError) as error:
            errors.append(error)
            continue
        if begun is not None and offer.sha256 != begun:
            continue
        begun = offer.sha256
        try:
            return _pull(offer, wanted, progress, retry)
        except (NotFoundError, RejectedError, ModelFileError) as error:
            if isinstance(error, ModelFileError) and error.code not in _ELSEWHERE:
                raise
            errors.append(error)
    if not errors:
        raise ConfigError("there is no cloud to pull from", code="no_cloud", hint="name one with --cloud")
    if all(error.code == "download_failed" for error in errors):
        kept = _kept([source.name for source in sources], wanted)
        if kept is not None:
            if progress is not None:
                progress("no cloud can be reached: what was pulled before serves", 1.0)
            return kept
    raise errors[0]


def _offer(source: PackSource, retry: RetryPolicy) -> _Offer:
    """The cloud's manifest, checked."""
    data = fetch(source.url + MANIFEST_FILE, most_bytes=MAX_JSON, access=source.access, retry=retry)
    manifest = Manifest.from_bytes(data)
    if manifest.weights_bytes > MAX_WEIGHTS_BYTES:
        raise ModelFileError(
            f"{source.name} offers {manifest.weights_bytes} bytes of weights, at most {MAX_WEIGHTS_BYTES} "
            "are taken",
            code="bad_pack",
            hint="is this the cloud you meant?",
        )
    return _Offer(source, manifest, data, hashlib.sha256(data).hexdigest())


def _kept(names: Sequence[str], wanted: Wanted) -> Pack | None:
    """A pack pulled from one of the clouds before, with all the wanted blocks; the latest one."""
    records = list((cache_root() / "packs").glob(f"*@*/{FETCHED_FILE}"))
    for record in sorted(records, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(IsthmusError):
            pack = Pack.open(record.parent)
            if pack.fetched is None or pack.fetched.source not in names:
                continue
            if all(pack.has(name) for name in wanted(pack.spec)):
                return pack
    return None


def _pull(offer: _Offer, wanted: Wanted, progress: Progress | None, retry: RetryPolicy) -> Pack:
    manifest = offer.manifest
    target = pulled_pack_path(manifest.identity.base_name, offer.sha256)
    names = wanted(ModelSpec.from_json(manifest.spec))
    with file_errors(str(target)), exclusive(target):
        transfer = _Transfer(offer, target, retry)
        fetched = transfer.begin()
        needed = {
            owner for entry in manifest.blocks if entry.name in names for owner in (entry.name, *entry.needs)
        }
        missing = [e for e in manifest.blocks if e.name in needed and e.name not in fetched.blocks]
        _check_space(target, missing)
        total, done = sum(entry.length for entry in missing), 0
        for entry in missing:

            def tell(_: str, share: float, done: int = done, entry: BlockEntry = entry) -> None:
                if progress is not None:
                    progress(
                        f"pulling from {offer.source.name}", (done + share * entry.length) / max(1, total)
                    )

            transfer.block(entry, tell)
            fetched = fetched.model_copy(update={"blocks": {**fetched.blocks, entry.name: entry.length}})
            write_fetched(target, fetched)
            transfer.placed(entry)
            done += entry.length
        return Pack.open(target)


def _check_space(target: Path, missing: Sequence[BlockEntry]) -> None:
    """For each block twice its bytes for a moment: as it arrives, and in its place."""
    needed = sum(entry.length for entry in missing) + max((entry.length for entry in missing), default=0)
    free = shutil.disk_usage(target).free
    if needed > free:
        raise ModelFileError(
            f"{needed} bytes are needed below {target}, {free} are free",
            code="disk_full",
            hint="free some space, point ISTHMUS_CACHE at a larger disk, or take a smaller --split",
        )


@dataclass(frozen=True, slots=True)
class _Transfer:
    """From the cloud of `offer` into the folder `target`. Call with its lock held."""

    offer: _Offer
    target: Path
    retry: RetryPolicy

    def begin(self) -> Fetched:
        """What is there already; where that is nothing, or not whole, a folder without any block."""
        offer, target = self.offer, self.target
        with contextlib.suppress(ModelFileError, NotFoundError, OSError):
            kept = read_fetched(target)
            whole = kept is not None and (target / MANIFEST_FILE).read_bytes() == offer.data
            if kept is not None and whole and Pack.open(target).fetched == kept:
                return kept
        if target.exists():
            shutil.rmtree(target)
        target.mkdir()
        for name, sha256 in offer.manifest.files.items():
            data = self._file(name, MAX_JSON)
            if hashlib.sha256(data).hexdigest() != sha256:
                raise self._altered(name, sha256)
            write_atomically(target / name, data)
        with open(target / WEIGHTS_FILE, "wb") as weights:
            weights.truncate(offer.manifest.weights_bytes)
        fetched = Fetched(manifest_sha256=offer.sha256, source=offer.source.name)
        write_fetched(target, fetched)
        write_atomically(target / MANIFEST_FILE, offer.data)  # last: from now on it is a pack
        return fetched

    def block(self, entry: BlockEntry, progress: Progress) -> None:
        """The graph and the weights of one block, checked, each in its place and on the disk."""
        graph = self._file(entry.graph, MAX_GRAPH)
        check_graph(self.offer.manifest, entry, graph)
        write_atomically(self.target / entry.graph, graph)
        try:
            part = download(
                self.offer.source.url + WEIGHTS_FILE,
                self._part(entry),
                sha256=entry.sha256,
                size=entry.length,
                span=Span(entry.offset, f'"{self.offer.sha256}"'),
                access=self.offer.source.access,
                progress=progress,
                retry=self.retry,
            )
        except ModelFileError as error:
            if error.code != "checksum_mismatch":
                raise
            raise self._altered(f"block {entry.name}", entry.sha256) from error
        with open(part, "rb") as source, open(self.target / WEIGHTS_FILE, "r+b") as weights:
            weights.seek(entry.offset)
            shutil.copyfileobj(source, weights, 1 << 20)
            weights.flush()
            os.fsync(weights.fileno())

    def placed(self, entry: BlockEntry) -> None:
        """The block is recorded: what it arrived in can go."""
        self._part(entry).unlink()
        with contextlib.suppress(OSError):  # another block's beginning is still there
            (self.target / _PARTS).rmdir()

    def _part(self, entry: BlockEntry) -> Path:
        return self.target / _PARTS / entry.name

    def _file(self, name: str, most_bytes: int) -> bytes:
        source = self.offer.source
        return fetch(source.url + name, most_bytes=most_bytes, access=source.access, retry=self.retry)

    def _altered(self, what: str, expected: str) -> ModelFileError:
        return ModelFileError(
            f"{what} came from {self.offer.source.name} with another sha256 than its manifest says, "
            f"{expected[:16]}…",
            code="hash_mismatch",
            hint="it was altered on its way, or the cloud's pack is damaged: build it again there",
        )

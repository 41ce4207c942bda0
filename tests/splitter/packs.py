"""Packs of tiny models for the tests: built once per process, copied where a test damages them."""

from __future__ import annotations

import atexit
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from isthmus.splitter.build import BuildReport, build_pack
from isthmus.splitter.checkpoint import open_checkpoint
from isthmus.splitter.packing import Bits
from isthmus.splitter.sources import pull
from tests.tiny import make_tiny, make_tiny_gguf


def _temporary() -> Path:
    """A folder that goes when the process ends: these packs outlive any one test."""
    path = Path(mkdtemp(prefix="isthmus-tiny-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def tiny_source(family: str = "llama", *, tied: bool = False, gguf: str | None = None) -> Path:
    """The path of a tiny checkpoint: a folder, or a .gguf of that quantisation."""
    root = _temporary()
    folder = make_tiny(family, root / "tiny", tied=tied, seed=3)
    return folder if gguf is None else make_tiny_gguf(folder, root / "tiny.gguf", quantisation=gguf)


def build(source: Path, out: Path, bits: Bits) -> BuildReport:
    """`isthmus build` without the cache."""
    pulled = pull(str(source))
    with open_checkpoint(pulled.path) as checkpoint:
        return build_pack(checkpoint, pulled, out, bits=bits)


@cache
def tiny_pack(bits: Bits = 8, *, family: str = "llama", tied: bool = False, gguf: str | None = None) -> Path:
    """A built pack, shared: never write into it."""
    out = _temporary() / "pack"
    return build(tiny_source(family, tied=tied, gguf=gguf), out, bits).pack

"""What a pack's blocks take of a process's memory: measured in a fresh process, or modelled.

A fresh one, because what a used heap has to spare hides what is new.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from isthmus.splitter.pack import Pack

CHUNK_ROWS: Final = 128
"""Rows at once in a prefill, as the agent computes it: `scratch_bytes` is for these."""

# Resident bytes of a layer over its bytes in the pack. ONNX Runtime prepacks quantised matrices into copies,
# and copies their scales. Measured on SmolLM2-135M with onnxruntime 1.31, layers of 3 to 14 MB.
_COPIES: Final = {"f32": 1.02, "q8-affine": 1.28, "q4-native": 1.45, "q4-affine": 1.45}
_EMBED_EXTRA: Final = 10_000_000  # the first session brings the runtime's own buffers, and the tables
_BUFFERS: Final = 5_000_000  # and so does the first layer


@dataclass(frozen=True, slots=True)
class Footprint:
    """Resident bytes above an idle process: per layer, for the embedding, for the head beyond the embedding,
    and once for buffers."""

    layer_bytes: int
    embed_bytes: int
    head_bytes: int
    scratch_bytes: int


@dataclass(frozen=True, slots=True)
class Readings:
    """Resident bytes of one process, in the order in which it loads: idle; with the embedding, every row of
    it read once; (layers, bytes) once these ran a row; after a chunk, its KV not counted; with the head."""

    idle: int
    embed: int
    layers: tuple[tuple[int, int], ...]
    chunk: int
    head: int

    def footprint(self) -> Footprint:
        """The layers' slope; what the line leaves over counts as buffers: the sum is what was seen."""
        counts = np.array([count for count, _ in self.layers], dtype=np.float64)
        resident = np.array([seen - self.embed for _, seen in self.layers], dtype=np.float64)
        if len(counts) > 1:
            slope = float(np.polyfit(counts, resident, 1)[0])
        else:
            slope = float(resident[0] / counts[0])
        layer = max(0, round(slope))
        deepest = int(counts[-1])
        return Footprint(
            layer_bytes=layer,
            embed_bytes=max(0, self.embed - self.idle),
            head_bytes=max(0, self.head - self.chunk),
            scratch_bytes=max(0, self.chunk - self.embed - deepest * layer),
        )


def model_memory(pack: Pack) -> Footprint:
    """Expected from the pack's sizes. A tied head reads the embedding's bytes into copies of its own."""
    embed, *layers, head = pack.bytes_per_block
    copies = _COPIES.get(pack.scheme, max(_COPIES.values()))
    spec = pack.spec
    buffers = (
        _BUFFERS
        + CHUNK_ROWS * (4 * spec.hidden + 3 * spec.intermediate + 2 * spec.num_heads * spec.head_dim) * 4
    )
    return Footprint(
        layer_bytes=round(copies * sum(layers) / len(layers)),
        embed_bytes=embed + _EMBED_EXTRA,
        head_bytes=round(copies * (head + (embed if spec.tied_embedding else 0))),
        scratch_bytes=buffers,
    )


def measure_memory(pack: Pack, *, threads: int, num_layers: int) -> Footprint | None:
    """Measured on the CPU with the first `num_layers` layers; None where the process fails (it then has said
    why on stderr)."""
    depths = sorted({max(1, round(num_layers * share)) for share in (0.1, 0.25, 0.5, 0.75, 1.0)})
    command = [sys.executable, "-m", "isthmus.splitter.profile_memory", str(pack.path), str(threads)]
    done = subprocess.run([*command, *map(str, depths)], stdout=subprocess.PIPE, check=False)
    return parse_readings(done.stdout).footprint() if done.returncode == 0 else None


def parse_readings(data: bytes) -> Readings:
    """What the measuring process prints."""
    raw = json.loads(data)
    raw["layers"] = tuple((count, seen) for count, seen in raw["layers"])
    return Readings(**raw)


def read_process(path: Path, threads: int, depths: Sequence[int]) -> Readings:
    """Load and run step by step in this process, which should be fresh."""
    import psutil

    from isthmus.splitter.pack import Pack
    from isthmus.splitter.runner import BlockRunner

    def resident() -> int:
        return int(psutil.Process().memory_info().rss)

    pack = Pack.open(path)
    spec = pack.spec
    runner = BlockRunner(pack, threads=threads)
    idle = resident()
    runner.load(range(0), embed=True)
    # The embedding is mapped, so a row counts once it was used; in time all are.
    for first in range(0, spec.vocab_size, CHUNK_ROWS):
        runner.embed(range(first, min(first + CHUNK_ROWS, spec.vocab_size)))
    embed = resident()
    layers: list[tuple[int, int]] = []
    for depth in depths:
        runner.load(range(depth))
        runner.forward(runner.new_cache(range(depth), capacity=1), runner.embed([0]))
        layers.append((depth, resident()))
    count = min(CHUNK_ROWS, spec.context_length)
    cache = runner.new_cache(range(1), capacity=count)
    runner.forward(cache, runner.embed([0] * count))
    chunk = resident() - cache.nbytes
    runner.load(range(0), head=True)
    runner.head(runner.embed([0]))
    return Readings(idle, embed, tuple(layers), chunk, resident() - cache.nbytes)


def main() -> None:
    """`python -m isthmus.splitter.profile_memory PACK THREADS DEPTH…`: the readings as JSON."""
    from dataclasses import asdict

    path, threads, *depths = sys.argv[1:]
    print(json.dumps(asdict(read_process(Path(path), int(threads), [int(depth) for depth in depths]))))


if __name__ == "__main__":
    main()

"""`bench split --memory`: what an edge that holds K layers adds to an idle one, each K in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from isthmus.bench.report import Report

if TYPE_CHECKING:
    from isthmus.splitter.pack import Pack

TOKENS = 16


def bench_memory(pack: Pack, splits: list[int]) -> Report:
    """A row per K: resident memory of an edge process that ran K layers, above one that loaded none."""
    report = Report("split")
    idle = _resident(pack, 0)
    for split in splits:
        resident = _resident(pack, split)
        weights = sum(pack.bytes_per_block[: split + 1])
        report.rows.append(
            {
                "split": split,
                "resident_mb": resident / 1e6,
                "above_idle_mb": (resident - idle) / 1e6,
                "weights_mb": weights / 1e6,
            }
        )
    report.figures["idle_resident_mb"] = idle / 1e6
    for row in report.rows:
        report.figures[f"above_idle_mb_k_{row['split']}"] = row["above_idle_mb"]
    report.notes = [
        f"{pack.scheme}; each K in a fresh process that ran {TOKENS} tokens through K layers",
        "idle: the same process with ONNX Runtime loaded and no block",
    ]
    return report


def _resident(pack: Pack, split: int) -> int:
    command = [sys.executable, "-m", "isthmus.bench.memory", str(pack.path), str(split)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout)["resident_bytes"])


def _child(path: str, split: int) -> None:
    from pathlib import Path

    import psutil

    from isthmus.splitter.pack import Pack
    from isthmus.splitter.runner import BlockRunner

    runner = BlockRunner(Pack.open(Path(path)))
    if split:
        runner.load(range(split), embed=True)
        cache = runner.new_cache(range(split))
        runner.forward(cache, runner.embed(list(range(TOKENS))), start_layer=0, stop_layer=split)
    print(json.dumps({"resident_bytes": psutil.Process().memory_info().rss}))


if __name__ == "__main__":
    _child(sys.argv[1], int(sys.argv[2]))

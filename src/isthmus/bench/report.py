"""The form every bench answers in: machine, headline figures, rows with medians and spread, notes."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus.splitter.machine import cpu_name


@dataclass
class Report:
    """`{"bench","machine","figures","rows","notes"}` of CONTRACT.md."""

    bench: str
    figures: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "bench": self.bench,
            "machine": machine(),
            "figures": {name: rounded(value) for name, value in self.figures.items()},
            "rows": [
                {k: rounded(v) if isinstance(v, float) else v for k, v in row.items()} for row in self.rows
            ],
            "notes": self.notes,
        }


def rounded(value: float) -> float:
    """Four significant digits: more would claim a precision no timing here has."""
    return float(f"{value:.4g}")


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of the samples."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}


def machine() -> dict[str, Any]:
    """Which machine the figures are from."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu_name(), "cores": cores, "gpu": _gpu()}


def _gpu() -> str | None:
    """The GPU's name as its driver tells it; no torch is loaded for this."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text().splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return None

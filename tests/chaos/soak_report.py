"""What a soak saw: counts, silences and memory, as JSON and as text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MB = 1e6


@dataclass
class Memory:
    """Resident memory of one process over time."""

    seconds: list[float] = field(default_factory=list)
    resident_mb: list[float] = field(default_factory=list)

    def add(self, at_s: float, resident_bytes: int) -> None:
        self.seconds.append(at_s)
        self.resident_mb.append(resident_bytes / MB)

    def mb_per_hour(self, since_s: float) -> float | None:
        """Slope of the least-squares line through what was seen from `since_s` on; None from < 10 samples."""
        kept = [(s, mb) for s, mb in zip(self.seconds, self.resident_mb, strict=True) if s >= since_s]
        if len(kept) < 10:
            return None
        at, resident = np.array(kept).T
        return float(np.polyfit(at, resident, 1)[0] * 3600)

    def to_dict(self, since_s: float) -> dict[str, Any]:
        slope = self.mb_per_hour(since_s)
        return {
            "resident_mb": round(self.resident_mb[-1], 1) if self.resident_mb else None,
            "slope_mb_per_hour": None if slope is None else round(slope, 1),
        }


@dataclass
class SoakReport:
    """`lost`, `duplicated`, `wrong` count tokens; a request that fails has lost what it still owed."""

    minutes: float
    seed: int
    model: str
    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    tokens: int = 0
    lost: int = 0
    duplicated: int = 0
    wrong: int = 0
    longest_silence_s: float = 0.0
    warm_up_s: float = 0.0
    routes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    recoveries: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    left: dict[str, dict[str, int]] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Why this soak failed; nothing where it passed."""
        found = [
            f"{name} {count}" for name in ("lost", "duplicated", "wrong") if (count := getattr(self, name))
        ]
        found += [f"{count} requests failed with {code}" for code, count in self.failures.items()]
        found += [f"{name}: {what} {n} left" for name, of in self.left.items() for what, n in of.items() if n]
        return found + self.notes

    def to_dict(self) -> dict[str, Any]:
        return {
            "soak": {"minutes": self.minutes, "seed": self.seed, "model": self.model},
            "requests": self.requests,
            "finished": self.finished,
            "cancelled": self.cancelled,
            "tokens": self.tokens,
            "lost": self.lost,
            "duplicated": self.duplicated,
            "wrong": self.wrong,
            "failures": dict(self.failures),
            "longest_silence_s": round(self.longest_silence_s, 2),
            "routes": dict(self.routes),
            "faults": dict(self.faults),
            "recoveries": dict(self.recoveries),
            "process_exits": dict(self.exits),
            "left": self.left,
            "memory": {name: seen.to_dict(self.warm_up_s) for name, seen in self.memory.items()},
            "problems": self.problems,
        }

    def to_text(self) -> str:
        """For people: one line a fact."""
        told = self.to_dict()
        lines = [
            f"soak of {self.minutes:g} minutes, {self.model}, seed {self.seed}",
            f"requests     {self.requests} ({self.finished} finished, {self.cancelled} cancelled by us)",
            f"tokens       {self.tokens}",
            f"routes       {_counts(self.routes)}",
            f"faults       {sum(self.faults.values())}: {_counts(self.faults)}",
            f"recoveries   {sum(self.recoveries.values())}: {_counts(self.recoveries)}",
            f"lost {self.lost}, duplicated {self.duplicated}, wrong {self.wrong}",
            f"failed       {_counts(self.failures)}",
            f"longest silence between two tokens   {self.longest_silence_s:.2f} s",
            f"exits of cloud A   {_counts(self.exits)}",
        ]
        for name, of in told["left"].items():
            lines.append(f"left on {name}   {', '.join(f'{what} {n}' for what, n in of.items())}")
        for name, of in told["memory"].items():
            slope = of["slope_mb_per_hour"]
            grew = "too short to tell" if slope is None else f"{slope:+.1f} MB/h"
            lines.append(f"memory of {name}   {of['resident_mb']} MB, {grew}")
        lines.append("PASSED" if not self.problems else "FAILED: " + "; ".join(self.problems))
        return "\n".join(lines)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "none"

"""What this machine is called."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name(root: Path = Path("/proc")) -> str:
    """The processor's name as the kernel tells it; on ARM boards, which tell none, the board's."""
    for line in _text(root / "cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    board = _text(root / "device-tree/model").strip("\0 \n")
    return board or platform.processor() or platform.machine()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

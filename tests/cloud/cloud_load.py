"""What the system says of work on its cores, set by a test."""

from __future__ import annotations

import time
from typing import Any

import psutil
import pytest


def busy_for(monkeypatch: pytest.MonkeyPatch, cores: float) -> None:
    """The system's count of work grows by so many cores' worth beside our own."""
    nothing = psutil.cpu_times()._replace(**dict.fromkeys(psutil.cpu_times()._fields, 0.0))

    def cpu_times() -> Any:
        return nothing._replace(user=cores * time.monotonic() + time.process_time())

    monkeypatch.setattr(psutil, "cpu_times", cpu_times)

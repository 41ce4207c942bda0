"""What start-up measured on this machine, kept as JSON in the cache so that the next start need not."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from isthmus.splitter.store import cache_root, write_atomically


def start_cache_path(name: str, device: torch.device, *key: object) -> Path:
    """`<cache>/cloud/<name>-<hash>.json`, the hash over `key` and all that timings depend on here: torch, the
    device, threads."""
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu{os.cpu_count()}"
    whole = [torch.__version__, place, torch.get_num_threads(), *key]
    digest = hashlib.sha256(json.dumps(whole).encode()).hexdigest()
    return cache_root() / "cloud" / f"{name}-{digest[:32]}.json"


def read_start_cache(path: Path) -> dict[str, Any]:
    """The stored object; empty if there is none, or none that can be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_start_cache(path: Path, content: dict[str, Any]) -> None:
    """Only a convenience: where the cache can't be written, the next start measures again."""
    with suppress(OSError):
        write_atomically(path, json.dumps(content, indent=1).encode())

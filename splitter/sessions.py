"""ONNX Runtime sessions as this project opens them: one thread pool and one arena for the whole process."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from typing import Any

from isthmus.protocol.errors import ConfigError, ModelFileError
from isthmus.splitter.providers import ProviderChoice

_lock = threading.Lock()
_threads = 0  # size of the global pool; 0 until it exists


def default_threads() -> int:
    """Cores this process may use: affinity and container quota counted, hyperthreads not counted twice."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed, _quota(allowed)))


def _quota(allowed: int, file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The container's CPU quota in whole cores; `allowed` where there is none. Threads beyond it spin each
    other out of their time slices."""
    try:
        quota, period = file.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no cgroup v2, or quota "max"
        return allowed


def configure_threads(threads: int | None = None) -> int:
    """Makes the one pool all sessions of this process share (`None`: a thread per core); returns its size.

    Sessions with pools of their own fight: 30 one-layer sessions ran at 6 tok/s instead of 150. The pool
    is made once. Raises ConfigError (`threads_fixed`) when another size is asked for later, or when
    something else in the process opened an ONNX Runtime session first.
    """
    global _threads
    import onnxruntime as ort

    if threads is not None and threads < 1:
        raise ConfigError(f"{threads} threads cannot compute", code="bad_threads", hint="ask for 1 or more")
    with _lock:
        if _threads == 0:
            wanted = threads or default_threads()
            try:
                ort.set_global_thread_pool_sizes(wanted, 1)
            except RuntimeError as error:
                raise ConfigError(
                    f"the thread pool cannot be sized any more: {error}",
                    code="threads_fixed",
                    hint="call configure_threads() before any other onnxruntime session is opened",
                ) from error
            _share_arena()
            _threads = wanted
        if threads not in (None, _threads):
            raise ConfigError(
                f"{threads} threads asked for, but this process already runs {_threads}",
                code="threads_fixed",
                hint="the pool is made once per process; restart to change it",
            )
        return _threads


def open_session(graph: bytes, folder: Path, provider: ProviderChoice, what: str) -> Any:
    """An InferenceSession of `graph`, its weights mapped from files in `folder` (and from nowhere else:
    ONNX Runtime refuses external paths that leave it). Raises ModelFileError (`bad_graph`) naming `what`.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3  # errors; warnings would go to stderr past our logging
    # Memory patterns are planned anew for every number of rows and were not faster here.
    options.enable_mem_pattern = False
    entries = {
        "session.model_external_initializers_file_folder_path": str(folder.resolve()),
        # One arena for all blocks: with 30 of their own, a prefill of 512 rows held 900 MB of scratch.
        "session.use_env_allocators": "1",
        # Weights come from the system, not from the arena, so that unloading gives the memory back.
        "session.use_device_allocator_for_initializers": "1",
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    try:
        return ort.InferenceSession(graph, options, providers=list(provider.chain))
    except Exception as error:  # pybind raises a class of its own per status, all straight from Exception
        raise ModelFileError(
            f"{what} cannot be loaded: {error}",
            code="bad_graph",
            hint="the pack is damaged, or needs a newer onnxruntime; rebuild it",
        ) from error


def release_memory() -> None:
    """Gives back to the system what unloaded sessions have freed; glibc would keep it in its heap (of a
    quantised model of 210 MB resident, 60 came back without this, 200 with it)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:  # glibc only
        trim(0)


def _share_arena() -> None:
    import onnxruntime as ort

    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    # strategy 1 = grow by what is asked for, not by the next power of two
    ort.create_and_register_allocator(info, ort.OrtArenaCfg({"arena_extend_strategy": 1}))

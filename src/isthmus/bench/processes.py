"""Real processes for benches: a cloud and a relay started through the public command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager

from isthmus.protocol.errors import IsthmusError


@contextmanager
def process(*arguments: str) -> Iterator[str]:
    """`isthmus ARGUMENTS --json` running; yields the URL of its ready line; SIGTERM at the end."""
    with started(*arguments) as (url, _):
        yield url


@contextmanager
def started(*arguments: str) -> Iterator[tuple[str, int]]:
    """The same; yields the URL and the process id."""
    command = [sys.executable, "-m", "isthmus", *arguments, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            line = child.stdout.readline()
            answer = json.loads(line) if line else {}
            if "url" not in answer:
                told = answer.get("error", {}).get("message", f"exit code {child.wait()}")
                raise IsthmusError(f"`isthmus {' '.join(arguments)}` did not start: {told}")
            yield answer["url"], child.pid
        finally:
            child.terminate()
            try:
                child.wait(timeout=20)
            except subprocess.TimeoutExpired:
                child.kill()


@contextmanager
def on_cores(cores: AbstractSet[int]) -> Iterator[None]:
    """This thread, and what it starts meanwhile, runs on `cores` only (nothing happens for an empty set)."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def halves() -> tuple[set[int], set[int]]:
    """This machine's cores in two halves, for two processes that play two machines; two empty sets where
    there is one core only, or no way to say it."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    half = len(cores) // 2
    return (set(cores[:half]), set(cores[half:])) if half else (set(), set())

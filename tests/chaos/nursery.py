"""Cloud processes that start in a fraction of a second: born by fork from one that has PyTorch loaded.

Each is a process of its own that runs the program's `main` with the arguments of `isthmus serve cloud`, and
can be killed like one. What is saved is the importing, 2 s of CPU for every life.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

import httpx

_FORK: Final = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["pytest", "isthmus.cli", "isthmus.cloud.serve", "tests.chaos.nursery"])
READY_S: Final = 60.0


def _be_a_cloud(arguments: list[str], out: Connection, log: str) -> None:
    """In the child: standard output goes into the pipe, errors and the log into a file."""
    from isthmus.cli import main

    os.dup2(out.fileno(), 1)
    errors = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(errors, 2)
    # As in a fresh process: nothing of the parent's may be shared.
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["isthmus", "serve", "cloud", *arguments]
    main()


class NurseryCloud:
    """`isthmus serve cloud ARGUMENTS` on one port, over any number of lives."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        self.port = 0
        self._arguments = arguments
        self._process: BaseProcess | None = None
        self._restarting: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it on its port (the first time: on a free one) and wait until it is ready."""
        assert self._process is None, "it runs"
        ours, theirs = _FORK.Pipe(duplex=False)
        arguments = [*self._arguments, "--port", str(self.port), "--json"]
        process = _FORK.Process(target=_be_a_cloud, args=(arguments, theirs, str(self.log)), daemon=True)
        process.start()
        theirs.close()
        with ours:
            line = b""
            while not line.endswith(b"\n") and ours.poll(READY_S):
                if not (more := os.read(ours.fileno(), 4096)):
                    break
                line += more
        if not line:
            process.kill()
            raise AssertionError(f"the cloud said nothing; its log: {self.log.read_text()[-2000:]}")
        answer = json.loads(line)
        assert "url" in answer, answer
        self.port = int(answer["url"].rpartition(":")[2])
        self._process = process

    def kill(self) -> None:
        """SIGKILL, as a spot machine dies, and reap."""
        process, self._process = self._process, None
        assert process is not None, "it does not run"
        process.kill()
        process.join()
        process.close()

    def kill_and_restart(self) -> None:
        """SIGKILL; a supervisor starts it again at once, while the caller goes on."""
        self.kill()

        def again() -> None:
            try:
                self.start()
            except BaseException as error:
                self._failure = error

        self._restarting = threading.Thread(target=again, name="supervisor")
        self._restarting.start()

    def be_up(self) -> None:
        """Wait for a restart that is going on; start it where it is dead."""
        if self._restarting is not None:
            self._restarting.join()
            self._restarting = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self._process is None:
            self.start()

    @property
    def is_up(self) -> bool:
        return self._process is not None

    def stop(self) -> None:
        """The end, whatever it is doing."""
        if self._restarting is not None:
            self._restarting.join()
        if self._process is not None:
            self.kill()

    def stats(self) -> dict[str, Any]:
        """Its counts, asked past any relay."""
        reply: dict[str, Any] = httpx.get(f"http://127.0.0.1:{self.port}/v1/stats", timeout=10).json()
        return reply

    def wait_for_rows(self, total: int) -> None:
        """Until the cloud has computed so many rows in this life."""
        until = time.monotonic() + 30
        while (counts := self.stats())["rows_computed_total"] < total:
            assert time.monotonic() < until, counts
            time.sleep(0.01)

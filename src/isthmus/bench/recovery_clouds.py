"""Cloud processes that are killed and come back on their port: `isthmus serve cloud`, supervised."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from time import perf_counter
from types import TracebackType
from typing import IO

from isthmus.protocol.errors import IsthmusError


class CloudProcess:
    """`isthmus serve cloud ARGUMENTS` on one port of loopback, over any number of process lives.

    The first `start` picks a free port and every later one takes the same, so that `url` stays true.
    `ready_s`: how long the newest start took, from the process's birth to its ready line, in seconds.
    As a context manager it starts the cloud and ends it.
    """

    def __init__(self, *arguments: str, log: IO[str] | None = None) -> None:
        """`log`: an open file for what the processes write to standard error; None: it goes to ours."""
        self.ready_s = 0.0
        self.num_starts = 0
        self.exit_codes: list[int] = []
        self._arguments = arguments
        self._log = log
        self._port = 0
        self._child: subprocess.Popen[str] | None = None
        self._supervisor: threading.Thread | None = None
        self._failure: IsthmusError | None = None
        self._given_up = False

    def __enter__(self) -> CloudProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """`ws://127.0.0.1:PORT`."""
        return f"ws://127.0.0.1:{self.port}"

    @property
    def http(self) -> str:
        """`http://127.0.0.1:PORT`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        assert self._port, "start() first"
        return self._port

    @property
    def pid(self) -> int:
        """Of the newest process."""
        assert self._child is not None, "start() first"
        return self._child.pid

    def start(self) -> None:
        """Start the process, once the one before has ended, and wait for its ready line. IsthmusError with
        its own words where it fails."""
        self._reap()
        started = perf_counter()
        command = [sys.executable, "-m", "isthmus", "serve", "cloud", *self._arguments]
        child = subprocess.Popen(
            [*command, "--port", str(self._port), "--json"],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._child = child
        assert child.stdout is not None
        with child.stdout:  # nothing follows the ready line
            line = child.stdout.readline()
        answer = json.loads(line) if line else {}
        if "url" not in answer:
            told = answer.get("error", {}).get("message", f"exit code {child.wait()}")
            child.wait()
            raise IsthmusError(f"`isthmus serve cloud` did not start: {told}", code="cloud_not_started")
        self._port = int(answer["url"].rpartition(":")[2])
        self.ready_s = perf_counter() - started
        self.num_starts += 1

    def kill(self) -> float:
        """SIGKILL, as a spot machine dies; returns at once, with the moment it was sent (perf_counter)."""
        assert self._child is not None, "start() first"
        self._child.kill()
        return perf_counter()

    def restart_when_it_ends(self) -> None:
        """Supervise from now on: the next time the process ends, whatever ended it, start it again at once.
        `restarted` waits for that."""

        def supervise() -> None:
            try:
                self._reap()
                if not self._given_up:
                    self.start()
            except IsthmusError as error:
                self._failure = error

        self._failure = None
        self._supervisor = threading.Thread(target=supervise, name="isthmus-supervisor", daemon=True)
        self._supervisor.start()

    def restarted(self) -> None:
        """Wait until the supervisor, if there is one, has the process up again. IsthmusError where it could
        not be started."""
        if self._supervisor is not None:
            self._supervisor.join()
        if self._failure is not None:
            raise self._failure

    @property
    def restarting(self) -> bool:
        """Is a supervisor waiting for the end of the process, or starting it?"""
        return self._supervisor is not None and self._supervisor.is_alive()

    def stop(self) -> None:
        """SIGKILL and reap, for good."""
        self._given_up = True
        if self._child is None:
            return
        self._child.kill()
        if self._supervisor is not None:
            self._supervisor.join()
        self._child.kill()  # had the supervisor begun to start it, it is another one
        self._reap()

    def _reap(self) -> None:
        """Wait for the end of the process that was ready last; once for each."""
        if self._child is not None and len(self.exit_codes) < self.num_starts:
            self.exit_codes.append(self._child.wait())


def cloud_arguments(model: str, *more: str) -> Sequence[str]:
    """Arguments of a cloud whose answers can be compared token by token: fp32."""
    return ("--model", model, "--precision", "fp32", *more)

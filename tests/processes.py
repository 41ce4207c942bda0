"""Real processes for tests: `isthmus serve …` over loopback, stopped and reaped at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Service:
    """A running `isthmus` process and the URL of its ready line."""

    process: subprocess.Popen[str]
    url: str

    @property
    def http(self) -> str:
        return self.url.replace("ws://", "http://", 1)

    def kill(self) -> None:
        """SIGKILL, as a spot machine dies."""
        self.process.kill()
        self.process.wait()


@contextmanager
def serve(*arguments: str, env: dict[str, str] | None = None) -> Iterator[Service]:
    """`isthmus serve ARGUMENTS --json`, ready."""
    command = [sys.executable, "-m", "isthmus", "serve", *arguments, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    with process.stdout:
        try:
            line = process.stdout.readline()
            answer = json.loads(line) if line else {}
            assert "url" in answer, f"{command} said {line!r} and exited {process.poll()}"
            yield Service(process, answer["url"])
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def run(
    *arguments: str, stdin: str | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`isthmus ARGUMENTS` to its end."""
    command = [sys.executable, "-m", "isthmus", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, input=stdin, env=env, timeout=300, check=False
    )

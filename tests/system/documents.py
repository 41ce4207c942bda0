"""Runs the commands of a page as a reader would: in order, in one folder, servers going on to the end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What a reader has already, or another test runs: the demo (tests/cli/test_demo.py), this suite, an install
# (tests/test_packaging.py).
ELSEWHERE = ("make ", "pip install")
_PORTS = ("8077", "8078", "9000")
_SERVERS = re.compile(r"isthmus (serve|relay)\b")


def commands(page: str) -> list[str]:
    """Every line of the page's `sh` blocks, lines that end in a backslash joined with the next."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith(ELSEWHERE)]


def blocks_not_run(page: str) -> list[str]:
    """Lines that look like commands and stand outside of `sh` blocks."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^ {4}((?:\S*isthmus|curl|openssl|docker|pip|systemctl) .*)$", text, re.MULTILINE)
    return [line for line in found if not line.startswith(ELSEWHERE)]


class Reader:
    """Somebody who types the commands of a page in a folder of their own. Ports are replaced by free ones,
    and `gpu-box`, the other machine, is this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._servers: list[subprocess.Popen[str]] = []
        ports = {port: str(_free_port()) for port in _PORTS}
        self._names = {"gpu-box": "localhost"} | ports
        # What a command takes that names no port.
        self._defaults = {
            "serve edge": f"--port {ports['8077']}",
            "serve cloud": f"--port {ports['8078']}",
            "serve all": f"--port {ports['8077']} --cloud-port {ports['8078']}",
        }
        shim = f'#!/bin/sh\nexec "{sys.executable}" -m isthmus "$@"\n'
        for name in (".venv/bin/isthmus", "bin/isthmus"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(shim)
            (folder / name).chmod(0o755)
        self._env = os.environ | {
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "ISTHMUS_CONFIG": str(folder / "config.toml"),
            "ISTHMUS_STATE": str(folder / "state"),
            "ISTHMUS_DATA": str(folder / "data"),
        }

    def type(self, line: str) -> str:
        """Run one line; its standard output. A server's is its ready line. AssertionError where it fails."""
        for name, stands_for in self._names.items():
            line = line.replace(name, stands_for)
        if _SERVERS.search(line):
            return self._serve(line)
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=self._env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _serve(self, line: str) -> str:
        line = line.partition(" #")[0]
        for command, flags in self._defaults.items():
            if command in line and "--port" not in line:
                line += f" {flags}"
        server = subprocess.Popen(
            ["bash", "-c", f"exec {line}"],
            cwd=self.folder,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._servers.append(server)
        assert server.stdout is not None
        said = server.stdout.readline()
        if " all" in line:  # two processes, the edge last
            said += server.stdout.readline()
        assert "ready" in said, f"{line} said {said!r}"
        return said

    def leave(self) -> None:
        """Stop the servers, the newest first; each ends with 0."""
        for server in reversed(self._servers):
            server.send_signal(signal.SIGTERM)
            code = server.wait(timeout=60)
            assert server.stdout is not None
            server.stdout.close()
            assert code == 0, f"{server.args!r} ended with {code}"


@contextmanager
def reader(folder: Path) -> Iterator[Reader]:
    """A Reader whose servers are stopped at the end."""
    one = Reader(folder)
    try:
        yield one
    finally:
        one.leave()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

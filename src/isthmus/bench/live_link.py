"""A link between two processes that changes while it is used: `isthmus relay --control` as a process."""

from __future__ import annotations

import json
import subprocess
import sys
from types import TracebackType
from typing import Any

from isthmus.protocol.errors import IsthmusError
from isthmus.relay import LinkShape


class LiveLink:
    """A relay in front of `target`, in a process of its own. As a context manager it starts and ends it.

    `url`: where to connect instead of `target`. `shape`: how the link behaves now; its jitter never changes.
    """

    def __init__(self, target: str, shape: LinkShape) -> None:
        self.target, self.shape = target, shape
        self.url = ""
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> LiveLink:
        shape = self.shape
        command = [
            sys.executable,
            "-m",
            "isthmus",
            "relay",
            "127.0.0.1:0",
            self.target,
            "--control",
            "--json",
        ]
        command += ["--rtt-ms", str(shape.rtt_ms), "--jitter-ms", str(shape.jitter_ms)]
        command += ["--up-mbps", str(shape.up_mbps), "--down-mbps", str(shape.down_mbps)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.url = str(self._answer()["url"])
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def reshape(self, shape: LinkShape) -> None:
        """The link behaves like `shape` once this returns. IsthmusError where the relay refuses it."""
        told = self._command(f"shape {shape.rtt_ms} {shape.up_mbps} {shape.down_mbps}")
        self.shape = LinkShape(**told["shape"])

    def _command(self, line: str) -> dict[str, Any]:
        assert self._child is not None, "enter it first"
        assert self._child.stdin is not None
        self._child.stdin.write(f"{line}\n")
        self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child is not None
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise IsthmusError(f"the relay has ended: exit code {self._child.wait()}", code="relay_ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise IsthmusError(f"the relay: {answer['error']['message']}", code=answer["error"]["code"])
        return answer

    def _end(self) -> None:
        if self._child is None:
            return
        self._child.terminate()
        self._child.communicate()  # closes both pipes and waits

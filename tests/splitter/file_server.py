"""A real HTTP server on 127.0.0.1 that serves files from memory and can be told to misbehave."""

from __future__ import annotations

import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Behaviour:
    """`cut_after`: bytes of body sent before each connection is cut, one entry per request, then never.

    `statuses` are answered first, one per request. `ranges=False` ignores Range headers, `range_ends=False`
    where they end. `num_sent` counts bytes of bodies, by path. `refused_agent`
    gets 403 if its User-Agent contains that word. `routes` answers paths that are no files.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    cut_after: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    ranges: bool = True
    range_ends: bool = True
    send_length: bool = True
    refused_agent: str | None = None
    headers: Callable[[str], dict[str, str]] = lambda path: {}
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    num_sent: Counter[str] = field(default_factory=Counter)
    routes: Callable[[str], bytes | None] = lambda path: None


def _handler(behaviour: Behaviour) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass  # the test reads `behaviour.requests`

        def do_HEAD(self) -> None:
            self._answer(body_wanted=False)

        def do_GET(self) -> None:
            self._answer(body_wanted=True)

        def _answer(self, *, body_wanted: bool) -> None:
            wanted = self.headers.get("Range")
            behaviour.requests.append((self.command, self.path, wanted))
            if body_wanted and behaviour.statuses:
                self._empty(behaviour.statuses.pop(0), behaviour.headers(self.path))
                return
            if behaviour.refused_agent and behaviour.refused_agent in self.headers.get("User-Agent", ""):
                self._empty(403)
                return
            data = behaviour.routes(self.path)
            if data is None:
                data = behaviour.files.get(self.path.partition("?")[0])
            if data is None:
                self._empty(404, behaviour.headers(self.path))
                return
            start, total = 0, len(data)
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "") if behaviour.ranges else None
            if match and int(match[1]) >= total:
                self._empty(416, {"Content-Range": f"bytes */{total}"})
                return
            end = total
            if match:
                start = int(match[1])
                end = int(match[2]) + 1 if match[2] and behaviour.range_ends else total
            self.send_response(206 if match else 200)
            if match:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{total}")
            if behaviour.send_length:
                self.send_header("Content-Length", str(end - start))
            else:
                self.send_header("Connection", "close")
            for name, value in behaviour.headers(self.path).items():
                self.send_header(name, value)
            self.end_headers()
            if not body_wanted:
                return
            cut = behaviour.cut_after.pop(0) if behaviour.cut_after else None
            body = data[start:end] if cut is None else data[start : min(end, start + cut)]
            behaviour.num_sent[self.path] += len(body)  # before the client can have them
            self.wfile.write(body)
            self.wfile.flush()
            if cut is not None:
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = cut is not None or not behaviour.send_length

        def _empty(self, status: int, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": "0", **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()

    return Handler


class _Server(ThreadingHTTPServer):
    # Idle keep-alive connections must not hold up the end of the test.
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that hang up are what these tests are about


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[str]:
    """The base address of a server that runs in threads until the block ends."""
    server = _Server(("127.0.0.1", 0), _handler(behaviour))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

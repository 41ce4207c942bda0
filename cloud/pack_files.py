"""`GET /v1/pack/…`: the cloud's pack for edges that have no model files yet, whole files or byte ranges."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from isthmus.protocol.errors import IsthmusError, NotFoundError, OverloadedError
from isthmus.splitter.pack import MANIFEST_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

    from isthmus.splitter.pack import Pack

PACK_PATH: Final = "/v1/pack/{name:path}"
MAX_DOWNLOADS: Final = 8
# A client that takes nothing for so long has lost its place.
STALL_S: Final = 30.0
_RETRY_AFTER_S: Final = 5

Check = Callable[[Request], Response | None]
"""The refusal of a request (host, key), or None."""
Refuse = Callable[[IsthmusError, int], Response]


class PackFiles:
    """The files of `pack` by the names that its manifest gives them: a client's name is looked up here and
    never becomes a path. None: no pack is offered. At most `max_downloads` are under way at once."""

    def __init__(
        self, pack: Pack | None, registry: CollectorRegistry, *, max_downloads: int = MAX_DOWNLOADS
    ) -> None:
        self.max_downloads = max_downloads
        self.num_running = 0
        self.bytes_sent = Counter("isthmus_pack_bytes", "Bytes of the pack sent to edges", registry=registry)
        self.etag = ""
        self._files: dict[str, tuple[Path, os.stat_result]] = {}
        if pack is not None:
            self.etag = f'"{hashlib.sha256((pack.path / MANIFEST_FILE).read_bytes()).hexdigest()}"'
            graphs = [entry.graph for entry in pack.manifest.blocks]
            for name in (MANIFEST_FILE, WEIGHTS_FILE, *graphs, *pack.manifest.files):
                self._files[name] = (pack.path / name, os.stat(pack.path / name))

    async def find(self, name: str) -> _File:
        """NotFoundError `no_pack_offered`, `no_such_file`, or `pack_changed` since this server began."""
        if not self._files:
            raise NotFoundError(
                "this cloud offers no pack",
                code="no_pack_offered",
                hint="start it with --offer-pack on, or build the pack there with `isthmus build` first",
            )
        if name not in self._files:
            raise NotFoundError(f"the pack has no file {name[:100]!r}", code="no_such_file")
        path, then = self._files[name]
        try:
            now = await asyncio.to_thread(os.stat, path)
        except OSError:
            now = None
        if now is None or (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise NotFoundError(
                f"{name} was removed or rebuilt since this cloud began",
                code="pack_changed",
                hint="restart it",
            )
        return _File(self, path, now)


def pack_route(files: PackFiles, check: Check, refuse: Refuse) -> Route:
    """The route; `check` comes first."""

    async def give(request: Request) -> Response:
        if (refusal := check(request)) is not None:
            return refusal
        try:
            return await files.find(request.path_params["name"])
        except NotFoundError as error:
            return refuse(error, 404)

    return Route(PACK_PATH, give, methods=["GET"])  # and HEAD


class _File(FileResponse):
    """One file, or what a Range header asks of it; read off the event loop, sent as the client takes it."""

    chunk_size = 1 << 18

    def __init__(self, files: PackFiles, path: Path, status: os.stat_result) -> None:
        media_type = "application/json" if path.suffix == ".json" else "application/octet-stream"
        super().__init__(path, headers={"etag": files.etag}, media_type=media_type, stat_result=status)
        self._all = files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        files = self._all
        if files.num_running >= files.max_downloads:
            error = OverloadedError(
                f"{files.max_downloads} downloads are running",
                code="too_many_downloads",
                hint="try again soon",
            )
            headers = {"retry-after": str(_RETRY_AFTER_S)}
            busy = JSONResponse({"error": error.to_dict()}, status_code=429, headers=headers)
            await busy(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            async with asyncio.timeout(STALL_S):
                await send(message)
            files.bytes_sent.inc(len(message.get("body", b"")))

        files.num_running += 1
        try:
            await super().__call__(scope, receive, counted)
        except TimeoutError:
            pass  # the server cuts a connection whose reply is not whole
        finally:
            files.num_running -= 1

"""The files of the web chat, as a browser may have them: closed types, a strict policy, nothing else."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

# Python's own table depends on the machine (a registry, /etc/mime.types), and a browser that is told nosniff
# runs no script of another type. What is not listed is not served.
TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".map": "application/json",
    ".md": "text/plain; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
    "": "text/plain; charset=utf-8",  # LICENSE
}

HEADERS: Final = {
    # What a model writes ends up in this page: even if its cleaning had a hole, nothing is run or fetched.
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Asked for again each time, answered with 304: after an upgrade nobody sees half of the old page.
    "cache-control": "no-cache",
    "accept-ranges": "none",
}


class Pages(StaticFiles):
    """The files below `directory`, with HEADERS; 404 for what is no file there, hidden, or of no type of
    TYPES."""

    def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
        """As Starlette's, which keeps to the directory; but only what may be shown is found."""
        parts = PurePath(path).parts
        shown = not any(part.startswith(".") for part in parts) and PurePath(path).suffix in TYPES
        return super().lookup_path(path) if shown else ("", None)

    async def get_response(self, path: str, scope: Scope) -> Response:
        """The file at `path` below the directory, whole; 304 where the browser has it."""
        # Starlette's answers to bad ranges are no JSON, and no file here is so large that a part would do.
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"range"]
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        if response.status_code == 200:
            response.headers["content-type"] = TYPES[PurePath(path).suffix]
        return response


def page_routes(directory: Path | None = None) -> list[BaseRoute]:
    """`/` and `/ui/…` over the files in `directory`; None: the web chat's, as installed."""
    pages = Pages(directory=directory or Path(str(files("isthmus") / "web")))

    async def index(request: Request) -> Response:
        return await pages.get_response("index.html", request.scope)

    return [Route("/", index, methods=["GET"]), Mount("/ui", pages)]

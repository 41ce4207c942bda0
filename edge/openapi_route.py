"""Serves the OpenAPI document."""

from __future__ import annotations

from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


@cache
def _document(keys: bool) -> dict[str, Any]:
    # Not before it is asked for: its many models take as long to make as the rest of the API to import.
    from isthmus.edge.openapi import document

    return document(keys=keys)


def document_route(*, keys: bool) -> Route:
    """`/openapi.json`. `keys`: does this agent ask for API keys?"""

    async def answer(request: Request) -> Response:
        return JSONResponse(_document(keys))

    return Route("/openapi.json", answer, methods=["GET"])

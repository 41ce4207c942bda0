"""Reading the body of an HTTP request, which may be anybody's and of any length."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request

from isthmus.edge.api_errors import BodyTooLargeError

# A full context of the longest models (128 Ki tokens of prose) is some 0.6 MB of text.
MAX_BODY_BYTES: Final = 4 * 1024 * 1024


async def read_body(request: Request) -> bytes:
    """The whole body, at most MAX_BODY_BYTES; a larger one is not read to its end."""
    announced = request.headers.get("content-length", "")
    too_large = BodyTooLargeError(
        f"the body has {announced or 'more'} bytes, at most {MAX_BODY_BYTES} are read",
        hint="no model's context holds as much text",
    )
    if announced.isdigit() and int(announced) > MAX_BODY_BYTES:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)

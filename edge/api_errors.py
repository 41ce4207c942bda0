"""Errors of the HTTP API: everything that goes wrong, in OpenAI's shape with a stable code."""

from __future__ import annotations

import math
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from isthmus.edge.request_ids import REQUEST_ID
from isthmus.protocol.errors import IsthmusError, OverloadedError, RequestError


class FieldError(RequestError):
    """A field of a request body; `param` is its name as OpenAI's errors carry it (a.0.b)."""

    def __init__(self, message: str, *, param: str, code: str = "bad_request", hint: str = "") -> None:
        super().__init__(message, code=code, hint=hint)
        self.param = param


class UnreadError(RequestError):
    """Refused without reading the body to its end; the connection is closed with the response."""


class BodyTooLargeError(UnreadError):
    default_code = "body_too_large"
    http_status = 413


class ForeignError(UnreadError):
    """A request that a web page of another origin made the browser send."""

    default_code = "foreign_origin"
    http_status = 403


class UnauthorizedError(UnreadError):
    """No key of this agent; the code is OpenAI's."""

    default_code = "invalid_api_key"
    http_status = 401


def error_body(error: IsthmusError) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`; the hint is part of the message."""
    if isinstance(error, OverloadedError):
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error" if error.http_status < 500 else "server_error"
    param = error.param if isinstance(error, FieldError) else None
    return {"error": {"message": str(error), "type": kind, "param": param, "code": error.code}}


def error_response(error: IsthmusError) -> JSONResponse:
    """The error as a response of its own, with the headers that belong to it."""
    headers: dict[str, str] = {}
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    if isinstance(error, UnauthorizedError):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, UnreadError):
        headers["connection"] = "close"  # else the server would read on, to the end of what was refused
    return JSONResponse(error_body(error), status_code=error.http_status, headers=headers)


async def _on_isthmus_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, IsthmusError)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = {
        "error": {
            "message": f"{request.method} {request.url.path}: {error.detail}",
            "type": "invalid_request_error",
            "param": None,
            "code": {404: "unknown_path", 405: "method_not_allowed"}.get(error.status_code, "http_error"),
        }
    }
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(
        status_code=499
    )  # nobody reads it; 499 is what access logs use for "client closed request"


async def _on_bug(request: Request, error: Exception) -> Response:
    """A fault of ours. The client learns no more than its kind; the traceback is logged (logs.py)."""
    response = error_response(
        IsthmusError(f"the agent failed: {type(error).__name__}", hint="its log tells more; please report it")
    )
    # This handler stands outside of the middleware that names the other replies.
    response.headers[REQUEST_ID] = request.state.request_id
    return response


def add_error_handlers(app: Starlette) -> None:
    """No request to `app` is answered with an error in another shape."""
    app.add_exception_handler(IsthmusError, _on_isthmus_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_client_gone)
    app.add_exception_handler(Exception, _on_bug)

"""What the edge logs: events with figures, warnings and faults, never a word of what a request said.

The lines go to the standard library's logger `isthmus.edge`; how they look is the process's choice. The
message of an exception may quote what it stumbled over (a prompt, a header), so of an unexpected one only the
kind and the lines of code it went through are written.
"""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
from typing import Any, Final

import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

_CODE: Final = re.compile("[a-z][a-z0-9_]{0,63}")

log: Final = structlog.wrap_logger(
    logging.getLogger("isthmus.edge"),
    wrapper_class=structlog.stdlib.BoundLogger,
    processors=[
        structlog.stdlib.filter_by_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.stdlib.render_to_log_kwargs,
    ],
    cache_logger_on_first_use=True,
)


def plain_code(code: str) -> str:
    """An error's code as it may be logged: a cloud chose it, and what is no plain name may be anything."""
    return code if _CODE.fullmatch(code) else "other"


def trace_of(error: BaseException) -> str:
    """Where an exception, and those that led to it, came through, and their kinds; none of their messages."""
    lines: list[str] = []
    waiting, seen = [error], set[int]()
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        lines += [*traceback.format_tb(current.__traceback__), type(current).__qualname__]
        waiting += [led for led in (current.__context__, current.__cause__) if led is not None]
        if isinstance(current, BaseExceptionGroup):
            waiting += current.exceptions
    return "\n".join(line.rstrip() for line in lines)


class QuietFaults:
    """ASGI wrapper around the whole app: its faults are logged here, else uvicorn would quote them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            log.error("a request failed by a fault of this agent\n%s", trace_of(error))


def log_stray_faults(loop: asyncio.AbstractEventLoop) -> None:
    """Have the loop report exceptions that nobody awaited like this; its own report quotes them."""

    def report(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        log.error("%s\n%s", context["message"], "" if error is None else trace_of(error))

    loop.set_exception_handler(report)

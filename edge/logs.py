"""The log of the edge's process: warnings and faults on stderr, never a word of what a request said.

The message of an exception may quote what it stumbled over (a prompt, a header), so of an unexpected one
only the kind and the lines of code it went through are written.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import traceback
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import LOGGING_CONFIG

log = logging.getLogger("isthmus.edge")


def log_config() -> dict[str, Any]:
    """uvicorn's, with our own lines beside its."""
    config = copy.deepcopy(LOGGING_CONFIG)
    config["loggers"][log.name] = {"handlers": ["default"], "level": "WARNING", "propagate": False}
    return config


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

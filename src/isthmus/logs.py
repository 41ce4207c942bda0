"""How the log of a long-running process looks: one line per event on stderr, JSON or for a terminal.

stdout belongs to the ready line. Nothing of what a request said is ever written, nor the message of an
exception, which may quote it: of a fault only its kind and the lines of code that it came through.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog
from structlog.types import EventDict, Processor, WrappedLogger

from isthmus.edge.logs import trace_of


class _Handler(logging.StreamHandler[TextIO]):
    """Ours, so that a second configuration replaces the first."""


def configure_log(format_: str = "auto", level: str = "info") -> None:
    """Has this process log to stderr: our own lines from `level` on (debug, info, warning, error), those of
    libraries from warning on, since their debug lines quote headers and messages. `format_`: json, tty, or
    auto: for a terminal where stderr is one, else JSON."""
    stderr = sys.stderr
    is_terminal = stderr.isatty()
    renderer: Processor
    if format_ == "tty" or (format_ == "auto" and is_terminal):
        # Of a value that is text, repr: no control character reaches the terminal.
        renderer = structlog.dev.ConsoleRenderer(colors=is_terminal, repr_native_str=True)
    else:
        renderer = structlog.processors.JSONRenderer()
    handler = _Handler(stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.ExtraAdder(),
                structlog.stdlib.add_logger_name,
                structlog.stdlib.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                _without_messages,
            ],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old, _Handler):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("isthmus").setLevel(level.upper())


def _without_messages(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """An exception's kind and places instead of its text; nor what another handler left in the record."""
    event.pop("message", None)
    fault = event.pop("exc_info", None)
    error = fault[1] if isinstance(fault, tuple) else fault
    if isinstance(error, BaseException):
        event["exception"] = trace_of(error)
    return event

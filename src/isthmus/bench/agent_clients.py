"""Clients of a served edge, as many as wanted in one process: a bare HTTP/1.1 reader of streamed answers.

An HTTP library costs as much per token as the server itself; on the few cores that both share, what it costs
would be taken for the server's.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from isthmus.protocol.errors import IsthmusError


@dataclass
class Reply:
    """One answered request. `status`: HTTP's; `retry_after_s`: its header, where there is one. `error`: the
    code of a failure, before or within the stream. `at_s`: when each piece of text came (perf_counter)."""

    status: int
    retry_after_s: float | None = None
    text: str = ""
    num_tokens: int = 0
    error: str | None = None
    began_s: float = 0.0
    ended_s: float = 0.0
    at_s: list[float] = field(default_factory=list)


async def ask(url: str, body: dict[str, Any]) -> Reply:
    """POST `body` to /v1/chat/completions at `url` as a stream, read to its end. IsthmusError for what is no
    HTTP; OSError where nobody listens."""
    parts = urlsplit(url)
    payload = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    began_s = perf_counter()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {parts.netloc}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
        )
        writer.write(head.encode() + payload)
        reply = await _read_head(reader)
        reply.began_s = began_s
        if reply.status == 200:
            async with aclosing(_events(reader)) as events:
                async for event in events:
                    _take(reply, event)
        else:
            reply.error = _code(await reader.read())
        reply.ended_s = perf_counter()
        return reply
    finally:
        writer.close()


async def _read_head(reader: asyncio.StreamReader) -> Reply:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    version, _, rest = lines[0].partition(" ")
    if not version.startswith("HTTP/1."):
        raise IsthmusError(f"the server answered {lines[0]!r}, which is no HTTP/1.1")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    wait = headers.get("retry-after")
    return Reply(int(rest.split()[0]), None if wait is None else float(wait))


async def _events(reader: asyncio.StreamReader) -> AsyncGenerator[dict[str, Any], None]:
    """The server-sent events of a chunked body. IsthmusError where it ends before `[DONE]`."""
    rest = b""
    while size := int(await reader.readline() or b"0", 16):
        rest += (await reader.readexactly(size + 2))[:-2]
        *whole, rest = rest.split(b"\n\n")
        for event in whole:
            if event == b"data: [DONE]":
                return
            if event.startswith(b"data: "):
                yield json.loads(event[6:])
    raise IsthmusError("the stream ended before [DONE]")


def _take(reply: Reply, event: dict[str, Any]) -> None:
    if "error" in event:
        reply.error = event["error"]["code"]
        return
    for choice in event["choices"]:
        if text := choice["delta"].get("content"):
            reply.text += text
            reply.at_s.append(perf_counter())
    if event.get("usage"):
        reply.num_tokens = event["usage"]["completion_tokens"]


def _code(body: bytes) -> str:
    """The code of an error's body (chunked or not)."""
    text = body.decode(errors="replace")
    start, end = text.find("{"), text.rfind("}")
    try:
        return str(json.loads(text[start : end + 1])["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "unreadable"

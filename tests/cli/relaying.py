"""Shared by the relay's tests: a server behind a relay, and what its connections carried."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from isthmus.relay import LinkShape, Relay

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass  # the relay cut it, as it was told
    writer.close()


@asynccontextmanager
async def relayed(
    shape: LinkShape | None = None, handler: Handler = echo, **options: Any
) -> AsyncIterator[Relay]:
    """A running relay in front of a server of its own."""
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    target = server.sockets[0].getsockname()[:2]
    options.setdefault("seed", 1)
    relay = Relay(("127.0.0.1", 0), (target[0], target[1]), shape or LinkShape(), **options)
    await relay.start()
    try:
        yield relay
    finally:
        await relay.aclose()
        server.close()


@asynccontextmanager
async def client(relay: Relay) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection(*relay.listen)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def read_to_end(reader: asyncio.StreamReader) -> tuple[bytes, bool]:
    """What still came, and whether it ended with a reset."""
    got = b""
    try:
        while data := await reader.read(65536):
            got += data
    except ConnectionResetError:
        return got, True
    return got, False


async def echoed(streams: Streams, data: bytes, *, within_s: float = 5.0) -> bytes:
    """Sends `data` and reads as many bytes back."""
    reader, writer = streams
    writer.write(data)
    async with asyncio.timeout(within_s):
        return await reader.readexactly(len(data))

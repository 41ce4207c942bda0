"""A real edge for the API's tests: agent, app and uvicorn on a free port, in a thread with its own loop."""

from __future__ import annotations

import asyncio
import queue
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from isthmus.edge.agent import Agent
from isthmus.edge.api import ServedModel
from isthmus.edge.api_models import Ask
from isthmus.edge.chat import ChatTemplate
from isthmus.edge.conversations_store import ConversationStore
from isthmus.edge.server import serve_edge
from isthmus.splitter.pack import Pack

NAME = "tiny"


@dataclass
class LiveEdge:
    """A running edge. `http` is a client with its address."""

    url: str
    http: httpx.Client
    template: ChatTemplate

    def stats(self) -> dict[str, Any]:
        """What the agent counts."""
        stats: dict[str, Any] = self.http.get("/v1/stats").json()
        return stats


@contextmanager
def live_edge(
    pack: Pack,
    *,
    ask: Ask | None = None,
    served: dict[str, Any] | None = None,
    conversations: Path | None = None,
    verify: ssl.SSLContext | bool = True,
    **options: Any,
) -> Iterator[LiveEdge]:
    """Serves `pack` under NAME; drains and closes at the end.

    `options` are the Agent's, `served` those of serve_edge (keys, TLS); `conversations`: the file they
    are kept in; `verify`: whom `http` trusts.
    """
    template = ChatTemplate.from_pack(pack)
    said: queue.Queue[str | BaseException] = queue.Queue()
    stoppers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        stop = asyncio.Event()
        stoppers.append((asyncio.get_running_loop(), stop))
        agent = Agent(pack, **options)
        kept = None if conversations is None else ConversationStore(conversations)
        model = ServedModel(NAME, agent, template, pack.generation(), ask or Ask(), kept)
        access = {"host": "127.0.0.1", **(served or {})}
        await serve_edge(model, port=0, ready=said.put, stop=stop, **access)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            said.put(error)

    thread = threading.Thread(target=run, name="live-edge")
    thread.start()
    try:
        first = said.get(timeout=60)
        if isinstance(first, BaseException):
            raise first
        with httpx.Client(base_url=first, timeout=60, verify=verify) as http:
            yield LiveEdge(first, http, template)
    finally:
        for loop, stop in stoppers:
            if thread.is_alive():
                loop.call_soon_threadsafe(stop.set)
        thread.join(60)
    assert not thread.is_alive(), "the edge did not drain"
    assert said.empty(), said.get()

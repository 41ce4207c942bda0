"""What the agent is doing now, in one object: what /v1/stats answers, once or every second."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Iterable
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import psutil
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from isthmus.edge.api import ServedModel
    from isthmus.edge.running import Running
    from isthmus.splitter.pack import Pack

PERIOD_S: Final = 1.0


class Snapshots:
    """Of one served model. `conversations`: are conversations kept here?"""

    def __init__(self, model: ServedModel, *, conversations: bool) -> None:
        self._model = model
        self._conversations = conversations
        self._process = psutil.Process()
        self._since = monotonic()

    def now(self) -> dict[str, Any]:
        """The agent's `stats()`, and the model and the process around it."""
        pack, stats = self._model.agent.pack, self._model.agent.stats()
        return {
            "model": model_card(self._model.name, pack),
            "pid": os.getpid(),
            "uptime_s": monotonic() - self._since,
            "rss_bytes": self._process.memory_info().rss,
            **stats,
            "conversations": self._conversations,
        }

    def routes(self) -> list[Route]:
        """Paths and their handlers."""
        return [
            Route("/v1/stats", self._one, methods=["GET"]),
            Route("/v1/stats/stream", self._many, methods=["GET"]),
        ]

    async def _one(self, request: Request) -> Response:
        return JSONResponse(self.now())

    async def _many(self, request: Request) -> Response:
        how: dict[str, Any] = {"media_type": "text/event-stream", "headers": {"cache-control": "no-cache"}}
        if request.method == "HEAD":  # has no body, so it would never be seen to end
            return Response(**how)
        return StreamingResponse(self.stream(), **how)

    async def stream(self) -> AsyncGenerator[str, None]:
        """Server-sent events, a snapshot every PERIOD_S, until the server drains."""
        draining = self._model.draining
        while not draining.is_set():
            yield f"data: {json.dumps(self.now(), allow_nan=False)}\n\n"
            try:
                async with asyncio.timeout(PERIOD_S):
                    await draining.wait()
            except TimeoutError:
                continue


def model_card(name: str, pack: Pack) -> dict[str, Any]:
    """The served model in figures; `bytes_per_block`: embedding, each layer, norm with head."""
    spec, manifest = pack.spec, pack.manifest
    return {
        "id": name,
        "num_layers": spec.num_layers,
        "hidden": spec.hidden,
        "bits": manifest.bits,
        "scheme": manifest.scheme,
        "context_length": spec.context_length,
        "bytes_per_block": list(pack.bytes_per_block),
    }


def active(running: Iterable[Running]) -> list[dict[str, Any]]:
    """The requests that run, as they run now."""
    return [
        {
            "request_id": one.request.request_id,
            "route": one.route,
            "split": one.split,
            "shape": one.shape,
            "prompt_tokens": len(one.request.prompt_ids),
            "tokens": one.num_out,
        }
        for one in running
    ]


def loaded_bytes(pack: Pack, layers: Iterable[int], *, embed: bool, head: bool) -> int:
    """What the weights of these blocks take."""
    blocks = pack.bytes_per_block
    return sum(blocks[1 + layer] for layer in layers) + blocks[0] * embed + blocks[-1] * head

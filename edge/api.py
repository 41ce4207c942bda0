"""The HTTP API of the edge: OpenAI's chat and completions over one agent, models, health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from isthmus.edge.agent import Agent
from isthmus.edge.api_body import read_body
from isthmus.edge.api_errors import FieldError, add_error_handlers
from isthmus.edge.api_messages import conversation
from isthmus.edge.api_models import Ask, ChatRequest, CompletionRequest
from isthmus.edge.api_parse import parse_body, parse_either
from isthmus.edge.chat import ChatTemplate
from isthmus.edge.conversations_api import ConversationsApi
from isthmus.edge.conversations_store import ConversationStore
from isthmus.edge.dialects import chat_dialect, completion_dialect
from isthmus.edge.guard import Guard
from isthmus.edge.merge import merge
from isthmus.edge.openapi_route import document_route
from isthmus.edge.replies import Reply
from isthmus.edge.request_ids import RequestIds
from isthmus.edge.requests import GenerateRequest
from isthmus.edge.snapshot import Snapshots
from isthmus.edge.web import page_routes
from isthmus.protocol.errors import NotFoundError
from isthmus.protocol.keys import KeyFile

T = TypeVar("T")


@dataclass
class ServedModel:
    """The one model this agent serves, how its prompts are made, and what it was started with.

    `defaults`: the pack's generation.json. `ask`: route, split … of requests that don't say. `conversations`
    None: those of the web chat are not kept. `draining` is set when the server begins to drain: what has no
    end of its own ends then.
    """

    name: str
    agent: Agent
    template: ChatTemplate
    defaults: dict[str, Any]
    ask: Ask = field(default_factory=Ask)
    conversations: ConversationStore | None = None
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    created: int = field(default_factory=lambda: int(time.time()))

    def check(self, asked: str | None) -> None:
        """404 for another model than the one served; no name means this one."""
        if asked not in (None, self.name):
            raise NotFoundError(
                f"the model {asked!r} is not served here",
                code="model_not_found",
                hint=f"this agent serves {self.name!r}",
            )

    def card(self) -> dict[str, Any]:
        """The model as /v1/models tells of it."""
        manifest, spec = self.agent.pack.manifest, self.agent.pack.spec
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "isthmus",
            "isthmus": {
                "num_layers": spec.num_layers,
                "context_length": spec.context_length,
                "bits": manifest.bits,
                "scheme": manifest.scheme,
            },
        }


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled (ClientDisconnect) as soon as the client hangs up."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.create_task(work), asyncio.create_task(hang_up())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class EventStream(StreamingResponse):
    """Server-sent events; `source`, what they are made from, is closed with the response in any case."""

    def __init__(
        self, events: AsyncGenerator[str, None], source: AsyncGenerator[Any, None], *, route: str
    ) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"x-isthmus-route": route, "cache-control": "no-cache"},
        )
        self._closed_at_end = events, source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events, source = self._closed_at_end
        async with aclosing(source), aclosing(events):
            await super().__call__(scope, receive, send)


async def _first_of(events: AsyncGenerator[T, None]) -> T:
    return await anext(events)


class Api:
    """Handlers over one served model."""

    def __init__(self, model: ServedModel) -> None:
        self.model = model

    def routes(self) -> list[Route]:
        """Paths and their handlers."""
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/route", self.route, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.one_model, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/livez", self.livez, methods=["GET"]),
            Route("/readyz", self.readyz, methods=["GET"]),
        ]

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, parse_body(ChatRequest, await read_body(request)))

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, parse_body(CompletionRequest, await read_body(request)))

    async def route(self, request: Request) -> Response:
        """The decision about a request, which is not run."""
        body = parse_either(await read_body(request))
        for name, asked in (("stream", body.stream), ("n", (body.n or 1) > 1)):
            if asked:
                raise FieldError(f"{name} is not honoured here: there is one decision", param=name)
        one, *_ = await self._requests(request, body)
        decision = await unless_client_leaves(request, self.model.agent.route(one))
        answer = {
            "route": decision.route,
            "split": decision.split,
            "shape": decision.shape,
            "reason": decision.reason,
            "decision": decision.to_dict(),
            "request": {"prompt_tokens": len(one.prompt_ids), "max_tokens": one.max_tokens},
        }
        return JSONResponse(answer, headers={"x-isthmus-route": decision.route})

    async def _requests(
        self, request: Request, body: ChatRequest | CompletionRequest
    ) -> list[GenerateRequest]:
        """What the body asks of the agent, one request per choice."""
        self.model.check(body.model)
        # Off the event loop: megabytes of text take long to tokenise, and the other requests go on.
        template = self.model.template
        grammar = None
        if isinstance(body, ChatRequest):
            toolbox, grammar = body.toolbox(), body.grammar()
            if toolbox is not None:
                grammar = toolbox.grammar(template.tool_format, template.tokenizer, grammar)
            messages = conversation(body.messages)
            ids = await run_in_threadpool(template.encode, messages, toolbox.tools if toolbox else ())
        elif isinstance(body.prompt, str):
            ids = await run_in_threadpool(template.encode_raw, body.prompt)
        else:
            ids = body.prompt
        spec = self.model.agent.pack.spec
        return body.to_requests(
            ids,
            defaults=self.model.defaults,
            end_ids=spec.eos_ids,
            context=spec.context_length,
            ask=self.model.ask,
            grammar=grammar,
            request_id=request.state.request_id,
        )

    async def _answer(self, request: Request, body: ChatRequest | CompletionRequest) -> Response:
        requests = await self._requests(request, body)
        form = self.model.template.tool_format
        reply = Reply(
            chat_dialect if isinstance(body, ChatRequest) else completion_dialect,
            self.model.name,
            self.model.template.tokenizer,
            requests,
            explain=body.wants_explanation(),
            calls=form if isinstance(body, ChatRequest) and body.toolbox() else None,
        )
        events = merge(self.model.agent, requests)
        if not body.stream:
            async with aclosing(events):
                whole = await unless_client_leaves(request, reply.whole(events))
            return JSONResponse(whole, headers={"x-isthmus-route": whole["isthmus"]["route"]})
        try:
            # The status line is sent only when the first token exists: what fails before has its own status.
            first = await unless_client_leaves(request, _first_of(events))
        except BaseException:
            await events.aclose()
            raise
        stream = reply.server_sent_events(first, events, include_usage=body.wants_usage())
        return EventStream(stream, events, route=reply.route_of(first))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.model.card()]})

    async def one_model(self, request: Request) -> Response:
        self.model.check(request.path_params["name"])
        return JSONResponse(self.model.card())

    async def metrics(self, request: Request) -> Response:
        return Response(self.model.agent.telemetry.render(), media_type="text/plain; version=0.0.4")

    async def livez(self, request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def readyz(self, request: Request) -> Response:
        reason = self.model.agent.not_ready_reason()
        if reason:
            return JSONResponse({"status": "not ready", "reason": reason}, status_code=503)
        return JSONResponse({"status": "ready"})


def make_app(model: ServedModel, *, only_local: bool = True, keys: KeyFile | None = None) -> Starlette:
    """The ASGI app. The agent's start and end are the caller's. `only_local`, `keys`: see `Guard`."""
    keys = keys or KeyFile(None)
    guard = Middleware(Guard, only_local=only_local, keys=keys)
    snapshots = Snapshots(model, conversations=model.conversations is not None)
    kept = ConversationsApi(model.conversations)
    routes = [*Api(model).routes(), *snapshots.routes(), *kept.routes(), *page_routes()]
    routes.append(document_route(keys=not keys.ring.open))
    app = Starlette(routes=routes, middleware=[Middleware(RequestIds), guard])
    add_error_handlers(app)
    return app

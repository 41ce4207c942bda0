"""The OpenAPI document of the edge: what each path takes and answers, from the models that check it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from isthmus import __version__
from isthmus.edge import openapi_replies as replies
from isthmus.edge.api_models import ChatRequest, CompletionRequest
from isthmus.edge.conversations_api import PATH as CONVERSATIONS
from isthmus.edge.conversations_api import Messages, NewConversation, Retitled

Model = type[BaseModel]

_REF: Final = "#/components/schemas/{model}"
_JSON: Final = "application/json"
_STREAM: Final = "text/event-stream"
_STREAMED: Final = "; with `stream`, as server-sent events that end with `data: [DONE]`"

MEANINGS: Final = {
    304: "not changed since the browser got it",
    400: "the request cannot be honoured; `param` names the field",
    401: "no valid API key",
    403: "another host's name, or a page of another origin",
    404: "there is no such thing here",
    405: "not by this method",
    409: "as many conversations as can be are kept",
    413: "the body is larger than what is read",
    429: "the queue is full; `retry-after` says when to try again",
    500: "a fault of this agent",
    502: "the cloud refused or failed",
    503: "not now: the cloud cannot be reached, or a file is busy",
    504: "the cloud did not answer in time",
    507: "the disk is full",
}
_RUN: Final = (404, 429, 500, 502, 503, 504)
_KEPT: Final = (404, 500, 503, 507)


@dataclass(frozen=True)
class Operation:
    """A method on a path. `body`: one of these; `answers`: by status, a model, a media type, or nothing.
    `fails`: with which statuses beside those that every operation has. `chunks`: the answer may be (with no
    `answers`, it always is) server-sent events of these. `open`: no key is asked for."""

    method: str
    path: str
    summary: str
    answers: Mapping[int, Model | str | None]
    body: Sequence[Model] = ()
    body_required: bool = True
    fails: Sequence[int] = ()
    chunks: Sequence[Model] = ()
    open: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


_ROUTE_HEADER: Final = {"x-isthmus-route": "where it ran; of a stream, where it began"}
OPERATIONS: Final = (
    Operation(
        "post", "/v1/chat/completions", "Answer a chat",
        {200: replies.ChatReply}, (ChatRequest,), fails=_RUN, chunks=(replies.ChatChunk, replies.Error),
        headers=_ROUTE_HEADER,
    ),
    Operation(
        "post", "/v1/completions", "Continue a text",
        {200: replies.CompletionReply}, (CompletionRequest,), fails=_RUN,
        chunks=(replies.CompletionChunk, replies.Error), headers=_ROUTE_HEADER,
    ),
    Operation(
        "post", "/v1/route", "Decide where a request would run, without running it",
        {200: replies.RouteReply}, (ChatRequest, CompletionRequest), fails=(404, 500, 502, 503, 504),
        headers=_ROUTE_HEADER,
    ),
    Operation("get", "/v1/models", "The served model", {200: replies.ModelList}),
    Operation("get", "/v1/models/{name}", "One model", {200: replies.ModelCard}, fails=(404,)),
    Operation("get", "/v1/stats", "What the agent is doing", {200: replies.Stats}),
    Operation(
        "get", "/v1/stats/stream", "The same, once a second, as server-sent events",
        {200: None}, chunks=(replies.Stats,),
    ),
    Operation(
        "get", CONVERSATIONS, "The kept conversations, newest first",
        {200: replies.ConversationList}, fails=(500, 503, 507),
    ),
    Operation(
        "post", CONVERSATIONS, "Begin a conversation",
        {201: replies.WholeConversation}, (NewConversation,), body_required=False, fails=(*_KEPT, 409),
    ),
    Operation("delete", CONVERSATIONS, "Delete all conversations", {204: None}, fails=_KEPT),
    Operation(
        "get", CONVERSATIONS + "/{id}", "A conversation with its messages",
        {200: replies.WholeConversation}, fails=_KEPT,
    ),
    Operation(
        "patch", CONVERSATIONS + "/{id}", "Give a conversation another title",
        {200: replies.ConversationSummary}, (Retitled,), fails=_KEPT,
    ),
    Operation("delete", CONVERSATIONS + "/{id}", "Delete a conversation", {204: None}, fails=_KEPT),
    Operation(
        "put", CONVERSATIONS + "/{id}/messages", "Replace the messages of a conversation",
        {200: replies.ConversationSummary}, (Messages,), fails=_KEPT,
    ),
    Operation("get", "/metrics", "Metrics in Prometheus' text format", {200: "text/plain"}),
    Operation("get", "/openapi.json", "This document", {200: _JSON}),
    Operation("get", "/livez", "Is the process alive?", {200: replies.Alive}, open=True),
    Operation(
        "get", "/readyz", "Would requests be answered?", {200: replies.Ready, 503: replies.Ready}, open=True
    ),
    Operation("get", "/", "The web chat", {200: "text/html", 304: None}, open=True),
    Operation(
        "get", "/ui/{path}", "A file of the web chat", {200: "*/*", 304: None}, fails=(404,), open=True
    ),
)  # fmt: skip


def document(*, keys: bool) -> dict[str, Any]:
    """OpenAPI 3.1. `keys`: does this agent ask for API keys?"""
    models = {model: None for one in OPERATIONS for model in (*one.body, *one.answers.values(), *one.chunks)}
    named = [model for model in models if isinstance(model, type)]
    pairs: list[tuple[Model, Literal["validation"]]] = [(model, "validation") for model in named]
    _, schemas = models_json_schema(pairs, ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for one in OPERATIONS:
        paths.setdefault(one.path, {})[one.method] = _operation(one, keys=keys)
    components: dict[str, Any] = {"schemas": schemas["$defs"]}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Isthmus edge",
            "version": __version__,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": components,
    }


def _operation(one: Operation, *, keys: bool) -> dict[str, Any]:
    asks_key = keys and not one.open
    fails = {403, *one.fails, *((400, 413) if one.body else ()), *((401,) if asks_key else ())}
    told: dict[str, Any] = {
        "operationId": one.method + "".join(c if c.isalnum() else "_" for c in one.path),
        "summary": one.summary,
        "responses": {
            str(status): _answer(one, status)
            for status in sorted({*one.answers, *(fails - one.answers.keys())})
        },
    }
    if asks_key:
        told["security"] = [{"key": []}]
    names = [part[1:-1] for part in one.path.split("/") if part.startswith("{")]
    if names:
        told["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if one.body:
        refs = [_ref(model) for model in one.body]
        schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
        told["requestBody"] = {"required": one.body_required, "content": {_JSON: {"schema": schema}}}
    return told


def _answer(one: Operation, status: int) -> dict[str, Any]:
    if status not in one.answers:
        answer: dict[str, Any] = {
            "description": MEANINGS[status],
            "content": {_JSON: {"schema": _ref(replies.Error)}},
        }
        if status == 429:
            answer["headers"] = _headers({"retry-after": "seconds"})
        return answer
    kind = one.answers[status]
    answer = {"description": MEANINGS.get(status, "as asked"), "content": {}}
    if isinstance(kind, str):
        answer["content"][kind] = {"schema": {} if kind == _JSON else {"type": "string"}}
    elif kind is not None:
        answer["content"][_JSON] = {"schema": _ref(kind)}
    if one.chunks:
        answer["description"] += _STREAMED * (kind is not None)
        answer["content"][_STREAM] = {"schema": _event(one.chunks)}
    if one.headers:
        answer["headers"] = _headers(one.headers)
    return answer


def _event(chunks: Sequence[Model]) -> dict[str, Any]:
    """One server-sent event. OpenAPI 3.2 has `itemSchema` for it; in 3.1, tools read `schema` so."""
    chunk = {"anyOf": [_ref(model) for model in chunks]}
    data: list[dict[str, Any]] = [{"contentMediaType": _JSON, "contentSchema": chunk}]
    if len(chunks) > 1:  # a stream that has an end
        data.append({"const": "[DONE]"})
    return {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"type": "string", "anyOf": data}},
    }


def _ref(model: Model) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def _headers(meanings: Mapping[str, str]) -> dict[str, Any]:
    return {
        name: {"description": meaning, "schema": {"type": "string"}} for name, meaning in meanings.items()
    }

"""The HTTP side of the kept conversations: bodies, paths, and the answer where none are kept."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isthmus.edge.api_body import read_body
from isthmus.edge.api_fields import Closed, JsonObject
from isthmus.edge.api_parse import parse_body
from isthmus.edge.conversations_store import ConversationStore
from isthmus.protocol.errors import NotFoundError

PATH: Final = "/v1/isthmus/conversations"
MAX_TITLE_CHARS: Final = 200
MAX_MESSAGES: Final = 2000


class NewConversation(Closed):
    """Body of a POST. The page names a conversation after its first message, so the title may come later."""

    title: str = Field(default="", max_length=MAX_TITLE_CHARS)


class Retitled(Closed):
    """Body of a PATCH."""

    title: str = Field(max_length=MAX_TITLE_CHARS)


class KeptMessage(Closed):
    """One message as it is shown again. `stopped`: its user cut it short. `isthmus`: the object of the reply
    it came in; any JSON."""

    role: Literal["system", "user", "assistant"]
    content: str
    stopped: bool = False
    isthmus: JsonObject | None = None


class Messages(Closed):
    """Body of a PUT: all the messages there are from now on."""

    messages: list[KeptMessage] = Field(max_length=MAX_MESSAGES)


class ConversationsApi:
    """Handlers over `store`; None: nothing is kept, by the setting `conversations`."""

    def __init__(self, store: ConversationStore | None) -> None:
        self._kept = store

    def routes(self) -> list[Route]:
        """Paths and their handlers."""
        all_of_them = {"GET": self.summaries, "POST": self.create, "DELETE": self.delete_all}
        one = {"GET": self.get, "PATCH": self.rename, "DELETE": self.delete}
        return [
            _route(PATH, all_of_them),
            _route(PATH + "/{id}", one),
            _route(PATH + "/{id}/messages", {"PUT": self.put}),
        ]

    async def summaries(self, request: Request) -> Response:
        if self._kept is None:
            return JSONResponse({"enabled": False, "data": []})
        found = await self._kept.summaries(_tenant(request))
        return JSONResponse({"enabled": True, "data": [one.to_dict() for one in found]})

    async def create(self, request: Request) -> Response:
        store = self._store()
        body = parse_body(NewConversation, await read_body(request) or b"{}")
        made = await store.create(_tenant(request), body.title)
        return JSONResponse(made.to_dict(), status_code=201)

    async def delete_all(self, request: Request) -> Response:
        await self._store().delete_all(_tenant(request))
        return Response(status_code=204)

    async def get(self, request: Request) -> Response:
        return JSONResponse((await self._store().get(_tenant(request), _id(request))).to_dict())

    async def rename(self, request: Request) -> Response:
        store = self._store()
        body = parse_body(Retitled, await read_body(request))
        renamed = await store.rename(_tenant(request), _id(request), body.title)
        return JSONResponse(renamed.to_dict())

    async def delete(self, request: Request) -> Response:
        await self._store().delete(_tenant(request), _id(request))
        return Response(status_code=204)

    async def put(self, request: Request) -> Response:
        store = self._store()
        body = parse_body(Messages, await read_body(request))
        messages = [message.model_dump(exclude_unset=True) for message in body.messages]
        changed = await store.put(_tenant(request), _id(request), messages)
        return JSONResponse(changed.to_dict())

    def _store(self) -> ConversationStore:
        if self._kept is None:
            raise NotFoundError(
                "this agent keeps no conversations",
                code="conversations_off",
                hint="it was started with the setting conversations = off",
            )
        return self._kept


def _route(path: str, handlers: Mapping[str, Callable[[Request], Awaitable[Response]]]) -> Route:
    """One route for all methods of a path: of several, the first one would say which methods are allowed."""

    async def answer(request: Request) -> Response:
        return await handlers["GET" if request.method == "HEAD" else request.method](request)

    return Route(path, answer, methods=list(handlers))


def _tenant(request: Request) -> str:
    """Whose key it is: put there by the Guard."""
    tenant: str = request.state.tenant
    return tenant


def _id(request: Request) -> str:
    key: str = request.path_params["id"]
    return key

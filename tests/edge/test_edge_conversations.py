"""Conversations over HTTP: life of one, keys, bounds, and what is answered where none are kept."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from isthmus.commands.serve_edge import kept_conversations
from isthmus.config import Settings
from isthmus.edge.api import ServedModel, make_app
from isthmus.edge.conversations_api import MAX_MESSAGES, MAX_TITLE_CHARS, PATH
from isthmus.edge.conversations_store import ConversationStore
from isthmus.protocol.errors import ConfigError
from isthmus.protocol.keys import KeyFile

TURNS = [
    {"role": "user", "content": "hello"},
    {
        "role": "assistant",
        "content": "**hi**",
        "stopped": True,
        "isthmus": {"route": "local", "ttft": [0.5, None]},
    },
    {"role": "user", "content": "", "isthmus": None},
]


def client(store: ConversationStore | None, keys: KeyFile | None = None) -> httpx.AsyncClient:
    """Of an app with these conversations; the model has no part in this."""
    model = ServedModel("m", None, None, {}, conversations=store)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(make_app(model, keys=keys))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[ConversationStore]:
    store = ConversationStore(tmp_path / "conversations.db")
    yield store
    await store.aclose()


@pytest.fixture
async def http(store: ConversationStore) -> AsyncIterator[httpx.AsyncClient]:
    async with client(store) as http:
        yield http


def refused(answer: httpx.Response, status: int, code: str) -> str:
    """Checks the error's form, which is OpenAI's; its message."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    message: str = error["message"]
    return message


async def test_the_life_of_a_conversation(http: httpx.AsyncClient) -> None:
    assert (await http.get(PATH)).json() == {"enabled": True, "data": []}
    answer = await http.post(PATH, json={"title": "Greetings"})
    assert answer.status_code == 201
    made = answer.json()
    assert made.keys() == {"id", "title", "created", "updated", "num_messages", "messages"}
    one = f"{PATH}/{made['id']}"
    answer = await http.put(f"{one}/messages", json={"messages": TURNS})
    assert answer.status_code == 200
    assert answer.json()["num_messages"] == 3
    assert (await http.get(one)).json()["messages"] == TURNS
    assert (await http.patch(one, json={"title": "Hellos"})).json()["title"] == "Hellos"
    listed = (await http.get(PATH)).json()["data"]
    assert [entry["title"] for entry in listed] == ["Hellos"]
    assert "messages" not in listed[0]
    answer = await http.delete(one)
    assert (answer.status_code, answer.content) == (204, b"")
    refused(await http.get(one), 404, "unknown_conversation")
    refused(await http.delete(one), 404, "unknown_conversation")
    assert (await http.get(PATH)).json()["data"] == []


async def test_a_title_may_come_later(http: httpx.AsyncClient) -> None:
    for body in (b"", b"{}"):
        answer = await http.post(PATH, content=body)
        assert (answer.status_code, answer.json()["title"]) == (201, "")


async def test_all_go_at_once(http: httpx.AsyncClient) -> None:
    for _ in range(3):
        await http.post(PATH, json={})
    assert (await http.delete(PATH)).status_code == 204
    assert (await http.get(PATH)).json() == {"enabled": True, "data": []}


async def test_each_key_has_its_own(store: ConversationStore, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alice:key-of-alice-0123456789\nbob:key-of-bob-0123456789\n")
    async with client(store, KeyFile(file)) as http:
        alice, bob = ({"authorization": f"Bearer key-of-{name}-0123456789"} for name in ("alice", "bob"))
        refused(await http.get(PATH), 401, "invalid_api_key")
        made = (await http.post(PATH, json={"title": "hers"}, headers=alice)).json()
        assert (await http.get(PATH, headers=bob)).json()["data"] == []
        refused(await http.get(f"{PATH}/{made['id']}", headers=bob), 404, "unknown_conversation")
        assert (await http.delete(PATH, headers=bob)).status_code == 204
        assert len((await http.get(PATH, headers=alice)).json()["data"]) == 1
    async with client(store) as http:  # started without keys: nobody's
        assert (await http.get(PATH)).json()["data"] == []


async def test_where_none_are_kept_nothing_is() -> None:
    async with client(None) as http:
        assert (await http.get(PATH)).json() == {"enabled": False, "data": []}
        for method, path in (
            *(("POST", ""), ("DELETE", ""), ("GET", "/x"), ("PATCH", "/x"), ("DELETE", "/x")),
            ("PUT", "/x/messages"),
        ):
            refused(await http.request(method, PATH + path, json={}), 404, "conversations_off")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "", "x": 1}]}, "messages.0.x"),
        ({"messages": [{"role": "user", "content": "", "isthmus": [1]}]}, "messages.0.isthmus"),
        ({"messages": [], "title": "x"}, "title"),
        ({"messages": [{"role": "user", "content": ""}] * (MAX_MESSAGES + 1)}, "messages"),
    ],
)
async def test_bad_messages_change_nothing(http: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    made = (await http.post(PATH, json={})).json()
    where = f"{PATH}/{made['id']}"
    await http.put(f"{where}/messages", json={"messages": TURNS})
    answer = await http.put(f"{where}/messages", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert (await http.get(where)).json()["messages"] == TURNS


async def test_what_json_cannot_say_is_refused(http: httpx.AsyncClient) -> None:
    where = f"{PATH}/{(await http.post(PATH, json={})).json()['id']}"
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = json.dumps({"messages": [{"role": "user", "content": "", "isthmus": {"a": ["?"]}}]})
        refused(await http.put(f"{where}/messages", content=body.replace('"?"', number)), 400, "bad_request")
    for bad in (b"", b"{", b"\xff", b'{"messages": "\\ud800"}', json.dumps(TURNS).encode()):
        assert (await http.put(f"{where}/messages", content=bad)).status_code == 400
    assert (await http.get(where)).json()["messages"] == []


async def test_titles_are_bounded(http: httpx.AsyncClient) -> None:
    made = (await http.post(PATH, json={"title": "x" * MAX_TITLE_CHARS})).json()
    long = {"title": "x" * (MAX_TITLE_CHARS + 1)}
    for answer in (await http.post(PATH, json=long), await http.patch(f"{PATH}/{made['id']}", json=long)):
        refused(answer, 400, "bad_request")


async def test_a_conversation_larger_than_a_body_is_refused(http: httpx.AsyncClient) -> None:
    where = f"{PATH}/{(await http.post(PATH, json={})).json()['id']}"
    body = {"messages": [{"role": "user", "content": "x" * (5 << 20)}]}
    refused(await http.put(f"{where}/messages", json=body), 413, "body_too_large")


async def test_trouble_with_the_file_is_told_in_openais_form(tmp_path: Path) -> None:
    store = ConversationStore(tmp_path / "conversations.db")
    store.path.mkdir()
    async with client(store) as http:
        message = refused(await http.get(PATH), 500, "storage_failed")
        assert "conversations.db" in message
        assert (await http.get("/livez")).status_code == 200
    await store.aclose()


def test_where_they_are_kept_is_a_setting(tmp_path: Path) -> None:
    def kept(**env: str) -> Path | None:
        store = kept_conversations(Settings(env={"ISTHMUS_CONFIG": str(tmp_path / "none"), **env}))
        return None if store is None else store.path

    assert kept(ISTHMUS_DATA="/data") == Path("/data/conversations.db")
    assert kept(XDG_DATA_HOME="/xdg", HOME="/home/x") == Path("/xdg/isthmus/conversations.db")
    assert kept(HOME="/home/x") == Path("/home/x/.local/share/isthmus/conversations.db")
    assert kept(HOME="/home/x", ISTHMUS_CONVERSATIONS="off") is None
    with pytest.raises(ConfigError, match="on, off"):
        kept(ISTHMUS_CONVERSATIONS="maybe")

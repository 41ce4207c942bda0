"""`isthmus chat` on a real terminal: replies stream, commands work, Ctrl-C stops the reply only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.terminal import Terminal, terminal
from tests.processes import run

pytestmark = pytest.mark.processes

PROMPT = "› "
LONG = "3500"  # tokens: seconds of talk, nearly the whole context


@pytest.fixture
def chat(model: str, env: dict[str, str]) -> Iterator[Terminal]:
    """A chat at its first prompt, greedy, with long replies."""
    assert run("build", model, "--bits", "8", env=env).returncode == 0
    arguments = ("--model", model, "--bits", "8", "--temperature", "0", "--max-tokens", LONG)
    with terminal("isthmus", "chat", *arguments, env=env) as chat:
        assert "4 layers · /help for commands" in chat.expect(PROMPT)
        yield chat


def test_a_talk(chat: Terminal, tmp_path: Path) -> None:
    chat.type("/stats\n")
    assert "no reply yet" in chat.expect(PROMPT)
    chat.type("/help\n")
    listed = chat.expect(PROMPT)
    for command in ("/route", "/split", "/stats", "/explain", "/save FILE", "/new", "/quit"):
        assert command in listed
    chat.type("hello\n")
    assert chat.expect(PROMPT).removeprefix("hello").strip()
    chat.type("/stats\n")
    assert "local (all layers here) · " in chat.expect(PROMPT)
    chat.type("/explain\n")
    assert "no cloud is configured" in chat.expect(PROMPT)
    saved = tmp_path / "talk.json"
    chat.type(f"/save {saved}\n")
    chat.expect(PROMPT)
    assert [message["role"] for message in json.loads(saved.read_text())] == ["user", "assistant"]
    chat.type("/new\n")
    chat.expect(PROMPT)
    chat.type(f"/save {saved}\n")
    chat.expect(PROMPT)
    assert json.loads(saved.read_text()) == []
    chat.type("/quit\n")
    assert chat.wait() == 0


def test_mistakes_are_told_and_forgiven(chat: Terminal) -> None:
    for typed, said in (
        ("/route fast", "one of auto, local, split, offload"),
        ("/split many", "not of type int"),
        ("/dance", "there is no command /dance"),
        ("/save /no/such/folder/talk.json", "No such file or directory"),
    ):
        chat.type(f"{typed}\n")
        assert said in chat.expect(PROMPT)
    chat.type("/route offload\n")
    chat.expect(PROMPT)
    chat.type("hello\n")
    assert "no cloud is configured" in chat.expect(PROMPT)
    chat.type("/quit\n")
    assert chat.wait() == 0


def test_ctrl_c_stops_the_reply_and_nothing_else(chat: Terminal, tmp_path: Path) -> None:
    chat.type("hello the\n")
    chat.expect("hello the\n.")  # the echo of what was typed, and the reply's beginning
    chat.interrupt(r"\(stopped\)")
    chat.expect(PROMPT)
    saved = tmp_path / "talk.json"
    chat.type(f"/save {saved}\n")
    chat.expect(PROMPT)
    asked, said = json.loads(saved.read_text())
    assert asked["content"] == "hello the"
    assert said["content"]  # what was said by then is part of the conversation
    chat.interrupt("Ctrl-D leaves")
    chat.expect(PROMPT)
    chat.type("half a line")
    chat.expect("half a line")
    chat.interrupt("Ctrl-D leaves")
    chat.expect(PROMPT)
    chat.type("\x04")
    assert chat.wait() == 0

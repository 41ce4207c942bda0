"""`isthmus chat` on a real terminal: replies stream, commands work, Ctrl-C stops the reply only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from isthmus.commands.chat_commands import Talk
from isthmus.commands.chat_screen import event_text, status_line
from isthmus.commands.chat_terminal import CommandCompleter, TerminalScreen
from tests.cli.terminal import Terminal, terminal
from tests.processes import run

PROMPT = "› "
NEW_PROMPT = "›\x08"  # as prompt-toolkit draws it first
LONG = "3500"  # tokens: seconds of talk, nearly the whole context


@pytest.fixture
def chat(model: str, env: dict[str, str]) -> Iterator[Terminal]:
    """A chat at its first prompt, greedy, with long replies."""
    assert run("build", model, "--bits", "8", env=env).returncode == 0
    arguments = ("--model", model, "--bits", "8", "--temperature", "0", "--max-tokens", LONG)
    with terminal("isthmus", "chat", *arguments, env=env) as chat:
        assert "4 layers · /help for commands" in chat.expect(PROMPT)
        yield chat


@pytest.mark.processes
def test_a_talk(chat: Terminal, tmp_path: Path) -> None:
    chat.type("/stats\n")
    assert "no reply yet" in chat.expect(PROMPT)
    chat.type("/help\n")
    listed = chat.expect(PROMPT)
    for command in ("/route", "/split", "/shape", "/privacy", "/stats", "/explain", "/save FILE", "/quit"):
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


@pytest.mark.processes
def test_mistakes_are_told_and_forgiven(chat: Terminal) -> None:
    for typed, said in (
        ("/route fast", "one of auto, local, split, offload"),
        ("/split many", "not of type int"),
        ("/shape round", "one of prefix, u"),
        ("/privacy full", "one of any, activations-only, local-only"),
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


@pytest.mark.processes
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


# ---- a terminal that can move its cursor -------------------------------------------------------------


@pytest.mark.processes
def test_a_talk_on_a_terminal_that_can_do_more(model: str, env: dict[str, str], tmp_path: Path) -> None:
    assert run("build", model, "--bits", "8", env=env).returncode == 0
    able = {**env, "TERM": "xterm-256color", "ISTHMUS_STATE": str(tmp_path / "state")}
    del able["COLUMNS"]
    arguments = ("--model", model, "--bits", "8", "--temperature", "0", "--max-tokens", LONG)
    saved = tmp_path / "talk.json"
    with terminal("isthmus", "chat", *arguments, env=able) as chat:
        assert "4 layers · /help for commands" in chat.expect(NEW_PROMPT)
        chat.expect("· route auto")  # the status line
        for typed, completed in (
            ("/priv\t", "privacy"),
            (" lo\t", "local-only"),
            ("\n", "\nprivacy local-only"),
        ):
            chat.type(typed)
            chat.expect(completed)
        chat.expect(NEW_PROMPT)
        chat.expect("route auto, local-only")
        chat.type("hello\x1b\rthe\n")
        chat.expect("…[^…]*[^…\\s]")  # the reply has begun
        chat.interrupt(r"\(stopped\)")
        chat.expect(NEW_PROMPT)
        chat.type(f"/save {saved}\n")
        chat.expect(NEW_PROMPT)
        asked, said = json.loads(saved.read_text())
        assert asked["content"] == "hello\nthe"
        assert said["content"]
        chat.type("half a line")
        chat.interrupt("Ctrl-D leaves")
        chat.expect(NEW_PROMPT)
        chat.type("\x04")
        assert chat.wait() == 0
    history = tmp_path / "state" / "chat-history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "+hello\n+the\n" in history.read_text()


@pytest.mark.parametrize(("keep", "kept"), [(True, True), (False, False)])
def test_what_is_typed_is_kept_only_where_that_is_wanted(
    keep: bool, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_STATE", str(tmp_path))
    for typed in ("first\n", "\x1b[A\n"):  # Up brings back what an earlier session typed, if it was kept
        with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
            keys.send_text(typed)
            line = TerminalScreen(lambda: "", keep_history=keep).read_line()
    assert line == ("first" if kept else "")
    assert (tmp_path / "chat-history").exists() is kept


def test_a_history_that_cannot_be_written_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ISTHMUS_STATE", str(tmp_path / "file" / "state"))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("hello\n")
        assert TerminalScreen(lambda: "", keep_history=True).read_line() == "hello"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("/s", ["/split", "/shape", "/stats", "/save"]),
        ("/route ", ["auto", "local", "split", "offload"]),
        ("/privacy l", ["local-only"]),
        ("/stats ", []),
        ("hello /r", []),
        ("", []),
    ],
)
def test_completion(typed: str, offered: list[str]) -> None:
    found = CommandCompleter().get_completions(Document(typed), CompleteEvent(completion_requested=True))
    assert [completion.text for completion in found] == offered


def test_completion_of_files(tmp_path: Path) -> None:
    (tmp_path / "talk.json").touch()
    found = CommandCompleter().get_completions(Document(f"/save {tmp_path}/ta"), CompleteEvent())
    assert [completion.text for completion in found] == ["lk.json"]


def test_the_status_line() -> None:
    clouds: list[dict[str, Any]] = [
        {"url": "wss://gpu-box:8078", "state": "up", "detail": "", "rtt_s": 0.0231},
        {"url": "ws://127.0.0.1:1", "state": "down", "detail": "nobody listens", "rtt_s": None},
    ]
    talk = Talk({"route": "split", "split": "12"}, privacy="activations-only")
    assert status_line("tiny", talk, clouds) == (
        "tiny · route split, K 12, activations-only · gpu-box:8078 up, 23.1 ms · "
        "127.0.0.1:1 down: nobody listens"
    )


def test_what_moved_a_reply_is_told_in_words() -> None:
    assert "ws://a:1 is lost" in event_text({"event": "link_lost", "at_index": 3, "cloud": "ws://a:1"})
    assert "local, 30 layers" in event_text({"event": "moved", "route": "local", "split": 30, "after_s": 0.1})
    assert "cloud ws://b:1" in event_text({"event": "resumed", "cloud": "ws://b:1", "rows": 4})
    assert event_text({"event": "canary"}) == ""

"""Reads an answer as it comes: text, and the calls in it. What it reads was held to the grammar (tools.py):
it may be cut short anywhere, and is well-formed up to there."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Literal

from isthmus.edge.stop import overlap
from isthmus.edge.tools import ToolFormat


@dataclass(frozen=True, slots=True)
class Said:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """A call begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Argued:
    """More of a call's arguments."""

    index: int
    text: str


Piece = Said | Called | Argued


@dataclass(slots=True)
class Call:
    """A call so far; `arguments` is JSON, cut short where the answer was."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class AnswerReader:
    """Feed text, get pieces; `content` and `calls` are all of them together. `form` None: there are no
    calls."""

    form: ToolFormat | None = None
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    _state: Literal["text", "head", "arguments", "between"] = "text"
    _held: str = ""
    _depth: int = 0
    _in_string: bool = False
    _escaped: bool = False

    def push(self, text: str) -> list[Piece]:
        """What became certain with this text."""
        if self.form is None:
            return self._say(text)
        self._held += text
        read = {
            "text": self._read_text,
            "head": self._read_head,
            "arguments": self._read_arguments,
            "between": self._read_between,
        }
        pieces: list[Piece] = []
        before = None
        while self._held and (self._state, len(self._held)) != before:
            before = self._state, len(self._held)
            pieces += read[self._state](self.form)
        return pieces

    def finish(self) -> list[Piece]:
        """The answer ends here: text that might have become a call is text. The head of a call that was cut
        short is nothing."""
        held, self._held = self._held, ""
        return self._say(held) if self._state == "text" else []

    def finish_reason(self, reason: str) -> str:
        """`reason`, or "tool_calls" where the answer ended with whole calls."""
        whole = bool(self.calls) and self._state == "between"
        return "tool_calls" if whole and reason == "stop" else reason

    def _say(self, text: str) -> list[Piece]:
        self.content += text
        return [Said(text)] if text else []

    def _read_text(self, form: ToolFormat) -> list[Piece]:
        if not form.marker:
            if self.content or not self._held.startswith("{"):
                said, self._held = self._held, ""
                return self._say(said)
            self._state = "head"
            return []
        at = self._held.find(form.marker)
        if at >= 0:
            said, self._held = self._held[:at], self._held[at + len(form.marker) :]
            self._state = "head"
            return self._say(said)
        cut = len(self._held) - overlap(self._held, form.marker)
        said, self._held = self._held[:cut], self._held[cut:]
        return self._say(said)

    def _read_head(self, form: ToolFormat) -> list[Piece]:
        name, found, rest = self._held.removeprefix(form.before).partition(form.middle)
        if not found:
            return []
        self._held, self._state, self._depth = rest, "arguments", 0
        call = Call(f"call_{secrets.token_hex(12)}", name)
        self.calls.append(call)
        return [Called(len(self.calls) - 1, call.id, call.name)]

    def _read_arguments(self, form: ToolFormat) -> list[Piece]:
        end = len(self._held)
        for at, char in enumerate(self._held):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = char == "\\", char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{}":
                self._depth += 1 if char == "{" else -1
                if self._depth == 0:
                    end, self._state = at + 1, "between"
                    break
        text, self._held = self._held[:end], self._held[end:]
        self.calls[-1].arguments += text
        return [Argued(len(self.calls) - 1, text)]

    def _read_between(self, form: ToolFormat) -> list[Piece]:
        if form.marker and form.marker in self._held:
            _, _, self._held = self._held.partition(form.marker)
            self._state = "head"
        return []

"""What can be typed in a chat beside questions: the slash commands, and what they change."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import RenderableType

from isthmus.commands.explain import explanation
from isthmus.commands.generate import summary_line
from isthmus.commands.options import Flags
from isthmus.config import BY_NAME, Settings
from isthmus.protocol.errors import ConfigError

if TYPE_CHECKING:
    from isthmus.edge.requests import Finished, Privacy, Started

PRIVACY: Final[tuple[Privacy, ...]] = ("any", "activations-only", "local-only")


@dataclass
class Talk:
    """A conversation: messages, the flags as commands changed them, and how the replies came to be."""

    flags: Flags
    privacy: Privacy = "any"
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)
    last: tuple[Started, Finished] | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """`values`: what its argument may be, where that is a closed list."""

    name: str
    argument: str
    help: str
    values: tuple[str, ...] = ()


COMMANDS: Final = (
    Command("/route", "ROUTE", "the route of the next replies", BY_NAME["route"].choices),
    Command("/split", "K", "layers on the edge (with /route split); /split alone lets the router choose"),
    Command("/shape", "SHAPE", "who samples in a split; alone: the router chooses", BY_NAME["shape"].choices),
    Command("/privacy", "LEVEL", "what may leave this machine", PRIVACY),
    Command("/stats", "", "how the last reply came to be"),
    Command("/explain", "", "the last decision with its candidates"),
    Command("/save", "FILE", "the conversation as JSON"),
    Command("/new", "", "forget the conversation"),
    Command("/help", "", "this list"),
    Command("/quit", "", "leave (so does Ctrl-D); Ctrl-C stops a reply"),
)


def help_text() -> str:
    """The commands, one a line."""
    wanted = [f"{one.name} {'|'.join(one.values) or one.argument}" for one in COMMANDS]
    width = max(map(len, wanted)) + 2
    return "\n".join(f"{name:<{width}}{one.help}" for name, one in zip(wanted, COMMANDS, strict=True))


def obey(talk: Talk, line: str) -> RenderableType:
    """Do what a line that begins with a slash asks for; what to answer. Raises ConfigError, OSError."""
    name, _, value = line.partition(" ")
    value = value.strip()
    match name:
        case "/help":
            return help_text()
        case "/route":
            Settings({**talk.flags, "route": value}).text("route")
            talk.flags["route"] = value
            if value != "split":
                talk.flags["split"] = None
            return f"route {value}"
        case "/split":
            Settings({**talk.flags, "split": value or None}).number("split")
            talk.flags["split"] = value or None
            talk.flags["route"] = "split" if value else talk.flags.get("route")
            return f"{value} layers here" if value else "the router chooses how many layers stay here"
        case "/shape":
            Settings({**talk.flags, "shape": value or None}).text("shape")
            talk.flags["shape"] = value or None
            return f"shape {value}" if value else "the router chooses the shape"
        case "/privacy":
            talk.privacy = _privacy(value)
            return f"privacy {value}"
        case "/stats":
            return summary_line(*talk.last) if talk.last else "no reply yet"
        case "/explain":
            return explanation(talk.last[0].decision) if talk.last else "no reply yet"
        case "/save":
            path = Path(value or "conversation.json").expanduser()
            text = json.dumps(talk.messages, ensure_ascii=False, indent=2)
            path.write_text(text + "\n", encoding="utf-8")
            return f"saved to {path}"
        case "/new":
            talk.messages.clear()
            return "a new conversation"
        case _:
            return f"there is no command {name}\n{help_text()}"


def _privacy(value: str) -> Privacy:
    for level in PRIVACY:
        if value == level:
            return level
    raise ConfigError(f"/privacy {value!r}", hint=f"one of {', '.join(PRIVACY)}")

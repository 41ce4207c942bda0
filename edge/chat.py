"""From chat messages to token ids: the model's own template in an immutable sandbox, user text kept inert.

Template and user text are input from strangers: the one runs in a sandbox (template_sandbox.py), and control
tokens written in the other stay text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError

from isthmus.edge.template_sandbox import MAX_CHARS, TemplateSandbox, budgeted_range
from isthmus.edge.tool_prompt import Message, told_in_text
from isthmus.edge.tools import Tool, format_of
from isthmus.protocol.errors import RequestError

if TYPE_CHECKING:
    from isthmus.splitter.pack import Pack
    from isthmus.splitter.tokenizer import Tokenizer

# What a template, or the messages it is given, may raise.
_REFUSALS = (TemplateError, TypeError, ValueError, KeyError, OverflowError, RecursionError, MemoryError)


class ChatTemplate:
    """Renders and tokenises conversations for one model; may be used from several threads.

    `default_system`: the system message of conversations that don't begin with one (None: the template
    decides).
    """

    def __init__(
        self, source: str | None, tokenizer: Tokenizer, *, default_system: str | None = None
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.default_system = default_system
        self.tool_format, self._knows_tools = format_of(source)
        controls = tokenizer.special_tokens
        # Longest first, so that of two tokens that begin alike the whole one is found.
        self._controls = _any_of(controls)
        self._hidden_controls = _any_of(
            name for name, token in controls.items() if tokenizer.is_skipped(token)
        )

    @classmethod
    def from_pack(cls, pack: Pack) -> ChatTemplate:
        """The template of a pack (None where the model has none: then only raw prompts work)."""
        system = pack.generation().get("default_system")
        return cls(
            pack.chat_template(),
            pack.tokenizer(),
            default_system=system if isinstance(system, str) else None,
        )

    def encode_raw(self, text: str) -> list[int]:
        """Token ids of a bare prompt, begun as the model's tokeniser does; control tokens are parsed."""
        return self.tokenizer.encode(text, add_bos=True)

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Token ids of the conversation up to where the assistant speaks next.

        Messages have `role` and `content`, an assistant's may have `tool_calls` (arguments as an object), a
        tool's `tool_call_id` and `name`. `tools`: what the model may call.

        Control tokens that stand in a message's text are tokenised as plain text, so no message can end
        its turn early or speak in another role. Those that a reply shows (`<think>`) stay what they are in
        the assistant's text: the template may look for them, and they are the model's own words.
        """
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        literals: list[str] = []

        def number(match: re.Match[str]) -> str:
            literals.append(match[0])
            return f"{mark}{len(literals) - 1}\ue002"

        def inert(value: Any, controls: re.Pattern[str]) -> Any:
            if isinstance(value, str):
                return controls.sub(number, value)
            if isinstance(value, Mapping):
                return {controls.sub(number, key): inert(each, controls) for key, each in value.items()}
            return [inert(each, controls) for each in value] if isinstance(value, Sequence) else value

        def inert_message(message: Message) -> Message:
            shown = message.get("role") == "assistant"
            return {
                key: inert(value, self._hidden_controls if shown and key == "content" else self._controls)
                for key, value in message.items()
            }

        text = self.render([inert_message(message) for message in messages], inert(tools, self._controls))
        if not literals:
            return self.tokenizer.encode(text)
        first, *rest = text.split(mark)
        segments = [(first, True)]
        for part in rest:
            digits, _, after = part.partition("\ue002")
            segments += [(literals[int(digits)], False), (after, True)]
        return self.tokenizer.encode_segments(segments)

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """The conversation as text, with the opening of the assistant's turn at its end."""
        if self.default_system is not None and not (messages and messages[0].get("role") == "system"):
            messages = [{"role": "system", "content": self.default_system}, *messages]
        names: dict[str, Any] = {}
        if self._knows_tools:
            names["tools"] = list(tools) or None  # as transformers has it
        else:
            messages = told_in_text(messages, tools)
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(
                messages=list(messages),
                add_generation_prompt=True,
                range=budgeted_range(),
                **names,
                **self.tokenizer.template_tokens,
            ):
                parts.append(part)
                length += len(part)
                if length > MAX_CHARS:
                    raise SecurityError(f"the template's text is longer than {MAX_CHARS} characters")
        except _REFUSALS as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {error}",
                code="bad_messages",
                hint="roles usually alternate user and assistant, after at most one system message",
            ) from error
        return "".join(parts)

    @cached_property
    def _template(self) -> Template:
        if self.source is None:
            raise RequestError(
                "this model has no chat template",
                code="no_chat_template",
                hint="use /v1/completions or run --raw",
            )
        return TemplateSandbox().from_string(self.source)


def _any_of(names: Any) -> re.Pattern[str]:
    """A pattern that finds any of the names; one that finds nothing if there are none."""
    ordered = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")

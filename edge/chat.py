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
from isthmus.protocol.errors import RequestError

if TYPE_CHECKING:
    from isthmus.splitter.pack import Pack
    from isthmus.splitter.tokenizer import Tokenizer

Message = Mapping[str, Any]

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

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation up to where the assistant speaks next.

        Control tokens that stand in a message's text are tokenised as plain text, so no message can end
        its turn early or speak in another role. Those that a reply shows (`<think>`) stay what they are in
        the assistant's messages: the template may look for them, and they are the model's own words.
        """
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        literals: list[str] = []

        def number(match: re.Match[str]) -> str:
            literals.append(match[0])
            return f"{mark}{len(literals) - 1}\ue002"

        def inert(message: Message) -> dict[str, Any]:
            controls = self._hidden_controls if message.get("role") == "assistant" else self._controls
            return {
                key: controls.sub(number, value) if isinstance(value, str) else value
                for key, value in message.items()
            }

        text = self.render([inert(message) for message in messages])
        if not literals:
            return self.tokenizer.encode(text)
        first, *rest = text.split(mark)
        segments = [(first, True)]
        for part in rest:
            digits, _, after = part.partition("\ue002")
            segments += [(literals[int(digits)], False), (after, True)]
        return self.tokenizer.encode_segments(segments)

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text, with the opening of the assistant's turn at its end."""
        if self.default_system is not None and not (messages and messages[0].get("role") == "system"):
            messages = [{"role": "system", "content": self.default_system}, *messages]
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(
                messages=list(messages),
                add_generation_prompt=True,
                range=budgeted_range(),
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

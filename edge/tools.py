"""How models write calls of functions, and the grammar that holds an answer to it.

Two forms are known: Hermes' (also Qwen's), calls in `<tool_call>` tags, and Llama 3's, a bare JSON object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from isthmus.edge.api_errors import FieldError
from isthmus.edge.requests import Grammar

if TYPE_CHECKING:
    from isthmus.splitter.tokenizer import Tokenizer

MAX_CALLS: Final = 16
"""In one answer: small models ask for the same again and again."""

Tool = Mapping[str, Any]
"""As OpenAI has it: {"type": "function", "function": {"name", "description"?, "parameters"}}."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A call is written `marker`, `before`, the name, `middle`, the arguments as JSON, `after`, `end`.

    `marker` and `end` may be tokens of their own. "" for `marker`: a call is the whole answer, and text does
    not begin as a call does.
    """

    marker: str
    before: str
    middle: str
    after: str
    end: str
    between: str = ""

    @property
    def markers(self) -> tuple[str, ...]:
        """What may be one token."""
        return tuple(text for text in (self.marker, self.end) if text)


HERMES: Final = ToolFormat(
    marker="<tool_call>",
    before='\n{"name": "',
    middle='", "arguments": ',
    after="}\n",
    end="</tool_call>",
    between="\n",
)
LLAMA: Final = ToolFormat(marker="", before='{"name": "', middle='", "parameters": ', after="}", end="")


def format_of(template: str | None) -> tuple[ToolFormat, bool]:
    """The form in which a model with this chat template writes calls, and whether the template knows of it.
    If it does not, the conversation has to tell (tool_prompt.py), and then Hermes' form is taken."""
    source = template or ""
    if re.search(r"\btools\b", source):
        if HERMES.marker in source and "<function=" not in source:
            return HERMES, True
        if "ipython" in source and '"parameters": ' in source:
            return LLAMA, True
    return HERMES, False


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of a request. `must`: at least one call; `only`: of this one; `many`: more than one call."""

    tools: tuple[Tool, ...]
    must: bool = False
    only: str | None = None
    many: bool = True

    def grammar(self, form: ToolFormat, tokenizer: Tokenizer, answer: Grammar | None) -> Grammar:
        """What an answer must match: calls, or, unless there must be one, text that may end in calls.

        A marker that is a control token of the model is written as that token. `answer`: what the text must
        match; then there are no calls behind it. FieldError where it could not be told from one.
        """
        if answer is not None and not form.marker and not self.must:
            raise FieldError(
                "response_format together with tools: this model writes calls as bare JSON, and they could "
                "not be told from the answer",
                param="response_format",
                hint='send "tool_choice": "required", or no tools',
            )
        callable_ = [tool["function"] for tool in self.tools if self.only in (None, tool["function"]["name"])]
        names = " | ".join(f"call_{number}" for number in range(len(callable_)))
        marker, end = (_terminal(text, tokenizer) for text in (form.marker, form.end))
        more = (
            f"({_quoted(form.between)} {marker} call){{0,{MAX_CALLS - 1}}}"
            if self.many and form.marker
            else ""
        )
        rules = [
            *self._start(form, tokenizer, answer, more),
            f"call: {_quoted(form.before)} ({names}) {_quoted(form.after)} {end}",
        ]
        for number, function in enumerate(callable_):
            rules += [
                f"call_{number}: {_quoted(function['name'] + form.middle)} arguments_{number}",
                f"arguments_{number}: {_json(function['parameters'])}",
            ]
        return Grammar("lark", "\n".join(rules))

    def _start(self, form: ToolFormat, tokenizer: Tokenizer, answer: Grammar | None, more: str) -> list[str]:
        marker = _terminal(form.marker, tokenizer)
        if self.must:
            return [f"start: {marker} call {more}"]
        if answer is not None:
            schema = json.loads(answer.text) if answer.text else {"type": "object"}
            return [f"start: answer | {marker} call {more}", f"answer: {_json(schema)}"]
        if not form.marker:
            return ["start: (first text)? | call", "first: /[^{]/", *_text(form, tokenizer)]
        if form.marker in tokenizer.special_tokens:
            return [f"start: text ({marker} call {more})?", *_text(form, tokenizer)]
        # Spelled with ordinary tokens, it is found where it stands first.
        return [f"start: TEXT | lead call {more}", f"lead[lazy]: TEXT {marker}", r"TEXT: /(.|\n)*/"]


def _text(form: ToolFormat, tokenizer: Tokenizer) -> list[str]:
    """The rule `text`: anything, also control tokens that a reply shows (`<think>`), but no marker."""
    named = tokenizer.special_tokens.items()
    shown = sorted(
        token for name, token in named if name not in form.markers and not tokenizer.is_skipped(token)
    )
    more = f" (<[{','.join(map(str, shown))}]> TEXT?)*" if shown else ""
    without = rf" & ~/(.|\n)*{re.escape(form.marker)}(.|\n)*/" if form.marker else ""
    return [f"text: TEXT?{more}", rf"TEXT: /(.|\n)+/{without}"]


def _terminal(text: str, tokenizer: Tokenizer) -> str:
    token = tokenizer.special_tokens.get(text)
    return _quoted(text) if token is None else f"<[{token}]>"


def _quoted(text: str) -> str:
    return json.dumps(text) if text else ""


def _json(schema: Mapping[str, Any]) -> str:
    """JSON by a schema, spaced as templates space the calls of earlier turns (Python's json.dumps), so that
    the tokens of an answer are found again in the cache."""
    spacing = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return f"%json {json.dumps({**schema, 'x-guidance': spacing}, ensure_ascii=False)}"

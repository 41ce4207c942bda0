"""The messages of a chat as OpenAI writes them, and the conversation they make."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from isthmus.edge.api_errors import FieldError
from isthmus.edge.api_fields import Closed, Name


class TextPart(Closed):
    """One part of a message's content; only text is understood."""

    type: Literal["text"]
    text: str


# Parts are joined.
Content = str | list[TextPart]


def text_of(content: Content | None) -> str:
    """The whole text of a message."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


class SystemMessage(Closed):
    """What the model shall be; "developer" is OpenAI's newer word for it."""

    role: Literal["system", "developer"]
    content: Content


class UserMessage(Closed):
    """What the user said."""

    role: Literal["user"]
    content: Content


class FunctionCall(Closed):
    """Of a function by its name; `arguments` is a JSON object as text."""

    name: Name
    arguments: str


class ToolCall(Closed):
    """A call that the model asked for."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(Closed):
    """What the model said, or the calls it asked for."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, min_length=1)
    # Clients send replies back as they have them, with what could be in them; here there is nothing it could
    # hold.
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is required where there are no tool_calls")
        return self


class ToolMessage(Closed):
    """What a called function answered."""

    role: Literal["tool"]
    tool_call_id: str
    content: Content


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


def conversation(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The messages as chat templates want them: text whole, arguments parsed, and the answers to one
    message's calls in the order of the calls, because models tell them by that and not by their ids.

    FieldError for arguments that are no JSON object, and for an answer to no call, or the second to one.
    """
    said: list[dict[str, Any]] = []
    calls: dict[str, tuple[int, str]] = {}
    answers: dict[int, dict[str, Any]] = {}
    for number, message in enumerate(messages):
        if isinstance(message, ToolMessage):
            if message.tool_call_id not in calls:
                where = f"messages.{number}.tool_call_id"
                raise FieldError(
                    f"{where}: no call before it with the id {message.tool_call_id!r} waits for an answer",
                    param=where,
                    hint="the assistant's message with the tool_calls comes first, each call has one answer",
                )
            order, name = calls.pop(message.tool_call_id)
            answers[order] = {
                "role": "tool",
                "tool_call_id": message.tool_call_id,
                "name": name,
                "content": text_of(message.content),
            }
            continue
        said += [answers[order] for order in sorted(answers)]
        answers = {}
        role = "system" if message.role == "developer" else message.role
        plain: dict[str, Any] = {"role": role, "content": text_of(message.content)}
        if isinstance(message, AssistantMessage):
            calls = {}
            if message.tool_calls:
                plain["tool_calls"] = [
                    _plain_call(call, f"messages.{number}.tool_calls.{order}")
                    for order, call in enumerate(message.tool_calls)
                ]
                calls = {
                    call.id: (order, call.function.name) for order, call in enumerate(message.tool_calls)
                }
        said.append(plain)
    return said + [answers[order] for order in sorted(answers)]


def _plain_call(call: ToolCall, place: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        where = f"{place}.function.arguments"
        raise FieldError(
            f"{where}: no JSON object",
            param=where,
            hint="a call that was cut short by max_tokens cannot be sent back",
        )
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}

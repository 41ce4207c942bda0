"""Tools told to a model whose chat template knows nothing of them: in the system message, in the assistant's
and the user's text, in Hermes' form (tools.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from isthmus.edge.tools import HERMES, Tool

Message = Mapping[str, Any]

_TOLD: Final = """# Tools

You may call these functions, each described by a JSON object:
<tools>
{tools}
</tools>

To call one, answer with a JSON object of its name and arguments in tool_call tags:
<tool_call>
{{"name": "NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}
</tool_call>
What it returns comes in tool_response tags."""


def told_in_text(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """The conversation in the roles that every template knows. Answers of functions become the user's text,
    those that follow one another one message, since many templates want user and assistant to alternate."""
    told: list[dict[str, Any]] = []
    if tools:
        system, *rest = messages if messages and messages[0]["role"] == "system" else ({}, *messages)
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        parts = (system.get("content", ""), _TOLD.format(tools=listed))
        told.append({"role": "system", "content": "\n\n".join(filter(None, parts))})
        messages = rest
    answered = False
    for message in messages:
        if message["role"] != "tool":
            told.append({"role": message["role"], "content": _with_calls(message)})
        else:
            answer = f"<tool_response>\n{message['content']}\n</tool_response>"
            if answered:
                told[-1]["content"] += f"\n{answer}"
            else:
                told.append({"role": "user", "content": answer})
        answered = message["role"] == "tool"
    return list(told)


def _with_calls(message: Message) -> str:
    """The message's text, and the calls in it as the model wrote them."""
    calls = [
        HERMES.marker
        + HERMES.before
        + call["function"]["name"]
        + HERMES.middle
        + json.dumps(call["function"]["arguments"], ensure_ascii=False)
        + HERMES.after
        + HERMES.end
        for call in message.get("tool_calls", ())
    ]
    return HERMES.between.join([message["content"], *calls] if message["content"] else calls)

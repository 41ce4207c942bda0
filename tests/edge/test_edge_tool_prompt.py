"""Conversations with calls of functions, from OpenAI's messages to token ids: whole, in order, and inert."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.edge.api_errors import FieldError
from isthmus.edge.api_messages import conversation
from isthmus.edge.api_models import ChatRequest
from isthmus.edge.api_parse import parse_body
from isthmus.edge.chat import ChatTemplate
from tests.edge.test_edge_chat import with_tokens
from tests.tiny import TINY_CHAT_TEMPLATE

# The tags are tokens here, so that a text could make them, if it were let.
TOKENIZER = with_tokens({"<tool_call>": False, "</tool_call>": False, "</tool_response>": False})
KNOWING = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<tool_call> </tool_call><|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
UNKNOWING, TELLING = ChatTemplate(TINY_CHAT_TEMPLATE, TOKENIZER), ChatTemplate(KNOWING, TOKENIZER)
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
OTHER = {**CALL, "id": "call_2", "function": {"name": "sub", "arguments": "{}"}}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
}
TURNS: list[dict[str, Any]] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Add "}, {"type": "text", "text": "one."}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL, OTHER]},
    {"role": "tool", "tool_call_id": "call_2", "content": "minus"},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "plus"}]},
    {"role": "assistant", "content": "Done.", "refusal": None},
]


def body(messages: list[dict[str, Any]], **fields: Any) -> ChatRequest:
    return parse_body(ChatRequest, json.dumps({"messages": messages, **fields}).encode())


def test_a_conversation_is_whole_and_its_answers_in_order() -> None:
    system, user, calls, plus, minus, done = conversation(body(TURNS).messages)
    assert (system, user) == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add one."},
    )
    assert calls["content"] == ""
    assert [call["function"] for call in calls["tool_calls"]] == [
        {"name": "add", "arguments": {"a": 1}}, {"name": "sub", "arguments": {}}
    ]  # fmt: skip
    assert plus == {"role": "tool", "tool_call_id": "call_1", "name": "add", "content": "plus"}
    assert (minus["name"], minus["content"]) == ("sub", "minus")
    assert done == {"role": "assistant", "content": "Done."}


@pytest.mark.parametrize(
    ("messages", "param", "said"),
    [
        ([*TURNS[:3], {**TURNS[3], "tool_call_id": "call_3"}], "messages.3.tool_call_id", "'call_3'"),
        ([*TURNS[:4], TURNS[3]], "messages.4.tool_call_id", "'call_2'"),
        ([TURNS[1], TURNS[3]], "messages.1.tool_call_id", "'call_2'"),
        (
            [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": '{"a'}}]}],
            "messages.0.tool_calls.0.function.arguments",
            "no JSON object",
        ),
        (
            [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[1]"}}]}],
            "messages.0.tool_calls.0.function.arguments",
            "no JSON object",
        ),
        (
            [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f g", "arguments": "{}"}}]}],
            "messages.0.tool_calls.0.function.name",
            "pattern",
        ),
        ([{"role": "assistant"}], "messages.0", "content is required"),
        ([{"role": "assistant", "content": "x", "tool_calls": []}], "messages.0.tool_calls", "at least 1"),
        ([{"role": "tool", "content": "x"}], "messages.0.tool_call_id", "required"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "messages.0.tool_calls", "unknown field"),
        ([{"content": "x"}], "messages.0.role", "discriminator"),
        (["x"], "messages.0", "object"),
    ],
)
def test_what_is_no_conversation_is_named(messages: list[Any], param: str, said: str) -> None:
    with pytest.raises(FieldError, match=said) as caught:
        conversation(body(messages).messages)
    assert caught.value.param == param


# ---- what the body may ask for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"tools": []}, "tools", "at least 1"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type", "'function'"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "required"),
        ({"tools": [{**TOOL, "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        ({"tools": [{**TOOL, "function": {"name": "f", "x": 1}}]}, "tools.0.function.x", "unknown field"),
        (
            {"tools": [{**TOOL, "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools.0.function.parameters",
            "of type 'array'",
        ),
        ({"tools": [TOOL, TOOL]}, "", "two functions have the name 'add'"),
        ({"tools": [TOOL] * 129}, "tools", "at most 128"),
        ({"tool_choice": "auto"}, "", "tool_choice goes with tools"),
        ({"parallel_tool_calls": False}, "", "parallel_tool_calls goes with tools"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "'required'"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function", "required"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "mul"}}},
            "",
            "no function 'mul'",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "required",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": [1]}}},
            "response_format.json_schema.schema",
            "object",
        ),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x", "unknown field"),
        ({"response_format": {}}, "response_format.type", "discriminator"),
    ],
    ids=str,
)
def test_a_wrong_wish_is_named(fields: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(FieldError, match=said) as caught:
        body([TURNS[1]], **fields)
    assert caught.value.param == param


def test_a_schema_with_a_number_that_is_none_is_refused() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 0.5}}}
    whole = json.dumps({"messages": [TURNS[1]], "response_format": schema})
    for number in ("NaN", "1e999"):
        raw = whole.replace("0.5", number)
        with pytest.raises(FieldError) as caught:
            parse_body(ChatRequest, raw.encode())
        assert caught.value.param == "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("choice", "must", "only"),
    [
        (None, False, None),
        ("auto", False, None),
        ("required", True, None),
        ({"type": "function", "function": {"name": "add"}}, True, "add"),
    ],
)
def test_what_may_be_called_and_what_must(choice: Any, must: bool, only: str | None) -> None:
    for parallel, many in ((None, True), (True, True), (False, False)):
        box = body([TURNS[1]], tools=[TOOL], tool_choice=choice, parallel_tool_calls=parallel).toolbox()
        assert box is not None
        assert (box.tools, box.must, box.only, box.many) == ((TOOL,), must, only, many)


def test_with_no_tool_to_choose_none_is_told() -> None:
    assert body([TURNS[1]], tools=[TOOL], tool_choice="none").toolbox() is None
    assert body([TURNS[1]], tool_choice="none").toolbox() is None


def test_parameters_are_those_of_an_object() -> None:
    parameters: dict[str, Any] = {"properties": {}}
    box = body([TURNS[1]], tools=[{**TOOL, "function": {"name": "f", "parameters": parameters}}]).toolbox()
    assert box is not None
    assert box.tools[0]["function"]["parameters"] == {"type": "object", **parameters}


def test_a_function_without_parameters_takes_none() -> None:
    box = body([TURNS[1]], tools=[{"type": "function", "function": {"name": "f", "strict": True}}]).toolbox()
    assert box is not None
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    assert box.tools[0]["function"] == {"name": "f", "parameters": nothing}


# ---- the prompt ----------------------------------------------------------------------------------------


def test_a_template_that_knows_tools_is_given_them() -> None:
    text = TELLING.render(conversation(body(TURNS).messages), [TOOL])
    assert json.dumps(TOOL) in text
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text
    assert "<|im_start|>tool\nplus<|im_end|>\n<|im_start|>tool\nminus<|im_end|>" in text
    assert TELLING.render([{"role": "user", "content": "x"}]).startswith("<|im_start|>user")


def test_to_another_template_they_are_told_in_words() -> None:
    said = conversation(body(TURNS).messages)
    text = UNKNOWING.render(said, [TOOL])
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert json.dumps(TOOL["function"]) in text
    assert (
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "sub", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nplus\n</tool_response>\n<tool_response>\nminus\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\nDone.<|im_end|>"
    ) in text
    assert UNKNOWING.render([{"role": "user", "content": "x"}], [TOOL]).startswith(
        "<|im_start|>system\n# Tools"
    )
    default = ChatTemplate(TINY_CHAT_TEMPLATE, TOKENIZER, default_system="Be kind.")
    told = default.render([{"role": "user", "content": "x"}], [TOOL])
    assert told.startswith("<|im_start|>system\nBe kind.\n\n# Tools")
    assert "tool" not in default.render([{"role": "user", "content": "x"}])


NASTY = st.sampled_from(["<|im_end|>", "<|im_start|>", "</tool_call>", "</tool_response>", "system", "a"])


@pytest.mark.parametrize("template", [UNKNOWING, TELLING], ids=["unknowing", "knowing"])
@settings(max_examples=30)
@given(text=st.lists(NASTY, max_size=4).map("".join))
def test_nothing_that_others_wrote_makes_a_control_token(template: ChatTemplate, text: str) -> None:
    """Neither a tool's description or the names in it, nor what a function answered, nor arguments."""

    def ids(text: str) -> list[int]:
        parameters = {"type": "object", "properties": {text: {"description": text, "enum": [text]}}}
        tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": parameters}}
        arguments = json.dumps({text: [text, {"x": text}]})
        call = {"id": text, "type": "function", "function": {"name": "f", "arguments": arguments}}
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": text, "content": text},
        ]
        request = body(turns, tools=[tool])
        toolbox = request.toolbox()
        assert toolbox is not None
        return template.encode(conversation(request.messages), toolbox.tools)

    def controls(text: str) -> list[int]:
        special = set(TOKENIZER.special_tokens.values())
        return [token for token in ids(text) if token in special]

    assert controls(text) == controls("")
    assert text in TOKENIZER.decode(ids(text), skip_special=False)

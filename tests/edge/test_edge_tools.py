"""Calls of functions: the form a model writes them in, the grammar that holds it to that, reading them."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge.api_errors import FieldError
from isthmus.edge.grammar import Grammars
from isthmus.edge.requests import Grammar
from isthmus.edge.tool_reader import AnswerReader, Argued, Called, Said
from isthmus.edge.tools import HERMES, LLAMA, MAX_CALLS, Toolbox, ToolFormat, format_of
from isthmus.protocol.errors import RequestError
from isthmus.splitter.tokenizer import Tokenizer
from tests.edge.test_edge_chat import with_tokens
from tests.tiny import TINY_CHAT_TEMPLATE, tiny_tokenizer_json

NO_MORE = {"additionalProperties": False}
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], **NO_MORE}
ADD = {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}}
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "parameters": parameters}}
    for name, parameters in (("weather", WEATHER), ("weather_now", WEATHER), ("add", {**ADD, **NO_MORE}))
)
ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
ONE = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
LLAMA_ROME = '{"name": "weather", "parameters": {"city": "Rome"}}'

PLAIN = Tokenizer(tiny_tokenizer_json(), bos_id=0, eos_ids=(2,))
# As Qwen has it: the tags, and a tag that replies show, are tokens of their own.
TAGGED = with_tokens({"<tool_call>": False, "</tool_call>": True, "<think>": False})


def matches(grammar: Grammar, text: str, tokenizer: Tokenizer = PLAIN, *, special: bool = False) -> bool:
    """Could an answer be this text, and end there?"""
    matcher = Grammars(tokenizer, tokenizer.vocab_size).compile(grammar, (2,)).matcher()
    for token in tokenizer.encode(text, special=special):
        if not matcher.allowed()[token]:
            return False
        matcher.accept(token)
    return bool(matcher.allowed()[2])


# ---- forms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "form", "knows"),
    [
        (None, HERMES, False),
        (TINY_CHAT_TEMPLATE, HERMES, False),
        ("{% if tools %}<tool_call>\n{{ tools }}{% endif %}", HERMES, True),
        ("{% if tools %}<tool_call><function=f>{% endif %}", HERMES, False),  # Qwen3-Coder's XML
        ('{% if tools %}Environment: ipython\n"parameters": {% endif %}', LLAMA, True),
        ("{% if tools %}[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]{% endif %}", HERMES, False),
    ],
)
def test_the_form_follows_from_the_template(template: str | None, form: ToolFormat, knows: bool) -> None:
    assert format_of(template) == (form, knows)


# ---- the grammar -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "allowed", "refused"),
    [
        (
            {},
            ["", "hello", "a < b, <tool", ROME, f"Let me see. {ROME}", f"{ROME}\n{ONE}"],
            [
                f"{ROME} hello",
                "<tool_call> hello",
                ROME[:-3],
                ROME.replace("weather", "wether"),
                f"{ROME}{ONE}",
            ],
        ),
        ({"many": False}, ["hello", ROME], [f"{ROME}\n{ROME}"]),
        (
            {"must": True},
            [ROME, f"{ONE}\n{ROME}", "\n".join([ONE] * MAX_CALLS)],
            ["", "hello", f"hello {ROME}", "\n".join([ONE] * (MAX_CALLS + 1))],
        ),
        ({"must": True, "many": False}, [ROME], [f"{ROME}\n{ROME}", ""]),
        ({"must": True, "only": "add"}, [ONE, f"{ONE}\n{ONE}"], [ROME, f"{ONE}\n{ROME}"]),
        (
            {"must": True},
            [ROME.replace("weather", "weather_now"), ONE.replace('"a": 1', "")],
            [ONE.replace("1", '"1"'), ONE.replace('"a"', '"b"'), ROME.replace("{", "{ ")],
        ),
    ],
    ids=str,
)
def test_an_answer_is_text_or_calls_in_hermes_form(
    box: dict[str, Any], allowed: list[str], refused: list[str]
) -> None:
    grammar = Toolbox(TOOLS, **box).grammar(HERMES, PLAIN, None)
    assert [text for text in allowed if not matches(grammar, text)] == []
    assert [text for text in refused if matches(grammar, text)] == []


def test_tags_that_are_tokens_are_written_as_tokens() -> None:
    for box in (Toolbox(TOOLS), Toolbox(TOOLS, must=True)):
        grammar = box.grammar(HERMES, TAGGED, None)
        assert matches(grammar, f"{ROME}\n{ONE}", TAGGED, special=True)
        assert not matches(grammar, ROME, TAGGED, special=False)
    free = Toolbox(TOOLS).grammar(HERMES, TAGGED, None)
    assert matches(free, f"<think>Rome?\n {ROME}", TAGGED, special=True)
    assert matches(free, "<think>", TAGGED, special=True)
    assert not matches(free, "hello </tool_call>", TAGGED, special=True)
    assert not matches(free, "<|im_start|>", TAGGED, special=True)


def test_llamas_form_is_one_bare_object() -> None:
    free, must = (Toolbox(TOOLS, must=must).grammar(LLAMA, PLAIN, None) for must in (False, True))
    for text in ("", "hello {", LLAMA_ROME):
        assert matches(free, text)
        assert matches(must, text) == (text == LLAMA_ROME)
    for text in ("{hello", LLAMA_ROME * 2, LLAMA_ROME + " "):
        assert not matches(free, text)


@pytest.mark.parametrize(
    "answer", [Grammar("json_object"), Grammar("json_schema", '{"type": "object", "required": ["x"]}')]
)
def test_the_answer_may_have_a_form_of_its_own(answer: Grammar) -> None:
    grammar = Toolbox(TOOLS).grammar(HERMES, PLAIN, answer)
    assert matches(grammar, '{"x": 1}')
    assert matches(grammar, ROME)
    assert matches(grammar, "{}") == (answer.kind == "json_object")
    assert not matches(grammar, "hello")
    with pytest.raises(FieldError, match="could not be told from the answer") as caught:
        Toolbox(TOOLS).grammar(LLAMA, PLAIN, answer)
    assert caught.value.param == "response_format"
    assert matches(Toolbox(TOOLS, must=True).grammar(LLAMA, PLAIN, answer), LLAMA_ROME)


def test_a_schema_that_cannot_be_followed_is_refused() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}
    with pytest.raises(RequestError) as caught:
        matches(Toolbox((tool,)).grammar(HERMES, PLAIN, None), "")
    assert caught.value.code == "bad_grammar"


# ---- reading -----------------------------------------------------------------------------------------


def read(text: str, form: ToolFormat | None, cuts: list[int]) -> AnswerReader:
    """The answer read in pieces; what was handed out is what is kept."""
    reader = AnswerReader(form)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [
        piece for start, end in pairwise(edges) for piece in reader.push(text[start:end])
    ] + reader.finish()
    assert "".join(piece.text for piece in pieces if isinstance(piece, Said)) == reader.content
    for index, call in enumerate(reader.calls):
        began = [piece for piece in pieces if isinstance(piece, Called) and piece.index == index]
        assert [(piece.id, piece.name) for piece in began] == [(call.id, call.name)]
        argued = [piece.text for piece in pieces if isinstance(piece, Argued) and piece.index == index]
        assert "".join(argued) == call.arguments
        assert all(argued)
    return reader


ARGUMENTS = st.dictionaries(
    st.text(max_size=4), st.text(st.sampled_from('a"\\{}<é\n'), max_size=6), max_size=3
)
CUTS = st.lists(st.integers(0, 300), max_size=12)


@given(st.sampled_from(["", "Let me see. ", "a <tool", "{"]), st.lists(ARGUMENTS, max_size=3), CUTS)
def test_calls_are_read_however_they_come(text: str, calls: list[dict[str, str]], cuts: list[int]) -> None:
    written = [
        f'<tool_call>\n{{"name": "f{number}", "arguments": {json.dumps(call)}}}\n</tool_call>'
        for number, call in enumerate(calls)
    ]
    reader = read(text + "\n".join(written), HERMES, cuts)
    assert reader.content == text
    assert [(call.name, json.loads(call.arguments)) for call in reader.calls] == [
        (f"f{number}", call) for number, call in enumerate(calls)
    ]
    assert reader.finish_reason("stop") == ("tool_calls" if calls else "stop")
    assert reader.finish_reason("length") == "length"
    assert len({call.id for call in reader.calls}) == len(calls)
    assert all(call.id.startswith("call_") for call in reader.calls)


@given(st.one_of(st.just("{ hello"), st.just("hello {}"), st.just(LLAMA_ROME)), CUTS)
def test_llamas_calls_are_read_however_they_come(text: str, cuts: list[int]) -> None:
    reader = read(text if text == LLAMA_ROME else text.lstrip("{"), LLAMA, cuts)
    if text == LLAMA_ROME:
        assert (reader.content, reader.calls[0].name, reader.calls[0].arguments) == (
            "", "weather", '{"city": "Rome"}'
        )  # fmt: skip
    else:
        assert (reader.content, reader.calls) == (text.lstrip("{"), [])


@pytest.mark.parametrize("length", range(len(ROME) + 1))
def test_an_answer_cut_short_is_told_as_far_as_it_came(length: int) -> None:
    reader = read(ROME[:length], HERMES, list(range(length)))
    whole = '{"city": "Rome"}'
    began, ended = ROME.index(whole), ROME.index(whole) + len(whole)
    assert reader.content == (ROME[:length] if length < len("<tool_call>") else "")
    if length < began:
        assert reader.calls == []
    else:
        assert reader.calls[0].arguments == ROME[began : min(length, ended)]
    assert (reader.finish_reason("stop") == "tool_calls") == (length >= ended)


def test_without_tools_everything_is_text() -> None:
    assert read(ROME, None, [3, 20]).content == ROME

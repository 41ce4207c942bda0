"""Which tokens a grammar allows next; what it takes, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.edge.grammar import Grammars
from isthmus.edge.requests import Grammar
from isthmus.protocol.errors import RequestError
from isthmus.protocol.sampling import SamplingParams, sample
from isthmus.splitter.tokenizer import Tokenizer
from tests.edge.edge_world import ask
from tests.splitter.tokenizer_files import from_gguf, sentencepiece_gguf
from tests.tiny import tiny_tokenizer_json

VOCAB, END = 320, 2
WARM = SamplingParams(temperature=1.3, seed=5)


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer_json(), eos_ids=(END,))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCAB)


# ---- what may come next ------------------------------------------------------------------------------


def texts(grammars: Grammars, tokenizer: Tokenizer, grammar: Grammar, so_far: str) -> set[str]:
    """Texts of the tokens that may follow `so_far`; "" for the end id."""
    matcher = grammars.compile(grammar, (END,)).matcher(tokenizer.encode(so_far, special=False))
    return {
        "" if token == END else tokenizer.token_bytes(int(token)).decode("latin-1")
        for token in np.flatnonzero(matcher.allowed())
    }


def test_the_end_id_comes_where_the_answer_is_complete_and_only_there(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    grammar = Grammar("lark", "start: /[0-9]{2,3}/")
    digits = set("0123456789")
    assert texts(grammars, tokenizer, grammar, "") == digits
    assert texts(grammars, tokenizer, grammar, "1") == digits
    assert texts(grammars, tokenizer, grammar, "12") == digits | {""}
    assert texts(grammars, tokenizer, grammar, "123") == {""}


def test_spaces_in_json_are_bounded(grammars: Grammars, tokenizer: Tokenizer) -> None:
    for grammar in (
        Grammar("json_object"),
        schema({"type": "object", "x-guidance": {"whitespace_flexible": 1}}),
    ):
        for so_far in (
            "",
            "{",
            '{"a":',
            '{"a": ',
            '{"a": 1',
            '{"a": [1,',
            '{"a": [1, ',
            '{"a": {}',
            '{"a":true',
        ):
            found = texts(grammars, tokenizer, grammar, so_far)
            assert found.isdisjoint("\n\t\r")
            assert (" " in found) == so_far.endswith((":", ","))


def test_no_control_token_no_padding_and_no_other_end_id_is_ever_allowed(grammars: Grammars) -> None:
    matcher = grammars.compile(Grammar("lark", r"start: /(.|\n)*/"), (END,)).matcher()
    found = np.flatnonzero(matcher.allowed())
    assert END in found
    assert found.min() == END
    assert found.max() < 3 + 256 + 7
    both = grammars.compile(Grammar("lark", r"start: /(.|\n)*/"), (0, END)).matcher()
    assert set(np.flatnonzero(both.allowed())) == {0, *found.tolist()}


def test_a_control_token_that_the_grammar_names(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = Grammar("lark", 'start: "hello" <|im_start|> %json {"type": "integer"}')
    matcher = grammars.compile(grammar, (END,)).matcher(tokenizer.encode("hello", special=False))
    assert np.flatnonzero(matcher.allowed()).tolist() == [1]
    matcher.accept(1)
    assert not matcher.allowed()[[1, END]].any()


def follow(grammars: Grammars, grammar: Grammar) -> list[int]:
    """The ids of the only answer that there is."""
    matcher, ids = grammars.compile(grammar, (END,)).matcher(), list[int]()
    while not ids or ids[-1] != END:
        (token,) = np.flatnonzero(matcher.allowed()).tolist()
        matcher.accept(token)
        ids.append(token)
    return ids


def test_where_there_is_no_choice_it_is_spelled_as_the_model_is_used_to(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    text = '"hello the é"'
    ids = follow(grammars, schema({"const": "hello the é"}))
    assert ids == [*tokenizer.encode(text, special=False), END]
    assert len(ids) < len(text)


def test_a_tokeniser_that_begins_with_a_space(tmp_path: Path) -> None:
    """Sentencepiece puts one before the first word, and not before what follows another."""
    tokenizer = from_gguf(sentencepiece_gguf(tmp_path / "t.gguf"), eos_ids=(END,))
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    ids = follow(grammars, schema({"const": "hello world"}))
    assert tokenizer.decode(ids) == '"hello world"'
    assert len(ids) < len('"hello world"')


def test_a_tokeniser_that_rewrites_text() -> None:
    """What is forced comes out as the grammar has it."""
    data = json.loads(tiny_tokenizer_json())
    data["normalizer"] = {"type": "NFC"}
    tokenizer = Tokenizer(json.dumps(data), eos_ids=(END,))
    ids = follow(Grammars(tokenizer, VOCAB), schema({"const": "e\u0301"}))
    assert tokenizer.decode(ids) == '"e\u0301"'


scalars = st.sampled_from([
    {"type": "boolean"}, {"type": "null"}, {"type": "integer", "minimum": -20, "maximum": 300},
    {"type": "string", "maxLength": 5}, {"type": "string", "enum": ["a", "hello the", "é\n\"\\"]},
    {"type": "string", "format": "date"}, {"const": {"deep": [1, {"er": None}]}},
])  # fmt: skip
schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.builds(
            lambda items, n: {"type": "array", "items": items, "maxItems": n}, inner, st.integers(0, 3)
        ),
        st.builds(lambda any_of: {"anyOf": any_of}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda properties, need: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:need],
                "additionalProperties": False,
            },
            st.dictionaries(st.text(max_size=4), inner, max_size=3),
            st.integers(0, 3),
        ),
    ),
    max_leaves=4,
)


@settings(max_examples=80)
@given(schemas, st.integers(0, 99))
def test_whatever_is_drawn_fits_the_schema(
    grammars: Grammars, tokenizer: Tokenizer, value: dict[str, Any], seed: int
) -> None:
    """Random logits in the place of a model."""
    matcher = grammars.compile(schema(value), (END,)).matcher()
    random, ids = np.random.default_rng(seed), list[int]()
    while not ids or ids[-1] != END:
        logits = random.standard_normal(VOCAB).astype(np.float32)
        ids.append(sample(logits, WARM, position=len(ids), allowed=matcher.allowed()).token)
        matcher.accept(ids[-1])
        assert len(ids) < 2000
    jsonschema_rs.validate(value, json.loads(tokenizer.decode(ids)))


# ---- refused -----------------------------------------------------------------------------------------


def pattern(number: int) -> dict[str, str]:
    return {"type": "string", "pattern": f".*{chr(97 + number)}.*"}


def chain(links: int) -> dict[str, Any]:
    """As many definitions, each of an array of the next one."""
    steps = {f"{i}": {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(links)}
    return {"$defs": {**steps, f"{links}": {"type": "null"}}, "$ref": "#/$defs/0"}


BAD: dict[str, tuple[Any, str]] = {
    "no object": (True, "is of type bool"),
    "unknown type": ({"type": "strin"}, "strin"),
    "unsupported keyword": ({"not": {"type": "null"}}, '"not"'),
    "unsupported format": ({"type": "string", "format": "colour"}, "colour"),
    "asked to be lenient": ({"not": {}, "x-guidance": {"lenient": True}}, '"not"'),
    "oneOf that may overlap": ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "oneOf"),
    "broken pattern": ({"type": "string", "pattern": "("}, "unclosed group"),
    "endless": ({"$ref": "#"}, "nothing matches it"),
    "empty": ({"enum": []}, "anyOf is empty"),
    "from elsewhere": ({"$ref": "http://example.com/x.json"}, "not present"),
    "from the disk": ({"$ref": "file:///etc/passwd"}, "not present"),
    "deep": (json.loads('{"items":' * 400 + "{}" + "}" * 400), "recursion limit"),
    "wide": ({"type": "object", "properties": {f"p{i}": {} for i in range(2500)}}, "2000"),
    "combinations": (
        {"allOf": [{"anyOf": [{"properties": {f"{i}": {}}}, {"minItems": i}]} for i in range(30)]},
        "too large",
    ),
    "joined patterns": ({"allOf": [pattern(i) for i in range(26)]}, "26 patterns .*, at most 8"),
    "patterns in a chain": (
        {"$defs": {f"{i}": {"$ref": f"#/$defs/{i + 1}", **pattern(i)} for i in range(20)}},
        "20 patterns",
    ),
    "joined multiples": ({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}, "come to 99400891"),
    "a large multiple": ({"multipleOf": 4_000_037}, "4000037"),
    "a fine multiple": ({"multipleOf": 0.0123457}, "123457"),
    "a long pattern": ({"pattern": "a?" * 30_000, "minLength": 2}, "60000 characters, at most 4096"),
    "a large schema": ({"const": "x" * (64 << 10)}, "at most 65536"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_schema_that_cannot_be_kept_to_is_refused_with_the_reason(grammars: Grammars, name: str) -> None:
    value, reason = BAD[name]
    with pytest.raises(RequestError, match=reason) as caught:
        grammars.compile(schema(value), (END,))
    assert caught.value.code == "bad_grammar"
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    "text", ["", "nope", '{"type": "string"', '{"minimum": 1e999}', '{"const": "\\ud800"}']
)
def test_a_schema_that_is_no_json(grammars: Grammars, text: str) -> None:
    with pytest.raises(RequestError, match="no JSON") as caught:
        grammars.compile(Grammar("json_schema", text), (END,))
    assert caught.value.code == "bad_grammar"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Empty grammar"),
        ("start: other", "unknown name"),
        ('start: start "a"', "nothing matches it"),
        ('start: %json {"not": {}}', '"not"'),
        (f"start: %json {json.dumps({'allOf': [pattern(i) for i in range(26)]})}", "26 patterns"),
        ('start: a b\na: %json {"multipleOf": 15000}\nb: %json {"multipleOf": 6000}', "come to 21000"),
        ("start: " + "x" * (256 << 10), "at most 262144"),
    ],
)  # fmt: skip
def test_a_bad_lark_grammar(grammars: Grammars, text: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        grammars.compile(Grammar("lark", text), (END,))
    assert caught.value.code == "bad_grammar"


@pytest.mark.parametrize(
    ("kind", "text"), [("regex", "a"), ("json_object", "{}"), ("lark", 'start: "\ud800"')]
)
def test_a_grammar_that_is_none(kind: Any, text: str) -> None:
    with pytest.raises(RequestError) as caught:
        Grammar(kind, text)
    assert caught.value.code == "bad_grammar"


@pytest.mark.parametrize(
    "value",
    [
        {"allOf": [pattern(i) for i in range(2)]},
        {"type": "array", "items": {"anyOf": [pattern(i) for i in range(20)]}},
        {"properties": {f"p{i}": {"title": "P", "anyOf": [pattern(i), {"type": "null"}]} for i in range(20)}},
        {"type": "number", "multipleOf": 0.01},
        {"properties": {"pattern": {"type": "integer"}, "allOf": {"type": "null"}, "multipleOf": {}}},
        {"const": {"multipleOf": True, "pattern": 3, "patternProperties": None}},
    ],
    ids=str,
)
def test_what_is_harmless_is_taken(grammars: Grammars, value: dict[str, Any]) -> None:
    assert grammars.compile(schema(value), (END,)).matcher().allowed().any()


async def test_a_chain_of_references_does_not_overflow_the_stack(tokenizer: Tokenizer) -> None:
    """With the stack that threads commonly have, the compiler would take the process with it."""
    grammar = schema(chain(1500))
    grammars = Grammars(tokenizer, VOCAB)
    compiled = await grammars.of(ask([5], 9, grammar=grammar, end_ids=(END,)))
    grammars.close()
    assert compiled is not None
    assert compiled.matcher().allowed().any()


def test_an_answer_whose_grammar_gets_too_complex_fails_with_a_reason(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    """Patterns are unfolded as they are needed, within bounds."""
    value = {"type": "string", "pattern": r"^(\p{L}{1,1000}|\p{N}{1,1000}){1,1000}$"}
    matcher = grammars.compile(schema(value), (END,)).matcher(tokenizer.encode('"', special=False))

    def go_on() -> None:
        for token in tokenizer.encode("abc123" * 99, special=False):
            assert matcher.allowed()[token]
            matcher.accept(token)

    with pytest.raises(RequestError, match="too many") as caught:
        go_on()
    assert caught.value.code == "bad_grammar"


def test_an_edge_without_grammars_does_not_load_the_library() -> None:
    code = "import sys, isthmus.edge.agent, isthmus.edge.server; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

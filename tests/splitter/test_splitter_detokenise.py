"""Decoding: streamed or whole the same text, and whole characters only."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.splitter.tokenizer import Tokenizer, byte_alphabet
from tests.tiny import tiny_tokenizer_json


def check_stream(tokenizer: Tokenizer, ids: list[int], *, skip_special: bool) -> str:
    stream = tokenizer.stream(skip_special=skip_special)
    pieces = [stream.push(token) for token in ids]
    pieces.append(stream.flush())
    assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip_special)
    return "".join(pieces)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 330), max_size=40), skip_special=st.booleans())
def test_streaming_any_ids_equals_decoding_them_whole(
    ids: list[int], skip_special: bool, byte_level: Tokenizer
) -> None:
    from tokenizers import Tokenizer as Raw

    text = check_stream(byte_level, ids, skip_special=skip_special)
    reference: str = Raw.from_str(tiny_tokenizer_json()).decode(ids, skip_special_tokens=skip_special)
    assert text == reference


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40))
def test_streaming_text_emits_only_whole_characters(
    text: str, byte_level: Tokenizer, sentencepiece: Tokenizer
) -> None:
    for tokenizer in (byte_level, sentencepiece):
        if tokenizer.strips_first_space:
            text = text.lstrip(" ▁")  # the prefix space is not doubled: the first one of the text is lost
        if tokenizer is sentencepiece:
            text = text.replace("▁", "_")  # this vocabulary's own sign for a space
        ids = tokenizer.encode(text, special=False)
        stream = tokenizer.stream()
        out = ""
        for token in ids:
            out += stream.push(token)
            assert text.startswith(out)  # in particular: never a U+FFFD that the text has not
        assert out + stream.flush() == text


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_streaming_any_sentencepiece_ids(data: st.DataObject, sentencepiece: Tokenizer) -> None:
    ids = data.draw(st.lists(st.integers(0, sentencepiece.vocab_size + 3), max_size=30))
    check_stream(sentencepiece, ids, skip_special=data.draw(st.booleans()))


def test_an_emoji_arrives_with_its_last_byte(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("😀!")
    assert len(ids) == 5
    stream = byte_level.stream()
    assert [stream.push(token) for token in ids] == ["", "", "", "😀", "!"]
    assert stream.flush() == ""


def test_an_unfinished_character_shows_at_the_end(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("😀")[:2]
    stream = byte_level.stream()
    assert "".join(stream.push(token) for token in ids) == ""
    assert stream.flush() == "\ufffd"
    # The stream starts afresh.
    assert "".join(stream.push(token) for token in byte_level.encode("ok")) == "ok"


def test_the_first_space_of_sentencepiece_goes_once(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("two  spaces ")
    stream = sentencepiece.stream()
    for _ in range(2):  # flushing starts the stream afresh
        assert "".join([*map(stream.push, ids), stream.flush()]) == "two  spaces "


def test_ids_outside_the_vocabulary_are_nothing(byte_level: Tokenizer) -> None:
    assert byte_level.decode([-1, 319, 2**40, *byte_level.encode("hello")]) == "hello"


def test_byte_alphabet_is_the_one_of_tokenizers() -> None:
    from tokenizers import pre_tokenizers

    table = byte_alphabet()
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(table.values()) == list(range(256))

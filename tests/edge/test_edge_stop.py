"""Stop strings: cut at the earliest match, wherever the token borders fall."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge.stop import StopMatcher


def feed(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    text = ""
    for piece in pieces:
        text += matcher.push(piece)
        if matcher.stopped:
            break
    return text + matcher.flush(), matcher.stopped


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "stopped"),
    [
        (["hello"], [], "hello", False),
        (["he", "llo"], ["lo"], "hel", True),
        (["a", "<", "e", "nd", ">b"], ["<end>"], "a", True),
        (["a", "<", "e", "nx"], ["<end>"], "a<enx", False),
        (["aab"], ["ab", "aab"], "", True),
        (["aa", "a", "b"], ["ab"], "aa", True),
        (["x\n", "\ny"], ["\n\n"], "x", True),
        (["", "a", ""], ["b"], "a", False),
        (["stop at once"], ["s"], "", True),
    ],
)
def test_cut_before_the_first_stop(pieces: list[str], stops: list[str], text: str, stopped: bool) -> None:
    assert feed(pieces, stops) == (text, stopped)


def test_certain_text_is_not_held_back() -> None:
    matcher = StopMatcher(["###"])
    assert matcher.push("abc#") == "abc"
    assert matcher.push("d") == "#d"
    assert matcher.push("##") == ""
    assert matcher.push("#") == ""
    assert matcher.stopped
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


@given(
    st.lists(st.text(alphabet="ab#", max_size=4), max_size=12),
    st.lists(st.text(alphabet="ab#", min_size=1, max_size=4), max_size=3),
)
def test_any_cutting_gives_what_the_whole_text_gives(pieces: list[str], stops: list[str]) -> None:
    """As if the whole text were searched, up to the end of the first stop string to be complete."""
    whole = "".join(pieces)
    seen = ""
    expected, stopped = whole, False
    for piece in pieces:
        seen += piece
        found = [at for stop in stops if (at := seen.find(stop)) >= 0]
        if found:
            expected, stopped = seen[: min(found)], True
            break
    assert feed(pieces, stops) == (expected, stopped)

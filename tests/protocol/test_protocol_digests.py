"""The digest chain and the resume tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.protocol.activations import RowCodec, RowFormat, encode_ids
from isthmus.protocol.digests import RowDigests
from isthmus.protocol.errors import RejectedError
from isthmus.protocol.frames import MsgType
from isthmus.protocol.resume_tokens import check_token, make_token
from tests.protocol.pairing import HIDDEN, SESSION_ID, rows
from tests.protocol.transcript_lines import tensor

RAW = np.arange(60, dtype=np.uint8).reshape(10, 6)


def chain(*parts: slice, start: int = 0) -> RowDigests:
    digests = RowDigests(start)
    for part in parts:
        digests.append(RAW[part])
    return digests


def test_chunk_borders_do_not_matter() -> None:
    whole = chain(slice(0, 10))
    assert chain(slice(0, 3), slice(3, 4), slice(4, 10)).state == whole.state
    assert (len(whole), whole.stop) == (10, 10)
    assert [chain(slice(0, n)).state for n in range(1, 11)] == [(n, whole.at(n)) for n in range(1, 11)]
    assert whole.at(0) == ""
    assert RowDigests().state == (0, "")


def test_every_row_and_its_place_count() -> None:
    states = {chain(slice(0, 10), start=start).state for start in range(3)}
    for row in range(10):
        other = RAW.copy()
        other[row, 5] ^= 1
        digests = RowDigests()
        digests.append(other)
        states.add(digests.state)
        assert digests.at(row) == chain(slice(0, 10)).at(row)
    assert len(states) == 13


def test_golden() -> None:
    digests = RowDigests()
    digests.append(b"\x01\0\0\0\x02\0\0\0")
    assert digests.state == (2, "62d30d57db52411478ab697ad4dd0e91")


def test_ids_are_rows_of_four_bytes() -> None:
    ids, array = RowDigests(), RowDigests()
    ids.append(encode_ids([7, 8, 9]))
    array.append(np.frombuffer(encode_ids([7, 8, 9]), np.uint8).reshape(3, 4))
    assert ids.state == array.state == (3, ids.at(3))


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 4)), max_size=12), st.integers(0, 5))
def test_truncate_is_forgetting(script: list[tuple[int, int]], start: int) -> None:
    """However rows were overwritten, the chain is that of the rows that are left."""
    digests, held, first = RowDigests(start), list[int](), start
    for pos, n in script:
        pos = min(pos, first + len(held))
        digests.truncate(pos)
        if pos < first:
            first, held = pos, []
        held = held[: pos - first] + [(pos + n + i) % 10 for i in range(n)]
        digests.append(RAW[held[-n:]])
        assert (len(digests), digests.stop) == (len(held), first + len(held))
    plain = RowDigests(first)
    plain.append(RAW[held])
    assert digests.state == plain.state


def test_rows_that_the_cloud_made_lie_between() -> None:
    digests = chain(slice(0, 4))
    before = digests.at(4)
    digests.truncate(7)
    assert (digests.stop, digests.at(4), digests.at(7)) == (7, before, before)
    digests.append(RAW[7:8])
    twice = digests.state
    digests.truncate(7)
    digests.append(RAW[7:8])
    assert digests.state == twice


@pytest.mark.parametrize("form", list(RowFormat))
@pytest.mark.parametrize("n", [1, 9])
def test_the_cloud_digests_what_the_edge_encoded(form: RowFormat, n: int) -> None:
    codec = RowCodec(form, HIDDEN)
    raw = codec.encode_raw(rows(n))
    sent = codec.pack(raw)
    assert sent == codec.encode(rows(n))
    frame = tensor(MsgType.STEP, sent, n, seq=1, pos=0)
    unpacked = codec.unpack(frame, max_raw=1 << 20)
    assert np.array_equal(unpacked, raw)
    assert np.array_equal(codec.decode_raw(unpacked), codec.decode_frame(frame, max_raw=1 << 20))


# ---- resume tokens

SECRET = b"s" * 32
CLAIMS = {"tenant": "home", "session_id": SESSION_ID, "model": "m"}


def refusal(token: str, *, now_s: float = 0.0, secret: bytes = SECRET, **claims: str) -> str:
    with pytest.raises(RejectedError) as caught:
        check_token(secret, token, now_s=now_s, **(CLAIMS | claims))
    return caught.value.code


def test_a_token_holds_until_its_time_is_over() -> None:
    token = make_token(SECRET, expires_s=100.0, **CLAIMS)
    check_token(SECRET, token, now_s=99.9, **CLAIMS)
    check_token(SECRET, token, now_s=-1e9, **CLAIMS)
    assert refusal(token, now_s=100.0) == "resume_expired"
    assert refusal(token, now_s=1e9) == "resume_expired"
    assert refusal(token, now_s=1e9, tenant="else") == "resume_refused"  # nothing about others' expiry


def test_a_token_is_for_one_tenant_session_model_and_secret() -> None:
    token = make_token(SECRET, expires_s=100.0, **CLAIMS)
    assert refusal(token, tenant="homf") == refusal(token, tenant="") == "resume_refused"
    assert refusal(token, session_id="0" * 32) == refusal(token, model="n") == "resume_refused"
    assert refusal(token, secret=b"t" * 32) == "resume_refused"
    # No two lists of claims make the same message.
    shifted = make_token(SECRET, expires_s=100.0, tenant="homem", session_id=SESSION_ID, model="")
    assert refusal(shifted) == "resume_refused"


def test_a_token_with_any_character_changed_is_refused() -> None:
    token = make_token(SECRET, expires_s=100.0, **CLAIMS)
    for at, character in enumerate(token):
        for other in {"0", "f", "F", "g", " ", "\u0131", chr(ord(character) ^ 1)} - {character}:
            assert refusal(token[:at] + other + token[at + 1 :]) == "resume_refused"
    for wrong in ("", token[:-1], token[:15], token + "0", " " + token, token.upper() + "A", token * 9):
        assert refusal(wrong) == "resume_refused"


@given(st.text(max_size=100))
def test_any_text_is_refused(text: str) -> None:
    assert refusal(text) == "resume_refused"


def test_an_expiry_that_is_no_number_is_refused() -> None:
    for expiry in ("000000000000f87f", "000000000000f07f"):  # NaN, infinity
        assert refusal(expiry + "0" * 64) == "resume_refused"

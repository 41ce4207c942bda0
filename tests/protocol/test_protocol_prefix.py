"""Prefix offers: equal exactly where secret, context and tokens are, at lengths both ends choose alike."""

from __future__ import annotations

import hmac
import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from isthmus.protocol.errors import ConfigError, RequestError
from isthmus.protocol.identity import ModelIdentity
from isthmus.protocol.prefix import MAX_ENTRIES, PAGE, PrefixOffer, digest_chain, is_offered, prefix_context

SECRET = b"k" * 32
token_ids = st.lists(st.integers(0, 2**32 - 1), max_size=100)


def chain(ids: list[int], *extra: int, secret: bytes = SECRET, context: bytes = b"context") -> dict[int, str]:
    return dict(digest_chain(secret, context, ids, extra_lengths=extra).entries)


def test_digests_are_pinned() -> None:
    assert chain(list(range(40)), 5) == {
        5: "c85118950b6e4a5cdf9e4a6881816f82",
        16: "c839ec32e22983c1a597542502298b9c",
        32: "3a59e539a8a2c5fb0c98e11f03a16399",
    }


def test_the_chain_is_the_documented_one() -> None:
    def mac(message: bytes) -> bytes:
        return hmac.new(SECRET, message, "sha256").digest()

    ids = list(range(1000, 1040))
    root = mac(b"root" + b"context")
    page = mac(b"page" + root + struct.pack("<16I", *ids[:16]))
    tail = mac(b"tail" + page + struct.pack("<3I", *ids[16:19]))
    got = chain(ids, 19)
    assert got[16] == page[:16].hex()
    assert got[19] == tail[:16].hex()


@given(token_ids, st.sets(st.integers(-3, 120), max_size=5))
def test_which_lengths_are_offered(ids: list[int], extra: set[int]) -> None:
    offer = digest_chain(SECRET, b"", ids, extra_lengths=extra)
    pages = set(range(PAGE, len(ids) + 1, PAGE))
    assert [n for n, _ in offer.entries] == sorted(pages | {n for n in extra if 1 <= n <= len(ids)})
    assert len({digest for _, digest in offer.entries}) == len(offer.entries)


@given(token_ids, token_ids, token_ids, st.sets(st.integers(1, 100), max_size=5))
def test_offers_agree_exactly_on_the_common_prefix(
    common: list[int], a: list[int], b: list[int], extra: set[int]
) -> None:
    left, right = chain(common + a, *extra), chain(common + b, *extra)
    shared = len(common)
    while shared < min(len(common + a), len(common + b)) and (common + a)[shared] == (common + b)[shared]:
        shared += 1
    both = left.keys() & right.keys()
    assert {n for n in both if left[n] == right[n]} == {n for n in both if n <= shared}


def test_a_tail_is_never_taken_for_a_page() -> None:
    ids = list(range(16))
    assert chain(ids, 16) == chain(ids)  # an extra length at a border is the page's digest
    assert chain(ids, 15)[15] != chain(ids)[16]
    assert chain([], 1) == {}


def test_secret_and_context_bind() -> None:
    ids = list(range(20))
    base = chain(ids, 18)
    for other in (chain(ids, 18, secret=b"j" * 32), chain(ids, 18, context=b"contexu")):
        assert base.keys() == other.keys()
        assert not set(base.values()) & set(other.values())


def test_context_names_everything_the_kv_depends_on() -> None:
    model = ModelIdentity(architecture={"a": 1}, tokenizer_hash="t", base_name="b", weights_hash="w")
    other = model.model_copy(update={"weights_hash": "v"})
    renamed = model.model_copy(update={"base_name": "c"})
    contexts = [
        prefix_context(model, edge_precision="q8", split=8, row_format="f32"),
        prefix_context(other, edge_precision="q8", split=8, row_format="f32"),
        prefix_context(renamed, edge_precision="q8", split=8, row_format="f32"),
        prefix_context(model, edge_precision="f32", split=8, row_format="f32"),
        prefix_context(model, edge_precision="q8", split=9, row_format="f32"),
        prefix_context(model, edge_precision="q8", split=8, row_format="int8o"),
    ]
    assert len(set(contexts)) == len(contexts)
    assert contexts[0] == prefix_context(model, edge_precision="q8", split=8, row_format="f32")


def test_long_offers_stay_small_and_miss_little() -> None:
    offered = [n for n in range(1, 131_073) if is_offered(n)]
    assert offered[:64] == list(range(16, 1025, 16))
    assert len(offered) < 300
    assert all(b - a <= max(PAGE, a / 32) for a, b in itertools.pairwise(offered))
    assert not is_offered(0)
    assert not is_offered(-16)
    offer = digest_chain(SECRET, b"", range(131_072), extra_lengths=[100_003])
    assert [n for n, _ in offer.entries] == sorted([*offered, 100_003])
    assert len(offer.model_dump_json()) < 16_384


def test_weak_secret() -> None:
    with pytest.raises(ConfigError) as caught:
        digest_chain(b"short", b"", [1])
    assert caught.value.code == "weak_secret"


@pytest.mark.parametrize("token", [-1, 2**32])
def test_ids_that_are_not_u32(token: int) -> None:
    with pytest.raises(RequestError, match=f"token 2 of the sequence is {token}"):
        digest_chain(SECRET, b"", [1, 2, token])


D = "0" * 32


@pytest.mark.parametrize(
    "entries",
    [
        [(0, D)],
        [(-1, D)],
        [(2**32, D)],
        [(16, D), (16, D)],
        [(32, D), (16, D)],
        [(16, D[:-1])],
        [(16, D + "0")],
        [(16, D[:-1] + "G")],
        [(16, D[:-1] + "A")],
        [(16, D + "\n")],
        [(16, 5)],
        [(16.0, D)],
        [(16,)],
        [(n, D) for n in range(1, MAX_ENTRIES + 2)],
    ],
    ids=lambda entries: str(entries)[:40],
)
def test_bad_offer(entries: list[object]) -> None:
    with pytest.raises(ValidationError):
        PrefixOffer.model_validate({"entries": entries})


def test_offer_round_trips_as_json() -> None:
    offer = digest_chain(SECRET, b"", list(range(50)), extra_lengths=[50])
    assert PrefixOffer.model_validate_json(offer.model_dump_json()) == offer
    assert PrefixOffer().entries == []

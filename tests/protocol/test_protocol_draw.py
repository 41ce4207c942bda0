"""The uniform draw: published vectors, pinned values, ranges and chi-square along every argument."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.protocol.draw import philox4x32, uniform
from isthmus.protocol.errors import RequestError


def test_philox_known_answers() -> None:
    # From Random123's kat_vectors (D. E. Shaw Research), philox4x32 with 10 rounds.
    ones = 0xFFFFFFFF
    assert philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox4x32((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox4x32((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)) == (
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
    )  # fmt: skip


def test_uniform_is_pinned() -> None:
    assert uniform(0, 0, 0) == (0x6627E8D5E169C58D >> 11) / 2**53
    assert uniform(42, 0, 0) == 0.6129598811894158
    assert uniform(42, 0, 1) == 0.9877186509145105
    assert uniform(42, 1, 0) == 0.2612414777956905
    assert uniform(2**64 - 1, 2**32 - 1, 2**32 - 1) == 0.3011603248915362


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_uniform_is_a_function_into_the_half_open_interval(seed: int, choice: int, position: int) -> None:
    u = uniform(seed, choice, position)
    assert 0 <= u < 1
    assert u == uniform(seed, choice, position)
    assert u * 2**53 == int(u * 2**53)


@pytest.mark.parametrize(
    "triple", [(-1, 0, 0), (2**64, 0, 0), (0, -1, 0), (0, 2**32, 0), (0, 0, -1), (0, 0, 2**32)]
)
def test_uniform_out_of_range(triple: tuple[int, int, int]) -> None:
    with pytest.raises(RequestError) as caught:
        uniform(*triple)
    assert caught.value.code == "bad_seed"


def chi_square(counts: list[int], expected: list[float]) -> float:
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_uniform_is_uniform_along_every_argument(axis: int) -> None:
    n, bins = 16_000, 16
    triples = [[3, 5, 7] for _ in range(n)]
    for i, triple in enumerate(triples):
        triple[axis] = i
    draws = [uniform(*t) for t in triples]
    count = Counter(int(u * bins) for u in draws)
    # 15 degrees of freedom: 99.9 % of chi-square lies below 37.7; fixed inputs, so no flakes.
    assert chi_square([count[b] for b in range(bins)], [n / bins] * bins) < 37.7
    pairs = Counter((int(a * 4), int(b * 4)) for a, b in itertools.pairwise(draws))
    assert chi_square([pairs[a, b] for a in range(4) for b in range(4)], [(n - 1) / 16] * 16) < 37.7

"""`auto` is a pure function: fidelity first, then speed, ties by fidelity; and it says why."""

from __future__ import annotations

from isthmus.splitter.choice import KL_LIMIT, Candidate, choose
from isthmus.splitter.fidelity import Speed


def candidate(scheme: str, kl: float, request_s: float | None, weights_bytes: int = 100) -> Candidate:
    """`request_s` seconds for the typical request of 128 + 64 tokens, a third of them for the prompt."""
    speed = None if request_s is None else Speed(128 / (request_s / 3), 64 / (2 * request_s / 3))
    return Candidate(scheme, kl, weights_bytes, speed)


def test_the_fastest_that_is_close_enough_wins() -> None:
    chosen, reason = choose(
        [candidate("q8-affine", 4e-3, 1.0), candidate("q4-native", 5e-3, 0.7), candidate("f32", 0.0, 3.0)],
        asked="auto",
    )
    assert chosen.scheme == "q4-native"
    assert "fastest with KL ≤ 0.01: 0.70 s" in reason
    assert "slower: q8-affine (1.00 s), f32 (3.00 s)" in reason


def test_fidelity_decides_before_speed() -> None:
    chosen, reason = choose(
        [
            candidate("q4-affine", 4e-2, None),
            candidate("q8-affine", KL_LIMIT, 1.0),
            candidate("f32", 0.0, 3.0),
        ],
        asked="auto",
    )
    assert chosen.scheme == "q8-affine"
    assert "KL too high: q4-affine (0.04)" in reason


def test_equally_fast_goes_to_the_closer_one() -> None:
    chosen, reason = choose(
        [candidate("q4-native", 5e-3, 1.0), candidate("q8-affine", 4e-3, 1.09), candidate("f32", 0.0, 1.11)],
        asked="auto",
    )
    assert chosen.scheme == "q8-affine"
    assert "as fast within 10% but with a higher KL: q4-native" in reason


def test_only_fp32_passes() -> None:
    chosen, reason = choose([candidate("q8-affine", 0.5, None), candidate("f32", 0.0, None)], asked="auto")
    assert chosen.scheme == "f32"
    assert reason == "the only scheme with KL ≤ 0.01; KL too high: q8-affine (0.5)"


def test_what_is_too_large_to_time_is_not_preferred() -> None:
    both = [candidate("q8-affine", 4e-3, 9.0), candidate("f32", 0.0, None)]
    assert choose(both, asked="auto")[0].scheme == "q8-affine"
    neither = [candidate("f32", 0.0, None, 400), candidate("q8-affine", 4e-3, None, 100)]
    chosen, reason = choose(neither, asked="auto")
    assert chosen.scheme == "q8-affine"
    assert "smallest" in reason


def test_asked_bits_are_given_and_a_poor_kl_is_said() -> None:
    chosen, reason = choose([candidate("q4-affine", 0.2, None)], asked=4)
    assert chosen.scheme == "q4-affine"
    assert reason == "4 bits were asked for; its KL 0.2 is above 0.01, which auto would not take"

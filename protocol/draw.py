"""The uniform draw: a pure function of (seed, choice, position), so that a replay draws alike."""

from __future__ import annotations

from typing import Final

from isthmus.protocol.errors import RequestError

# Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC'11). 32-bit
# words only, so torch reproduces it in int64 arithmetic.
_M0: Final = 0xD2511F53
_M1: Final = 0xCD9E8D57
_W0: Final = 0x9E3779B9
_W1: Final = 0xBB67AE85
_MASK: Final = 0xFFFFFFFF
_ROUNDS: Final = 10


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four 32-bit words from four counter words and two key words, ten rounds."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, choice: int, position: int) -> float:
    """A float in [0, 1) with 53 random bits, keyed by `seed` (u64), `choice` and `position` (u32 each).

    Philox key = seed (low word, high word); counter = (position, choice, 0, 0); the result is the upper
    53 bits of word0·2³² + word1, over 2⁵³: the same bits on every machine. RequestError outside the ranges.
    """
    if not (0 <= seed < 2**64 and 0 <= choice < 2**32 and 0 <= position < 2**32):
        raise RequestError(
            f"seed {seed}, choice {choice}, position {position}: seed must fit 64 bits, the others 32 bits",
            code="bad_seed",
        )
    word0, word1, _, _ = philox4x32((position, choice, 0, 0), (seed & _MASK, seed >> 32))
    return ((word0 << 21) | (word1 >> 11)) * 2.0**-53

"""Mutations of bytes as lists of edits, so that a failing case can be made smaller and told."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

_INTERESTING = (
    b"\0", b"\xff", b"\x7f", b"\x80", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff" * 8, b"\0\0\0\x80",
    b"\1\0\0\0",
    b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"NaN", b"-1", b"1e999", b"null", b"[", b"{", b'"', b"\n", b":",
    b"9" * 20, b"\xc3\x28", b"true", b"0.5", b"\\u0000",
)  # fmt: skip


class Edit(NamedTuple):
    """Bytes [at, at + cut) become `new`; positions beyond the end mean the end."""

    at: int
    cut: int
    new: bytes


def draw_edits(rng: Random, size: int) -> list[Edit]:
    """One to four edits of something `size` bytes long; sometimes it is cut off as well."""
    edits = []
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        at = rng.randrange(size + 1)
        kind = rng.random()
        if kind < 0.35:
            edits.append(Edit(at, 1, bytes([rng.randrange(256)])))
        elif kind < 0.7:
            new = rng.choice(_INTERESTING)
            edits.append(Edit(at, rng.choice((0, 1, len(new))), new))
        elif kind < 0.8:
            edits.append(Edit(at, rng.randrange(1, 9), b""))
        elif kind < 0.9:
            edits.append(Edit(at, 0, rng.randbytes(rng.randrange(1, 9))))
        else:
            edits.append(Edit(at, size, b""))
    return edits


def apply(data: bytes, edits: list[Edit]) -> bytes:
    for edit in edits:
        data = data[: edit.at] + edit.new + data[edit.at + edit.cut :]
    return data


def shrink(edits: list[Edit], fails: Callable[[list[Edit]], bool]) -> list[Edit]:
    """The edits without those that the failure does not need."""
    for edit in list(edits):
        fewer = [other for other in edits if other is not edit]
        if fails(fewer):
            edits = fewer
    return edits

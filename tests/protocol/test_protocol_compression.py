"""zstd bodies: the traps of the format, each refused with a typed error and before its memory."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from isthmus.protocol.compression import MAX_WINDOW_BYTES, compress, decompress
from isthmus.protocol.errors import CodecError

CONTENT = bytes(range(256)) * 8
FRAME = compress(CONTENT)


def frame(
    content: bytes, *, size: int | None, window_log: int | None = None, dict_id: int | None = None
) -> bytes:
    """A frame written by hand (RFC 8878, 3.1.1): one raw block and a made-up checksum."""
    descriptor = 0x04 | (0xC0 if size is not None else 0) | (0x20 if window_log is None else 0)
    head = b"" if window_log is None else bytes([(window_log - 10) << 3])
    if dict_id is not None:
        descriptor |= 0x03
        head += struct.pack("<I", dict_id)
    if size is not None:
        head += struct.pack("<Q", size)
    block = struct.pack("<I", 1 | len(content) << 3)[:3] + content
    return zstandard.FRAME_HEADER + bytes([descriptor]) + head + block + b"\0\0\0\0"


def skippable(content: bytes = b"skip") -> bytes:
    return struct.pack("<II", 0x184D2A50, len(content)) + content


@given(st.binary(min_size=1, max_size=5000), st.integers(1, 3))
def test_round_trip(data: bytes, times: int) -> None:
    data *= times
    packed = compress(data)
    assert decompress(packed, expected=len(data)) == data
    for wrong in (0, len(data) - 1, len(data) + 1, 2**40):
        with pytest.raises(CodecError):
            decompress(packed, expected=wrong)


def test_a_body_larger_than_the_compressor_window_comes_back() -> None:
    data = bytes(range(251)) * 40_000  # 10 MB: the frame then has a window of its own, below the limit
    assert decompress(compress(data), expected=len(data)) == data


NO_SIZE = zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compress(CONTENT)
NO_CHECKSUM = zstandard.ZstdCompressor().compress(CONTENT)
BOMB = compress(bytes(64 * 2**20))

BAD = {
    "bomb": (BOMB, 1024, "declares 67108864, expected 1024"),
    "no content size": (NO_SIZE, len(CONTENT), "declares no size, expected 2048"),
    "forged 1 TiB": (frame(b"abc", size=2**40), 3, "declares 1099511627776, expected 3"),
    "window_log 27": (
        frame(b"abc", size=3, window_log=27),
        3,
        f"134217728 bytes, at most {MAX_WINDOW_BYTES}",
    ),
    "window_log 24": (frame(b"abc", size=3, window_log=24), 3, "window of 16777216"),
    "dictionary id": (frame(b"abc", size=3, dict_id=77), 3, "needs dictionary 77"),
    "no checksum": (NO_CHECKSUM, len(CONTENT), "without a checksum"),
    "wrong checksum": (frame(b"abc", size=3), 3, "checksum"),
    "less content than declared": (frame(b"abc", size=4), 4, "zstd:"),
    "more content than declared": (frame(b"abcd", size=3), 3, "zstd:"),
    "two frames": (FRAME + FRAME, len(CONTENT), "unused data"),
    "two frames, sizes added up": (FRAME + FRAME, 2 * len(CONTENT), "declares 2048, expected 4096"),
    "trailing byte": (FRAME + b"x", len(CONTENT), "1 bytes of unused data"),
    "skippable frame": (skippable(), 4, "begins with 502a4d18"),
    "skippable frame before": (skippable() + FRAME, len(CONTENT), "begins with 502a4d18"),
    "skippable frame after": (FRAME + skippable(), len(CONTENT), "unused data"),
    "empty": (b"", 1, "begins with"),
    "magic only": (FRAME[:4], len(CONTENT), "zstd:"),
    "not zstd": (b"\x1f\x8b" + bytes(50), 50, "begins with 1f8b0000"),
}


@pytest.mark.parametrize(("data", "expected", "message"), BAD.values(), ids=BAD.keys())
def test_bad_frame(data: bytes, expected: int, message: str) -> None:
    with pytest.raises(CodecError, match=message) as caught:
        decompress(data, expected=expected)
    assert caught.value.code == "bad_compression"


@pytest.mark.parametrize("name", ["bomb", "forged 1 TiB", "window_log 27", "no content size"])
def test_refusal_takes_no_memory(name: str) -> None:
    data, expected, _ = BAD[name]
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            decompress(data, expected=expected)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


def test_cut_at_every_byte() -> None:
    for cut in range(len(FRAME)):
        with pytest.raises(CodecError):
            decompress(FRAME[:cut], expected=len(CONTENT))


def test_every_flipped_bit_is_found() -> None:
    small = compress(b"an activation row, say" * 3)
    survived = []
    for bit in range(8 * len(small)):
        flipped = bytearray(small)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            assert decompress(bytes(flipped), expected=66) == b"an activation row, say" * 3
        except CodecError:
            continue
        survived.append(bit)
    # Byte 4 is the frame header descriptor; its bit 4 is "unused" by the format and changes nothing.
    assert survived == [4 * 8 + 4]


@given(st.binary(max_size=60), st.integers(0, 100))
def test_arbitrary_bytes_decompress_or_codec_error(data: bytes, expected: int) -> None:
    for candidate in (data, zstandard.FRAME_HEADER + data, FRAME[:9] + data):
        with contextlib.suppress(CodecError):
            assert len(decompress(candidate, expected=expected)) == expected

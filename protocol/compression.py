"""zstd for frame bodies: one frame of exactly the expected size, refused before anything is allocated."""

from __future__ import annotations

from typing import Final

import zstandard

from isthmus.protocol.errors import CodecError

LEVEL: Final = 3
# Level 3 uses windows of at most 2 MiB; a decoder must reserve what a frame asks for, so 8 MiB is the most
# it may ask (zstd's own advice for interoperability, RFC 8878 section 3.1.1.1.2).
MAX_WINDOW_BYTES: Final = 8 * 2**20
_MAGIC: Final = zstandard.FRAME_HEADER


def compress(data: bytes) -> bytes:
    """`data` as one zstd frame that declares its content size and carries a checksum (off by default)."""
    # A fresh context costs 10 µs; a shared one would not be safe between threads.
    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=True).compress(data)


def decompress(data: bytes, *, expected: int) -> bytes:
    """The content of the one zstd frame in `data`, which must be exactly `expected` bytes long.

    The caller bounds `expected`: it is what gets allocated. CodecError for anything else: no or another
    content size (the library ignores `max_output_size` where a size is declared, so it is compared here,
    first), a window above 8 MiB, a dictionary, no checksum or a wrong one, a skippable frame, a second
    frame, trailing bytes.
    """
    if data[:4] != _MAGIC:
        raise CodecError(
            f"zstd: body begins with {data[:4].hex()}, a frame with {_MAGIC.hex()}", code="bad_compression"
        )
    try:
        head = zstandard.get_frame_parameters(data)
    except zstandard.ZstdError as error:
        raise CodecError(f"zstd: {error}", code="bad_compression") from None
    if head.content_size != expected:
        declared = "no size" if head.content_size == zstandard.CONTENTSIZE_UNKNOWN else head.content_size
        raise CodecError(f"zstd: frame declares {declared}, expected {expected}", code="bad_compression")
    if head.window_size > MAX_WINDOW_BYTES:
        raise CodecError(
            f"zstd: window of {head.window_size} bytes, at most {MAX_WINDOW_BYTES} are taken",
            code="bad_compression",
        )
    if head.dict_id != 0:
        raise CodecError(f"zstd: frame needs dictionary {head.dict_id}", code="bad_compression")
    if not head.has_checksum:
        raise CodecError("zstd: frame without a checksum", code="bad_compression")
    try:
        return zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompress(
            data, max_output_size=expected, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise CodecError(f"zstd: {error}", code="bad_compression") from None

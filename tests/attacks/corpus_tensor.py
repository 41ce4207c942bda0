"""Cases of tensor bodies and their compression."""

from __future__ import annotations

import struct
from functools import partial

import zstandard

from isthmus.protocol.compression import compress
from isthmus.protocol.frames import Codec, Dtype, MsgType
from tests.attacks.bad_inputs import Attack, Stage
from tests.attacks.messages import (
    HIDDEN,
    ROW_BYTES,
    bf16_with,
    int8_rows,
    message,
    open_message,
    packed_step,
    raw_rows,
    step,
    with_value,
)

NAN, INF = float("nan"), float("inf")
_INT8 = {"row_format": "int8o"}
_BF16 = {"row_format": "bf16"}
_IDS = {"split": 0}

_raw_len = partial(Attack, "raw_len 2³²−1", fatal=True)
_none = partial(Attack, "n_tok 0", fatal=True)
_many = partial(Attack, "n_tok > limit")
_unknown = partial(Attack, "unknown dtype or codec")
_hidden = partial(Attack, "wrong hidden size", code="bad_length")
_overflow = partial(Attack, "n_tok × hidden × size overflow", code="bad_length", fatal=True)
_values = partial(Attack, "NaN/Inf rows", code="bad_values")
_outliers = partial(Attack, "outlier index out of range or repeated", stage=Stage.GREETED)


def _ids(*ids: int) -> bytes:
    return step(struct.pack(f"<{len(ids)}i", *ids), len(ids), dtype=Dtype.TOKEN_IDS, seq=1, pos=0)


def _scale(value: float) -> Attack:
    body = step(int8_rows(2, scale=value), 2, dtype=Dtype.INT8, seq=1, pos=0)
    name = f"scale {value:g}"
    item = "zero, NaN or subnormal scales"
    return Attack(item, name, (body,), "bad_scale", Stage.OPENED, opening=_INT8)


def _open_with_outliers(name: str, code: str, text: str) -> Attack:
    """OPEN as JSON that the models would refuse to make."""
    good = open_message(row_format="int8o")[42:]
    body = good.replace(b'"outliers":[]', f'"outliers":[{text}]'.encode())
    assert body != good
    return _outliers(name=name, messages=(message(MsgType.OPEN, body, dtype=Dtype.JSON),), code=code)


TENSOR_ATTACKS: tuple[Attack, ...] = (
    _raw_len(name="plain", messages=(step(raw_rows(1), 1, raw_len=2**32 - 1),), code="too_large"),
    _raw_len(
        name="compressed", messages=(packed_step(b"x" * 100, 512, raw_len=2**32 - 1),), code="too_large"
    ),
    _raw_len(
        name="of JSON",
        messages=(message(MsgType.CANCEL, b"{}", dtype=Dtype.JSON, raw_len=2**32 - 1),),
        code="too_large",
    ),
    _none(name="with a body", messages=(step(raw_rows(1), 0),), code="bad_rows"),
    _none(name="without a body", messages=(step(b"", 0),), code="bad_rows"),
    _none(name="token ids", messages=(step(b"\0" * 4, 0, dtype=Dtype.TOKEN_IDS),), code="bad_rows"),
    _many(name="513 rows", messages=(step(raw_rows(513), 513),), code="too_many_rows"),
    _many(name="beyond the session", messages=(step(raw_rows(511), 511),), code="context_full"),
    _many(name="65535 rows of nothing", messages=(step(raw_rows(1), 65535),), code="bad_length", fatal=True),
    *(
        _unknown(
            name=f"dtype {n}", messages=(step(raw_rows(1), 1, dtype=n),), code="unknown_dtype", fatal=True
        )
        for n in (7, 128, 255)
    ),
    *(
        _unknown(
            name=f"codec {n}", messages=(step(raw_rows(1), 1, codec=n),), code="unknown_codec", fatal=True
        )
        for n in (2, 255)
    ),
    _unknown(
        name="no dtype", messages=(step(raw_rows(1), 1, dtype=Dtype.NONE),), code="bad_dtype", fatal=True
    ),
    _unknown(name="rows as JSON", messages=(step(b"[]", 1, dtype=Dtype.JSON),), code="bad_dtype", fatal=True),
    _unknown(
        name="bf16 where f32 was agreed", messages=(step(raw_rows(1), 2, dtype=Dtype.BF16),), code="bad_dtype"
    ),
    _unknown(
        name="ids where rows were agreed",
        messages=(step(b"\1\0\0\0", 1, dtype=Dtype.TOKEN_IDS),),
        code="bad_dtype",
    ),
    _unknown(
        name="rows where ids were agreed",
        messages=(step(raw_rows(1), 1, seq=1, pos=0),),
        code="bad_dtype",
        stage=Stage.OPENED,
        opening=_IDS,
    ),
    _unknown(
        name="compressed ids",
        code="bad_codec",
        stage=Stage.OPENED,
        opening=_IDS,
        fatal=True,
        messages=(step(b"x", 1, dtype=Dtype.TOKEN_IDS, codec=Codec.ZSTD, raw_len=4, seq=1, pos=0),),
    ),
    *(
        _unknown(
            name=f"token id {n}",
            messages=(_ids(1, n),),
            code="bad_token_id",
            stage=Stage.OPENED,
            opening=_IDS,
        )
        for n in (320, 2**31 - 1, -1, -(2**31))
    ),
    *(
        _hidden(name=f"{n} channels", messages=(step(raw_rows(2, n), 2),))
        for n in (1, HIDDEN - 1, HIDDEN + 1)
    ),
    _hidden(name="3 rows said to be 2", messages=(step(raw_rows(3), 2),)),
    _hidden(
        name="int8 rows without their scale",
        stage=Stage.OPENED,
        opening=_INT8,
        messages=(step(bytes(2 * HIDDEN), 2, dtype=Dtype.INT8, seq=1, pos=0),),
    ),
    _overflow(name="a product that wraps at 16 bits", messages=(step(raw_rows(1), 257),)),
    _overflow(name="four bytes said to be 16,384 rows", messages=(step(b"\0" * 4, 2**14, dtype=Dtype.F32),)),
    _overflow(
        name="a compressed body said to be as long as the product wraps",
        messages=(packed_step(compress(bytes(ROW_BYTES)), 257, raw_len=257 * ROW_BYTES % 2**16),),
        stage=Stage.OPENED,
    ),
    *(
        _values(name=f"{value} in f32", messages=(step(with_value(value), 3),))
        for value in (NAN, INF, -INF, 2.0**127)
    ),
    *(
        _values(
            name=f"{value} in bf16",
            stage=Stage.OPENED,
            opening=_BF16,
            messages=(step(bf16_with(value), 3, dtype=Dtype.BF16, seq=1, pos=0),),
        )
        for value in (NAN, INF)
    ),
    *(
        _values(
            name=f"{value} in an outlier channel",
            stage=Stage.OPENED,
            opening={**_INT8, "outliers": (5,)},
            messages=(step(int8_rows(2, outlier=value, outliers=(5,)), 2, dtype=Dtype.INT8, seq=1, pos=0),),
        )
        for value in (NAN, INF)
    ),
    _values(
        name="compressed", messages=(packed_step(compress(with_value(NAN, 512)), 512),), stage=Stage.OPENED
    ),
    *map(_scale, (0.0, -0.0, NAN, 1e-40, -1.0, INF, 2.0**121)),
    _open_with_outliers("one past the last channel", "bad_outliers", "64"),
    _open_with_outliers("2³²−1", "bad_outliers", "4294967295"),
    _open_with_outliers("twice the same", "bad_outliers", "5,5"),
    _open_with_outliers("descending", "bad_outliers", "7,3"),
    _open_with_outliers("more than 64", "bad_outliers", ",".join(["0"] * 65)),
    _open_with_outliers("negative", "bad_message", "-1"),
    _open_with_outliers("a fraction", "bad_message", "1.5"),
    _open_with_outliers("10,000 of them", "bad_message", ",".join(["0"] * 10_000)),
)

# ---- zstd: 512 rows, so that a body of a few kB is smaller than what it claims to hold

_ROWS = 512
_RAW = _ROWS * ROW_BYTES
_CONTENT = raw_rows(2) * (_ROWS // 2)
_GOOD = compress(_CONTENT)
_MAGIC = zstandard.FRAME_HEADER
_MEGABYTE_OF_ZEROS = struct.pack("<I", (2**17 << 3) | (1 << 1))[:3] + b"\0"  # one RLE block of 128 KiB


def _frame(descriptor: int, fields: bytes, num_blocks: int = 0) -> bytes:
    """A zstd frame made by hand (RFC 8878, 3.1.1): `num_blocks` blocks of 128 KiB of zeros, then an empty
    last one, and a checksum of nothing in particular."""
    return _MAGIC + bytes([descriptor]) + fields + _MEGABYTE_OF_ZEROS * num_blocks + b"\1\0\0" + b"\0" * 4


_CHECKSUM, _SINGLE_SEGMENT = 1 << 2, 1 << 5
_SIZE_4, _SIZE_8 = 2 << 6, 3 << 6


Body = tuple[str, str, bytes]  # item, name, what is said to be 128 KiB compressed


def _flipped(at: int) -> Body:
    body = bytearray(_GOOD)
    body[at] ^= 1
    return "flipped bit", f"in byte {at}", bytes(body)


ZSTD_BODIES: tuple[Body, ...] = (
    (
        "bomb",
        "says its 512 MiB",
        _frame(_SIZE_4 | _SINGLE_SEGMENT | _CHECKSUM, struct.pack("<I", 2**29), 4096),
    ),
    (
        "bomb",
        "says 128 KiB, holds 512 MiB",
        _frame(_SIZE_4 | _SINGLE_SEGMENT | _CHECKSUM, struct.pack("<I", _RAW), 4096),
    ),
    (
        "bomb",
        "says 128 KiB, holds nothing",
        _frame(_SIZE_4 | _SINGLE_SEGMENT | _CHECKSUM, struct.pack("<I", _RAW)),
    ),
    (
        "no content size",
        "of the right content",
        zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress(_CONTENT),
    ),
    ("no content size", "of 512 MiB", _frame(_CHECKSUM, b"\x38", 4096)),
    (
        "forged 1 TiB size",
        "single segment",
        _frame(_SIZE_8 | _SINGLE_SEGMENT | _CHECKSUM, struct.pack("<Q", 2**40), 2),
    ),
    (
        "forged 1 TiB size",
        "with a window",
        _frame(_SIZE_8 | _CHECKSUM, b"\x38" + struct.pack("<Q", 2**40), 2),
    ),
    (
        "window_log 27",
        "over the right size",
        _frame(_SIZE_4 | _CHECKSUM, bytes([(27 - 10) << 3]) + struct.pack("<I", _RAW), 1),
    ),
    (
        "window_log 27",
        "the largest there is, window_log 41",
        _frame(_SIZE_4 | _CHECKSUM, b"\xff" + struct.pack("<I", _RAW), 1),
    ),
    ("two frames", "the same twice", _GOOD + _GOOD),
    ("two frames", "a half each", compress(_CONTENT[: _RAW // 2]) + compress(_CONTENT[_RAW // 2 :])),
    ("two frames", "an empty one behind", _GOOD + compress(b"")),
    ("trailing byte", "a zero", _GOOD + b"\0"),
    ("trailing byte", "one short", _GOOD[:-1]),
    ("skippable frame", "before", b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"abcd" + _GOOD),
    ("skippable frame", "behind", _GOOD + b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"abcd"),
    ("skippable frame", "alone, 4 GiB long", b"\x5f\x2a\x4d\x18" + struct.pack("<I", 2**32 - 1)),
    (
        "dictionary id",
        "one byte",
        _frame(_SIZE_4 | _SINGLE_SEGMENT | _CHECKSUM | 1, b"\7" + struct.pack("<I", _RAW), 1),
    ),
    (
        "dictionary id",
        "four bytes",
        _frame(_SIZE_4 | _SINGLE_SEGMENT | _CHECKSUM | 3, struct.pack("<II", 2**31, _RAW), 1),
    ),
    *(_flipped(at) for at in (0, 4, 5, 6, 9, 20, len(_GOOD) // 2, len(_GOOD) - 1)),
    (
        "flipped bit",
        "no checksum to find it by",
        zstandard.ZstdCompressor(write_content_size=True).compress(_CONTENT),
    ),
    ("flipped bit", "not zstd at all", b"\x1f\x8b" + bytes(100)),
    ("flipped bit", "the magic alone", _MAGIC),
)

ZSTD_ATTACKS: tuple[Attack, ...] = tuple(
    Attack(item, name, (packed_step(body, _ROWS),), "bad_compression", Stage.OPENED)
    for item, name, body in ZSTD_BODIES
)

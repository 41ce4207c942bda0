"""Messages as an attacker makes them: any header over any body, and the terms they are spoken under."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.activations import RowCodec, RowFormat
from isthmus.protocol.frames import HEADER, Codec, Dtype, Flag, MsgType, encode_frame, json_frame
from isthmus.protocol.messages import Open
from isthmus.protocol.sampling import SamplingParams

# The tiny model's terms (tests.tiny): what the attacker learned from WELCOME.
LAYERS, HIDDEN, VOCAB, CONTEXT = 4, 64, 320, 512
ROW_BYTES = 4 * HIDDEN


def message(
    kind: int,
    body: bytes = b"",
    *,
    magic: bytes = b"IS",
    version: int = 1,
    flags: int = 0,
    stream: int = 1,
    epoch: int = 1,
    seq: int = 0,
    pos: int = 0,
    n_tok: int = 0,
    dtype: int = Dtype.NONE,
    codec: int = Codec.NONE,
    raw_len: int | None = None,
    wire_len: int | None = None,
    crc: int | None = None,
) -> bytes:
    """A message with the right lengths and checksum, but for what is said otherwise."""
    return HEADER.pack(
        magic, version, kind, flags, stream, epoch, seq, pos, n_tok, dtype, codec,
        len(body) if raw_len is None else raw_len,
        len(body) if wire_len is None else wire_len,
        zlib.crc32(body) if crc is None else crc,
    ) + body  # fmt: skip


PING = message(MsgType.PING, stream=0, epoch=0, seq=1)


def opening(**changes: Any) -> Open:
    """Split 1 in the prefix shape, 500 prompt tokens, the whole context."""
    values: dict[str, Any] = {
        "split": 1,
        "shape": "prefix",
        "row_format": "f32",
        "max_tokens": 8,
        "prompt_tokens": 500,
        "max_context": CONTEXT,
        "sampling": SamplingParams(temperature=0.0),
    }
    return Open(**{**values, **changes})


def open_message(**changes: Any) -> bytes:
    return encode_frame(json_frame(MsgType.OPEN, opening(**changes), stream=1, epoch=1))


def control(kind: MsgType, text: str, **header: Any) -> bytes:
    return message(kind, text.encode(), dtype=Dtype.JSON, **header)


def rows(n: int, hidden: int = HIDDEN) -> NDArray[np.float32]:
    """f32[n, hidden], each value telling its place."""
    return np.arange(n * hidden, dtype=np.float32).reshape(n, hidden) / np.float32(n * hidden)


def raw_rows(n: int, hidden: int = HIDDEN) -> bytes:
    return rows(n, hidden).tobytes()


def step(body: bytes, n_tok: int, **header: Any) -> bytes:
    """STEP 2 at position 2: what follows the step of two rows. F32 if nothing else is said."""
    values: dict[str, Any] = {"seq": 2, "pos": 2, "dtype": Dtype.F32, "n_tok": n_tok}
    return message(MsgType.STEP, body, **{**values, **header})


FIRST_STEP = step(raw_rows(2), 2, seq=1, pos=0)
NEXT_STEP = step(raw_rows(1), 1)
# Two rows, the prompt's last two: needs a session of four prompt tokens.
LAST_STEP = step(raw_rows(2), 2, flags=Flag.FINAL)
SHORT = {"prompt_tokens": 4}


def packed_step(body: bytes, n_tok: int, **header: Any) -> bytes:
    """STEP 1 with `n_tok` rows that claim to be compressed to `body`."""
    values = {"seq": 1, "pos": 0, "codec": Codec.ZSTD, "raw_len": n_tok * ROW_BYTES}
    return step(body, n_tok, **{**values, **header})


def int8_rows(
    n: int, *, scale: float | None = None, outlier: float | None = None, outliers: Sequence[int] = ()
) -> bytes:
    """Rows in int8o; `scale` of the last row, and its first outlier channel's value."""
    codec = RowCodec(RowFormat.INT8, HIDDEN, tuple(outliers), zstd=False)
    raw = bytearray(codec.encode_raw(rows(n)).tobytes())
    last = (n - 1) * codec.row_bytes
    if scale is not None:
        struct.pack_into("<f", raw, last, scale)
    if outlier is not None:
        raw[last + 4 : last + 6] = struct.pack("<f", outlier)[2:]
    return bytes(raw)


def with_value(value: float, n: int = 3) -> bytes:
    """f32 rows with `value` somewhere in the middle."""
    values = rows(n)
    values[n // 2, 7] = value
    return values.tobytes()


def bf16_with(value: float, n: int = 3) -> bytes:
    values = rows(n)
    values[n // 2, 7] = value
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()

"""The activation codec: residual rows and token ids to bytes and back, row by row.

Row formats (little-endian; h = hidden, m = number of outlier channels):

    f32     h x f32
    bf16    h x bf16, rounded to nearest even
    int8o   scale f32 | m x bf16 | h x int8         value = int8 * scale, plus the bf16 in outlier channels

Residual rows have a few channels some hundred times larger than the rest (21,748 beside an rms of 114
was seen). In `int8o` those leave in bf16, so that the per-row scale is set by the others alone; what bf16
rounding left of them goes into their int8 as in any other channel: no byte is wasted, and the KL of the
logits falls by a few percent more.

A row's bytes depend on that row only (element-wise IEEE operations and an exact maximum), so digests and
replays may cut the rows anywhere. Compression is over the whole body, after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.compression import compress, decompress
from isthmus.protocol.errors import CodecError
from isthmus.protocol.frames import Codec, Dtype, Frame

F32Rows = NDArray[np.float32]

# Values beyond this are refused on both sides. It is far above any residual (1e5) and far enough below
# f32's and bf16's maximum (2^128) that rounding to bf16 and the int8o sum can't overflow.
MAX_ABS: Final = float(2.0**126)
_MAX_SCALE: Final = float(2.0**120)  # MAX_ABS / 127 is below; times -128, plus an outlier, is finite
_MIN_SCALE: Final = float(np.finfo(np.float32).tiny)  # the smallest normal f32
_LEVELS: Final = np.float32(127)
MAX_OUTLIERS: Final = 64
# zstd takes 5-12 % off a single int8o row of SmolLM2, 60 bytes, for 25 µs per end in which a token waits:
# a gain only on links below ~10 Mbit/s. From two rows on it is a prefill, where it takes 20 %.
_MIN_ROWS_TO_COMPRESS: Final = 2


class RowFormat(StrEnum):
    """The names used in OPEN and on the command line."""

    F32 = "f32"
    BF16 = "bf16"
    INT8 = "int8o"


DTYPE_OF: Final[dict[RowFormat, Dtype]] = {
    RowFormat.F32: Dtype.F32,
    RowFormat.BF16: Dtype.BF16,
    RowFormat.INT8: Dtype.INT8,
}


class Encoded(NamedTuple):
    """The fields of a frame that carry rows. `raw_len` in bytes, before compression."""

    body: bytes
    dtype: Dtype
    codec: Codec
    raw_len: int


@dataclass(frozen=True)
class RowCodec:
    """Rows f32[n, hidden] to frame bodies and back.

    `outliers`: ascending channel numbers, for INT8 only. `zstd`: whether the encoder may compress; the
    decoder takes both. CodecError where these don't fit together.
    """

    format: RowFormat
    hidden: int
    outliers: tuple[int, ...] = ()
    zstd: bool = True

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise CodecError(f"hidden size {self.hidden}, at least 1 is needed", code="bad_row_format")
        if self.outliers and self.format is not RowFormat.INT8:
            raise CodecError(
                f"{len(self.outliers)} outlier channels with row format {self.format}, which has none",
                code="bad_outliers",
            )
        if len(self.outliers) > MAX_OUTLIERS:
            raise CodecError(
                f"{len(self.outliers)} outlier channels, at most {MAX_OUTLIERS} are taken",
                code="bad_outliers",
            )
        before = -1
        for channel in self.outliers:
            if not before < channel < self.hidden:
                raise CodecError(
                    f"outlier channels must ascend without repetition within 0..{self.hidden - 1}, "
                    f"{channel} follows {before}",
                    code="bad_outliers",
                )
            before = channel

    @property
    def dtype(self) -> Dtype:
        return DTYPE_OF[self.format]

    @cached_property
    def _channels(self) -> NDArray[np.intp]:
        return np.array(self.outliers, np.intp)

    @property
    def row_bytes(self) -> int:
        """Uncompressed bytes of one row."""
        if self.format is RowFormat.F32:
            return 4 * self.hidden
        if self.format is RowFormat.BF16:
            return 2 * self.hidden
        return 4 + 2 * len(self.outliers) + self.hidden

    def encode(self, rows: F32Rows) -> Encoded:
        """`rows` f32[n >= 1, hidden] as a body, compressed where that makes it smaller.

        CodecError for another shape, and for NaN, infinities or values beyond `MAX_ABS`.
        """
        return self.pack(self.encode_raw(rows))

    def pack(self, raw: NDArray[np.uint8]) -> Encoded:
        """Rows as `encode_raw` gives them, uint8[n >= 1, row_bytes], as a body."""
        whole = raw.tobytes()
        if self.zstd and len(raw) >= _MIN_ROWS_TO_COMPRESS:
            body = compress(whole)
            if len(body) < len(whole):
                return Encoded(body, self.dtype, Codec.ZSTD, len(whole))
        return Encoded(whole, self.dtype, Codec.NONE, len(whole))

    def encode_raw(self, rows: F32Rows) -> NDArray[np.uint8]:
        """The rows before compression, uint8[n, row_bytes]: what digests are taken over."""
        if rows.ndim != 2 or len(rows) < 1 or rows.shape[1] != self.hidden or rows.dtype != np.float32:
            raise CodecError(
                f"rows are {rows.dtype}{list(rows.shape)}, expected float32[n >= 1, {self.hidden}]",
                code="bad_shape",
            )
        if self.format is RowFormat.INT8:
            return self._encode_int8(rows)
        _check_values(rows)
        rows = np.ascontiguousarray(rows, dtype="<f4")
        return (rows if self.format is RowFormat.F32 else _to_bf16(rows)).view(np.uint8)

    def _encode_int8(self, rows: F32Rows) -> NDArray[np.uint8]:
        m = len(self.outliers)
        out = np.empty((len(rows), self.row_bytes), np.uint8)
        work = np.array(rows, dtype="<f4", order="C")
        if m:
            large = np.take(work, self._channels, axis=1)  # C order, which views as bytes need
            _check_values(large)
            packed = _to_bf16(large)
            rest = large - _from_bf16(packed)
            out[:, 4 : 4 + 2 * m] = packed.view(np.uint8)
            work[:, self._channels] = 0
        largest = np.maximum(work.max(axis=1), -work.min(axis=1))  # NaN and inf come through
        _check_limit(float(largest.max()))
        scale = np.maximum(largest / _LEVELS, np.float32(_MIN_SCALE))
        out[:, :4] = scale.astype("<f4")[:, None].view(np.uint8)
        if m:
            # bf16's rounding error may exceed the scale's reach in a really large channel.
            reach = (scale * _LEVELS)[:, None]
            work[:, self._channels] = np.clip(rest, -reach, reach)
        work *= (np.float32(1) / scale)[:, None]
        np.rint(work, out=work)
        out[:, 4 + 2 * m :] = work.astype(np.int8).view(np.uint8)
        return out

    def decode(
        self, body: bytes, *, n_tok: int, dtype: Dtype, codec: Codec, raw_len: int, max_raw: int
    ) -> F32Rows:
        """The rows f32[n_tok, hidden] of a frame's body.

        Sizes are compared with the negotiated shape before anything is allocated; `max_raw` (bytes) is the
        caller's limit on the uncompressed body. CodecError for everything that doesn't fit: dtype, sizes,
        compression, NaN or infinite values, scales that are zero, negative, subnormal, NaN or too large.
        """
        return self.decode_raw(
            self._unpack(body, n_tok=n_tok, dtype=dtype, codec=codec, raw_len=raw_len, max_raw=max_raw)
        )

    def _unpack(
        self, body: bytes, *, n_tok: int, dtype: Dtype, codec: Codec, raw_len: int, max_raw: int
    ) -> NDArray[np.uint8]:
        if dtype is not self.dtype:
            message = f"rows of dtype {dtype.name}, negotiated was {self.dtype.name}"
            raise CodecError(message, code="bad_dtype")
        expected = n_tok * self.row_bytes
        if n_tok < 1 or raw_len != expected:
            raise CodecError(
                f"{n_tok} rows of {self.row_bytes} bytes are {expected} bytes, the frame declares {raw_len}",
                code="bad_length",
            )
        if raw_len > max_raw:
            raise CodecError(f"rows of {raw_len} bytes, the limit is {max_raw}", code="too_large")
        if codec is Codec.ZSTD:
            body = decompress(body, expected=raw_len)
        elif len(body) != raw_len:
            raise CodecError(f"body of {len(body)} bytes, the frame declares {raw_len}", code="bad_length")
        return np.frombuffer(body, np.uint8).reshape(n_tok, self.row_bytes)

    def decode_raw(self, raw: NDArray[np.uint8]) -> F32Rows:
        """The rows f32[n, hidden] of `unpack`'s bytes; CodecError for values that `decode` refuses."""
        if self.format is RowFormat.INT8:
            return self._decode_int8(raw)
        if self.format is RowFormat.F32:
            rows = raw.view("<f4").astype(np.float32)  # a writable copy
        else:
            rows = _from_bf16(raw.view("<u2"))
        _check_values(rows)
        return rows

    def _decode_int8(self, raw: NDArray[np.uint8]) -> F32Rows:
        m = len(self.outliers)
        scale = np.ascontiguousarray(raw[:, :4]).view("<f4")
        if not (scale.min() >= _MIN_SCALE and scale.max() <= _MAX_SCALE):  # NaN fails both
            row = int(np.flatnonzero(~((scale[:, 0] >= _MIN_SCALE) & (scale[:, 0] <= _MAX_SCALE)))[0])
            raise CodecError(
                f"row {row} has scale {float(scale[row, 0])}, allowed {_MIN_SCALE}..{_MAX_SCALE}",
                code="bad_scale",
            )
        rows = raw[:, 4 + 2 * m :].view(np.int8).astype(np.float32)
        rows *= scale
        if m:
            large = _from_bf16(np.ascontiguousarray(raw[:, 4 : 4 + 2 * m]).view("<u2"))
            _check_values(large)
            rows[:, self._channels] += large
        return rows

    def unpack(self, frame: Frame, *, max_raw: int) -> NDArray[np.uint8]:
        """A parsed frame's rows before decoding, uint8[n_tok, row_bytes]: what digests are taken over.
        CodecError for a dtype, a size or a compression that doesn't fit."""
        return self._unpack(
            frame.body,
            n_tok=frame.n_tok,
            dtype=frame.dtype,
            codec=frame.codec,
            raw_len=frame.raw_len,
            max_raw=max_raw,
        )

    def decode_frame(self, frame: Frame, *, max_raw: int) -> F32Rows:
        """`decode` of a parsed frame's body."""
        return self.decode_raw(self.unpack(frame, max_raw=max_raw))


def _check_values(values: F32Rows) -> None:
    """Two reductions and no temporary: NaN and infinities come through both."""
    _check_limit(float(np.maximum(values.max(), -values.min())))


def _check_limit(largest: float) -> None:
    if not largest <= MAX_ABS:
        raise CodecError(
            f"rows hold a value of {largest}, the largest allowed is {MAX_ABS:.4g}",
            code="bad_values",
            hint="a NaN or infinity here means that the layers before the cut overflowed",
        )


def _to_bf16(values: F32Rows) -> NDArray[np.uint16]:
    """bf16 bits, rounded to nearest even; the values are known to be finite and within MAX_ABS."""
    bits = values.view(np.uint32)
    nearest = bits >> np.uint32(16)  # in place from here on: a prefill's temporaries cost more than its sums
    nearest &= np.uint32(1)
    nearest += np.uint32(0x7FFF)
    nearest += bits
    nearest >>= np.uint32(16)
    return nearest.astype(np.dtype("<u2"))


def _from_bf16(bits: NDArray[np.uint16]) -> F32Rows:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def choose_outliers(rows: F32Rows, count: int = 8) -> tuple[int, ...]:
    """The `count` channels of f32[n, hidden] with the largest |x| in any row, ascending; ties by number."""
    peak = np.abs(rows).max(axis=0)
    return tuple(sorted(int(c) for c in np.argsort(-peak, kind="stable")[:count]))


def encode_ids(ids: Sequence[int]) -> bytes:
    """Token ids as i32, dtype TOKEN_IDS. CodecError for an id that is not one."""
    array = np.asarray(ids, dtype=np.int64)
    if array.size and not (array.min() >= 0 and array.max() < 2**31):
        raise CodecError(
            f"token ids span {array.min()}..{array.max()}, they must fit 31 bits", code="bad_token_id"
        )
    return array.astype("<i4").tobytes()


def decode_ids(body: bytes, *, n_tok: int, vocab_size: int) -> list[int]:
    """`n_tok` ids below `vocab_size`, or CodecError."""
    if len(body) != 4 * n_tok:
        raise CodecError(f"{n_tok} token ids are {4 * n_tok} bytes, got {len(body)}", code="bad_length")
    array = np.frombuffer(body, "<i4")
    if array.size and not (array.min() >= 0 and array.max() < vocab_size):
        bad = int(array[(array < 0) | (array >= vocab_size)][0])
        raise CodecError(f"token id {bad}, the vocabulary has {vocab_size}", code="bad_token_id")
    return [int(token) for token in array.tolist()]

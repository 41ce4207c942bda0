"""The activation codec: exactness per format, row independence, and every wrong body."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isthmus.protocol.activations import (
    MAX_ABS,
    MAX_OUTLIERS,
    Encoded,
    F32Rows,
    RowCodec,
    RowFormat,
    choose_outliers,
    decode_ids,
    encode_ids,
)
from isthmus.protocol.errors import CodecError
from isthmus.protocol.frames import Codec, Dtype, Frame, MsgType, decode_frame, encode_frame

MAX_RAW = 1 << 20
TINY = float(np.finfo(np.float32).tiny)


def decode(codec: RowCodec, encoded: Encoded, n: int) -> F32Rows:
    return codec.decode(
        encoded.body,
        n_tok=n,
        dtype=encoded.dtype,
        codec=encoded.codec,
        raw_len=encoded.raw_len,
        max_raw=MAX_RAW,
    )


def residual_rows(n: int, hidden: int, seed: int = 0) -> F32Rows:
    """Rows like a residual stream's: heavy tails and a few channels some hundred times larger."""
    rng = np.random.default_rng(seed)
    rows = rng.laplace(scale=20, size=(n, hidden)).astype(np.float32)
    rows[:, :: max(hidden // 5, 1)] *= 300
    return rows


@st.composite
def codecs_and_rows(draw: st.DrawFn) -> tuple[RowCodec, F32Rows]:
    form = draw(st.sampled_from(RowFormat))
    hidden = draw(st.integers(1, 40))
    channels = st.sets(st.integers(0, hidden - 1), max_size=min(hidden, 8))
    outliers = tuple(sorted(draw(channels))) if form is RowFormat.INT8 else ()
    values = st.floats(-MAX_ABS, MAX_ABS, width=32) | st.floats(-100, 100, width=32)
    rows = draw(hnp.arrays(np.float32, (draw(st.integers(1, 6)), hidden), elements=values))
    return RowCodec(form, hidden, outliers, zstd=draw(st.booleans())), rows


# -- round trip -------------------------------------------------------------------------------------------


@given(codecs_and_rows())
@example((RowCodec(RowFormat.INT8, 3, (1,)), np.array([[MAX_ABS, -MAX_ABS, MAX_ABS]], np.float32)))
@example((RowCodec(RowFormat.INT8, 3, (0,)), np.array([[5, TINY / 8, 0], [0, 0, 0]], np.float32)))
def test_round_trip_within_the_format_s_step(case: tuple[RowCodec, F32Rows]) -> None:
    codec, rows = case
    encoded = codec.encode(rows)
    assert encoded.raw_len == len(rows) * codec.row_bytes
    assert len(encoded.body) <= encoded.raw_len
    back = decode(codec, encoded, len(rows))
    assert back.dtype == np.float32
    assert back.flags.writeable
    assert np.isfinite(back).all()
    if codec.format is RowFormat.F32:
        np.testing.assert_array_equal(back, rows)
    elif codec.format is RowFormat.BF16:
        np.testing.assert_array_equal(back, rows.astype(ml_dtypes.bfloat16).astype(np.float32))
    else:
        inside = np.setdiff1d(np.arange(codec.hidden), codec.outliers)
        wide = rows.astype(np.float64)
        step = np.maximum(np.abs(wide[:, inside]).max(axis=1, initial=0) / 127, TINY)
        # Half a step, and the rounding of scale, product and sum in f32.
        bound = np.repeat(0.5 * step[:, None], codec.hidden, axis=1) + np.abs(wide) * 2.0**-22 + 2 * TINY
        if codec.outliers:  # never worse than bf16 alone, and mostly far better
            large = np.abs(wide[:, codec.outliers])
            bound[:, codec.outliers] = np.maximum(bound[:, codec.outliers], large * 2.0**-8 + 2 * TINY)
        assert (np.abs(back - wide) <= bound).all()


@given(codecs_and_rows(), st.data())
def test_rows_are_independent(case: tuple[RowCodec, F32Rows], data: st.DataObject) -> None:
    codec, rows = case
    raw = codec.encode_raw(rows)
    assert raw.shape == (len(rows), codec.row_bytes)
    i = data.draw(st.integers(0, len(rows) - 1))
    assert raw[i].tobytes() == codec.encode_raw(rows[i : i + 1]).tobytes()
    whole = decode(codec, codec.encode(rows), len(rows))
    alone = decode(codec, codec.encode(rows[i : i + 1]), 1)
    np.testing.assert_array_equal(whole[i : i + 1], alone)


@pytest.mark.parametrize("hidden", [576, 4096])
@pytest.mark.parametrize("form", RowFormat)
def test_rows_are_independent_at_real_widths(form: RowFormat, hidden: int) -> None:
    # Vector kernels treat the ends of long arrays apart: property tests with 40 channels don't reach that.
    rows = residual_rows(33, hidden)
    codec = RowCodec(form, hidden, choose_outliers(rows) if form is RowFormat.INT8 else ())
    whole = codec.encode_raw(rows)
    for i in range(len(rows)):
        assert whole[i].tobytes() == codec.encode_raw(rows[i : i + 1]).tobytes()


def test_layout_is_pinned() -> None:
    rows = np.array([[0.5, -127.0, 1000.25, 3.0]], np.float32)
    assert RowCodec(RowFormat.F32, 4).encode(rows).body == struct.pack("<4f", *rows[0])
    assert RowCodec(RowFormat.BF16, 4).encode(rows).body == struct.pack("<4H", 0x3F00, 0xC2FE, 0x447A, 0x4040)
    # Scale 1; the outlier 1000.25 is bf16 1000 and the 0.25 left rounds to 0; so does 0.5, to even.
    assert RowCodec(RowFormat.INT8, 4, (2,)).encode(rows) == Encoded(
        struct.pack("<fH4b", 1.0, 0x447A, 0, -127, 0, 3), Dtype.INT8, Codec.NONE, 10
    )


def test_int8_keeps_what_bf16_rounds_off_an_outlier() -> None:
    rows = np.array([[21748.0, 100.0, -127.0, 20.0]], np.float32)  # bf16 of the first: 21760
    codec = RowCodec(RowFormat.INT8, 4, (0,))
    assert decode(codec, codec.encode(rows), 1).tolist() == [[21748.0, 100.0, -127.0, 20.0]]


def test_int8_error_is_set_by_the_inliers_not_the_outliers() -> None:
    rows = residual_rows(64, 576)
    with_outliers = RowCodec(RowFormat.INT8, 576, choose_outliers(rows))
    without = RowCodec(RowFormat.INT8, 576)
    error = [np.sqrt(np.mean((decode(c, c.encode(rows), 64) - rows) ** 2)) for c in (with_outliers, without)]
    assert error[0] < error[1] / 20


def test_row_bytes() -> None:
    assert RowCodec(RowFormat.F32, 576).row_bytes == 2304
    assert RowCodec(RowFormat.BF16, 576).row_bytes == 1152
    assert RowCodec(RowFormat.INT8, 576, tuple(range(8))).row_bytes == 4 + 16 + 576


def test_non_contiguous_rows_encode_alike() -> None:
    rows = residual_rows(6, 48)
    for form in RowFormat:
        codec = RowCodec(form, 48, (0, 9) if form is RowFormat.INT8 else ())
        assert codec.encode(rows[::2]) == codec.encode(rows[::2].copy())
        assert codec.encode(np.asfortranarray(rows)) == codec.encode(rows)


def test_encoding_leaves_the_rows_alone() -> None:
    rows = residual_rows(3, 48)
    before = rows.copy()
    RowCodec(RowFormat.INT8, 48, (0, 9)).encode(rows)
    np.testing.assert_array_equal(rows, before)


def test_compression_only_where_it_helps() -> None:
    codec = RowCodec(RowFormat.F32, 64)
    noise = np.random.default_rng(0).integers(0, 2**30, (4, 64), np.uint32).view(np.float32)
    assert codec.encode(noise).codec is Codec.NONE  # zstd would expand it
    zeros = np.zeros((4, 64), np.float32)
    assert codec.encode(zeros).codec is Codec.ZSTD
    assert codec.encode(zeros[:1]).codec is Codec.NONE  # a token waits for a single row
    assert replace(codec, zstd=False).encode(zeros).codec is Codec.NONE


@pytest.mark.parametrize("form", RowFormat)
def test_through_a_frame(form: RowFormat) -> None:
    rows = residual_rows(5, 32)
    codec = RowCodec(form, 32, (0, 6) if form is RowFormat.INT8 else ())
    body, dtype, compression, raw_len = codec.encode(rows)
    sent = Frame(MsgType.STEP, stream=1, n_tok=5, dtype=dtype, codec=compression, raw_len=raw_len, body=body)
    got = codec.decode_frame(decode_frame(encode_frame(sent), max_body=MAX_RAW), max_raw=MAX_RAW)
    np.testing.assert_array_equal(got, decode(codec, codec.encode(rows), 5))


# -- what can't be encoded --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", RowFormat)
@pytest.mark.parametrize("where", [0, 3])  # an outlier channel of the int8 codec, and an ordinary one
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**126 * 1.01])
def test_values_that_are_not_sent(form: RowFormat, where: int, value: float) -> None:
    rows = np.ones((3, 8), np.float32)
    rows[1, where] = value
    with pytest.raises(CodecError) as caught:
        RowCodec(form, 8, (0,) if form is RowFormat.INT8 else ()).encode(rows)
    assert caught.value.code == "bad_values"


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((0, 8), np.float32),
        np.zeros((2, 9), np.float32),
        np.zeros(8, np.float32),
        np.zeros((1, 2, 8), np.float32),
        np.zeros((2, 8), np.float64),
    ],
)
def test_shapes_that_are_not_sent(rows: F32Rows) -> None:
    with pytest.raises(CodecError) as caught:
        RowCodec(RowFormat.F32, 8).encode(rows)
    assert caught.value.code == "bad_shape"


@pytest.mark.parametrize(
    ("form", "hidden", "outliers", "code"),
    [
        (RowFormat.INT8, 8, (8,), "bad_outliers"),
        (RowFormat.INT8, 8, (-1,), "bad_outliers"),
        (RowFormat.INT8, 8, (2, 2), "bad_outliers"),
        (RowFormat.INT8, 8, (3, 2), "bad_outliers"),
        (RowFormat.INT8, 999, tuple(range(MAX_OUTLIERS + 1)), "bad_outliers"),
        (RowFormat.F32, 8, (1,), "bad_outliers"),
        (RowFormat.BF16, 8, (1,), "bad_outliers"),
        (RowFormat.F32, 0, (), "bad_row_format"),
    ],
)
def test_codecs_that_are_not_made(form: RowFormat, hidden: int, outliers: tuple[int, ...], code: str) -> None:
    with pytest.raises(CodecError) as caught:
        RowCodec(form, hidden, outliers)
    assert caught.value.code == code


# -- wrong bodies -----------------------------------------------------------------------------------------

INT8 = RowCodec(RowFormat.INT8, 8, (1, 5))
GOOD = INT8.encode_raw(residual_rows(2, 8)).tobytes()


def refused(rows: RowCodec, body: bytes, **changes: object) -> CodecError:
    fields: dict[str, object] = {
        "n_tok": 2,
        "dtype": rows.dtype,
        "codec": Codec.NONE,
        "raw_len": 2 * rows.row_bytes,
        "max_raw": MAX_RAW,
    }
    with pytest.raises(CodecError) as caught:
        rows.decode(body, **(fields | changes))  # type: ignore[arg-type]  # fields by name, at run time
    return caught.value


def test_the_good_body_is_good() -> None:
    assert INT8.decode(
        GOOD, n_tok=2, dtype=Dtype.INT8, codec=Codec.NONE, raw_len=len(GOOD), max_raw=len(GOOD)
    ).shape == (2, 8)


@pytest.mark.parametrize("dtype", [d for d in Dtype if d is not Dtype.INT8])
def test_another_dtype_than_negotiated(dtype: Dtype) -> None:
    assert refused(INT8, GOOD, dtype=dtype).code == "bad_dtype"


@pytest.mark.parametrize(
    "changes",
    [
        {"n_tok": 0, "raw_len": 0},
        {"n_tok": -1, "raw_len": -16},
        {"n_tok": 3},
        {"n_tok": 1},
        {"raw_len": 2**32 - 1},
        {"raw_len": len(GOOD) - 1},
        {"n_tok": 65535},
        {"raw_len": 0},
    ],
)
def test_sizes_that_disagree(changes: dict[str, int]) -> None:
    assert refused(INT8, GOOD, **changes).code == "bad_length"


def test_body_shorter_or_longer_than_declared() -> None:
    assert refused(INT8, GOOD[:-1]).code == "bad_length"
    assert refused(INT8, GOOD + b"x").code == "bad_length"


def test_another_hidden_size() -> None:
    other = RowCodec(RowFormat.F32, 9).encode(np.ones((2, 9), np.float32))
    assert refused(RowCodec(RowFormat.F32, 8), other.body, raw_len=other.raw_len).code == "bad_length"


def test_max_raw_comes_before_allocation() -> None:
    wide = RowCodec(RowFormat.F32, 2**31)
    tracemalloc.start()
    try:
        # 65,535 rows x 2^31 channels x 4 bytes: no multiplication wraps, nothing is allocated.
        error = refused(wide, b"", n_tok=65535, raw_len=65535 * 2**33, codec=Codec.ZSTD)
        assert error.code == "too_large"
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert refused(INT8, GOOD, max_raw=len(GOOD) - 1).code == "too_large"


def test_broken_compression() -> None:
    assert refused(INT8, GOOD, codec=Codec.ZSTD).code == "bad_compression"


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, TINY / 2, 2.0**121, -0.0])
def test_bad_scale_names_row_and_value(scale: float) -> None:
    body = bytearray(GOOD)
    body[INT8.row_bytes : INT8.row_bytes + 4] = struct.pack("<f", scale)
    error = refused(INT8, bytes(body))
    assert error.code == "bad_scale"
    assert f"row 1 has scale {float(np.float32(scale))}" in error.message


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F7F])  # inf, -inf, NaN, NaN, 3.4e38
def test_bad_outlier(bits: int) -> None:
    body = bytearray(GOOD)
    body[6:8] = struct.pack("<H", bits)
    assert refused(INT8, bytes(body)).code == "bad_values"


def test_largest_legal_numbers_stay_finite() -> None:
    row = struct.pack("<fHH8b", 2.0**120, 0x7E80, 0xFE80, *([-128] * 8))  # the outliers are ±MAX_ABS
    rows = INT8.decode(row, n_tok=1, dtype=Dtype.INT8, codec=Codec.NONE, raw_len=len(row), max_raw=99)
    assert (rows[0] / MAX_ABS).tolist() == [-2, -1, -2, -2, -2, -3, -2, -2]


@pytest.mark.parametrize("form", [RowFormat.F32, RowFormat.BF16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_values(form: RowFormat, value: float) -> None:
    codec = RowCodec(form, 4)
    body = bytearray(codec.encode_raw(np.ones((2, 4), np.float32)).tobytes())
    bad = struct.pack("<f", value)
    body[-(codec.row_bytes // 4) :] = bad if form is RowFormat.F32 else bad[2:]
    assert refused(codec, bytes(body)).code == "bad_values"


@given(
    form=st.sampled_from(RowFormat), n_tok=st.integers(0, 3), compression=st.sampled_from(Codec),
    body=st.binary(max_size=100), exact=st.booleans(), raw_len=st.integers(0, 120),
)  # fmt: skip
def test_arbitrary_bodies_decode_or_codec_error(
    form: RowFormat, n_tok: int, compression: Codec, body: bytes, exact: bool, raw_len: int
) -> None:
    codec = RowCodec(form, 8, (2, 3) if form is RowFormat.INT8 else ())
    if exact:
        raw_len = n_tok * codec.row_bytes
        body = body.ljust(raw_len, b"\x01")[:raw_len]
    try:
        rows = codec.decode(
            body, n_tok=n_tok, dtype=codec.dtype, codec=compression, raw_len=raw_len, max_raw=100
        )
    except CodecError:
        return
    assert rows.shape == (n_tok, 8)
    assert np.isfinite(rows).all()


# -- outliers and ids -------------------------------------------------------------------------------------


def test_choose_outliers() -> None:
    rows = np.zeros((3, 10), np.float32)
    rows[0, 7], rows[1, 2], rows[2, 9], rows[0, 4] = -50, 40, 30, 1
    assert choose_outliers(rows, 3) == (2, 7, 9)
    assert choose_outliers(rows, 5) == (0, 2, 4, 7, 9)  # ties by number
    assert choose_outliers(rows, 99) == tuple(range(10))
    assert len(choose_outliers(residual_rows(2, 64))) == 8


@given(st.lists(st.integers(0, 49151), max_size=50))
def test_ids_round_trip(ids: list[int]) -> None:
    body = encode_ids(ids)
    assert len(body) == 4 * len(ids)
    assert decode_ids(body, n_tok=len(ids), vocab_size=49152) == ids


def test_ids_layout_is_pinned() -> None:
    assert encode_ids([1, 65536]) == b"\x01\0\0\0\0\0\x01\0"


@pytest.mark.parametrize("ids", [[-1], [2**31], [1, 2, -5]])
def test_ids_that_are_not_sent(ids: list[int]) -> None:
    with pytest.raises(CodecError) as caught:
        encode_ids(ids)
    assert caught.value.code == "bad_token_id"


@pytest.mark.parametrize("token", [-1, 100, 2**31 - 1, -(2**31)])
def test_ids_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(CodecError, match=f"token id {token}, the vocabulary has 100"):
        decode_ids(struct.pack("<2i", 99, token), n_tok=2, vocab_size=100)


def test_ids_of_another_length() -> None:
    with pytest.raises(CodecError) as caught:
        decode_ids(bytes(9), n_tok=2, vocab_size=100)
    assert caught.value.code == "bad_length"

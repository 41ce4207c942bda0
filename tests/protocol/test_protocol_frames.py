"""Frames: the golden header, the table of legal combinations, and everything a peer may get wrong."""

from __future__ import annotations

import tracemalloc
import zlib
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from isthmus.protocol import frames
from isthmus.protocol.errors import FrameError
from isthmus.protocol.frames import (
    HEADER,
    HEADER_BYTES,
    Codec,
    Dtype,
    Flag,
    Frame,
    MsgType,
    decode_frame,
    encode_frame,
    json_frame,
    parse_json,
)

MAX = 1 << 20

STEP = Frame(
    MsgType.STEP,
    stream=7,
    epoch=1,
    seq=2**40 + 5,
    pos=300,
    n_tok=2,
    flags=Flag.TRUNCATE | Flag.FINAL,
    dtype=Dtype.INT8,
    codec=Codec.NONE,
    raw_len=6,
    body=b"abcdef",
)


def forge(body: bytes = b"{}", **fields: int | bytes) -> bytes:
    """A message with a right checksum and whatever header one likes; by default a legal OPEN."""
    values: dict[str, int | bytes] = {
        "magic": b"IS", "version": 1, "type": MsgType.OPEN, "flags": 0, "stream": 1, "epoch": 0, "seq": 0,
        "pos": 0, "n_tok": 0, "dtype": Dtype.JSON, "codec": 0, "raw_len": len(body), "wire_len": len(body),
        "crc": zlib.crc32(body),
    }  # fmt: skip
    return HEADER.pack(*(values | fields).values()) + body


def forge_step(body: bytes = b"12345678", **fields: int | bytes) -> bytes:
    """The same, by default a legal STEP of two int8 rows."""
    return forge(body, **({"type": MsgType.STEP, "n_tok": 2, "dtype": Dtype.INT8} | fields))


# -- golden -----------------------------------------------------------------------------------------------


def test_header_is_pinned_byte_for_byte() -> None:
    assert HEADER_BYTES == 42
    assert encode_frame(STEP).hex(" ") == (
        "49 53 01 06 03 00 07 00 00 00 01 00 00 00 05 00 00 00 00 01 00 00 2c 01 00 00 02 00 03 00"
        " 06 00 00 00 06 00 00 00 ef 39 8e 4b 61 62 63 64 65 66"
    )


def test_enum_numbers_are_pinned() -> None:
    names = (
        "HELLO WELCOME REJECT OPEN OPENED STEP VERIFY RESULT STREAM CREDIT CANCEL CLOSE CLOSED RESUME RESUMED"
        " STATUS GOAWAY ERROR CANARY CANARY_RESULT PING PONG PROBE PROBE_REPLY"
    )
    assert {t.name: int(t) for t in MsgType} == {name: i for i, name in enumerate(names.split(), 1)}
    assert {d.name: int(d) for d in Dtype} == {
        "NONE": 0, "F32": 1, "BF16": 2, "INT8": 3, "TOKEN_IDS": 4, "JSON": 5, "PADDING": 6,
    }  # fmt: skip
    assert {c.name: int(c) for c in Codec} == {"NONE": 0, "ZSTD": 1}
    assert {f.name: int(f) for f in Flag} == {"TRUNCATE": 1, "FINAL": 2, "ALL_ROWS": 4}


# -- round trip -------------------------------------------------------------------------------------------

u32 = st.integers(0, 2**32 - 1)


@st.composite
def legal_frames(draw: st.DrawFn) -> Frame:
    msg_type = draw(st.sampled_from(MsgType))
    rule = frames._RULES[msg_type]
    streams = {0: st.just(0), 1: st.integers(1, 2**32 - 1), 2: u32}[rule.stream]
    flags = Flag(draw(st.integers(0, 7)) & int(rule.flags))
    dtype = draw(st.sampled_from(sorted(rule.dtypes)))
    codec = Codec.NONE
    n_tok = prefix = 0
    if dtype is Dtype.NONE:
        body = b""
    elif dtype in (Dtype.JSON, Dtype.PADDING):
        body = draw(st.binary(min_size=int(dtype is Dtype.JSON), max_size=40))
    else:
        n_tok = draw(st.integers(1, 5))
        units = 1 if dtype is Dtype.TOKEN_IDS else draw(st.integers(1, 5))
        row = {Dtype.F32: 4, Dtype.BF16: 2, Dtype.INT8: 1, Dtype.TOKEN_IDS: 4}[dtype] * units
        prefix = 4 * n_tok if msg_type is MsgType.VERIFY else 0
        size = n_tok * row + prefix
        body = draw(st.binary(min_size=size, max_size=size))
    raw_len = len(body)
    if dtype in (Dtype.F32, Dtype.BF16, Dtype.INT8) and raw_len > 1 and draw(st.booleans()):
        codec, body = Codec.ZSTD, body[: draw(st.integers(prefix, raw_len - 1))]
    return Frame(
        msg_type, draw(streams), draw(u32), draw(st.integers(0, 2**64 - 1)), draw(u32), n_tok,
        flags, dtype, codec, raw_len, body,
    )  # fmt: skip


@given(legal_frames())
def test_round_trip(frame: Frame) -> None:
    data = encode_frame(frame)
    assert decode_frame(data, max_body=MAX) == frame
    assert decode_frame(bytearray(data), max_body=MAX) == frame
    assert decode_frame(memoryview(data), max_body=MAX) == frame


@given(st.binary(max_size=200))
@example(forge())
def test_arbitrary_bytes_parse_or_frame_error(data: bytes) -> None:
    try:
        frame = decode_frame(data, max_body=100)
    except FrameError:
        return
    assert encode_frame(frame) == data


@given(
    header=st.fixed_dictionaries(
        {},
        optional={
            "type": st.integers(0, 30), "flags": st.integers(0, 2**16 - 1) | st.integers(0, 7),
            "stream": u32, "n_tok": st.integers(0, 9), "dtype": st.integers(0, 7), "codec": st.integers(0, 2),
            "raw_len": u32 | st.integers(0, 60),
        },
    ),
    body=st.binary(max_size=50),
)  # fmt: skip
def test_any_header_over_any_body_parses_or_frame_error(header: dict[str, int], body: bytes) -> None:
    data = forge_step(body, **header)
    try:
        frame = decode_frame(data, max_body=60)
    except FrameError:
        return
    assert max(frame.raw_len, len(frame.body)) <= 60
    assert encode_frame(frame) == data


@given(legal_frames(), st.data())
def test_a_flipped_bit_is_never_another_body(frame: Frame, data: st.DataObject) -> None:
    message = bytearray(encode_frame(frame))
    bit = data.draw(st.integers(0, 8 * len(message) - 1))
    message[bit // 8] ^= 1 << bit % 8
    try:
        parsed = decode_frame(message, max_body=MAX)
    except FrameError:
        return
    assert parsed != frame
    assert parsed.body == frame.body  # only header fields can change unseen


# -- bad inputs -------------------------------------------------------------------------------------------

BAD_HEADERS = {
    "magic": (forge(magic=b"SI"), "bad_magic"),
    "older version": (forge(version=0), "bad_version"),
    "future version": (forge(version=2), "bad_version"),
    "type 0": (forge(type=0), "unknown_message_type"),
    "type 25": (forge(type=25), "unknown_message_type"),
    "type 255": (forge(type=255), "unknown_message_type"),
    "dtype 7": (forge(dtype=7), "unknown_dtype"),
    "codec 2": (forge(codec=2), "unknown_codec"),
    "flags on OPEN": (forge(flags=1), "bad_flags"),
    "session message on stream 0": (forge(stream=0), "bad_stream"),
    "connection message on a session's stream": (forge(type=MsgType.HELLO), "bad_stream"),
    "wire_len too small": (forge(wire_len=1), "bad_length"),
    "wire_len too large": (forge(wire_len=3), "bad_length"),
    "wire_len 2^32-1": (forge(wire_len=2**32 - 1), "bad_length"),
    "wire_len over the limit": (forge(b"x" * (MAX + 1)), "too_large"),
    "raw_len 2^32-1": (forge_step(codec=1, raw_len=2**32 - 1), "too_large"),
    "raw_len other than wire_len": (forge(raw_len=3), "bad_length"),
    "crc": (forge(crc=0), "bad_crc"),
    "rows in OPEN": (forge(dtype=Dtype.F32), "bad_dtype"),
    "JSON in STEP": (forge_step(dtype=Dtype.JSON), "bad_dtype"),
    "n_tok with JSON": (forge(n_tok=1), "bad_rows"),
    "empty JSON": (forge(b""), "bad_length"),
    "PING with a body": (forge(type=MsgType.PING, stream=0, dtype=Dtype.NONE), "bad_length"),
    "PING with rows": (forge(b"", type=MsgType.PING, stream=0, dtype=Dtype.NONE, n_tok=1), "bad_rows"),
    "PROBE with rows": (forge(type=MsgType.PROBE, stream=0, dtype=Dtype.PADDING, n_tok=1), "bad_rows"),
    "PROBE of a session": (forge(type=MsgType.PROBE, dtype=Dtype.PADDING), "bad_stream"),
    "compressed padding": (
        forge(type=MsgType.PROBE, stream=0, dtype=Dtype.PADDING, codec=1, raw_len=9),
        "bad_codec",
    ),
    "padding in OPEN": (forge(dtype=Dtype.PADDING), "bad_dtype"),
    "compressed JSON": (forge(codec=1, raw_len=5), "bad_codec"),
    "compressed ids": (forge_step(dtype=Dtype.TOKEN_IDS, codec=1, raw_len=9), "bad_codec"),
    "compression that expands": (forge_step(codec=1, raw_len=8), "bad_length"),
    "n_tok 0": (forge_step(n_tok=0), "bad_rows"),
    "rows of no bytes": (forge_step(b""), "bad_length"),
    "fewer bytes than rows": (forge_step(n_tok=9), "bad_length"),
    "rows of unequal length": (forge_step(n_tok=3), "bad_length"),
    "f32 rows not of whole floats": (forge_step(dtype=Dtype.F32, n_tok=4), "bad_length"),
    "bf16 rows not of whole numbers": (forge_step(b"123456", dtype=Dtype.BF16), "bad_length"),
    "more ids than n_tok": (forge_step(dtype=Dtype.TOKEN_IDS, n_tok=1), "bad_length"),
    "VERIFY with ids but no rows": (forge_step(type=MsgType.VERIFY), "bad_length"),
    "VERIFY too short for its ids": (forge_step(b"1", type=MsgType.VERIFY), "bad_length"),
    "compressed VERIFY too short for its ids": (
        forge_step(b"1234567", type=MsgType.VERIFY, codec=1, raw_len=10),
        "bad_length",
    ),
    "FINAL on VERIFY": (forge_step(b"1234567890", type=MsgType.VERIFY, flags=Flag.FINAL), "bad_flags"),
    "ALL_ROWS on VERIFY": (forge_step(b"1234567890", type=MsgType.VERIFY, flags=Flag.ALL_ROWS), "bad_flags"),
}


@pytest.mark.parametrize(("data", "code"), BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_bad_header(data: bytes, code: str) -> None:
    with pytest.raises(FrameError) as caught:
        decode_frame(data, max_body=MAX)
    assert caught.value.code == code


def test_the_forged_messages_differ_from_legal_ones_by_one_thing() -> None:
    assert decode_frame(forge(), max_body=MAX).type is MsgType.OPEN
    assert decode_frame(forge_step(), max_body=MAX).n_tok == 2
    assert decode_frame(forge_step(codec=1, raw_len=10), max_body=MAX).raw_len == 10
    assert decode_frame(forge_step(b"1234567890", type=MsgType.VERIFY, flags=1), max_body=MAX).n_tok == 2
    assert (
        decode_frame(forge_step(type=MsgType.VERIFY, codec=1, raw_len=10), max_body=MAX).codec is Codec.ZSTD
    )


@pytest.mark.parametrize("bit", range(3, 16))
@pytest.mark.parametrize("msg_type", [MsgType.STEP, MsgType.OPEN])
def test_reserved_flags(msg_type: MsgType, bit: int) -> None:
    data = forge_step(flags=1 << bit) if msg_type is MsgType.STEP else forge(flags=1 << bit)
    with pytest.raises(FrameError, match="reserved bits"):
        decode_frame(data, max_body=MAX)


@pytest.mark.parametrize("flags", [8, 0x8000])
def test_reserved_flags_are_not_sent(flags: int) -> None:
    with pytest.raises(FrameError, match="flags"):
        encode_frame(replace(STEP, flags=Flag(flags)))


@pytest.mark.parametrize("cut", range(HEADER_BYTES))
def test_header_cut_at_every_byte(cut: int) -> None:
    with pytest.raises(FrameError) as caught:
        decode_frame(encode_frame(STEP)[:cut], max_body=MAX)
    assert caught.value.code == "short_frame"


@pytest.mark.parametrize("cut", range(HEADER_BYTES, HEADER_BYTES + 6))
def test_body_cut_at_every_byte(cut: int) -> None:
    with pytest.raises(FrameError) as caught:
        decode_frame(encode_frame(STEP)[:cut], max_body=MAX)
    assert caught.value.code == "bad_length"


def test_trailing_data() -> None:
    with pytest.raises(FrameError, match="header says 6 body bytes, 7 follow"):
        decode_frame(encode_frame(STEP) + b"x", max_body=MAX)


@pytest.mark.parametrize("text", ["", "hello", "IS\x01" * 30])
def test_text_message(text: str) -> None:
    with pytest.raises(FrameError) as caught:
        decode_frame(text, max_body=MAX)
    assert caught.value.code == "text_message"


def test_limits_are_inclusive_and_json_has_its_own() -> None:
    assert decode_frame(forge_step(), max_body=8, max_control=1).raw_len == 8
    assert decode_frame(forge(), max_body=100, max_control=2).raw_len == 2
    for data, limits in ((forge_step(), (7, 100)), (forge(), (100, 1))):
        with pytest.raises(FrameError) as caught:
            decode_frame(data, max_body=limits[0], max_control=limits[1])
        assert caught.value.code == "too_large"


def test_refusing_allocates_nothing_of_the_declared_size() -> None:
    data = forge_step(codec=1, raw_len=2**32 - 1)
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            decode_frame(data, max_body=MAX)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("field", "top"),
    [
        ("stream", 2**32),
        ("epoch", 2**32),
        ("seq", 2**64),
        ("pos", 2**32),
        ("n_tok", 2**16),
        ("raw_len", 2**32),
    ],
)
def test_numbers_beyond_their_field_are_not_sent(field: str, top: int) -> None:
    for value in (-1, top):
        with pytest.raises(FrameError, match=f"{field} is {value}"):
            encode_frame(replace(STEP, **{field: value}))  # type: ignore[arg-type]  # field named at run time


def test_what_the_decoder_refuses_is_not_sent() -> None:
    with pytest.raises(FrameError) as caught:
        encode_frame(replace(STEP, n_tok=4))
    assert caught.value.code == "bad_length"


# -- JSON bodies ------------------------------------------------------------------------------------------


class Note(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    number: int
    ratio: float = 0.5


def note(body: bytes) -> Frame:
    return Frame(MsgType.STATUS, dtype=Dtype.JSON, raw_len=len(body), body=body)


def test_json_round_trip_is_compact() -> None:
    frame = json_frame(MsgType.CREDIT, Note(number=3), stream=4, epoch=5, seq=6)
    assert frame.body == b'{"number":3,"ratio":0.5}'
    assert (frame.stream, frame.epoch, frame.seq) == (4, 5, 6)
    assert parse_json(decode_frame(encode_frame(frame), max_body=MAX), Note) == Note(number=3)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"{}", "number: Field required"),
        (b'{"number":"3"}', "number: Input should be a valid integer"),
        (b'{"number":3,"ratio":NaN}', "ratio: Input should be a finite number"),
        (b'{"number":3,"ratio":1e999}', "ratio: Input should be a finite number"),
        (b'{"number":3,"colour":1}', "colour: Extra inputs are not permitted"),
        (b'{"number":3', "body: Invalid JSON"),
        (b'{"number":3}x', "body: Invalid JSON"),
        (b'{"number":3,"\xff":1}', "body: Invalid JSON"),
        (b"[" * 100_000, "body: Invalid JSON"),
        (b"null", "body: Input should be"),
        (b'{"number":' + b"9" * 5000 + b"}", "body: Invalid JSON"),
    ],
)
def test_bad_json_names_the_field(body: bytes, named: str) -> None:
    with pytest.raises(FrameError) as caught:
        parse_json(note(body), Note)
    assert caught.value.code == "bad_message"
    assert f"STATUS: {named}" in caught.value.message


def test_errors_never_quote_values_and_stay_short() -> None:
    body = b'{"number":"my secret prompt",' + b",".join(
        b'"%d\xc3\xa9\\n%s":1' % (i, b"x" * 300) for i in range(999)
    )
    with pytest.raises(FrameError) as caught:
        parse_json(note(body + b"}"), Note)
    message = caught.value.message
    assert "secret" not in message
    assert message.isascii()
    assert "\n" not in message
    assert len(message) < 1000
    assert "996 more" in message


def test_json_is_asked_of_a_json_frame_only() -> None:
    with pytest.raises(FrameError, match="INT8, expected JSON"):
        parse_json(STEP, Note)


@given(
    st.binary(max_size=100) | st.text(alphabet='{}[]":,0123456789.eE-numberatio', max_size=60).map(str.encode)
)
def test_arbitrary_json_bodies_parse_or_frame_error(body: bytes) -> None:
    try:
        parsed = parse_json(note(body), Note)
    except FrameError:
        return
    assert isinstance(parsed.number, int)

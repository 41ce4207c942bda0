"""Frames: the fixed header, its closed enums and the one table of what each message type may carry.

A frame is one binary websocket message: a 42-byte little-endian header, then the body.

    offset  0  magic     2s   b"IS"
            2  version   u8   1
            3  type      u8   MsgType
            4  flags     u16  Flag
            6  stream    u32  0 = the connection itself
           10  epoch     u32
           14  seq       u64
           22  pos       u32  row position; kv_len in RESULT and CREDIT; bytes wanted back in PROBE
           26  n_tok     u16  rows (or token ids) in the body
           28  dtype     u8   Dtype: how the uncompressed body reads
           29  codec     u8   Codec: how the body is compressed
           30  raw_len   u32  bytes of the body once decompressed
           34  wire_len  u32  bytes of the body as sent; equals what follows
           38  crc32     u32  of the body as sent

Everything is checked against the bytes already in hand: parsing allocates nothing but the body's copy,
and decompression (compression.py) is never reached with a `raw_len` above the caller's limit.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from isthmus.protocol.errors import FrameError

MAGIC: Final = b"IS"
VERSION: Final = 1
HEADER: Final = struct.Struct("<2sBBHIIQIHBBIII")
HEADER_BYTES: Final = HEADER.size


class MsgType(IntEnum):
    """Message types; the numbers are the wire's."""

    HELLO = 1
    WELCOME = 2
    REJECT = 3
    OPEN = 4
    OPENED = 5
    STEP = 6
    VERIFY = 7
    RESULT = 8
    STREAM = 9
    CREDIT = 10
    CANCEL = 11
    CLOSE = 12
    CLOSED = 13
    RESUME = 14
    RESUMED = 15
    STATUS = 16
    GOAWAY = 17
    ERROR = 18
    CANARY = 19
    CANARY_RESULT = 20
    PING = 21
    PONG = 22
    PROBE = 23
    PROBE_REPLY = 24


class Flag(IntFlag):
    """Flags of STEP. `FINAL`: the last row produces output. `ALL_ROWS`: every row does. `TRUNCATE`, which
    VERIFY takes too: the KV is first cut back to `pos`. Others are refused."""

    NONE = 0
    TRUNCATE = 1
    FINAL = 2
    ALL_ROWS = 4


class Dtype(IntEnum):
    """How the uncompressed body reads: rows in one of three formats, token ids (i32), JSON, or bytes that
    mean nothing."""

    NONE = 0
    F32 = 1
    BF16 = 2
    INT8 = 3
    TOKEN_IDS = 4
    JSON = 5
    PADDING = 6


class Codec(IntEnum):
    """How the body is compressed."""

    NONE = 0
    ZSTD = 1


class _Stream(IntEnum):
    """Which streams a message type may travel on."""

    CONNECTION = 0
    SESSION = 1
    EITHER = 2


class _Rule(NamedTuple):
    dtypes: frozenset[Dtype]
    stream: _Stream
    flags: Flag = Flag.NONE


_ROWS = frozenset({Dtype.F32, Dtype.BF16, Dtype.INT8})
_ROWS_OR_IDS = _ROWS | {Dtype.TOKEN_IDS}
_JSON = frozenset({Dtype.JSON})
_EMPTY = frozenset({Dtype.NONE})
_PADDING = frozenset({Dtype.PADDING})
_WITHOUT_ROWS = frozenset({Dtype.NONE, Dtype.JSON, Dtype.PADDING})
_STEP_FLAGS = Flag.TRUNCATE | Flag.FINAL | Flag.ALL_ROWS

# The one table: what each message type may carry, and where.
_RULES: Final[dict[MsgType, _Rule]] = {
    MsgType.HELLO: _Rule(_JSON, _Stream.CONNECTION),
    MsgType.WELCOME: _Rule(_JSON, _Stream.CONNECTION),
    MsgType.REJECT: _Rule(_JSON, _Stream.CONNECTION),
    MsgType.OPEN: _Rule(_JSON, _Stream.SESSION),
    MsgType.OPENED: _Rule(_JSON, _Stream.SESSION),
    MsgType.STEP: _Rule(_ROWS_OR_IDS, _Stream.SESSION, _STEP_FLAGS),
    MsgType.VERIFY: _Rule(_ROWS_OR_IDS, _Stream.SESSION, Flag.TRUNCATE),
    MsgType.RESULT: _Rule(_ROWS | _JSON, _Stream.SESSION),
    MsgType.STREAM: _Rule(_JSON, _Stream.SESSION),
    MsgType.CREDIT: _Rule(_JSON, _Stream.SESSION),
    MsgType.CANCEL: _Rule(_JSON, _Stream.SESSION),
    MsgType.CLOSE: _Rule(_JSON, _Stream.SESSION),
    MsgType.CLOSED: _Rule(_JSON, _Stream.SESSION),
    MsgType.RESUME: _Rule(_JSON, _Stream.SESSION),
    MsgType.RESUMED: _Rule(_JSON, _Stream.SESSION),
    MsgType.STATUS: _Rule(_JSON, _Stream.CONNECTION),
    MsgType.GOAWAY: _Rule(_JSON, _Stream.CONNECTION),
    MsgType.ERROR: _Rule(_JSON, _Stream.EITHER),
    MsgType.CANARY: _Rule(_ROWS, _Stream.EITHER),
    MsgType.CANARY_RESULT: _Rule(_JSON, _Stream.EITHER),
    MsgType.PING: _Rule(_EMPTY, _Stream.CONNECTION),
    MsgType.PONG: _Rule(_EMPTY, _Stream.CONNECTION),
    MsgType.PROBE: _Rule(_PADDING, _Stream.CONNECTION),
    MsgType.PROBE_REPLY: _Rule(_PADDING, _Stream.CONNECTION),
}

# The body's length is a whole number of these per row; a row is at least one of them.
_UNIT: Final[dict[Dtype, int]] = {Dtype.F32: 4, Dtype.BF16: 2, Dtype.INT8: 1, Dtype.TOKEN_IDS: 4}
# VERIFY puts one i32 per row in front of the rows (drafts.py has the layout).
DRAFT_ID_BYTES: Final = 4

_FIELD_MAX: Final[dict[str, int]] = {
    "stream": 2**32 - 1,
    "epoch": 2**32 - 1,
    "seq": 2**64 - 1,
    "pos": 2**32 - 1,
    "n_tok": 2**16 - 1,
    "raw_len": 2**32 - 1,
}


@dataclass(frozen=True, slots=True)
class Frame:
    """One message. `body` is as it travels (compressed if `codec` says so), `raw_len` its size before."""

    type: MsgType
    stream: int = 0
    epoch: int = 0
    seq: int = 0
    pos: int = 0
    n_tok: int = 0
    flags: Flag = Flag.NONE
    dtype: Dtype = Dtype.NONE
    codec: Codec = Codec.NONE
    raw_len: int = 0
    body: bytes = b""


def encode_frame(frame: Frame) -> bytes:
    """Header and body as one message; FrameError for a frame the peer's decoder would refuse."""
    for name, top in _FIELD_MAX.items():
        value = getattr(frame, name)
        if not 0 <= value <= top:
            raise FrameError(f"{frame.type.name}: {name} is {value}, allowed 0..{top}", code="field_range")
    _check_legal(
        frame.type,
        frame.flags,
        frame.stream,
        frame.n_tok,
        frame.dtype,
        frame.codec,
        frame.raw_len,
        len(frame.body),
    )
    header = HEADER.pack(
        MAGIC,
        VERSION,
        frame.type,
        frame.flags,
        frame.stream,
        frame.epoch,
        frame.seq,
        frame.pos,
        frame.n_tok,
        frame.dtype,
        frame.codec,
        frame.raw_len,
        len(frame.body),
        zlib.crc32(frame.body),
    )
    return header + frame.body


def decode_frame(
    data: bytes | bytearray | memoryview | str, *, max_body: int, max_control: int | None = None
) -> Frame:
    """Parse one whole websocket message, or raise FrameError.

    `max_body` bounds the body in bytes, both as sent and as declared after decompression; `max_control`
    (default `max_body`) bounds JSON bodies. A text message (`str`) is refused, so that adapters may pass
    on whatever arrived.
    """
    if isinstance(data, str):
        raise FrameError("got a text message, only binary ones are spoken here", code="text_message")
    view = memoryview(data).cast("B")
    if len(view) < HEADER_BYTES:
        message = f"message of {len(view)} bytes, the header alone has {HEADER_BYTES}"
        raise FrameError(message, code="short_frame")
    magic, version, type_no, flags_no, *numbers = HEADER.unpack_from(view)
    stream, epoch, seq, pos, n_tok, dtype_no, codec_no, raw_len, wire_len, crc = numbers
    if magic != MAGIC:
        raise FrameError(f"magic is {magic!r}, expected {MAGIC!r}", code="bad_magic")
    if version != VERSION:
        raise FrameError(
            f"frame version {version}, this side speaks {VERSION}",
            code="bad_version",
            hint="update the older side",
        )
    msg_type = _enum(MsgType, type_no, "message type")
    dtype = _enum(Dtype, dtype_no, "dtype")
    codec = _enum(Codec, codec_no, "codec")
    if flags_no & ~int(_STEP_FLAGS):  # plain ints: ~ of an IntFlag keeps known bits only, in some versions
        raise FrameError(
            f"{msg_type.name}: flags {flags_no:#06x} hold reserved bits (known {int(_STEP_FLAGS):#06x})",
            code="bad_flags",
        )
    flags = Flag(flags_no)
    if wire_len != len(view) - HEADER_BYTES:
        raise FrameError(
            f"{msg_type.name}: header says {wire_len} body bytes, {len(view) - HEADER_BYTES} follow",
            code="bad_length",
        )
    limit = max_control if dtype is Dtype.JSON and max_control is not None else max_body
    if max(raw_len, wire_len) > limit:
        raise FrameError(
            f"{msg_type.name}: body of {max(raw_len, wire_len)} bytes, the limit is {limit}",
            code="too_large",
            hint="send fewer rows per step",
        )
    _check_legal(msg_type, flags, stream, n_tok, dtype, codec, raw_len, wire_len)
    body = view[HEADER_BYTES:]
    actual = zlib.crc32(body)
    if actual != crc:
        message = f"{msg_type.name}: body crc32 is {actual:#010x}, header says {crc:#010x}"
        raise FrameError(message, code="bad_crc")
    return Frame(msg_type, stream, epoch, seq, pos, n_tok, flags, dtype, codec, raw_len, bytes(body))


def _check_legal(
    msg_type: MsgType,
    flags: Flag,
    stream: int,
    n_tok: int,
    dtype: Dtype,
    codec: Codec,
    raw_len: int,
    wire_len: int,
) -> None:
    """The combination against the table; the same check for what we send and what we take."""
    name = msg_type.name
    rule = _RULES[msg_type]
    if int(flags) & ~int(rule.flags):
        raise FrameError(f"{name}: flags {int(flags):#06x}, allowed {int(rule.flags):#06x}", code="bad_flags")
    if rule.stream is not _Stream.EITHER and (stream != 0) != (rule.stream is _Stream.SESSION):
        wanted = "a session's (1 or more)" if rule.stream is _Stream.SESSION else "0"
        raise FrameError(f"{name}: on stream {stream}, belongs on {wanted}", code="bad_stream")
    if dtype not in rule.dtypes:
        allowed = ", ".join(sorted(d.name for d in rule.dtypes))
        raise FrameError(f"{name}: body dtype {dtype.name}, allowed {allowed}", code="bad_dtype")
    if codec is Codec.NONE:
        if raw_len != wire_len:
            raise FrameError(
                f"{name}: uncompressed body with raw_len {raw_len} but wire_len {wire_len}", code="bad_length"
            )
    elif dtype not in _ROWS:
        message = f"{name}: dtype {dtype.name} travels uncompressed, got {codec.name}"
        raise FrameError(message, code="bad_codec")
    elif wire_len >= raw_len:
        raise FrameError(
            f"{name}: compressed body of {wire_len} bytes is not smaller than raw_len {raw_len}",
            code="bad_length",
            hint="send such a body uncompressed",
        )
    if dtype in _WITHOUT_ROWS:
        if n_tok != 0:
            raise FrameError(f"{name}: {n_tok} rows in a body of dtype {dtype.name}", code="bad_rows")
        if dtype is not Dtype.PADDING and (raw_len == 0) != (dtype is Dtype.NONE):
            raise FrameError(f"{name}: body of {raw_len} bytes with dtype {dtype.name}", code="bad_length")
        return
    if n_tok == 0:
        raise FrameError(f"{name}: no rows in a body of dtype {dtype.name}", code="bad_rows")
    prefix = n_tok * DRAFT_ID_BYTES if msg_type is MsgType.VERIFY else 0
    row_len = raw_len - prefix
    unit = n_tok * _UNIT[dtype]
    ids_only = dtype is Dtype.TOKEN_IDS
    if row_len < unit or row_len % unit or (ids_only and row_len != unit) or wire_len < prefix:
        raise FrameError(
            f"{name}: {raw_len} bytes don't hold {n_tok} rows of {dtype.name}, a row being "
            f"{'' if ids_only else 'a multiple of '}{_UNIT[dtype]} bytes",
            code="bad_length",
        )


_E = TypeVar("_E", bound=IntEnum)


def _enum(kind: type[_E], value: int, what: str) -> _E:
    try:
        return kind(value)
    except ValueError:
        raise FrameError(f"unknown {what} {value}", code=f"unknown_{what.replace(' ', '_')}") from None


_M = TypeVar("_M", bound=BaseModel)

# A peer may send thousands of wrong fields; a message names the first few.
_MAX_NAMED_FIELDS: Final = 4
_MAX_CHARS: Final = 80


def json_frame(
    msg_type: MsgType, model: BaseModel, *, stream: int = 0, epoch: int = 0, seq: int = 0
) -> Frame:
    """A control message: `model` as compact JSON."""
    body = model.model_dump_json().encode()
    return Frame(msg_type, stream, epoch, seq, dtype=Dtype.JSON, raw_len=len(body), body=body)


def parse_json(frame: Frame, model_type: type[_M]) -> _M:
    """The body as a `model_type`; FrameError names the wrong fields, and never quotes their values."""
    if frame.dtype is not Dtype.JSON:
        raise FrameError(f"{frame.type.name}: body dtype {frame.dtype.name}, expected JSON", code="bad_dtype")
    try:
        return model_type.model_validate_json(frame.body)
    except ValidationError as error:
        # Values stay out: they may be a prompt or a key. Field names come from the peer: escaped and cut.
        found = error.errors(include_url=False, include_context=False, include_input=False)
        named = [f"{_field_name(e['loc'])}: {e['msg'][:_MAX_CHARS]}" for e in found[:_MAX_NAMED_FIELDS]]
        if len(found) > _MAX_NAMED_FIELDS:
            named.append(f"{len(found) - _MAX_NAMED_FIELDS} more")
        raise FrameError(f"{frame.type.name}: {'; '.join(named)}", code="bad_message") from None


def _field_name(loc: tuple[int | str, ...]) -> str:
    return ascii(".".join(map(str, loc)))[1:-1][:_MAX_CHARS] or "body"

"""Cases of framing, as messages. What happens below messages (fragments, pings, bytes) is in peers.py."""

from __future__ import annotations

from functools import partial

from isthmus.protocol.frames import HEADER_BYTES, Dtype, Flag, MsgType
from tests.attacks.bad_inputs import Attack, Stage
from tests.attacks.messages import NEXT_STEP, PING, control, message, raw_rows, step

_fatal = partial(Attack, fatal=True)
_text = partial(_fatal, "text frame", code="text_message")
_cut = partial(_fatal, "header cut at every byte")
_unknown = partial(_fatal, "unknown type", code="unknown_message_type")
_flags = partial(_fatal, "reserved flags set", code="bad_flags")
_length = partial(_fatal, "wire_len ≠ actual", code="bad_length")

FRAMING_ATTACKS: tuple[Attack, ...] = (
    _text(name="a word", messages=("hello",)),
    _text(name="before HELLO", messages=('{"type":"HELLO"}',), stage=Stage.CONNECTED),
    _text(name="no characters", messages=("",), stage=Stage.OPENED),
    _text(name="a megabyte", messages=("x" * 2**20,)),
    _fatal("empty frame", "in a session", (b"",), "short_frame"),
    _fatal("empty frame", "before HELLO", (b"",), "short_frame", Stage.CONNECTED),
    *(
        _cut(name=f"{n} of {HEADER_BYTES} bytes", messages=(NEXT_STEP[:n],), code="short_frame")
        for n in range(1, HEADER_BYTES)
    ),
    *(
        _cut(name=f"{n} bytes into the body", messages=(NEXT_STEP[: HEADER_BYTES + n],), code="bad_length")
        for n in (0, 1, 128, 255)
    ),
    *(
        _fatal("wrong magic", repr(magic), (message(MsgType.PING, stream=0, magic=magic),), "bad_magic")
        for magic in (b"\0\0", b"SI", b"is", b"GE")
    ),
    *(
        _fatal("future version", f"version {n}", (message(MsgType.PING, stream=0, version=n),), "bad_version")
        for n in (0, 2, 255)
    ),
    *(_unknown(name=f"type {n}", messages=(message(n, stream=0),)) for n in (0, 25, 127, 255)),
    _fatal(
        "unknown type",
        "a type that only the cloud sends",
        (control(MsgType.STATUS, '{"load":{}}', stream=0, epoch=0),),
        "unexpected_message",
    ),
    *(
        _flags(name=f"{1 << bit:#06x} on STEP", messages=(step(raw_rows(1), 1, flags=1 << bit),))
        for bit in range(3, 16)
    ),
    *(
        _flags(name=f"{flag.name} on PING", messages=(message(MsgType.PING, stream=0, flags=flag),))
        for flag in (Flag.TRUNCATE, Flag.FINAL, Flag.ALL_ROWS)
    ),
    *(
        _length(name=f"{said} said, 256 follow", messages=(step(raw_rows(1), 1, wire_len=said),))
        for said in (0, 255, 257, 2**31, 2**32 - 1)
    ),
    _length(name="bytes after the body", messages=(NEXT_STEP + b"\0",)),
    _length(name="a body on PING", messages=(PING + b"x",)),
    _fatal(
        "wire_len ≠ actual",
        "padding that claims rows",
        (message(MsgType.PROBE, b"x", stream=0, n_tok=1, dtype=Dtype.PADDING),),
        "bad_rows",
    ),
    _length(name="JSON of no bytes", messages=(message(MsgType.CANCEL, dtype=Dtype.JSON),)),
    _fatal("wire_len ≠ actual", "a wrong checksum", (step(raw_rows(1), 1, crc=1),), "bad_crc"),
    _fatal(
        "wire_len ≠ actual",
        "a session's message on stream 0",
        (step(raw_rows(1), 1, stream=0),),
        "bad_stream",
    ),
    _fatal("wire_len ≠ actual", "HELLO in a session", (control(MsgType.HELLO, "{}"),), "bad_stream"),
)

"""What is fuzzed: every decoder, with good inputs to begin from. A target parses, or raises IsthmusError."""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.protocol import messages
from isthmus.protocol.activations import RowCodec, RowFormat, decode_ids
from isthmus.protocol.compression import compress, decompress
from isthmus.protocol.drafts import split_drafts
from isthmus.protocol.frames import (
    HEADER,
    HEADER_BYTES,
    Codec,
    Dtype,
    MsgType,
    decode_frame,
    encode_frame,
    parse_json,
)
from isthmus.protocol.keys import parse_keys
from isthmus.protocol.profiles import DeviceProfile
from isthmus.protocol.resume_tokens import check_token, make_token
from isthmus.protocol.wire_types import Message
from isthmus.relay.script import FaultScript
from isthmus.splitter.gguf_reader import GGUFFile
from isthmus.splitter.graph_check import external_tensors
from isthmus.splitter.manifest import Manifest
from isthmus.splitter.safetensors_reader import SafetensorsFile
from isthmus.splitter.spec import ModelSpec
from tests.attacks.messages import HIDDEN, VOCAB, control, message, raw_rows, rows, step
from tests.protocol.pairing import make_profile
from tests.protocol.transcripts import TRANSCRIPTS
from tests.splitter.packs import tiny_pack, tiny_source

MAX_BODY = 2**16
_FORMATS = (RowFormat.F32, RowFormat.BF16, RowFormat.INT8)


@dataclass(frozen=True)
class Target:
    """`share` of the cases go here; each begins as one of `good`, is mutated and given to `run`."""

    name: str
    share: float
    good: tuple[bytes, ...]
    run: Callable[[bytes], object]


def sealed(data: bytes) -> bytes:
    """The message with the length and the checksum of its body put right, so that what lies behind is met."""
    if len(data) < HEADER_BYTES:
        return data
    body = data[HEADER_BYTES:]
    fields = list(HEADER.unpack_from(data))
    if fields[11] == fields[12]:
        fields[11] = len(body)
    fields[12:] = [len(body), zlib.crc32(body)]
    return HEADER.pack(*fields) + body


FRAMES = tuple(encode_frame(line.frame) for transcript in TRANSCRIPTS for line in transcript.lines)
_MODELS: dict[MsgType, type[Message]] = {
    MsgType.HELLO: messages.Hello, MsgType.WELCOME: messages.Welcome, MsgType.REJECT: messages.Reject,
    MsgType.OPEN: messages.Open, MsgType.OPENED: messages.Opened, MsgType.RESULT: messages.ResultBody,
    MsgType.STREAM: messages.StreamBody, MsgType.CREDIT: messages.Credit, MsgType.CANCEL: messages.Cancel,
    MsgType.CLOSE: messages.Close, MsgType.CLOSED: messages.Closed, MsgType.STATUS: messages.Status,
    MsgType.GOAWAY: messages.GoAway, MsgType.CANARY_RESULT: messages.CanaryResult,
    MsgType.ERROR: messages.ErrorBody, MsgType.RESUME: messages.Resume, MsgType.RESUMED: messages.Resumed,
}  # fmt: skip


_frame = partial(decode_frame, max_body=MAX_BODY)


def _control(data: bytes) -> object:
    frame = _frame(sealed(data))
    return parse_json(frame, _MODELS[frame.type]) if frame.type in _MODELS else None


def _to_text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: parse(data.decode("utf-8", "replace"))


def _keys(text: str) -> object:
    return parse_keys(text.splitlines(), source="keys")


_profile = partial(DeviceProfile.from_json, name="profile")

_OUTLIERS = (3, 17)
_CODECS = {
    RowFormat.F32: RowCodec(RowFormat.F32, HIDDEN),
    RowFormat.BF16: RowCodec(RowFormat.BF16, HIDDEN),
    RowFormat.INT8: RowCodec(RowFormat.INT8, HIDDEN, _OUTLIERS),
}


def _rows(data: bytes) -> object:
    """The first byte says which codec and how many rows are claimed; the rest is the body."""
    if not data:
        return None
    which, n_tok = data[0] % 3, 1 + (data[0] >> 2) % 4
    codec = _CODECS[_FORMATS[which]]
    body = data[1:]
    packed = body[:4] == b"\x28\xb5\x2f\xfd"
    decoded = codec.decode(
        body,
        n_tok=n_tok,
        dtype=codec.dtype,
        codec=Codec.ZSTD if packed else Codec.NONE,
        raw_len=n_tok * codec.row_bytes if packed else len(body),
        max_raw=MAX_BODY,
    )
    assert decoded.shape == (n_tok, HIDDEN)
    assert np.isfinite(decoded).all()
    return decoded


def _good_rows() -> tuple[bytes, ...]:
    found = []
    for which, name in enumerate(_FORMATS):
        found += [_first_byte(which, n) + _CODECS[name].encode(rows(n)).body for n in (1, 4)]
    return tuple(found)


def _first_byte(which: int, n: int) -> bytes:
    return bytes([next(b for b in range(256) if b % 3 == which and 1 + (b >> 2) % 4 == n)])


def _decompress(data: bytes) -> object:
    content = decompress(data, expected=1024)
    assert len(content) == 1024
    return content


_VERIFY = message(MsgType.VERIFY, b"\1\0\0\0\2\0\0\0" + raw_rows(2), seq=1, n_tok=2, dtype=Dtype.F32)


def _drafts(data: bytes) -> object:
    frame = _frame(sealed(data))
    if frame.type is not MsgType.VERIFY:
        return None
    ids, rest = split_drafts(frame, VOCAB)
    assert len(ids) == frame.n_tok == rest.n_tok
    return ids


def _ids(data: bytes) -> object:
    ids = decode_ids(data, n_tok=3, vocab_size=VOCAB)
    assert all(0 <= token < VOCAB for token in ids)
    return ids


class _OnDisk:
    """A parser of files, fed with bytes."""

    def __init__(self, name: str, parse: Callable[[Path], Any]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="isthmus-fuzz-")
        self._path = Path(self._folder.name) / name
        self._parse = parse

    def __call__(self, data: bytes) -> object:
        # A new file each time: the old one may still be mapped, and a mapped file must not be cut short.
        self._path.unlink(missing_ok=True)
        self._path.write_bytes(data)
        file = self._parse(self._path)
        try:
            assert all(tensor.offset + tensor.nbytes <= len(data) for tensor in file.tensors.values())
        finally:
            file.close()
        return None


def _small_gguf() -> bytes:
    from tests.splitter.test_splitter_gguf import gguf_bytes, text

    keys = [
        text("general.alignment") + (4).to_bytes(4, "little") + (32).to_bytes(4, "little"),
        text("a") + (8).to_bytes(4, "little") + text("word"),
        text("b")
        + (9).to_bytes(4, "little")
        + (8).to_bytes(4, "little")
        + (2).to_bytes(8, "little")
        + text("x")
        + text("y"),
        text("c")
        + (9).to_bytes(4, "little")
        + (5).to_bytes(4, "little")
        + (2).to_bytes(8, "little")
        + bytes(8),
    ]
    return gguf_bytes([("w", [32, 2], 8, 0), ("v", [16], 0, 96)], bytes(160), keys=keys)


def _small_safetensors() -> bytes:
    header = {
        "w": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
        "v": {"dtype": "BF16", "shape": [4], "data_offsets": [32, 40]},
        "__metadata__": {"format": "pt"},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(40)


def _spec(data: bytes) -> object:
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return ModelSpec.from_hf(config) if isinstance(config, dict) else None


_SECRET = b"s" * 32
_TOKEN_OF = {"tenant": "alice", "session_id": "0" * 32, "model": "m"}
_TOKEN = make_token(_SECRET, **_TOKEN_OF, expires_s=100.0)


def _token(data: bytes) -> object:
    text = data.decode("utf-8", "replace")
    check_token(_SECRET, text, **_TOKEN_OF, now_s=1.0)
    assert text == _TOKEN
    return None


SCRIPT = b"""# all faults
after 2.5: stall 1.5
every 3..8: one of cut, stall 1.5, half-open
at byte 5000 up: cut
at message 7 down of connection 2: slice 1
after 0: refuse 2
"""
KEYS = b"# keys\nalice:one\nbob : two\ncarol:sha256:" + b"0" * 64 + b"\n"


def decoder_targets() -> tuple[Target, ...]:
    """All but the two whole connections. Builds a tiny pack the first time."""
    pack, source = tiny_pack(), tiny_source()
    controls = tuple(frame for frame in FRAMES if HEADER.unpack_from(frame)[8] == Dtype.JSON)
    resume = (
        '{"session_id":"%s","resume_token":"t","attempt":1,"next_index":0,"last_seq":1,"rows":0,"digest":""}'
    )
    more = (
        control(MsgType.RESUME, resume % ("0" * 32)),
        control(MsgType.ERROR, '{"kind":"cloud","code":"c","message":"m","retry_after_s":1.5}'),
        control(MsgType.REJECT, '{"code":"c","message":"m"}', stream=0),
    )
    return (
        Target("decode_frame", 0.2, (*FRAMES, step(raw_rows(2), 2)), _frame),
        Target("decode_frame, sealed", 0.1, FRAMES, lambda data: _frame(sealed(data))),
        Target("parse_json", 0.2, (*controls, *more), _control),
        Target("RowCodec.decode", 0.1, _good_rows(), _rows),
        Target("decompress", 0.06, (compress(raw_rows(1) * 4), compress(bytes(1024))), _decompress),
        Target("split_drafts", 0.03, (_VERIFY,), _drafts),
        Target("decode_ids", 0.03, (b"\1\0\0\0\2\0\0\0\3\0\0\0",), _ids),
        Target("GGUF", 0.04, (_small_gguf(),), _OnDisk("x.gguf", GGUFFile)),
        Target("safetensors", 0.04, (_small_safetensors(),), _OnDisk("x.safetensors", SafetensorsFile)),
        Target("config.json", 0.02, ((source / "config.json").read_bytes(),), _spec),
        Target("pack manifest", 0.01, ((pack / "manifest.json").read_bytes(),), Manifest.from_bytes),
        Target("ONNX graph", 0.02, ((pack / "blocks/layer.1.onnx").read_bytes(),), external_tensors),
        Target("device profile", 0.02, (make_profile().to_json().encode(),), _profile),
        Target("key file", 0.03, (KEYS,), _to_text(_keys)),
        Target("fault script", 0.02, (SCRIPT,), _to_text(FaultScript.parse)),
        Target("resume token", 0.02, (_TOKEN.encode(),), _token),
    )

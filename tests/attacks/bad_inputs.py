"""The list of bad inputs, item by item, and what a case is. The tables beside it have one or more of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from isthmus.protocol.frames import MsgType

FRAMING = (
    "text frame", "empty frame", "header cut at every byte", "wrong magic", "future version", "unknown type",
    "reserved flags set", "wire_len ≠ actual", "disconnect in mid-fragment", "one byte per write",
    "10⁵ fragments", "ping flood", "a peer that never reads",
)  # fmt: skip
TENSOR = (
    "raw_len 2³²−1", "n_tok 0", "n_tok > limit", "unknown dtype or codec", "wrong hidden size",
    "n_tok × hidden × size overflow", "NaN/Inf rows", "zero, NaN or subnormal scales",
    "outlier index out of range or repeated",
)  # fmt: skip
ZSTD = (
    "bomb", "no content size", "forged 1 TiB size", "window_log 27", "two frames", "trailing byte",
    "skippable frame", "dictionary id", "flipped bit",
)  # fmt: skip
SESSION = (
    "STEP before HELLO", "HELLO twice", "duplicate seq with a different payload", "gap", "seq wrap",
    "pos ≠ kv_len", "TRUNCATE past the end", "stale epoch", "RESUME by another tenant, expired, tampered",
    "two RESUMEs at once", "RESUME during compute", "CANCEL racing RESULT",
    "SIGKILL between KV append and RESULT", "key revoked in mid-stream", "clock jump",
)  # fmt: skip
MODEL_FILES = (
    "GGUF or safetensors cut short", "header lying about sizes", "overlapping tensors", "unknown quant type",
    "unknown architecture", "tensor missing", "shape ≠ config", "disk full while building",
    "two builds at once", "pack with a flipped byte", "pack of another version",
    "chat template with lipsum.__globals__ or range(10**9)",
    "same identity with other weights whose canary disagrees", "ONNX external data path outside the pack",
)  # fmt: skip


class Stage(StrEnum):
    """How far the conversation has gone when the attack begins."""

    CONNECTED = "connected"  # the websocket is up, nothing was said
    GREETED = "greeted"  # HELLO and WELCOME
    OPENED = "opened"  # a session on stream 1, no step yet
    STEPPED = "stepped"  # and one step of two rows, without output


class Ours(StrEnum):
    """Messages the corpus cannot hold, because they depend on the model served."""

    HELLO = "the HELLO that suits the other side"


@dataclass(frozen=True)
class Attack:
    """Messages that must be answered by one of type `reply` with `code`, and nothing worse.

    `fatal`: the connection ends with it (the websocket with close code 1008), else it goes on.
    `opening`: fields of OPEN other than the usual.
    """

    item: str
    name: str
    messages: tuple[bytes | str, ...]
    code: str = ""
    stage: Stage = Stage.STEPPED
    fatal: bool = False
    reply: MsgType = MsgType.ERROR
    opening: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.item}: {self.name}"

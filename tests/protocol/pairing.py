"""Both ends of a connection paired in memory, and the small model they talk about; shared by the tests."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.activations import Encoded, RowCodec, RowFormat
from isthmus.protocol.cloud_connection import CanaryCache, CloudConnection, ServerInfo
from isthmus.protocol.edge_connection import EdgeConnection
from isthmus.protocol.edge_session import EdgeSession
from isthmus.protocol.errors import RejectedError
from isthmus.protocol.events import CloudEvent, EdgeEvent
from isthmus.protocol.frames import Frame, MsgType, decode_frame, encode_frame
from isthmus.protocol.identity import ModelIdentity
from isthmus.protocol.limits import Limits, TenantUsage
from isthmus.protocol.messages import Hello, Open
from isthmus.protocol.prefix import PrefixOffer
from isthmus.protocol.profiles import FIGURES, DeviceProfile
from isthmus.protocol.sampling import SamplingParams

LAYERS, HIDDEN, VOCAB, CONTEXT = 4, 8, 100, 512
IDENTITY = ModelIdentity(
    architecture={"hidden": HIDDEN}, tokenizer_hash="t", base_name="tiny", weights_hash="w"
)
OTHER_WEIGHTS = IDENTITY.model_copy(update={"weights_hash": "w2"})
INFO = ServerInfo(
    identity=IDENTITY,
    cloud_precision="fp32",
    num_layers=LAYERS,
    hidden=HIDDEN,
    vocab_size=VOCAB,
    context_length=CONTEXT,
    row_formats=("f32", "bf16", "int8o"),
    kv_bytes_per_token_layer=16,
)
HELLO = Hello(versions=(1,), identity=IDENTITY, edge_precision="fp32", row_formats=("f32", "bf16", "int8o"))
LIMITS = Limits()
SESSION_ID = "0123456789abcdef" * 2


def make_open(**changes: Any) -> Open:
    """A legal OPEN: split 1 in the prefix shape, 4 prompt tokens, up to 8 new ones."""
    values: dict[str, Any] = {
        "split": 1,
        "shape": "prefix",
        "row_format": "f32",
        "max_tokens": 8,
        "prompt_tokens": 4,
        "max_context": 64,
        "sampling": SamplingParams(temperature=0.0),
    }
    return Open(**(values | changes))


def offer(*lengths: int) -> PrefixOffer:
    return PrefixOffer(entries=[(n, f"{n:032x}") for n in lengths])


def rows(n: int, start: int = 0) -> NDArray[np.float32]:
    """f32[n, HIDDEN] whose values tell their position."""
    return (np.arange(start, start + n, dtype=np.float32)[:, None] + np.zeros(HIDDEN, np.float32)).copy()


def encoded(n: int, start: int = 0, fmt: RowFormat = RowFormat.F32) -> Encoded:
    return RowCodec(fmt, HIDDEN).encode(rows(n, start))


def make_profile(**changes: Any) -> DeviceProfile:
    """Of a cloud with four layers, all of it measured, but for what is said otherwise."""
    values: dict[str, Any] = {
        "side": "cloud",
        "device": "a processor",
        "provider": "torch",
        "threads": 2,
        "model": "tiny",
        "precision": "fp32",
        "num_layers": 4,
        "hidden": 8,
        "dated": "2026-11-22",
        "prefill": ((1.0, 0.001), (128.0, 0.01)),
        "prefill_context_s": 1e-7,
        "decode": ((0.0, 0.001), (512.0, 0.002)),
        "layer_share": (0.9, 1.0, 1.0, 1.1),
        "step_s": 0.0005,
        "embed_row_s": 1e-6,
        "head_s": 0.001,
        "codec_row_s": 1e-5,
        "load_s": 0.1,
        "layer_bytes": 1000,
        "embed_bytes": 2000,
        "head_bytes": 0,
        "scratch_bytes": 500,
        "labels": dict.fromkeys(FIGURES, "measured"),
    }
    return DeviceProfile(**{**values, **changes})


@dataclass
class Pair:
    """An EdgeConnection and a CloudConnection; `pump` carries everything both ways until it is quiet."""

    limits: Limits = LIMITS
    hello: Hello = HELLO
    info: ServerInfo = INFO
    usage: TenantUsage | None = None
    canaries: CanaryCache | None = None
    refusal: RejectedError | None = None
    now: float = 0.0
    edge_events: list[EdgeEvent] = field(default_factory=list)
    cloud_events: list[CloudEvent] = field(default_factory=list)
    sent_up: list[Frame] = field(default_factory=list)
    sent_down: list[Frame] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.edge = EdgeConnection(self.hello, self.limits)
        self.cloud = CloudConnection(
            self.info,
            self.limits,
            tenant="tenant",
            now=self.now,
            usage=self.usage,
            canaries=self.canaries,
            refusal=self.refusal,
        )

    def up(self) -> list[CloudEvent]:
        """Carry what the edge has to send; the events it made."""
        events: list[CloudEvent] = []
        for message in self.edge.data_to_send():
            self.sent_up.append(parse(message))
            events += self.cloud.receive(message, self.now)
        self.cloud_events += events
        return events

    def down(self) -> list[EdgeEvent]:
        events: list[EdgeEvent] = []
        for message in self.cloud.data_to_send():
            self.sent_down.append(parse(message))
            events += self.edge.receive(message, self.now)
        self.edge_events += events
        return events

    def pump(self) -> list[CloudEvent | EdgeEvent]:
        events: list[CloudEvent | EdgeEvent] = []
        while self.edge.has_data or self.cloud.has_data:
            events += self.up()
            events += self.down()
        return events

    def inject_up(self, frame: Frame, **changes: Any) -> list[CloudEvent]:
        """A frame the edge would not send, as if it had."""
        return self.cloud.receive(encode_frame(replace(frame, **changes)), self.now)

    def inject_down(self, frame: Frame, **changes: Any) -> list[EdgeEvent]:
        return self.edge.receive(encode_frame(replace(frame, **changes)), self.now)


def parse(message: bytes) -> Frame:
    return decode_frame(message, max_body=LIMITS.max_message_bytes)


def connected(**settings: Any) -> Pair:
    """A pair after the handshake, with empty event lists."""
    pair = Pair(**settings)
    pair.edge.start(pair.now)
    pair.pump()
    assert pair.edge.welcome is not None
    pair.edge_events.clear()
    pair.cloud_events.clear()
    pair.sent_up.clear()
    pair.sent_down.clear()
    return pair


def opened(pair: Pair, *, cached_rows: int = 0, **changes: Any) -> EdgeSession:
    """A session that both ends have opened, its events cleared."""
    session = pair.edge.open(make_open(**changes))
    pair.up()
    pair.cloud.opened(session.stream, session_id=SESSION_ID, cached_rows=cached_rows)
    pair.down()
    assert session.opened is not None
    pair.edge_events.clear()
    pair.cloud_events.clear()
    pair.sent_up.clear()
    pair.sent_down.clear()
    return session


def last_step(pair: Pair) -> Frame:
    return [f for f in pair.sent_up if f.type is MsgType.STEP][-1]

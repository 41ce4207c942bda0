"""Attacks against the pure state machine of the cloud: no socket, and an engine of a few lines."""

from __future__ import annotations

from collections.abc import Iterator

from isthmus.protocol.activations import decode_ids
from isthmus.protocol.admission import row_codec
from isthmus.protocol.cloud_connection import CloudConnection, ServerInfo
from isthmus.protocol.errors import IsthmusError, NotFoundError
from isthmus.protocol.events import (
    CancelRequested,
    CloseRequested,
    CloudEvent,
    ConnectionFailed,
    ResumeRequested,
    SessionOpenRequested,
    StepReceived,
)
from isthmus.protocol.frames import Frame, MsgType, decode_frame, encode_frame, json_frame
from isthmus.protocol.identity import ModelIdentity
from isthmus.protocol.limits import Limits, TenantUsage
from isthmus.protocol.messages import Hello
from tests.attacks.bad_inputs import Attack, Ours, Stage
from tests.attacks.messages import CONTEXT, FIRST_STEP, HIDDEN, LAYERS, VOCAB, open_message

LIMITS = Limits()
IDENTITY = ModelIdentity(
    architecture={"hidden": HIDDEN}, tokenizer_hash="t", base_name="tiny", weights_hash="w"
)
INFO = ServerInfo(
    identity=IDENTITY,
    cloud_precision="fp32",
    num_layers=LAYERS,
    hidden=HIDDEN,
    vocab_size=VOCAB,
    context_length=CONTEXT,
    row_formats=("f32", "bf16", "int8o"),
    kv_bytes_per_token_layer=256,
)


def hello_message(identity: ModelIdentity) -> bytes:
    hello = Hello(
        versions=(1,), identity=identity, edge_precision="fp32", row_formats=("f32", "bf16", "int8o")
    )
    return encode_frame(json_frame(MsgType.HELLO, hello))


def preamble(attack: Attack, hello: bytes) -> list[bytes]:
    """What an honest edge says up to the attack's stage."""
    said = [hello, open_message(**attack.opening), FIRST_STEP]
    return said[: list(Stage).index(attack.stage)]


class PureCloud:
    """A CloudConnection whose engine takes all rows and draws token 7."""

    def __init__(self) -> None:
        self.usage = TenantUsage.from_limits(LIMITS)
        self.core = CloudConnection(INFO, LIMITS, tenant="tenant", now=0.0, usage=self.usage)
        self.hello = hello_message(IDENTITY)
        self.failed = False

    def say(self, data: bytes | str) -> list[Frame]:
        """Deliver one message; what the cloud answers."""
        message = self.hello if data == Ours.HELLO else data
        for event in self.core.receive(message, 0.0):
            self._react(event)
        return [decode_frame(out, max_body=2**24) for out in self.core.data_to_send()]

    def play(self, attack: Attack) -> Iterator[Frame]:
        for data in preamble(attack, self.hello):
            for frame in self.say(data):
                assert frame.type is not MsgType.ERROR, frame.body
        for message in attack.messages:
            yield from self.say(message)

    def _react(self, event: CloudEvent) -> None:
        match event:
            case SessionOpenRequested(stream=stream):
                self.core.opened(stream, session_id="0" * 32)
            case StepReceived():
                self._compute(event)
            case CancelRequested(stream=stream) | CloseRequested(stream=stream):
                self.core.closed(stream)
            case ResumeRequested(stream=stream):
                unknown = NotFoundError("no such session is kept here", code="unknown_session")
                self.core.refuse(stream, unknown)
            case ConnectionFailed():
                self.failed = True

    def _compute(self, step: StepReceived) -> None:
        request = self.core.sessions[step.stream].open
        try:
            if request.split:
                row_codec(request, HIDDEN).decode_frame(step.frame, max_raw=LIMITS.max_message_bytes)
            else:
                decode_ids(step.frame.body, n_tok=step.n_tok, vocab_size=VOCAB)
        except IsthmusError as error:
            self.core.fail(step.stream, error)
            return
        if step.final:
            self.core.result_tokens(step.stream, [7], kv_len=step.pos + step.n_tok)

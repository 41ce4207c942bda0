"""A cloud that plays the corpus to an edge, and what the edge has to say beforehand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from isthmus.edge.link import SUBPROTOCOL
from isthmus.protocol.activations import Encoded, RowCodec, RowFormat
from isthmus.protocol.frames import MsgType, decode_frame, encode_frame, json_frame
from isthmus.protocol.handshake import ServerInfo, answer_hello
from isthmus.protocol.identity import ModelIdentity
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import Hello, Load, Open
from tests.attacks.bad_inputs import Attack, Stage
from tests.attacks.corpus_edge import HIDDEN, OPENED, VOCAB
from tests.attacks.messages import CONTEXT, LAYERS, control, opening

IDENTITY = ModelIdentity(
    architecture={"hidden": HIDDEN}, tokenizer_hash="t", base_name="tiny", weights_hash="w"
)
HELLO = Hello(versions=(1,), identity=IDENTITY, edge_precision="fp32", row_formats=("f32", "bf16", "int8o"))
INFO = ServerInfo(
    identity=IDENTITY,
    cloud_precision="fp32",
    num_layers=LAYERS,
    hidden=HIDDEN,
    vocab_size=VOCAB,
    context_length=CONTEXT,
    row_formats=("f32",),
    kv_bytes_per_token_layer=256,
)
LIMITS = Limits(heartbeat_s=0.5)
CODEC = RowCodec(RowFormat.F32, HIDDEN)


def welcome(info: ServerInfo = INFO) -> bytes:
    hello = HELLO.model_copy(update={"identity": info.identity})
    return encode_frame(json_frame(MsgType.WELCOME, answer_hello(hello, info, Limits(), Load(), ())))


def opened(stream: int = 1) -> bytes:
    return control(MsgType.OPENED, OPENED, stream=stream)


def asked(attack: Attack) -> Open:
    """The OPEN that the attack is an answer to."""
    values: dict[str, Any] = {"prompt_tokens": 4, **attack.opening}
    return opening(**values)


def first_rows(request: Open) -> tuple[Encoded, int]:
    """The prompt's rows and how many they are."""
    n = request.prompt_tokens
    return CODEC.encode(np.zeros((n, HIDDEN), np.float32)), n


def honest_messages(attack: Attack, info: ServerInfo = INFO) -> list[bytes]:
    """What an honest cloud says up to the attack's stage."""
    if attack.stage is Stage.CONNECTED:
        return []
    return [welcome(info)] if attack.stage is Stage.GREETED else [welcome(info), opened()]


@contextlib.asynccontextmanager
async def hostile_cloud(attack: Attack, info: ServerInfo = INFO) -> AsyncIterator[str]:
    """A websocket server that serves `info` and is honest up to the attack's stage; its URL."""

    async def hear(socket: ServerConnection, kind: MsgType) -> None:
        while decode_frame(await socket.recv(), max_body=2**24).type is not kind:
            pass

    async def handle(socket: ServerConnection) -> None:
        honest = honest_messages(attack, info)
        with contextlib.suppress(ConnectionClosed):
            await hear(socket, MsgType.HELLO)
            for heard, message in zip((MsgType.OPEN, MsgType.STEP), honest, strict=False):
                await socket.send(message)
                if heard is MsgType.OPEN or attack.stage is Stage.STEPPED:
                    await hear(socket, heard)
            for data in attack.messages:
                await socket.send(data)
            async for _ in socket:
                pass

    async with serve(handle, "127.0.0.1", 0, subprotocols=[SUBPROTOCOL], close_timeout=1) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        yield f"ws://127.0.0.1:{port}"
        for connection in list(server.connections):
            connection.transport.abort()
        await asyncio.sleep(0)

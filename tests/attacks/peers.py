"""Peers that misbehave below or around the messages: what they do, step by step."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame as WebsocketFrame
from websockets.frames import Opcode

from isthmus.cloud.websocket import MAX_FRAGMENTS, MAX_PINGS
from isthmus.protocol.activations import RowCodec, RowFormat
from isthmus.protocol.frames import Dtype, MsgType, parse_json
from isthmus.protocol.identity import canary_ids
from isthmus.protocol.messages import CanaryResult, ErrorBody
from tests.attacks.live_cloud import ANSWER_S, Target, next_frame
from tests.attacks.messages import HIDDEN, NEXT_STEP, PING, VOCAB, message, open_message
from tests.attacks.sansio import hello_message

POLICY, TOO_BIG = 1008, 1009
# Whoever goes on writing to a closed socket gets a reset, which may overtake the close frame.
RESET = 1006


@dataclass(frozen=True)
class Peer:
    """One way to misbehave. `play` asserts what the cloud answers."""

    item: str
    name: str
    play: Callable[[Target], Awaitable[None]]

    def __str__(self) -> str:
        return f"{self.item}: {self.name}"


def _part(data: bytes, *, opcode: Opcode = Opcode.BINARY, fin: bool = True) -> bytes:
    """A websocket frame as a client sends it."""
    return WebsocketFrame(opcode, data, fin).serialize(mask=True, extensions=[])


async def _greeted(socket: ClientConnection, target: Target) -> None:
    await socket.send(hello_message(target.identity))
    await next_frame(socket, MsgType.WELCOME)


async def _still_served(socket: ClientConnection) -> None:
    await socket.send(PING)
    await next_frame(socket, MsgType.PONG)


async def _cut_off(socket: ClientConnection, *codes: int) -> None:
    """The cloud ends the connection with one of these codes."""
    async with asyncio.timeout(ANSWER_S):
        with contextlib.suppress(ConnectionClosed):
            async for _ in socket:
                pass
        await socket.wait_closed()
    assert socket.close_code in codes


async def vanish_in_mid_fragment(target: Target) -> None:
    async with target.socket() as socket:
        await _greeted(socket, target)
        socket.transport.write(_part(NEXT_STEP[:100], fin=False) + _part(NEXT_STEP)[:20])
        await asyncio.sleep(0.05)
        socket.transport.abort()


async def one_byte_per_write(target: Target) -> None:
    async with target.socket() as socket:
        for data in (hello_message(target.identity), PING):
            for byte in _part(data):
                socket.transport.write(bytes([byte]))
                await asyncio.sleep(0)
        await next_frame(socket, MsgType.WELCOME)
        await next_frame(socket, MsgType.PONG)


async def a_message_in_few_fragments(target: Target) -> None:
    """Fragments as such are allowed: the limit is what keeps them from being an attack."""
    async with target.socket() as socket:
        await _greeted(socket, target)
        await socket.send([PING[:10], b"", PING[10:20], PING[20:]])
        await next_frame(socket, MsgType.PONG)


async def fragments(target: Target, content: bytes) -> None:
    async with target.socket() as socket:
        await _greeted(socket, target)
        socket.transport.write(_part(content, fin=False))
        some = _part(content, opcode=Opcode.CONT, fin=False) * 1000
        for _ in range(100):
            if socket.transport.is_closing():
                break
            socket.transport.write(some)
            await asyncio.sleep(0)
        await _cut_off(socket, POLICY, RESET)


async def one_fragment_too_many(target: Target) -> None:
    async with target.socket() as socket:
        await _greeted(socket, target)
        some = _part(b"", opcode=Opcode.CONT, fin=False) * MAX_FRAGMENTS
        socket.transport.write(_part(b"", fin=False) + some)
        await _cut_off(socket, POLICY)


async def a_message_without_end(target: Target) -> None:
    """Parts of a megabyte that never end: refused once they are more than a message may be."""
    async with target.socket() as socket:
        await _greeted(socket, target)
        socket.transport.write(_part(bytes(2**20), fin=False))
        for _ in range(20):
            if socket.transport.is_closing():
                break
            socket.transport.write(_part(bytes(2**20), opcode=Opcode.CONT, fin=False))
            await asyncio.sleep(0.01)
        await _cut_off(socket, TOO_BIG, RESET)


async def websocket_pings(target: Target) -> None:
    async with target.socket() as socket:
        await _greeted(socket, target)
        for _ in range(100):
            if socket.transport.is_closing():
                break
            socket.transport.write(_part(b"", opcode=Opcode.PING) * 100)
            await asyncio.sleep(0)
        await _cut_off(socket, POLICY, RESET)


async def one_ping_too_many(target: Target) -> None:
    async with target.socket() as socket:
        await _greeted(socket, target)
        socket.transport.write(_part(b"", opcode=Opcode.PING) * (MAX_PINGS + 1))
        await _cut_off(socket, POLICY)


async def session_pings(target: Target) -> None:
    async with target.socket() as socket:
        await _greeted(socket, target)
        for _ in range(10_000):
            await socket.send(PING)
        await _still_served(socket)


async def never_read(target: Target) -> None:
    """Makes the cloud answer 20,000 times, and reads none of it."""
    async with target.socket() as socket:
        await _greeted(socket, target)
        socket.transport.pause_reading()
        for _ in range(200):
            socket.transport.write(_part(NEXT_STEP) * 100)
            await asyncio.sleep(0)
        await asyncio.sleep(0.5)
        socket.transport.abort()


async def other_weights(target: Target) -> None:
    """The same model by name, other weights: nothing is served at a split until a canary agrees."""
    claimed = target.identity.model_copy(update={"weights_hash": "f" * 64})
    rows = np.ones((len(canary_ids(VOCAB)), HIDDEN), np.float32)
    canary = RowCodec(RowFormat.F32, HIDDEN, zstd=False).encode(rows).body
    async with target.socket() as socket:
        await socket.send(hello_message(claimed))
        await next_frame(socket, MsgType.WELCOME)
        header = {"stream": 0, "epoch": 0, "seq": 1, "pos": 1, "n_tok": len(rows), "dtype": Dtype.F32}
        await socket.send(message(MsgType.CANARY, canary, **header))  # type: ignore[arg-type]  # numbers
        result = parse_json(await next_frame(socket, MsgType.CANARY_RESULT), CanaryResult)
        assert not result.ok
        assert result.error > result.tolerance
        await socket.send(open_message(split=1))
        error = parse_json(await next_frame(socket, MsgType.ERROR), ErrorBody)
        assert (error.code, error.fatal) == ("canary_required", False)
        await _still_served(socket)


PEERS: tuple[Peer, ...] = (
    Peer("disconnect in mid-fragment", "after half a message", vanish_in_mid_fragment),
    Peer("one byte per write", "HELLO and a ping", one_byte_per_write),
    Peer("10⁵ fragments", "four are fine", a_message_in_few_fragments),
    Peer("10⁵ fragments", "one more than are allowed", one_fragment_too_many),
    Peer("10⁵ fragments", "empty ones", lambda target: fragments(target, b"")),
    Peer("10⁵ fragments", "of a byte", lambda target: fragments(target, b"x")),
    Peer("10⁵ fragments", "a message without end", a_message_without_end),
    Peer("ping flood", "one more than are allowed", one_ping_too_many),
    Peer("ping flood", "10,000 websocket pings", websocket_pings),
    Peer("ping flood", "10,000 PING messages", session_pings),
    Peer("a peer that never reads", "20,000 answers", never_read),
    Peer("same identity with other weights whose canary disagrees", "rows of ones", other_weights),
)

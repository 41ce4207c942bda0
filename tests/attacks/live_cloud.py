"""Attacks against a real `isthmus serve cloud` process, over real sockets and under a memory limit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import psutil
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from isthmus.edge.link import PATH, SUBPROTOCOL
from isthmus.protocol.edge_connection import EdgeConnection
from isthmus.protocol.events import ResultTokens, SessionOpened, StreamTokens, Welcomed
from isthmus.protocol.frames import Frame, MsgType, decode_frame, parse_json
from isthmus.protocol.identity import ModelIdentity
from isthmus.protocol.messages import ErrorBody, Reject
from tests.attacks.bad_inputs import Attack, Ours
from tests.attacks.messages import PING
from tests.attacks.sansio import hello_message, preamble
from tests.cloud.cloud_edges import Edge, hello_of, open_of
from tests.processes import serve

# The address space that the process may grow by once it is up: threads' stacks and arenas take most of it.
HEADROOM_BYTES = 768 * 2**20
ANSWER_S = 30.0


@dataclass
class Target:
    """A cloud under attack: where it is reached, its process, and the identity of the model it serves."""

    url: str
    pid: int
    identity: ModelIdentity
    key: str | None = None

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.pid)

    @property
    def rss(self) -> int:
        """Resident bytes."""
        return int(self.process.memory_info().rss)

    def limit_memory(self) -> None:
        """From here on an allocation of more than HEADROOM_BYTES fails."""
        size = int(self.process.memory_info().vms) + HEADROOM_BYTES
        self.process.rlimit(psutil.RLIMIT_AS, (size, size))

    def socket(self, **options: Any) -> connect:
        """A websocket to it, from which attacks are sent."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else None
        return connect(
            self.url + PATH,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            additional_headers=headers,
            compression=None,
            close_timeout=2,
            max_size=2**24,
            ping_interval=None,
            **options,
        )

    @contextlib.asynccontextmanager
    async def edge(self) -> AsyncIterator[Edge]:
        """An honest edge, welcomed."""
        async with self.socket() as socket:
            edge = Edge(socket, EdgeConnection(hello_of(self.identity)))
            edge.core.start(monotonic())
            await edge.flush()
            edge.reader = asyncio.create_task(edge.read())
            try:
                await edge.wait(Welcomed)
                yield edge
            finally:
                await socket.close()
                await edge.reader

    async def get(self, path: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        async with httpx.AsyncClient() as client:
            return await client.get(self.url.replace("ws://", "http://", 1) + path, headers=headers)

    async def settled(self, *, connections: int = 0) -> dict[str, Any]:
        """Its counts once no session runs and only `connections` are left."""
        async with asyncio.timeout(ANSWER_S):
            while True:
                stats: dict[str, Any] = (await self.get("/v1/stats")).json()
                if stats["sessions"] == 0 and stats["connections"] <= connections:
                    return stats
                await asyncio.sleep(0.02)


@contextlib.contextmanager
def attacked_cloud(
    source: Path, identity: ModelIdentity, *more: str, key: str | None = None
) -> Iterator[Target]:
    """`isthmus serve cloud` of the checkpoint, with its memory limited from then on."""
    settings = ("--precision", "fp32", "--threads", "1", "--kv-mb", "32", "--port", "0")
    with serve("cloud", "--model", str(source), *settings, *more) as service:
        target = Target(service.url, service.process.pid, identity, key)
        target.limit_memory()
        yield target


async def next_frame(socket: ClientConnection, *kinds: MsgType) -> Frame:
    """The next message of one of these types; others are passed over."""
    async with asyncio.timeout(ANSWER_S):
        while True:
            data = await socket.recv()
            frame = decode_frame(data, max_body=2**24)
            if frame.type in kinds:
                return frame


async def speak(socket: ClientConnection, attack: Attack, hello: bytes) -> None:
    """What comes before the attack, each message answered before the next."""
    answers = (MsgType.WELCOME, MsgType.OPENED)
    for index, message in enumerate(preamble(attack, hello)):
        await socket.send(message)
        if index < len(answers):
            await next_frame(socket, answers[index])


async def play(target: Target, attack: Attack) -> None:
    """Attack once; the answer must be the one the case names, and end what it must and no more."""
    hello = hello_message(target.identity)
    async with target.socket() as socket:
        await speak(socket, attack, hello)
        for message in attack.messages:
            await socket.send(hello if message == Ours.HELLO else message)
        frame = await next_frame(socket, attack.reply, MsgType.ERROR, MsgType.REJECT)
        assert frame.type is attack.reply, frame.body
        if frame.type is MsgType.ERROR:
            error = parse_json(frame, ErrorBody)
            assert (error.code, error.fatal) == (attack.code, attack.fatal), error
        elif frame.type is MsgType.REJECT:
            assert parse_json(frame, Reject).code == attack.code
        if attack.fatal:
            await asyncio.wait_for(socket.wait_closed(), ANSWER_S)
            assert socket.close_code == 1008
        else:
            await socket.send(PING)
            await next_frame(socket, MsgType.PONG)


class Bystander:
    """An honest edge that generates all the while, and compares."""

    PROMPT = tuple(3 + (7 * i) % 250 for i in range(20))
    TOKENS = 40

    def __init__(self, target: Target) -> None:
        self._target = target
        self._stop = asyncio.Event()
        self.tokens: list[int] = []
        self.rounds = 0

    async def ask(self, edge: Edge) -> list[int]:
        """One request by the offload route; its tokens."""
        session = edge.core.open(open_of(self.PROMPT, max_tokens=self.TOKENS, max_context=100))
        await edge.send_ids(session, self.PROMPT, final=True)
        await edge.wait(SessionOpened, session.stream)
        tokens = list((await edge.wait(ResultTokens, session.stream)).tokens)
        while len(tokens) < self.TOKENS:
            tokens += (await edge.wait(StreamTokens, session.stream)).tokens
        await edge.close(session)
        edge.events.clear()
        return tokens

    @contextlib.asynccontextmanager
    async def generating(self) -> AsyncIterator[None]:
        """Within this context it generates without a pause; leaving it tells whether all was as before."""
        async with self._target.edge() as edge:
            self.tokens = await self.ask(edge)
            task = asyncio.create_task(self._go_on(edge))
            try:
                yield
            finally:
                self._stop.set()
                await task

    async def _go_on(self, edge: Edge) -> None:
        while not self._stop.is_set():
            assert await self.ask(edge) == self.tokens
            self.rounds += 1

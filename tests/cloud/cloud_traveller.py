"""An edge that keeps what it sent, so that its session can go on over another connection."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from isthmus.cloud.feed import Feed
from isthmus.cloud.serve import Prepared
from isthmus.protocol.activations import RowCodec, RowFormat, encode_ids
from isthmus.protocol.edge_session import EdgeSession
from isthmus.protocol.events import (
    Replay,
    ResultRows,
    ResultTokens,
    SessionOpened,
    SessionResumed,
    SessionSuspended,
    StepReceived,
    StreamTokens,
    Welcomed,
)
from isthmus.protocol.messages import Open
from tests.cloud.cloud_clients import EdgeHalf
from tests.cloud.cloud_edges import Edge, RunningCloud


class Traveller:
    """One request, sent step by step; its rows and ids are kept by position."""

    def __init__(self, prepared: Prepared, request: Open, prompt: Sequence[int]) -> None:
        self.prepared, self.request, self.prompt = prepared, request, list(prompt)
        self.half = EdgeHalf(prepared.model, request.split)
        hidden = prepared.model.spec.hidden
        self.codec = RowCodec(RowFormat(request.row_format), hidden, request.outliers)
        self.result_codec = RowCodec(RowFormat(request.result_format), hidden)
        self.tokens: list[int] = []
        self.rows: NDArray[np.float32] = np.zeros((0, hidden), np.float32)
        self.edge: Edge
        self.session: EdgeSession

    @property
    def known(self) -> list[int]:
        return [*self.prompt, *self.tokens]

    async def open(self, edge: Edge) -> None:
        self.edge = edge
        await edge.wait(Welcomed)
        self.session = edge.core.open(self.request)
        await edge.flush()
        await edge.wait(SessionOpened, self.session.stream)

    def queue(
        self,
        first: int,
        ids: Sequence[int],
        *,
        final: bool = False,
        all_rows: bool = False,
        drafts: bool = False,
    ) -> None:
        """Rows of `ids` for the positions from `first` on, computed where they are not kept."""
        session, truncate = self.session, first < self.session.kv_len
        if self.request.split == 0:
            if drafts:
                session.verify_ids(ids, first, truncate=truncate)
            else:
                session.step_ids(ids, first, final=final, all_rows=all_rows, truncate=truncate)
            session.digests.truncate(first)
            session.digests.append(encode_ids(ids))
            return
        if first + len(ids) > len(self.rows):
            self.half.truncate(first)
            assert self.half.table.length == first
            self.rows = np.concatenate([self.rows[:first], self.half.rows(ids)])
        raw = self.codec.encode_raw(self.rows[first : first + len(ids)])
        body = self.codec.pack(raw)
        if drafts:
            session.verify_rows(ids, body, first, truncate=truncate)
        else:
            session.step_rows(body, first, len(ids), final=final, all_rows=all_rows, truncate=truncate)
        session.digests.truncate(first)
        session.digests.append(raw)

    async def send(self, first: int, ids: Sequence[int], **how: Any) -> None:
        self.queue(first, ids, **how)
        await self.edge.flush()

    async def send_prompt(self, chunk: int = 16) -> None:
        for first in range(0, len(self.prompt), chunk):
            part = self.prompt[first : first + chunk]
            await self.send(first, part, final=first + chunk >= len(self.prompt))

    async def send_newest(self) -> None:
        self.rows = self.rows[: len(self.known) - 1]  # behind it lie rows of drafts that were wrong
        await self.send(len(self.known) - 1, self.tokens[-1:], final=True)

    async def take(self) -> None:
        """The next output becomes tokens."""
        stream = self.session.stream
        if self.request.shape == "u":
            result = await self.edge.wait(ResultRows, stream)
            rows = self.result_codec.decode_frame(result.frame, max_raw=1 << 20)
            self.tokens.append(int(self.prepared.model.head(torch.from_numpy(rows))[-1].argmax()))
        elif self.request.streams and self.tokens:
            streamed = await self.edge.wait(StreamTokens, stream)
            assert streamed.first_index == len(self.tokens)
            self.tokens += streamed.tokens
        else:
            sampled = await self.edge.wait(ResultTokens, stream)
            assert sampled.first_index == len(self.tokens)
            self.tokens += sampled.tokens

    async def judge(self, chain: Sequence[int]) -> list[int]:
        """U-shape: the tokens of a draft chain's rows, up to the first that is not the next id."""
        result = await self.edge.wait(ResultRows, self.session.stream)
        rows = self.result_codec.decode_frame(result.frame, max_raw=1 << 20)
        drawn = [int(line.argmax()) for line in self.prepared.model.head(torch.from_numpy(rows))]
        right = next((at for at, token in enumerate(drawn) if [token] != list(chain[at + 1 : at + 2])))
        return drawn[: right + 1]

    async def finish(self) -> list[int]:
        """Goes on until the answer is whole; the prompt's output is due."""
        while len(self.tokens) < self.request.max_tokens:
            await self.take()
            if not self.request.streams and len(self.tokens) < self.request.max_tokens:
                await self.send_newest()
        await self.edge.close(self.session)
        return self.tokens

    async def abort(self) -> None:
        """The TCP connection is gone at once, as by a reset."""
        self.edge.socket.transport.abort()
        await self.edge.wait(SessionSuspended, self.session.stream)
        while any(isinstance(event, StreamTokens | ResultTokens | ResultRows) for event in self.edge.events):
            await self.take()  # it had arrived before

    async def resume(self, edge: Edge) -> SessionResumed:
        """RESUME on a new connection; what the cloud lacks is queued there, `replay` sends it."""
        self.edge = edge
        await edge.wait(Welcomed)
        edge.core.resume(self.session)
        await edge.flush()
        resumed = await edge.wait(SessionResumed, self.session.stream)
        if resumed.replay is not None:
            await self.replay(resumed.replay)
        return resumed

    async def replay(self, replay: Replay) -> None:
        plain = replay.stop - replay.last_rows
        ids = self.known[: replay.stop]
        for first in range(replay.start, plain, 16):
            await self.send(first, ids[first : min(first + 16, plain)])
        if not replay.last_rows:
            return
        if replay.drafts:
            await self.send(plain, replay.drafts, drafts=True)
        else:
            await self.send(plain, ids[plain:], final=replay.final, all_rows=replay.all_rows)


async def detached(cloud: RunningCloud, count: int = 1) -> None:
    """Once `count` sessions of the cloud wait for their edge."""
    await until(lambda: cloud.hub.sessions.num_detached == count)


async def taken(cloud: RunningCloud, seq: int) -> None:
    """Once the cloud's only session has taken step `seq`."""
    await until(lambda: [live.core.last_seq for live in cloud.hub.sessions] == [seq])


async def until(happened: Callable[[], bool]) -> None:
    """What the server does by itself has no message to wait for."""
    async with asyncio.timeout(30):
        while not happened():  # noqa: ASYNC110 - of another thread's loop
            await asyncio.sleep(0.001)


@contextlib.contextmanager
def held_engine(cloud: RunningCloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The engine stops before its next step until the event is set."""
    release = threading.Event()
    forward = cloud.hub.engine.core.forward
    run = forward.run

    def held(*arguments: Any) -> Any:
        assert release.wait(60)
        return run(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(forward, "run", held)
        try:
            yield release
        finally:
            release.set()


@contextlib.contextmanager
def held_decoder(monkeypatch: pytest.MonkeyPatch, inline: int = 0) -> Iterator[threading.Event]:
    """Every step of more than `inline` bytes is decoded by a thread, and not before the event is set."""
    release = threading.Event()
    decode = Feed._decode

    def held(feed: Feed, step: StepReceived) -> Any:
        assert step.frame.raw_len <= inline or release.wait(60)
        return decode(feed, step)

    with monkeypatch.context() as patch:
        patch.setattr("isthmus.cloud.feed.INLINE_BYTES", inline)
        patch.setattr(Feed, "_decode", held)
        try:
            yield release
        finally:
            release.set()

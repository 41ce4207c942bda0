"""What no recovery can be faster than, measured: noticing, connecting, and computing the history again."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from isthmus.protocol.activations import RowCodec, RowFormat
from isthmus.protocol.frames import VERSION
from isthmus.protocol.messages import Hello, Open
from isthmus.protocol.sampling import SamplingParams

if TYPE_CHECKING:
    from isthmus.edge.link import CloudLink
    from isthmus.splitter.pack import Pack
    from isthmus.splitter.runner import BlockRunner

REPEATS = 3
# Rows per chunk, as the edge sends a prompt.
CHUNK_ROWS = 128


class TargetBound(NamedTuple):
    """Of one cloud behind one link, at rest, in seconds: `connect_s` TCP, upgrade, HELLO and WELCOME;
    `answer_s` one message and its answer; `replay_s` OPEN, all rows of the history, and the token after."""

    connect_s: float
    answer_s: float
    replay_s: float


class LocalBound(NamedTuple):
    """Of the edge alone, in seconds: `load_s` the layers it did not hold, and the head; `compute_s` running
    them over the cached boundary rows of the history, and the head over the last."""

    load_s: float
    compute_s: float


class HistoryBounds:
    """Bounds for a history of `ids` at `split`: the rows are computed once, here; after that only what
    another machine, or the rest of the layers, must do with them is timed."""

    def __init__(self, pack: Pack, split: int, ids: Sequence[int], *, threads: int | None) -> None:
        self._pack, self._split, self._threads = pack, split, threads
        runner = self._runner()
        runner.load(range(split), embed=True)
        cache = runner.new_cache(range(split), capacity=len(ids))
        try:
            self._rows = runner.forward(cache, runner.embed(ids), start_layer=0, stop_layer=split)
        finally:
            cache.close()
        codec = RowCodec(RowFormat.F32, pack.spec.hidden, ())
        self._chunks = [
            (at, codec.encode(self._rows[at : at + CHUNK_ROWS])) for at in range(0, len(ids), CHUNK_ROWS)
        ]

    def _runner(self) -> BlockRunner:
        from isthmus.splitter.runner import BlockRunner

        return BlockRunner(self._pack, threads=self._threads)

    async def target(self, url: str) -> TargetBound:
        """Medians of a few tries against the cloud at `url`, to which nobody else may talk meanwhile."""
        await self._try(url)  # the first computation of a fresh process is slow
        tries = [await self._try(url) for _ in range(REPEATS)]
        return TargetBound(*(statistics.median(part) for part in zip(*tries, strict=True)))

    async def _try(self, url: str) -> TargetBound:
        from isthmus.edge.link import CloudLink

        hello = Hello(
            versions=(VERSION,),
            identity=self._pack.identity,
            edge_precision=self._pack.scheme,
            row_formats=tuple(form.value for form in RowFormat),
            client="isthmus-bench",
        )
        link = CloudLink(url, hello)
        started = perf_counter()
        await link.connect()
        connect_s = perf_counter() - started
        try:
            return TargetBound(connect_s, *await self._replay(link))
        finally:
            await link.aclose()

    async def _replay(self, link: CloudLink) -> tuple[float, float]:
        num_rows = len(self._rows)
        message = Open(
            split=self._split,
            shape="prefix",
            row_format=RowFormat.F32.value,
            max_tokens=1,
            prompt_tokens=num_rows,
            max_context=num_rows + 1,
            sampling=SamplingParams(temperature=0.0),
        )
        asked = await link.open(message)
        started = perf_counter()
        await asked.opened()
        answer_s = perf_counter() - started
        asked.cancel()
        started = perf_counter()
        session = await link.open(message)
        for at, encoded in self._chunks:
            n_tok = min(CHUNK_ROWS, num_rows - at)
            await session.room(n_tok)
            await session.send_rows(encoded, at, n_tok, final=at + n_tok == num_rows)
        await session.next()
        replay_s = perf_counter() - started
        session.cancel()
        return answer_s, replay_s

    def local(self) -> LocalBound:
        """Once, in a runner of its own that holds nothing before."""
        layers = range(self._split, self._pack.spec.num_layers)
        runner = self._runner()
        started = perf_counter()
        runner.load(layers, head=True)
        load_s = perf_counter() - started
        cache = runner.new_cache(layers, capacity=len(self._rows))
        try:
            started = perf_counter()
            rows = runner.forward(cache, self._rows, start_layer=layers.start, stop_layer=layers.stop)
            int(np.argmax(runner.head(rows[-1:])))
            return LocalBound(load_s, perf_counter() - started)
        finally:
            cache.close()


class Watch:
    """A connection of its own beside the agent's: it tells when the loss could be seen at all."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._seen: asyncio.Task[float] | None = None

    async def start(self) -> None:
        parts = urlsplit(self._url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        # Answered, it reaches through a relay to the cloud; and a connection that asks nothing is hung up on.
        writer.write(f"GET /livez HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\nok")

        async def wait() -> float:
            try:
                with suppress(OSError):
                    await reader.read()
                return perf_counter()
            finally:
                writer.transport.abort()

        self._seen = asyncio.get_running_loop().create_task(wait(), name="isthmus-bench-watch")

    async def seen_after(self, struck_s: float) -> float:
        """Seconds from `struck_s` (perf_counter) to the moment this connection broke."""
        assert self._seen is not None, "start() first"
        return max(0.0, await self._seen - struck_s)

    def cancel(self) -> None:
        if self._seen is not None:
            self._seen.cancel()

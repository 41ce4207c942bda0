"""One stretch of a generation: the edge runs blocks [0, K), one cloud the rest, or nobody where K = N.

There is one mechanism. The routes differ in two places only, who draws (`next`) and what a new token sets
going (`begin_step`):

    local    K = N   the edge draws; its next step starts
    split U  K < N   hidden rows come back, the edge draws; its next step starts, the row is sent
    split    K < N   the cloud draws; the edge's next step starts, the row is sent
    offload  K = 0   the cloud draws and goes on by itself

A leg begins at whatever tokens there are: at the prompt, or where another leg ended. `fill` brings both
halves to the last of them, from the caches, from rows that were sent before, or by computing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from isthmus.edge.half import Chunk
from isthmus.edge.requests import Decision, FinishReason
from isthmus.protocol.errors import CloudLostError, SequenceError
from isthmus.protocol.events import ResultRows
from isthmus.protocol.sampling import Sampled

if TYPE_CHECKING:
    from isthmus.edge.half import EdgeHalf, Rows
    from isthmus.edge.jobs import Jobs
    from isthmus.edge.link import CloudLink
    from isthmus.edge.remote import CloudHalf
    from isthmus.protocol.events import Replay

# Heartbeats are a second apart and other requests are not running: the loop can miss this much.
SHORT_STEP_S: Final = 0.010

# Rows per prefill chunk: large enough for the kernels, small enough that requests interleave and that
# computing, sending and the cloud's part overlap.
CHUNK_ROWS: Final = 128

Drawn = tuple[Sampled, FinishReason | None]


@dataclass(frozen=True)
class Remote:
    """The cloud's half, and the link that leads there."""

    link: CloudLink
    half: CloudHalf


class Leg:
    """`remote` is None for the route local. `alone`: whether no other request runs."""

    def __init__(
        self,
        decision: Decision,
        edge: EdgeHalf,
        remote: Remote | None,
        jobs: Jobs,
        alone: Callable[[], bool],
    ) -> None:
        self.decision = decision
        self.edge = edge
        self.remote = remote
        self.edge_cached = 0
        self._cloud = remote.half if remote else None
        self._jobs = jobs
        self._alone = alone
        self._arrived: deque[Drawn] = deque()
        self._draw: asyncio.Future[Sampled] | None = None
        self._step: Chunk | asyncio.Future[Chunk] | None = None

    # ---- to the last token -----------------------------------------------------------------------

    async def fill(self, ids: Sequence[int], index: int) -> None:
        """Compute and send what is missing of the rows of `ids`; the last of them makes output `index`. Where
        the cloud kept fewer rows than the edge, it gets those again; where it kept more, the edge's rows up
        to there are not sent."""
        cloud = self._cloud
        if cloud is not None:
            await cloud.start(ids)
        preparing = self._jobs.submit(partial(self.edge.prepare, ids))
        if cloud is not None and self.edge.split == 0:  # nothing runs here: don't wait for the worker's turn
            await self._send_ids(cloud, ids, await cloud.cached())
            return
        have = self.edge_cached = min(await preparing, len(ids) - 1) if cloud is None else await preparing
        if cloud is None:
            await self._compute(ids, have, index)
        else:
            await self._upload(cloud, ids, await self._meet(cloud, ids, have))

    async def _compute(self, ids: Sequence[int], have: int, index: int) -> None:
        """Local: all rows but the last chunk's, which also draws."""
        await self._jobs.submit(partial(self.edge.truncate, have))
        chunks = _chunks(have, len(ids), CHUNK_ROWS)
        for start, stop in chunks[:-1]:
            await self._rows(ids, start, stop)
        last = chunks[-1][0]
        self._draw = self._jobs.submit(partial(self.edge.rows_and_drawn, ids[last:], index))

    async def _meet(self, cloud: CloudHalf, ids: Sequence[int], have: int) -> int:
        """Agree with the cloud on where to begin: the position from which rows are still to be computed,
        all of which are to be sent, too. While the answer to an offer travels, the first chunk is
        computed: most likely the cloud still has what the edge has."""
        ahead: asyncio.Future[Rows] | None = None
        done = min(have + CHUNK_ROWS, len(ids))
        if cloud.offered and have < done and not cloud.history:
            ahead = self._rows(ids, have, done)
        since = await cloud.cached()
        if since < have:
            if not cloud.history:
                self.edge_cached = since  # what is behind runs through the blocks once more
            await self._send_again(cloud, ids, since, have)
            since = have
        if ahead is None:
            for start, stop in _chunks(have, since, CHUNK_ROWS):
                await self._rows(ids, start, stop)
            return since
        rows = await ahead
        while done <= since:  # the cloud kept more than the edge: catch up, sending nothing
            have, done = done, min(done + CHUNK_ROWS, since + 1)
            rows = await self._rows(ids, have, done)
        chunk = self.edge.encoded(rows[since - have :])
        await cloud.send_rows(chunk, since, final=done == len(ids))
        return done

    async def _upload(self, cloud: CloudHalf, ids: Sequence[int], since: int) -> None:
        """The pipeline: while chunk i is sent, chunk i + 1 is computed."""
        end = len(ids)
        chunks = _chunks(since, end, min(CHUNK_ROWS, cloud.chunk_rows))
        pending = self._chunk(ids, *chunks[0]) if chunks else None
        for number, (start, stop) in enumerate(chunks):
            assert pending is not None
            chunk = await pending
            pending = self._chunk(ids, *chunks[number + 1]) if stop < end else None
            await cloud.send_rows(chunk, start, final=stop == end)

    async def _send_again(
        self,
        cloud: CloudHalf,
        ids: Sequence[int],
        start: int,
        stop: int,
        *,
        final: bool = True,
        truncate: bool = False,
    ) -> None:
        """Send rows that the edge's cache has behind it: as they were sent before, else computed once more.
        With `final` the last token's row makes an output; `truncate`: the cloud has other rows from `start`
        on."""
        for first, last in _chunks(start, stop, min(CHUNK_ROWS, cloud.chunk_rows)):
            chunk = cloud.kept(first, last)
            if chunk is None:
                chunk = await self._jobs.submit(partial(self._chunk_again, ids[first:last], first))
            makes_output = final and last == len(ids)
            cut = truncate and first == start
            await cloud.send_rows(chunk, first, final=makes_output, truncate=cut, again=True)

    def _chunk_again(self, ids: Sequence[int], start: int) -> Chunk:
        return self.edge.encoded(self.edge.rows_again(ids, start))

    async def _send_ids(
        self,
        cloud: CloudHalf,
        ids: Sequence[int],
        start: int,
        *,
        final: bool = True,
        truncate: bool = False,
    ) -> None:
        for first, last in _chunks(start, len(ids), cloud.chunk_rows):
            makes_output = final and last == len(ids)
            cut = truncate and first == start
            await cloud.send_ids(ids[first:last], first, final=makes_output, truncate=cut)

    def _rows(self, ids: Sequence[int], start: int, stop: int) -> asyncio.Future[Rows]:
        return self._jobs.submit(partial(self.edge.rows, ids[start:stop]))

    def _chunk(self, ids: Sequence[int], start: int, stop: int) -> asyncio.Future[Chunk]:
        return self._jobs.submit(partial(self.edge.chunk, ids[start:stop]))

    # ---- token by token --------------------------------------------------------------------------

    @property
    def has_arrived(self) -> bool:
        """A token is here that was not handed out yet."""
        return bool(self._arrived)

    async def next(self, index: int) -> Drawn:
        """The token of output `index`, from whoever draws it, and whether the cloud ended the sequence with
        it."""
        if self._cloud is None:
            assert self._draw is not None
            return await self._draw, None
        if not self._arrived:
            output = await self._cloud.next()
            if isinstance(output, ResultRows):
                hidden = self._cloud.decode(output)
                if self.edge.grammar is None and self._is_short():
                    return self.edge.drawn(hidden, index), None
                return await self._jobs.submit(lambda: self.edge.drawn(hidden, index)), None
            last = len(output.tokens) - 1
            for i, token in enumerate(output.tokens):
                logprob = output.logprobs[i] if output.logprobs is not None else None
                top = output.top[i] if output.top is not None else ()
                self._arrived.append((Sampled(token, logprob, top), output.finish if i == last else None))
            if not self._arrived:
                raise SequenceError("the cloud sent a result without a token", code="empty_result")
        return self._arrived.popleft()

    def begin_step(self, token: int, index: int) -> None:
        """Set going what follows from a token that does not end the sequence; `index`: of the output after
        it."""
        if self._cloud is None:
            self._draw = self._jobs.submit(lambda: self.edge.rows_and_drawn((token,), index))
        elif self.edge.split > 0 and self._is_short():
            self._step = self.edge.chunk((token,))
        elif self.edge.split > 0:
            self._step = self._jobs.submit(lambda: self.edge.chunk((token,)))

    @property
    def step_is_ready(self) -> bool:
        """The newest token's row is computed already: the cloud may begin."""
        return isinstance(self._step, Chunk)

    async def send_step(self, pos: int) -> None:
        """Send the row of the newest token, which is at `pos`, if this route sends one and has not yet."""
        if self._step is None or self._cloud is None:
            return
        chunk = self._step = self._step if isinstance(self._step, Chunk) else await self._step
        await self._cloud.send_rows(chunk, pos, final=True)
        self._step = None

    def _is_short(self) -> bool:
        """Whether a step may run right here, on the event loop: nobody else computes, and the last one was
        over in a few milliseconds. Going to the worker and back costs 0.3 ms, a tenth of such a step."""
        return self.edge.chunk_s < SHORT_STEP_S and self._alone()

    # ---- after a loss ----------------------------------------------------------------------------

    async def settle(self) -> None:
        """Wait for the edge's own computing; afterwards its cache is at rest and nothing is half sent."""
        await self._jobs.settle()
        self._step = self._draw = None

    async def go_on(self, ids: Sequence[int], index: int) -> None:
        """After `settle`, stay here after all: the output `index`, which follows `ids`, is on its way
        again."""
        if self._cloud is None:
            await self._compute(ids, min(self.edge.length, len(ids) - 1), index)
        elif not self._cloud.awaiting:
            await self._send_rest(self._cloud, ids)

    async def resume(self, ids: Sequence[int]) -> tuple[str, int]:
        """Take the suspended session up over a new connection and send what it lacks, so that the output
        after `ids` is on its way. What the cloud had left ("ok", "replay", "rebuild") and the rows sent
        again. Raises what ended the attempt."""
        cloud = self._cloud
        assert cloud is not None
        resumed = await cloud.resume()
        before = cloud.rows_sent
        if resumed.replay is not None:
            await self._replay(cloud, ids, resumed.replay)
        if not cloud.awaiting:
            await self._send_rest(cloud, ids)
        return resumed.action, cloud.rows_sent - before

    async def _replay(self, cloud: CloudHalf, ids: Sequence[int], replay: Replay) -> None:
        start, stop = replay.start, replay.stop - len(replay.drafts)
        if self.edge.split == 0:
            await self._send_ids(cloud, ids[:stop], start, final=replay.final, truncate=replay.truncate)
            return
        # A draft's tokens are no part of `ids`; its row is the newest of all, so it is held.
        known = ids[:stop]
        await self._send_again(cloud, known, start, stop, final=replay.final, truncate=replay.truncate)
        if replay.drafts:
            chunk = cloud.kept(stop, replay.stop)
            if chunk is None:
                raise CloudLostError("the rows of the draft under way are gone")
            cut = replay.truncate and start == stop
            await cloud.send_draft(replay.drafts, chunk, stop, truncate=cut, again=True)

    async def _send_rest(self, cloud: CloudHalf, ids: Sequence[int]) -> None:
        """Go on where the sending was cut off: rows that never left, then those never computed."""
        since = cloud.kv_len
        if self.edge.split == 0:
            await self._send_ids(cloud, ids, since)
            return
        have = min(self.edge.length, len(ids))
        if since < have:
            await self._send_again(cloud, ids, since, have)
        await self._upload(cloud, ids, max(since, have))

    def release(self, ids: Sequence[int], *, ended: bool) -> None:
        """Give both halves back without waiting: the worker and the link keep the order of things."""
        if self._cloud is not None:
            if ended:
                self._cloud.close(ids[:-1])  # the last token was never fed to anyone
            else:
                self._cloud.cancel()
        self._jobs.end(partial(self.edge.release, list(ids)))


def _chunks(start: int, end: int, size: int) -> list[tuple[int, int]]:
    """[start, end) cut into pieces of at most `size`."""
    return [(at, min(at + size, end)) for at in range(start, end, size)]

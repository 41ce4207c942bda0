"""One generation over two machines: prefill in a pipeline, then step by step, whoever draws the token.

There is one mechanism. The edge runs blocks [0, K); where K < N the cloud runs the rest. The routes differ
in two places only, who draws (`_next`) and what a new token sets going (`_begin_step`):

    local    K = N   the edge draws; its next step starts
    split U  K < N   hidden rows come back, the edge draws; its next step starts, the row is sent
    split    K < N   the cloud draws; the edge's next step starts, the row is sent
    offload  K = 0   the cloud draws and goes on by itself

The next step is started before a token is handed out, so that the consumer's work overlaps with it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Executor
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, TypeVar

from isthmus.edge.half import Chunk
from isthmus.edge.requests import (
    AgentEvent,
    Decision,
    Finished,
    FinishReason,
    GenerateRequest,
    LinkUse,
    Timings,
    Token,
)
from isthmus.edge.stop import StopMatcher
from isthmus.protocol.errors import IsthmusError, SequenceError
from isthmus.protocol.events import ResultRows
from isthmus.protocol.sampling import Sampled

if TYPE_CHECKING:
    from isthmus.edge.half import EdgeHalf, Rows
    from isthmus.edge.remote import CloudHalf
    from isthmus.splitter.tokenizer import Tokenizer

T = TypeVar("T")

# Heartbeats are a second apart and other requests are not running: the loop can miss this much.
SHORT_STEP_S: Final = 0.010

# Rows per prefill chunk: large enough for the kernels, small enough that requests interleave and that
# computing, sending and the cloud's part overlap.
CHUNK_ROWS: Final = 128


class TextOut:
    """Ids in, certain text out: detokenised, UTF-8 whole, stop strings held back and cut off."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._stream = tokenizer.stream()
        self._stops = StopMatcher(stops)
        self._parts: list[str] = []

    @property
    def stopped(self) -> bool:
        """Was a stop string completed?"""
        return self._stops.stopped

    @property
    def text(self) -> str:
        """All text released so far."""
        return "".join(self._parts)

    def push(self, token: int) -> str:
        """The text that became certain with this token."""
        return self._keep(self._stops.push(self._stream.push(token)))

    def finish(self) -> str:
        """What was still held back at the end."""
        released = self._stops.push(self._stream.flush())
        return self._keep(released + self._stops.flush())

    def _keep(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text


class Generation:
    """Runs one request that holds a slot. `cloud` is None for the route local; `started_s`: when the slot was
    taken (perf_counter)."""

    def __init__(
        self,
        request: GenerateRequest,
        decision: Decision,
        *,
        edge: EdgeHalf,
        cloud: CloudHalf | None,
        worker: Executor,
        tokenizer: Tokenizer,
        events: list[dict[str, Any]],
        started_s: float,
        alone: Callable[[], bool],
    ) -> None:
        self.request = request
        self.events = events
        self._decision = decision
        self._edge = edge
        self._cloud = cloud
        self._worker = worker
        self._alone = alone
        self._text = TextOut(tokenizer, request.stop)
        self._edge_draws = cloud is None or decision.shape == "u"
        self._ids = list(request.prompt_ids)
        self._num_out = 0
        self._arrived: deque[tuple[Sampled, FinishReason | None]] = deque()
        self._draw: asyncio.Future[Sampled] | None = None
        self._step: Chunk | asyncio.Future[Chunk] | None = None
        self._jobs: set[asyncio.Future[Any]] = set()  # submitted, not finished
        self._edge_cached = 0
        self._released = False
        self._started_s = started_s
        self._first_s = self._last_s = 0.0

    async def run(self) -> AsyncGenerator[AgentEvent, None]:
        """Tokens, then Finished. Closing it early cancels both halves; the edge's cache is kept."""
        try:
            await self._prefill()
            finish: FinishReason | None = None
            while finish is None:
                sampled, cloud_finish = await self._next()
                token, finish = self._account(sampled, cloud_finish)
                if finish is None:
                    self._begin_step(sampled.token)
                    if isinstance(self._step, Chunk):  # computed already: the cloud may begin
                        await self._send_step()
                yield token
                if finish is None:
                    await self._send_step()
            finished = self._finished(finish)
            self._release(ended=True)  # before the last event: the next turn may start right after it
            yield finished
        finally:
            self._release(ended=False)

    # ---- prefill ---------------------------------------------------------------------------------

    async def _prefill(self) -> None:
        """Compute the prompt's rows that a cache does not have. Where the cloud kept fewer rows than the
        edge, the edge computes those again, since the cloud needs them; where it kept more, the edge's
        rows up to there are not sent."""
        prompt = self.request.prompt_ids
        cloud = self._cloud
        if cloud is not None:
            await cloud.start()
        preparing = self._submit(self._edge.prepare)
        if cloud is not None and self._edge.split == 0:  # nothing runs here: don't wait for the worker's turn
            for start, stop in _chunks(await cloud.cached(), len(prompt), cloud.chunk_rows):
                await cloud.send_ids(prompt[start:stop], start, final=stop == len(prompt))
            return
        have = self._edge_cached = await preparing
        if cloud is None:
            for start, stop in _chunks(have, len(prompt), CHUNK_ROWS)[:-1]:
                await self._rows(start, stop)
            last = _chunks(have, len(prompt), CHUNK_ROWS)[-1][0]
            self._draw = self._submit(lambda: self._edge.rows_and_drawn(prompt[last:], 0))
        else:
            await self._upload(cloud, await self._meet(cloud, have))

    async def _meet(self, cloud: CloudHalf, have: int) -> int:
        """Agree with the cloud on where to begin: the position from which rows are still to be computed,
        all of which are to be sent, too. While the answer to an offer travels, the first chunk is
        computed: most likely the cloud still has what the edge has."""
        prompt = self.request.prompt_ids
        ahead: asyncio.Future[Rows] | None = None
        done = min(have + CHUNK_ROWS, len(prompt))
        if cloud.offered:
            ahead = self._rows(have, done)
        since = await cloud.cached()
        if since < have:
            if ahead is not None:
                await ahead
            await self._submit(lambda: self._edge.truncate(since))
            self._edge_cached = since
            return since
        if ahead is None:
            return have
        rows = await ahead
        while done <= since:  # the cloud kept more than the edge: catch up, sending nothing
            have, done = done, min(done + CHUNK_ROWS, since + 1)
            rows = await self._rows(have, done)
        rows = rows[since - have :]
        await cloud.send_rows(Chunk(rows, cloud.codec.encode(rows)), since, final=done == len(prompt))
        return done

    async def _upload(self, cloud: CloudHalf, since: int) -> None:
        """The pipeline: while chunk i is sent, chunk i + 1 is computed."""
        end = len(self.request.prompt_ids)
        chunks = _chunks(since, end, min(CHUNK_ROWS, cloud.chunk_rows))
        pending = self._chunk(*chunks[0]) if chunks else None
        for number, (start, stop) in enumerate(chunks):
            assert pending is not None
            chunk = await pending
            pending = self._chunk(*chunks[number + 1]) if stop < end else None
            await cloud.send_rows(chunk, start, final=stop == end)

    def _rows(self, start: int, stop: int) -> asyncio.Future[Rows]:
        ids = self.request.prompt_ids[start:stop]
        return self._submit(lambda: self._edge.rows(ids))

    def _chunk(self, start: int, stop: int) -> asyncio.Future[Chunk]:
        ids = self.request.prompt_ids[start:stop]
        return self._submit(lambda: self._edge.chunk(ids))

    # ---- decode ----------------------------------------------------------------------------------

    async def _next(self) -> tuple[Sampled, FinishReason | None]:
        """The next token, from whoever draws it, and whether the cloud ended the sequence with it."""
        if self._cloud is None:
            assert self._draw is not None
            return await self._draw, None
        if not self._arrived:
            output = await self._cloud.next()
            if isinstance(output, ResultRows):
                hidden = self._cloud.decode(output)
                index = self._num_out
                if self._is_short():
                    return self._edge.drawn(hidden, index), None
                return await self._submit(lambda: self._edge.drawn(hidden, index)), None
            last = len(output.tokens) - 1
            for i, token in enumerate(output.tokens):
                logprob = output.logprobs[i] if output.logprobs is not None else None
                top = output.top[i] if output.top is not None else ()
                self._arrived.append((Sampled(token, logprob, top), output.finish if i == last else None))
            if not self._arrived:
                raise SequenceError("the cloud sent a result without a token", code="empty_result")
        return self._arrived.popleft()

    def _begin_step(self, token: int) -> None:
        """Set going what follows from a token that does not end the sequence."""
        if self._cloud is None:
            index = self._num_out
            self._draw = self._submit(lambda: self._edge.rows_and_drawn((token,), index))
        elif self._edge.split > 0 and self._is_short():
            self._step = self._edge.chunk((token,))
        elif self._edge.split > 0:
            self._step = self._submit(lambda: self._edge.chunk((token,)))

    def _is_short(self) -> bool:
        """Whether a step may run right here, on the event loop: nobody else computes, and the last one was
        over in a few milliseconds. Going to the worker and back costs 0.3 ms, a tenth of such a step."""
        return self._edge.chunk_s < SHORT_STEP_S and self._alone()

    async def _send_step(self) -> None:
        """Send the row of the newest token, if this route sends one."""
        if self._step is None or self._cloud is None:
            return
        chunk = self._step if isinstance(self._step, Chunk) else await self._step
        self._step = None
        await self._cloud.send_rows(chunk, len(self._ids) - 1, final=True)

    def _account(
        self, sampled: Sampled, cloud_finish: FinishReason | None
    ) -> tuple[Token, FinishReason | None]:
        """Note the token: its text, its index, and whether the sequence ends with it."""
        self._last_s = perf_counter()
        index = self._num_out
        if index == 0:
            self._first_s = self._last_s
        self._num_out += 1
        self._ids.append(sampled.token)
        finish: FinishReason | None = None
        text = ""
        if sampled.token in self.request.end_ids:
            finish = "stop"
        else:
            text = self._text.push(sampled.token)
            if self._text.stopped:
                finish = "stop"
            elif self._num_out >= self.request.max_tokens:
                finish = "length"
        return Token(index, sampled.token, text, sampled.logprob, tuple(sampled.top)), finish or cloud_finish

    # ---- the end ---------------------------------------------------------------------------------

    def _finished(self, finish: FinishReason) -> Finished:
        tail = self._text.finish()
        decode_s = self._last_s - self._first_s
        cloud = self._cloud
        counts = {
            "prompt_tokens": len(self.request.prompt_ids),
            "completion_tokens": self._num_out,
            "edge_rows_computed": self._edge.rows_computed,
            "edge_cached_rows": self._edge_cached,
            "rows_sent": cloud.rows_sent if cloud else 0,
            "cloud_cached_rows": cloud.cached_rows if cloud else 0,
        }
        return Finished(
            finish_reason=finish,
            token_ids=tuple(self._ids[len(self.request.prompt_ids) :]),
            text=self._text.text,
            tail=tail,
            timings=Timings(
                ttft_s=self._first_s - self._started_s,
                decode_tokens_per_s=(self._num_out - 1) / decode_s if decode_s > 0 else 0.0,
                total_s=perf_counter() - self._started_s,
            ),
            link=cloud.use() if cloud else LinkUse(),
            counts=counts,
            events=tuple(self.events),
        )

    def _release(self, *, ended: bool) -> None:
        """Give both halves back without waiting: the worker and the link keep the order of things.
        Only the first call counts."""
        if self._released:
            return
        self._released = True
        for job in tuple(self._jobs):
            job.cancel()  # what did not start yet will not
        if self._cloud is not None:
            if ended:
                self._cloud.close(self._ids[:-1])  # the last token was never fed to anyone
            else:
                self._cloud.cancel()
        with suppress(RuntimeError):  # the agent was closed before this iterator; its caches went with it
            self._worker.submit(self._edge.release, self._ids)

    # ---- the worker ------------------------------------------------------------------------------

    def _submit(self, job: Callable[[], T]) -> asyncio.Future[T]:
        """Run `job` in the worker, after what was submitted before."""
        try:
            future = asyncio.get_running_loop().run_in_executor(self._worker, job)
        except RuntimeError as error:  # the executor was shut down
            raise IsthmusError("the agent was closed while the request ran", code="agent_closed") from error
        self._jobs.add(future)
        future.add_done_callback(self._jobs.discard)
        return future


def _chunks(start: int, end: int, size: int) -> list[tuple[int, int]]:
    """[start, end) cut into pieces of at most `size`."""
    return [(at, min(at + size, end)) for at in range(start, end, size)]

"""One generation: token by token out of wherever it runs, each emitted once, with its text and its end.

The next step is started before a token is handed out, so that the consumer's work overlaps with it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from time import perf_counter
from typing import TYPE_CHECKING, Any

from isthmus.edge.calibration import Observed
from isthmus.edge.requests import (
    AgentEvent,
    Decision,
    Finished,
    FinishReason,
    GenerateRequest,
    Moved,
    Timings,
    Token,
)
from isthmus.edge.text import TextOut

if TYPE_CHECKING:
    from isthmus.edge.link import CloudLink
    from isthmus.edge.placement import Placement
    from isthmus.protocol.sampling import Sampled
    from isthmus.splitter.tokenizer import Tokenizer


class Generation:
    """Runs one request that holds a slot. `ids` is the list that `placement` reads; `started_s`: when the
    slot was taken (perf_counter)."""

    def __init__(
        self,
        request: GenerateRequest,
        placement: Placement,
        *,
        ids: list[int],
        tokenizer: Tokenizer,
        events: list[dict[str, Any]],
        started_s: float,
    ) -> None:
        self.request = request
        self.placement = placement
        self.events = events
        self._text = TextOut(tokenizer, request.stop)
        self._ids = ids
        self._num_out = 0
        self._released = False
        self._started_s = started_s
        self._first_s = self._last_s = 0.0
        self._busy_s = (0.0, 0.0)  # edge and cloud, up to the first token

    async def run(self, decision: Decision, link: CloudLink | None) -> AsyncGenerator[AgentEvent, None]:
        """Tokens, and Moved where something happens in between, then Finished. Closing it early cancels both
        halves; the edge's cache is kept."""
        placement = self.placement
        num_told = 0
        try:
            await placement.begin(decision, link)
            finish: FinishReason | None = None
            while finish is None:
                drawn = await placement.next()
                if len(self.events) > num_told:
                    moved = Moved(tuple(self.events[num_told:]))
                    num_told = len(self.events)
                    yield moved
                if drawn is None:
                    continue
                sampled, cloud_finish = drawn
                token, finish = self._account(sampled, cloud_finish)
                leg = placement.leg
                assert leg is not None
                if finish is None:
                    leg.begin_step(sampled.token, self._num_out)
                    if leg.step_is_ready:  # computed already: the cloud may begin
                        await placement.part(leg.send_step(len(self._ids) - 1))
                yield token
                if finish is None:
                    await placement.part(leg.send_step(len(self._ids) - 1))
            finished = self._finished(finish)
            self._release(ended=True)  # before the last event: the next turn may start right after it
            yield finished
        finally:
            self._release(ended=False)

    def _account(
        self, sampled: Sampled, cloud_finish: FinishReason | None
    ) -> tuple[Token, FinishReason | None]:
        """Note the token: its text, its index, and whether the sequence ends with it."""
        self._last_s = perf_counter()
        index = self._num_out
        if index == 0:
            self._first_s = self._last_s
            self._busy_s = self.placement.busy_s()
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

    def _finished(self, finish: FinishReason) -> Finished:
        tail = self._text.finish()
        decode_s = self._last_s - self._first_s
        placement = self.placement
        leg = placement.leg
        assert leg is not None
        counts = {
            "prompt_tokens": len(self.request.prompt_ids),
            "completion_tokens": self._num_out,
            "edge_rows_computed": leg.edge.rows_computed,
            "edge_cached_rows": placement.edge_cached_rows,
            "rows_sent": placement.rows_sent,
            "cloud_cached_rows": placement.cloud_cached_rows,
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
            link=placement.use(),
            counts=counts,
            route=leg.decision.route,
            split=leg.decision.split,
            shape=leg.decision.shape,
            events=tuple(self.events),
            observed=self._observed(decode_s),
        )

    def _observed(self, decode_s: float) -> Observed | None:
        """The times of one way, begun and ended there."""
        if self.placement.disturbed:
            return None
        edge_s, cloud_s = self.placement.busy_s()
        here, there = edge_s - self._busy_s[0], cloud_s - self._busy_s[1]
        leg = self.placement.leg
        split = leg is not None and leg.decision.route == "split"
        known = split and there > 0
        return Observed(
            ttft_s=self._first_s - self._started_s,
            steps=self._num_out - 1,
            decode_s=decode_s,
            edge_s=here if split else None,
            cloud_s=there if known else None,
            link_s=max(0.0, decode_s - here - there) if known else None,
            first_cloud_s=leg.remote.half.first_cloud_s if leg is not None and leg.remote else None,
        )

    def _release(self, *, ended: bool) -> None:
        """Only the first call counts."""
        if not self._released:
            self._released = True
            self.placement.release(ended=ended)

"""One generation that is interrupted: when its tokens came, and whether they are the unbroken run's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from isthmus.protocol.errors import IsthmusError

if TYPE_CHECKING:
    from isthmus.edge.agent import Agent
    from isthmus.edge.requests import GenerateRequest

# Two computations of one fp32 model may disagree only where the best two logits are closer than this.
NEAR_TIE: Final = 1e-3


@dataclass(frozen=True)
class Unbroken:
    """What a generation yields that nothing interrupts: ids, and by how much each led the next best one."""

    ids: tuple[int, ...]
    margins: tuple[float, ...]

    def near_tie(self, ids: tuple[int, ...]) -> int | None:
        """Where `ids` leave these ids at a near-tie; None where they are equal. IsthmusError for any other
        difference: then something was lost, doubled or computed wrongly."""
        at = next((i for i, (a, b) in enumerate(zip(ids, self.ids, strict=False)) if a != b), None)
        if at is None and len(ids) == len(self.ids):
            return None
        if at is None or self.margins[at] >= NEAR_TIE:
            at = min(len(ids), len(self.ids)) if at is None else at
            raise IsthmusError(
                f"the interrupted run left the unbroken one at token {at}: "
                f"{ids[at : at + 4]} for {self.ids[at : at + 4]}",
                code="unequal_tokens",
                hint="this is a bug: please report it with the command you ran",
            )
        return at


@dataclass(frozen=True)
class Interrupted:
    """A generation that lost its cloud: seconds from the blow to the first token after it, and the events."""

    ids: tuple[int, ...]
    recovery_s: float
    events: tuple[dict[str, Any], ...]


async def unbroken(agent: Agent, request: GenerateRequest) -> Unbroken:
    """Run `request` with nothing in its way."""
    from isthmus.edge.requests import Token

    request = replace(request, sampling=request.sampling.model_copy(update={"logprobs": 2}))
    ids: list[int] = []
    margins: list[float] = []
    async with aclosing(agent.generate(request)) as events:
        async for event in events:
            if isinstance(event, Token):
                ids.append(event.id)
                margins.append(event.top[0][1] - event.top[1][1])
    return Unbroken(tuple(ids), tuple(margins))


async def interrupted(
    agent: Agent, request: GenerateRequest, at: int, strike: Callable[[], Awaitable[float]]
) -> Interrupted:
    """Run `request` and await `strike` when token `at` was emitted; it says when it struck (perf_counter).

    Tokens that had left the cloud before may still come; what counts is the first token behind the loss, as
    the request's events tell it. IsthmusError where an index is missing or comes twice, or where the blow
    went unnoticed.
    """
    from isthmus.edge.requests import Finished, Token

    came_s: list[float] = []
    struck_s = 0.0
    finished: Finished | None = None
    async with aclosing(agent.generate(request)) as events:
        async for event in events:
            if isinstance(event, Token):
                if event.index != len(came_s):
                    raise IsthmusError(
                        f"token {event.index} came where {len(came_s)} was due", code="unequal_tokens"
                    )
                came_s.append(perf_counter())
                if event.index == at:
                    struck_s = await strike()
            elif isinstance(event, Finished):
                finished = event
    assert finished is not None, "a generation ends with Finished or raises"
    lost = next((event for event in finished.events if event["event"] == "link_lost"), None)
    if lost is None:
        raise IsthmusError(
            f"{len(came_s)} tokens came and the blow behind token {at} was not noticed",
            code="not_interrupted",
            hint="ask for more --output-tokens, so that the generation still runs when it is struck",
        )
    return Interrupted(finished.token_ids, came_s[lost["at_index"]] - struck_s, finished.events)

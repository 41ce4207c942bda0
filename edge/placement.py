"""Where a generation runs, and moving it: back to a cloud that was lost, to another one, to this device, or
to another cut. The move is always the same: a new leg is brought to the last token and goes on from there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from isthmus.edge.logs import log, plain_code
from isthmus.edge.recovery import MAX_FRUITLESS, CloudSearch, RecoveryConfig
from isthmus.edge.requests import Decision, GenerateRequest, LinkUse
from isthmus.protocol.errors import (
    CloudError,
    IsthmusError,
    NotFoundError,
    OverloadedError,
    RejectedError,
    UsageError,
)

if TYPE_CHECKING:
    from isthmus.edge.clouds import Clouds
    from isthmus.edge.leg import Drawn, Leg
    from isthmus.edge.legs import Legs
    from isthmus.edge.link import CloudLink
    from isthmus.edge.remote import CloudHalf

LOSSES: Final = (CloudError, OverloadedError, RejectedError, NotFoundError)
"""What a cloud may do to a request that can go on elsewhere."""

# A cloud that drains is left as soon as another one stands; who found none asks again after this long.
_LEAVE_AGAIN_S: Final = 2.0
_LEAVE_TIMEOUT_S: Final = 2.0


class Feasibility(Protocol):
    """The router's hard constraints, asked in the middle of a request."""

    def local(self) -> Decision | None:
        """The decision to go on on this device, if that is possible."""

    def check(self, decision: Decision, link: CloudLink) -> None:
        """RouteInfeasibleError where `decision` cannot be taken at this cloud."""


class _Loss(NamedTuple):
    error: IsthmusError
    began: float


class _Wanted(NamedTuple):
    decision: Decision
    link: CloudLink | None
    done: asyncio.Future[None]


@dataclass
class Counts:
    """How often requests had to be helped, over all requests of an agent."""

    resumes: int = 0
    failed_resumes: int = 0
    failovers: int = 0
    fallbacks: int = 0
    moves: int = 0


class Placement:
    """The legs of one request in turn. `ids` are all its tokens so far; the caller appends what `next`
    gives."""

    def __init__(
        self,
        request: GenerateRequest,
        legs: Legs,
        clouds: Clouds,
        feasibility: Feasibility,
        config: RecoveryConfig,
        *,
        ids: list[int],
        events: list[dict[str, Any]],
        counts: Counts,
    ) -> None:
        self.leg: Leg | None = None
        self.edge_cached_rows = 0
        """Of the prompt, in the edge's cache when the request began."""
        self.disturbed = False
        """Something was lost or moved: its times say nothing about the way it was decided to take."""
        self._request = request
        self._legs = legs
        self._clouds = clouds
        self._feasibility = feasibility
        self._config = config
        self._ids = ids
        self._events = events
        self._counts = counts
        self._halves: list[CloudHalf] = []
        self._lost: IsthmusError | None = None
        self._to_recover: _Loss | None = None
        self._wanted: _Wanted | None = None
        self._fruitless = 0
        self._leave_at = 0.0

    @property
    def index(self) -> int:
        """Index of the next output."""
        return len(self._ids) - len(self._request.prompt_ids)

    @property
    def _live(self) -> Leg:
        assert self.leg is not None, "begin() first"
        return self.leg

    async def begin(self, decision: Decision, link: CloudLink | None) -> None:
        """The first leg; its output is on its way afterwards, or `next` deals with the loss."""
        try:
            leg = await self._legs.first(decision, link)
        except LOSSES as error:
            if error.code != "draining":
                raise
            other = await self._clouds.reach()  # it stood when the decision was made
            self._feasibility.check(decision, other)
            leg = await self._legs.first(decision, other)
        self._take(leg)
        await self.part(self._live.fill(self._ids, self.index))
        self.edge_cached_rows = self._live.edge_cached

    async def part(self, work: Awaitable[None]) -> None:
        """Do a part of the leg's work. If the cloud is lost over it, `next` will deal with that."""
        try:
            await work
        except LOSSES as error:
            self._lost = error

    async def next(self) -> Drawn | None:
        """The next output. Moves where that is needed or wished; raises where nothing is left to try.

        None: the cloud was lost, or is found again, as the last of `events` tells; the call after it goes on.
        """
        if (loss := self._to_recover) is not None:
            self._to_recover = None
            await self._recover(*loss)
            return None
        try:
            if (lost := self._lost) is not None:
                self._lost = None
                raise lost
            if not self._live.has_arrived:
                await self._go_where_wished()
            drawn = await self._live.next(self.index)
        except LOSSES as error:
            self._lose(error)
            return None
        self._fruitless = 0
        return drawn

    def move(self, decision: Decision, link: CloudLink | None) -> asyncio.Future[None]:
        """Wish for another cut before the next output; done when it runs there, or failed and stays."""
        self._end_wish(OverloadedError("another move was asked for", code="move_replaced"))
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wanted = _Wanted(decision, link, done)
        return done

    def release(self, *, ended: bool) -> None:
        """The request is over."""
        self._end_wish(NotFoundError("the request ended before it could move", code="request_ended"))
        if self.leg is not None:
            self.leg.release(self._ids, ended=ended)

    # ---- what it used ----------------------------------------------------------------------------

    @property
    def rows_sent(self) -> int:
        return sum(half.rows_sent for half in self._halves)

    @property
    def cloud_cached_rows(self) -> int:
        """Of the prompt, at the cloud where the request began."""
        return self._halves[0].cached_rows if self._halves else 0

    def use(self) -> LinkUse:
        uses = [half.use() for half in self._halves]
        return LinkUse(
            uses[-1].rtt_s if uses else None,
            sum(use.bytes_up for use in uses),
            sum(use.bytes_down for use in uses),
        )

    def busy_s(self) -> tuple[float, float]:
        """Seconds that the edge and the cloud have computed where the request is now; 0.0 where the cloud
        does not tell."""
        leg = self._live
        return leg.edge.busy_s, leg.remote.half.cloud_s if leg.remote else 0.0

    def _take(self, leg: Leg) -> None:
        self.leg = leg
        if leg.remote is not None:
            self._halves.append(leg.remote.half)

    def _note(self, event: str, **details: Any) -> None:
        self._events.append({"event": event, "at_index": self.index, **details})
        codes = {name: plain_code(details[name]) for name in ("code", "reason") if name in details}
        log.info(event, request_id=self._request.request_id, at_index=self.index, **(details | codes))

    # ---- losses ----------------------------------------------------------------------------------

    def _lose(self, error: IsthmusError) -> None:
        """Note that the cloud is lost; raise `error` where that is no loss, or nobody may help."""
        leg, request = self._live, self._request
        refused = isinstance(error, OverloadedError | RejectedError)
        # A route asked for by name and refused at the start is an honest no, not a loss. A cloud that goes
        # away, and had no time to say so, is one.
        leaves = error.code == "draining"
        honest_no = refused and not leaves and self.index == 0 and request.route != "auto"
        closed_here = error.code == "link_closed"
        if leg.remote is None or request.fallback == "none" or honest_no or closed_here:
            raise error
        self.disturbed = True
        self._note("link_lost", code=error.code, cloud=leg.remote.link.url)
        self._to_recover = _Loss(error, monotonic())

    async def _recover(self, error: IsthmusError, began: float) -> None:
        """Bring the request to where its next output is on its way again, or raise `error`."""
        leg, request = self._live, self._request
        assert leg.remote is not None
        refused = isinstance(error, OverloadedError | RejectedError)
        link = leg.remote.link
        await leg.settle()
        local = self._feasibility.local() if request.fallback == "any" else None
        self._fruitless += 1
        if self._fruitless <= MAX_FRUITLESS:
            goaway = leg.remote.half.goaway
            links = self._clouds.in_order(link, goaway.alternative if goaway else "")
            search = CloudSearch(links, self._config, can_do_without=local is not None)
            if refused:
                search.give_up(link)
            async for found in search.found():
                if await self._resumed(found, began) or await self._moved_on(found, search, began):
                    return
        if local is None:
            raise error
        await self._recut(local, None)
        self._counts.fallbacks += 1
        self._note("moved", route="local", split=local.split, reason=error.code, after_s=monotonic() - began)

    async def _resumed(self, link: CloudLink, began: float) -> bool:
        """Take the session up where it is. False where it is not there, or was lost over it once more."""
        leg = self._live
        if leg.remote is None or leg.remote.link is not link or not leg.remote.half.suspended:
            return False
        try:
            action, rows = await leg.resume(self._ids)
        except IsthmusError as error:  # refused, out of step, or lost once more
            await leg.settle()
            if not isinstance(error, CloudError):
                leg.remote.half.cancel(keep_history=True)  # there is nothing to come back to
            self._counts.failed_resumes += 1
            self._note("resume_failed", code=error.code)
            return False
        self._counts.resumes += 1
        self._note("resumed", cloud=link.url, action=action, rows=rows, after_s=monotonic() - began)
        return True

    async def _moved_on(self, link: CloudLink, search: CloudSearch, began: float) -> bool:
        """The same cut with a new session at `link`."""
        leg = self._live
        assert leg.remote is not None
        if leg.remote.link is link and leg.remote.half.suspended:
            return False  # lost over the resume: the session may still be there in the next round
        try:
            self._feasibility.check(leg.decision, link)
            await self._go_to(link, "lost", began)
        except (*LOSSES, UsageError) as error:
            search.error = error
            await self._live.settle()
            if not isinstance(error, CloudError):
                search.give_up(link)
            return False
        return True

    async def _go_to(self, link: CloudLink, reason: str, began: float) -> None:
        """The same cut with a new session at `link`; what ends the attempt is raised."""
        self._take(await self._legs.elsewhere(self._live, link))
        await self._live.fill(self._ids, self.index)
        self._counts.failovers += 1
        decision = self._live.decision
        self._note(
            "moved",
            route=decision.route,
            split=decision.split,
            cloud=link.url,
            reason=reason,
            after_s=monotonic() - began,
        )

    # ---- wishes ----------------------------------------------------------------------------------

    async def _go_where_wished(self) -> None:
        if (wanted := self._wanted) is not None:
            self._wanted = None
            await self._move(wanted)
        remote = self._live.remote
        if remote is not None and remote.half.goaway is not None and self._request.fallback != "none":
            await self._leave(remote.link, remote.half.goaway.alternative)

    async def _move(self, wanted: _Wanted) -> None:
        leg = self._live
        self.disturbed = True
        await leg.settle()
        try:
            await self._recut(wanted.decision, wanted.link)
        except LOSSES as error:
            if not wanted.done.done():
                wanted.done.set_exception(error)
            if self._live is not leg:  # lost on arrival: the old place is given up already
                raise
            await leg.go_on(self._ids, self.index)
            return
        self._counts.moves += 1
        decision = wanted.decision
        self._note("moved", route=decision.route, split=decision.split, shape=decision.shape, reason="asked")
        if not wanted.done.done():
            wanted.done.set_result(None)

    async def _recut(self, decision: Decision, link: CloudLink | None) -> None:
        self._take(await self._legs.recut(self._live, decision, link, self._ids))
        await self._live.fill(self._ids, self.index)

    async def _leave(self, link: CloudLink, alternative: str) -> None:
        """The cloud drains: go to another one that stands. Without one, stay as long as it lasts."""
        if monotonic() < self._leave_at:
            return
        self._leave_at = monotonic() + _LEAVE_AGAIN_S
        leg = self._live
        for other in self._clouds.in_order(link, alternative):
            if other is link:
                continue
            try:
                async with asyncio.timeout(_LEAVE_TIMEOUT_S):
                    await other.connect()
                self._feasibility.check(leg.decision, other)
            except (IsthmusError, TimeoutError):
                continue
            await leg.settle()
            self.disturbed = True
            await self._go_to(other, "drain", monotonic())
            return

    def _end_wish(self, error: IsthmusError) -> None:
        if self._wanted is not None and not self._wanted.done.done():
            self._wanted.done.set_exception(error)
        self._wanted = None

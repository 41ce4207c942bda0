"""The clouds of one agent: which of them stand, in which order they are asked, and whose word about others
counts."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from time import monotonic
from typing import Any

from isthmus.edge.link import CloudLink, check_url
from isthmus.protocol.errors import CloudUnreachableError, IsthmusError, RejectedError
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import Hello

_BEST_FIRST = ("up", "unknown", "refused", "down")


class Clouds:
    """Links to `urls`, in the order of preference. Nothing is connected before it is needed."""

    def __init__(
        self,
        urls: Sequence[str],
        hello: Hello,
        *,
        api_key: str | None = None,
        limits: Limits | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.links = [
            CloudLink(url, hello, api_key=api_key, limits=limits, ssl_context=ssl_context) for url in urls
        ]

    async def aclose(self) -> None:
        for link in self.links:
            await link.aclose()

    def stats(self) -> list[dict[str, Any]]:
        """State, traffic and estimates of each link; None where something was never known."""
        now = monotonic()
        return [_stats(link, now) for link in self.links]

    def best_state(self, *, by_name: bool) -> tuple[str, str, CloudLink | None]:
        """(state, detail, link) of the best cloud. A failed one counts as "unknown" again once its circuit
        lets a probe through, or where the route is asked for `by_name`."""
        if not self.links:
            return "none", "no cloud is configured", None
        now = monotonic()
        states = []
        for link in self.links:
            state = link.state
            if state in ("down", "refused") and (by_name or link.breaker.may_try(now)):
                state = "unknown"
            states.append((_BEST_FIRST.index(state), state, link))
        _, state, link = min(states, key=lambda entry: entry[0])
        detail = link.detail
        if state == "down" and (wait_s := link.breaker.retry_in_s(now)):
            detail += f"; tried again in {wait_s:.0f} s"
        return state, detail, link

    def fresh_failure(self) -> IsthmusError | None:
        """Why no cloud could be reached a moment ago; None where one stands, or was not tried."""
        if any(link.state in ("up", "unknown") for link in self.links):
            return None
        return next((link.failure for link in self.links if link.failure is not None), None)

    async def reach(self) -> CloudLink:
        """The first cloud that stands or can be connected to. Clouds whose circuit is open are tried last."""
        for link in self.links:
            if link.state == "up":
                return link
        now = monotonic()
        failure: IsthmusError | None = None
        for link in sorted(self.links, key=lambda link: not link.breaker.may_try(now)):
            try:
                await link.connect()
            except (CloudUnreachableError, RejectedError) as error:
                failure = failure or error
            else:
                return link
        assert failure is not None, "the router allows a cloud only where one is configured"
        raise failure

    def in_order(self, first: CloudLink, alternative: str = "") -> list[CloudLink]:
        """All clouds to go on with after trouble at `first`: the one it named itself (only if it is among
        ours: nobody is sent to strangers), `first`, then the others."""
        named = [link for link in self.links if alternative and _same(link.url, alternative)]
        rest = [link for link in self.links if link is not first and link not in named]
        return [*(link for link in named if link is not first), first, *rest]


def _stats(link: CloudLink, now: float) -> dict[str, Any]:
    view, welcome = link.estimate(now), link.welcome
    profile = welcome.profile if welcome else None
    return {
        "url": link.url,
        "state": link.state,
        "detail": link.detail,
        "circuit": link.breaker.state(now),
        "rtt_s": link.rtt_s,
        "rtt_age_s": view.rtt.age_s if view.rtt else None,
        "up_bytes_per_s": view.up.value if view.up else None,
        "down_bytes_per_s": view.down.value if view.down else None,
        "bytes_up": link.bytes_up,
        "bytes_down": link.bytes_down,
        "connects": link.num_connects,
        "precision": welcome.cloud_precision if welcome else None,
        "device": profile.device if profile else None,
    }


def _same(ours: str, told: str) -> bool:
    try:
        return check_url(ours, None) == check_url(told, None)
    except IsthmusError:
        return False

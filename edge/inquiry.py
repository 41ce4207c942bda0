"""Ask a cloud what it is and how far away, without running anything there: for plans and benches."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from isthmus.edge.link import CloudLink, hello_of
from isthmus.protocol.errors import RejectedError
from isthmus.splitter.links import LinkView
from isthmus.splitter.situation import CloudState

if TYPE_CHECKING:
    from isthmus.protocol.profiles import DeviceProfile, Prices
    from isthmus.splitter.pack import Pack


@dataclass(frozen=True)
class CloudAnswer:
    """What a cloud says of itself, and the link as it was measured. `state`: connected, as busy as it is now.
    `context`: most tokens of a session."""

    profile: DeviceProfile
    prices: Prices | None
    state: CloudState
    context: int
    link: LinkView


async def ask_cloud(
    pack: Pack, url: str, *, api_key: str | None = None, ssl_context: ssl.SSLContext | None = None
) -> CloudAnswer:
    """Connect to `url` as an edge with `pack`, measure the link (up to 3 s and 1 MiB), and part.

    Raises what CloudLink's `connect` and `probe` do; RejectedError (`no_cloud_profile`) where the cloud tells
    no profile of itself."""
    link = CloudLink(url, hello_of(pack, "isthmus-plan"), api_key=api_key, ssl_context=ssl_context)
    try:
        welcome = await link.connect()
        if welcome.profile is None:
            raise RejectedError(
                f"{url} tells no profile of itself",
                code="no_cloud_profile",
                hint="plan with --cloud-profile, --rtt-ms, --up-mbps and --down-mbps instead",
            )
        await link.probe()
        load = link.load or welcome.load
        state = CloudState(tls=url.startswith("wss:"), sessions=float(load.running), queue_s=load.queue_s)
        context = min(welcome.context_length, welcome.limits.max_tokens_per_session)
        return CloudAnswer(welcome.profile, welcome.prices, state, context, link.estimate(monotonic()))
    finally:
        await link.aclose()

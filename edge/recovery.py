"""The search for a cloud to go on with: bounded in time, and no stampede on a machine that comes back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Final

from isthmus.edge.link import CloudLink, NobodyListensError
from isthmus.protocol.errors import CloudError, ConfigError, IsthmusError, RejectedError

# Recoveries without a new token between them: then a cloud that dies of this very request is left alone.
MAX_FRUITLESS: Final = 8


@dataclass(frozen=True)
class RecoveryConfig:
    """How long a lost cloud is looked for. All in seconds.

    `budget_s`: for finding one that stands, this one or another. `refused_grace_s`: the same where every
    machine answers that nothing listens, and this device could go on alone. Attempts pause by full jitter,
    at most `first_pause_s` and then twice as long each time, up to `longest_pause_s`.
    """

    budget_s: float = 10.0
    refused_grace_s: float = 1.0
    first_pause_s: float = 0.1
    longest_pause_s: float = 2.0

    def __post_init__(self) -> None:
        for name in ("budget_s", "refused_grace_s", "first_pause_s", "longest_pause_s"):
            value = getattr(self, name)
            if not 0 <= value <= 3600:
                raise ConfigError(f"{name} is {value}, allowed are 0 to 3600 seconds", code="bad_recovery")


class CloudSearch:
    """Yields links that stand, best first, until the caller is content or the time is over."""

    def __init__(self, links: Sequence[CloudLink], config: RecoveryConfig, *, can_do_without: bool) -> None:
        """`can_do_without`: there is another way to go on, so nobody waits long for a dead process."""
        self.error: IsthmusError | None = None
        """Why the newest candidate was none."""
        self._links = list(links)
        self._config = config
        self._can_do_without = can_do_without

    def give_up(self, link: CloudLink) -> None:
        """This cloud stands and is of no use: don't yield it again."""
        self._links.remove(link)

    async def found(self) -> AsyncIterator[CloudLink]:
        """Connected links. A link that proved useless is yielded again in the next round."""
        began = monotonic()
        deadline = began + self._config.budget_s
        pause_s = self._config.first_pause_s
        while self._links:
            all_dead = True
            for link in tuple(self._links):
                try:
                    await link.connect()
                except (CloudError, RejectedError) as error:
                    self.error = error
                    all_dead = all_dead and isinstance(error, NobodyListensError)
                    if isinstance(error, RejectedError) and error.retry_after_s is None:
                        self.give_up(link)
                    continue
                all_dead = False
                yield link
            if all_dead and self._can_do_without:
                deadline = min(deadline, began + self._config.refused_grace_s)
            wait_s = random.uniform(0, pause_s)
            if monotonic() + wait_s >= deadline:
                return
            await asyncio.sleep(wait_s)
            pause_s = min(self._config.longest_pause_s, 2 * pause_s)

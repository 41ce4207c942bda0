"""How many rows a session will produce, learned online from those that finished. Pure: no torch, no clock."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque


class OutputLengths:
    """A quantile of the output lengths of recently finished sessions, given how far a session has come.

    The prediction is the rank ceil(coverage * (m + 1)) of the m lengths in the window that are greater than
    `given`. If lengths come from one distribution, a session that reached `given` ends by its prediction with
    probability between `coverage` and `coverage + 1 / (m + 1)` (the rank of a new draw among m others is
    uniform), whatever the distribution. Two things weaken that: the window follows a drift with a delay, and
    while it fills, short sessions are overrepresented because they finish first.
    """

    def __init__(self, *, coverage: float = 0.8, window: int = 512, min_samples: int = 16) -> None:
        """`coverage`: share of sessions that shall end by their prediction. `window`: lengths remembered."""
        if not 0 < coverage < 1 or not 1 <= min_samples <= window:
            raise ValueError(
                f"coverage {coverage} must lie between 0 and 1, min_samples {min_samples} in 1..{window}"
            )
        self.coverage = coverage
        self.window = window
        self.min_samples = min_samples
        self._recent: deque[int] = deque()
        self._ordered: list[int] = []

    def __len__(self) -> int:
        return len(self._ordered)

    def observe(self, num_rows: int) -> None:
        """A session finished after `num_rows` rows of output."""
        if len(self._recent) == self.window:
            del self._ordered[bisect_left(self._ordered, self._recent.popleft())]
        self._recent.append(num_rows)
        insort(self._ordered, num_rows)

    def quantile(self, given: int, bound: int) -> int:
        """Rows of output in total, at most `bound`, that a session which has `given` of them will not exceed
        with probability `coverage`; `bound` where too few lengths are known to say."""
        first = bisect_right(self._ordered, given)
        num_longer = len(self._ordered) - first
        rank = math.ceil(self.coverage * (num_longer + 1))
        if len(self._ordered) < self.min_samples or rank > num_longer:
            return bound
        return min(self._ordered[first + rank - 1], bound)

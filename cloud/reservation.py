"""Who may start: admission by the peak of KV pages that the running sessions will need. Pure.

The peak is that of the past-future scheduler (arXiv 2507.10150): sessions that end early give their pages
back before the long ones need theirs, so the sum of all final sizes is too much, and the sum of all present
ones too little.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from isthmus.cloud.kv import PagePool
from isthmus.cloud.queueing import Entry
from isthmus.splitter.output_lengths import OutputLengths

Reservation: TypeAlias = Literal["predicted", "worst-case", "none"]


class Demand(NamedTuple):
    """What one session needs in pages: in each of `depth` layers for `rows` rows now (soon, for a prompt not
    computed yet), for `remaining` more until it ends, `end_pages` then. It holds `pages` already."""

    depth: int
    rows: int
    remaining: int
    end_pages: int
    pages: int = 0


def peak_pages(demands: Sequence[Demand], *, num_used: int, page_tokens: int) -> int:
    """The most pages that sessions need at once if each gains one row per step until its end.

    Just before the k-th longest remaining session ends, the k longest are there, each grown by the k-th's
    remaining rows (or to its own end). A session's last page counts as full while it grows: the result is
    never too small, and by less than one page per layer and session too large. Pages that several sessions
    share are counted once where `num_used`, the distinct pages in use, shows it.
    """
    table = np.array(demands, dtype=np.int64)
    depth, rows, remaining, end_pages, pages = table[np.argsort(-table[:, 2])].T
    growing = np.cumsum(depth * (rows + page_tokens - 1)) + remaining * np.cumsum(depth)
    shared = np.maximum(np.cumsum(pages) - num_used, 0)
    return int((np.minimum(np.cumsum(end_pages), growing // page_tokens) - shared).max())


class Forecaster:
    """Foretells what a session will need: for all rows it may ever hold (`worst-case`), for those it knows
    (`none`), or by the quantile of recent output lengths given what it has produced (`predicted`)."""

    def __init__(self, reservation: Reservation, lengths: OutputLengths, page_tokens: int) -> None:
        self.reservation = reservation
        self.lengths = lengths
        self.page_tokens = page_tokens

    def demand(self, entry: Entry) -> Demand:
        rows = end_rows = entry.num_known
        prompt = entry.prompt_rows
        if self.reservation != "none":
            rows = max(rows, prompt)
            end_rows = entry.max_rows
            if self.reservation == "predicted":
                end_rows = prompt + self.lengths.quantile(rows - prompt, end_rows - prompt)
            end_rows = max(rows, end_rows)
        table = entry.table
        depth = table.depth
        end_pages = depth * -(-end_rows // self.page_tokens)
        return Demand(depth, rows, end_rows - rows, end_pages, depth * table.num_columns)

    def finished(self, entry: Entry) -> None:
        """The session's length is a sample."""
        self.lengths.observe(max(0, entry.num_known - entry.prompt_rows))


class Admission:
    """Admits sessions within one plan, in the order asked, until the first that does not fit: none overtakes
    it, so that a large session gets its turn.

    If no other session runs, one is always admitted. Worst-case reservation adds up the final sizes, because
    it promises that no session at work is ever preempted, and when others end is no more than a guess.
    """

    def __init__(
        self, pool: PagePool, forecaster: Forecaster, running: Sequence[Entry], idle: Sequence[Entry]
    ) -> None:
        """`idle`: those that may be preempted to make room, first to go first. `running`: all others."""
        self._pool = pool
        self._forecaster = forecaster
        self._running = [forecaster.demand(entry) for entry in running]
        self._idle = [(entry, forecaster.demand(entry)) for entry in idle]
        self._end_pages = sum(one.end_pages for one in self._running)
        self._refused = False

    def admit(self, entry: Entry) -> list[Entry] | None:
        """The idle sessions to preempt so that `entry` can start, or None: it cannot."""
        if self._refused:
            return None
        demand = self._forecaster.demand(entry)
        num_idle = len(self._idle)
        num_gone = bisect_left(range(num_idle + 1), True, key=lambda num: self._fits(demand, num))
        if num_gone > num_idle and self._running:
            self._refused = True
            return None
        preempted = [idle for idle, _ in self._idle[:num_gone]]
        del self._idle[:num_gone]
        self._running.append(demand)
        self._end_pages += demand.end_pages
        return preempted

    def _fits(self, demand: Demand, num_gone: int) -> bool:
        """Whether a session of `demand` fits if the first `num_gone` idle ones are preempted."""
        idle = [one for _, one in self._idle[num_gone:]]
        end_pages = self._end_pages + sum(one.end_pages for one in idle) + demand.end_pages
        if end_pages <= self._pool.num_pages or self._forecaster.reservation == "worst-case":
            return end_pages <= self._pool.num_pages
        peak = peak_pages(
            [*self._running, *idle, demand],
            num_used=self._pool.num_used,
            page_tokens=self._forecaster.page_tokens,
        )
        return peak <= self._pool.num_pages

"""How a step's row budget is shared out among sessions in the order of their turns. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from isthmus.cloud.queueing import Entry


def share_budget(
    queue: Sequence[Entry],
    admit: Callable[[Entry], bool],
    *,
    max_rows: int,
    max_chunk_rows: int | None,
    may_be_alone: bool,
) -> tuple[dict[int, int], bool]:
    """Rows that each session of `queue` may compute in this step, by session id, at most `max_rows` together.

    Sessions with a single row compete with each other only, and so do those with more. These keep a quarter
    of the budget however many single rows there are, and get what single rows leave; single rows beyond the
    budget take turns (see `Fcfs.turns`): so neither kind can starve the other.
    `admit` is asked once, in order, for each session that would start with its share.

    Where `max_chunk_rows` is None, sessions are served whole or not at all. The first that does not fit
    beside the single rows gets a step for itself, even beyond `max_rows`, and True is returned; unless
    `may_be_alone` is False and there are others to serve: single rows must get every other step.
    """
    num_short = sum(1 for entry in queue if entry.num_pending == 1)
    reserved = max(max_rows // 4, 1) if num_short < len(queue) else 0
    short_left = min(num_short, max_rows - reserved)
    long_left = for_long = max_rows - short_left
    shares: dict[int, int] = {}
    too_long: Entry | None = None
    for entry in queue:
        rows = entry.num_pending
        if rows == 1:
            if short_left and (entry.running or admit(entry)):
                shares[entry.session_id] = 1
                short_left -= 1
            continue
        if max_chunk_rows is not None:
            rows = min(rows, max_chunk_rows, long_left)
        elif rows > long_left:
            if long_left == for_long:
                too_long = entry
            long_left = rows = 0  # no shorter one overtakes it
        if rows and (entry.running or admit(entry)):
            shares[entry.session_id] = rows
            long_left -= rows
    if too_long is not None and (may_be_alone or not shares) and (too_long.running or admit(too_long)):
        return {too_long.session_id: too_long.num_pending}, True
    return shares, False

"""How a step's row budget is shared out among sessions in the order of their turns, and how much of it goes
to others before one that comes now. Pure."""

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
    short_left = _for_short(num_short, max_rows, others=num_short < len(queue))
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


def _for_short(num_short: int, max_rows: int, *, others: bool) -> int:
    """Rows of the budget that single rows get, beside `others` with more."""
    return min(num_short, max_rows - (max(max_rows // 4, 1) if others else 0))


def rows_before(ahead: Sequence[int], num_short: int, *, max_rows: int, max_chunk_rows: int | None) -> int:
    """Rows of others that are computed up to and in the first step with room for a new session's prompt.

    `ahead`: rows, more than one, of each session whose turn comes first, in order; `num_short` sessions have
    a single row in every step, as decoding ones do. Shares are those of `share_budget`, but that sessions
    served whole (`max_chunk_rows` None) are taken to be cut at the end of the budget.
    """
    short = _for_short(num_short, max_rows, others=True)
    chunk = max_chunk_rows or max_rows
    left, total = list(ahead), 0
    while True:
        shares: list[int] = []
        room = max_rows - short
        for rows in left:
            shares.append(min(rows, chunk, room))
            room -= shares[-1]
        if room:
            return total + short + sum(shares)
        # The shares stay what they are until one of the sessions has less than its own left.
        num_steps = min(rows // share for rows, share in zip(left, shares, strict=True) if share)
        total += num_steps * max_rows
        left = [
            rows - num_steps * share
            for rows, share in zip(left, shares, strict=True)
            if rows > num_steps * share
        ]

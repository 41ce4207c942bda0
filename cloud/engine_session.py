"""One session inside the engine: its kept input rows, the outputs it owes, its sampling state."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from isthmus.cloud.kv import BlockTable
from isthmus.protocol.errors import IsthmusError, RequestError, SequenceError
from isthmus.protocol.sampling import Sampled, SamplingParams, TokenCounts, sample

if TYPE_CHECKING:
    from torch import Tensor

Rows: TypeAlias = NDArray[np.float32]  # [n, hidden]
Ids: TypeAlias = NDArray[np.int64]  # [n]
Finish: TypeAlias = Literal["stop", "length"]
OutputRows: TypeAlias = Literal["none", "last", "all"]

_GREEDY: Final = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOpen:
    """What the engine must know of a session. `split` is K, the entry layer; `offer` the (number of tokens,
    digest) pairs to look up in `tenant`'s prefix cache; `max_context` the most rows its KV may hold. Of
    sessions that compete, those of a higher `priority` go first. `context_ids` beyond the prompt are the
    output of an earlier session that this one goes on with: as many as the index drawn first."""

    split: int
    shape: Literal["prefix", "u"]
    prompt_tokens: int
    max_tokens: int
    max_context: int
    sampling: SamplingParams = _GREEDY
    end_ids: frozenset[int] = frozenset()
    context_ids: tuple[int, ...] | None = None
    offer: tuple[tuple[int, str], ...] = ()
    tenant: str = "local"
    stream_window: int = 2**31
    priority: int = 0

    @property
    def offload(self) -> bool:
        """Whether the cloud goes on by itself after the first token."""
        return self.split == 0 and self.shape == "prefix"


@dataclass(frozen=True, slots=True)
class Opened:
    """`cached_rows` rows came from the prefix cache."""

    session_id: int
    cached_rows: int


@dataclass(frozen=True, slots=True)
class Progress:
    """`num_rows` more rows that owe no output are computed."""

    session_id: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """Sampled tokens from output index `first_index` on; `kv_len` rows are kept. `stream`: produced without a
    step of the edge."""

    session_id: int
    kv_len: int
    first_index: int
    sampled: tuple[Sampled, ...]
    finish: Finish | None
    stream: bool


@dataclass(frozen=True, slots=True)
class Hidden:
    """U-shape: hidden rows before the final norm, float32 [n, hidden]."""

    session_id: int
    kv_len: int
    rows: Rows


@dataclass(frozen=True, slots=True)
class Closed:
    """The session is gone. `pages_freed` went back to the pool, `kv_len` rows were held, of which
    `cached_rows` stay findable in the prefix cache."""

    session_id: int
    pages_freed: int
    kv_len: int
    cached_rows: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The session is gone with `error`; its pages are free, all other sessions go on."""

    session_id: int
    error: IsthmusError


@dataclass(frozen=True, slots=True)
class CanaryRows:
    """The cloud's own rows of the canary sequence at the boundary `split`, float32 [n, hidden]."""

    session_id: int
    split: int
    rows: Rows


EngineOutput: TypeAlias = Opened | Progress | Tokens | Hidden | Closed | Failed | CanaryRows


class RowHistory:
    """The input rows of a session, kept so that its KV can be computed again: rows [n, hidden] or ids [n]."""

    def __init__(self, hidden: int | None) -> None:
        shape = (64,) if hidden is None else (64, hidden)
        self._data: NDArray[Any] = np.zeros(shape, dtype=np.int64 if hidden is None else np.float32)
        self.length = 0

    def append(self, rows: Rows | Ids) -> None:
        total = self.length + len(rows)
        if total > len(self._data):
            grown = np.zeros((max(total, 2 * len(self._data)), *self._data.shape[1:]), dtype=self._data.dtype)
            grown[: self.length] = self._data[: self.length]
            self._data = grown
        self._data[self.length : total] = rows
        self.length = total

    def truncate(self, to: int) -> None:
        self.length = min(self.length, to)

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        return self._data[: self.length][rows]


@dataclass(slots=True)
class Due:
    """Rows [start, stop) of the input produce output; `got` holds what was computed of them so far.
    `drafts`: their ids if they are a draft chain, which ends at the first token that is not the next id."""

    start: int
    stop: int
    stream: bool = False
    drafts: tuple[int, ...] = ()
    got: list[Tensor] = field(default_factory=list)
    num_got: int = 0


class EngineSession:
    """The engine's record of one session. Touched by the engine's thread only."""

    def __init__(self, session_id: int, request: EngineOpen, table: BlockTable, *, hidden: int) -> None:
        self.session_id = session_id
        self.request = request
        self.table = table
        self.history = RowHistory(None if request.split == 0 else hidden)
        self.due: deque[Due] = deque()
        # Spans of steps that owe nothing, by which credits go back; an output step's go with its RESULT.
        self._plain: deque[tuple[int, int]] = deque()
        # (output index, token): the output that the penalties count.
        self.tokens = list(enumerate((request.context_ids or ())[request.prompt_tokens :]))
        self.stream_limit = request.stream_window
        self.num_streamed = 0
        self.paused_token: int | None = None
        self._counts: TokenCounts | None = None

    def _context(self, num_output: int) -> TokenCounts | None:
        """What penalties count before output `num_output` is drawn: the ids as told or, where rows are ids,
        as received."""
        if self._counts is None and self.request.sampling.needs_context:
            num_prompt = self.request.prompt_tokens
            told: Sequence[int] | None = self.request.context_ids
            if told is None and self.request.split == 0:
                told = self.history[: num_prompt + num_output].tolist()
                self.tokens = list(enumerate(told[num_prompt:]))
            if told is not None:
                self._counts = TokenCounts(told[:num_prompt], [token for _, token in self.tokens])
        return self._counts

    def add_rows(self, rows: Rows | Ids, output: OutputRows, drafts: tuple[int, ...] = ()) -> None:
        """Appends input rows; their last one, or all of them, will produce output. `drafts`: their ids, if
        they are a draft chain, as far as its drafts are right.

        Raises:
            RequestError (`context_overflow`): the session would hold more rows than it asked for.
            RequestError (`verify_in_offload`): a draft chain where the cloud generates by itself.
        """
        start, stop = self.history.length, self.history.length + len(rows)
        if stop > self.request.max_context:
            raise RequestError(
                f"{stop} rows exceed the session's context of {self.request.max_context}",
                code="context_overflow",
                hint="open the session with a larger max_context",
            )
        if drafts and self.request.offload:
            raise RequestError(
                "a draft chain in offload, where the cloud generates by itself", code="verify_in_offload"
            )
        self.history.append(rows)
        if output == "none":
            self._plain.append((start, stop))
        else:
            self.due.append(Due(stop - 1 if output == "last" else start, stop, drafts=drafts))

    def add_token(self, token: int) -> None:
        """Offload: the sampled token becomes the next input row, which owes the next token."""
        start = self.history.length
        self.history.append(np.array([token], dtype=np.int64))
        self.due.append(Due(start, start + 1, stream=True))

    def truncate(self, to: int) -> int:
        """Forgets input rows from `to` on, what they still owed, and the tokens drawn after them.

        Returns how many of those rows were never computed and owed nothing: their credits go back too.

        Raises:
            SequenceError (`truncate_past_end`): there are fewer rows than that.
        """
        if not 0 <= to <= self.history.length:
            raise SequenceError(
                f"cannot truncate to {to}: {self.history.length} rows are known", code="truncate_past_end"
            )
        self.history.truncate(to)
        while self.due and self.due[-1].stop > to:
            self.due.pop()
        num_dropped = 0
        while self._plain and self._plain[-1][1] > to:
            start, stop = self._plain.pop()
            num_dropped += stop - max(start, to)
            if start < to:
                self._plain.append((start, to))
        # The token of index i was drawn from row prompt_tokens + i - 1, which is gone if it is >= to.
        kept = [one for one in self.tokens if self.request.prompt_tokens + one[0] <= to]
        # Rows that are ids may come back as other ids: what was sampled before is no longer what counts.
        if len(kept) < len(self.tokens) or self.request.split == 0:
            self.tokens = kept
            self._counts = None
        self.paused_token = None
        return num_dropped

    def settle(self, start: int, rows: Tensor) -> tuple[int, list[tuple[Due, list[Tensor]]]]:
        """Rows [start, start + n) are computed: how many of them owed nothing, and the outputs now complete
        with their hidden rows. Rows computed again after a preemption count for nothing."""
        stop = start + len(rows)
        num_plain = 0
        while self._plain and self._plain[0][0] < stop:
            first, last = self._plain.popleft()
            num_plain += min(stop, last) - first
            if last > stop:
                self._plain.appendleft((stop, last))
        complete: list[tuple[Due, list[Tensor]]] = []
        while self.due and self.due[0].start < stop:
            due = self.due[0]
            part = rows[max(0, due.start + due.num_got - start) : due.stop - start]
            due.got.append(part)
            due.num_got += len(part)
            if due.start + due.num_got < due.stop:
                break
            self.due.popleft()
            complete.append((due, due.got))
        return num_plain, complete

    def draw(self, logits: NDArray[np.float32], due: Due) -> tuple[tuple[Sampled, ...], Finish | None]:
        """The tokens of rows [due.start, due.stop) from their logits [n, vocab], cut where the answer ends
        and, in a draft chain, after the first that is not the next row's id.

        Raises:
            IsthmusError: the logits are not finite, or penalties lack the tokens to count.
        """
        request = self.request
        first = due.start + 1 - request.prompt_tokens
        counts = self._context(first)
        num_counted = self.tokens[-1][0] + 1 if self.tokens else 0
        if counts is not None and first != num_counted:
            raise RequestError(
                f"penalties need all tokens so far: token {first} is to be drawn, {num_counted} are known",
                code="context_needed",
                hint="open a session whose prompt and context_ids hold them",
            )
        sampled: list[Sampled] = []
        for row, line in zip(range(due.start, due.stop), logits, strict=True):
            # The token drawn from row r stands at position r + 1 of the sequence.
            one = sample(line, request.sampling, position=row + 1, counts=counts)
            index = row + 1 - request.prompt_tokens
            sampled.append(one)
            if counts is not None:
                self.tokens.append((index, one.token))
                counts.add(one.token)
            finish = self._finish_after(one.token, index, row + 1)
            if finish is not None:
                return tuple(sampled), finish
            if due.drafts and due.drafts[len(sampled) : len(sampled) + 1] != (one.token,):
                break
        return tuple(sampled), None

    def _finish_after(self, token: int, index: int, kv_len: int) -> Finish | None:
        if token in self.request.end_ids:
            return "stop"
        if index + 1 >= self.request.max_tokens or kv_len >= self.request.max_context:
            return "length"
        return None

    def may_stream(self) -> bool:
        """Whether one more token may be produced without a step: the edge's window has room."""
        return self.num_streamed < self.stream_limit


def as_rows(rows: NDArray[np.float32] | Sequence[int]) -> Rows | Ids:
    """Input as the history keeps it: float32 [n, hidden] rows, or int64 [n] token ids."""
    if isinstance(rows, np.ndarray) and rows.ndim == 2:
        return np.ascontiguousarray(rows, dtype=np.float32)
    return np.asarray(rows, dtype=np.int64)

"""Rule 8's canary as both ends keep count of it: one fixed row sequence per split, numbered, in order."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from isthmus.protocol.activations import RowCodec, RowFormat
from isthmus.protocol.admission import check_body
from isthmus.protocol.errors import CodecError, OverloadedError, SequenceError
from isthmus.protocol.events import CanaryDone, CanaryRequested
from isthmus.protocol.frames import Frame, MsgType, json_frame, parse_json
from isthmus.protocol.messages import CanaryResult

MAX_PENDING = 8
MAX_ROWS = 64

CanaryCache = dict[tuple[str, str, int], CanaryResult]
"""A result holds for (edge weights hash, edge precision, split); one cache serves all connections."""


class EdgeCanaries:
    """Which splits the cloud agreed to, and what it has still to answer."""

    def __init__(self, passed: Iterable[int]) -> None:
        self.passed = set(passed)
        self._num_sent = 0
        self._num_done = 0

    def send(self, split: int, rows: NDArray[np.float32], hidden: int) -> Frame:
        """The CANARY frame: raw f32[n, hidden] at `split`."""
        if self._num_sent - self._num_done >= MAX_PENDING:
            raise OverloadedError(f"{MAX_PENDING} canaries are unanswered", code="canaries_pending")
        encoded = RowCodec(RowFormat.F32, hidden).encode(rows)
        self._num_sent += 1
        return Frame(
            MsgType.CANARY,
            seq=self._num_sent,
            pos=split,
            n_tok=len(rows),
            dtype=encoded.dtype,
            codec=encoded.codec,
            raw_len=encoded.raw_len,
            body=encoded.body,
        )

    def answered(self, frame: Frame) -> CanaryDone:
        """Take in CANARY_RESULT. SequenceError for one that is not due."""
        result = parse_json(frame, CanaryResult)
        if frame.seq != self._num_done + 1 or frame.seq > self._num_sent:
            raise SequenceError(
                f"CANARY_RESULT {frame.seq}; {self._num_sent} canaries were sent, {self._num_done} answered",
                code="unexpected_canary_result",
            )
        self._num_done = frame.seq
        if result.ok:
            self.passed.add(result.split)
        return CanaryDone(result)


class CloudCanaries:
    """What this edge's weights may be trusted with, from the shared cache."""

    def __init__(self, cache: CanaryCache, weights_hash: str, precision: str, num_layers: int) -> None:
        self._cache = cache
        self._weights_hash = weights_hash
        self._precision = precision
        self._num_layers = num_layers
        self._num_received = 0
        self._pending: dict[int, int] = {}  # seq → split

    def is_ok(self, split: int) -> bool:
        known = self._cache.get((self._weights_hash, self._precision, split))
        return known is not None and known.ok

    def passed(self) -> tuple[int, ...]:
        """All splits with an agreeing canary."""
        return tuple(split for split in range(1, self._num_layers) if self.is_ok(split))

    def received(self, frame: Frame, hidden: int) -> CanaryRequested:
        """Take in CANARY: sizes first, then its number."""
        if not 1 <= frame.pos < self._num_layers or frame.n_tok > MAX_ROWS:
            raise CodecError(
                f"canary of {frame.n_tok} rows (at most {MAX_ROWS}) at split {frame.pos}, splits go from 1 "
                f"to {self._num_layers - 1}",
                code="bad_canary",
            )
        check_body(frame, RowCodec(RowFormat.F32, hidden))
        if frame.seq != self._num_received + 1 or len(self._pending) >= MAX_PENDING:
            raise SequenceError(
                f"canary {frame.seq} after {self._num_received}; {len(self._pending)} of at most "
                f"{MAX_PENDING} are pending",
                code="bad_canary",
            )
        self._num_received = frame.seq
        self._pending[frame.seq] = frame.pos
        return CanaryRequested(frame.pos, frame.seq, frame)

    def answer(self, seq: int, result: CanaryResult) -> Frame:
        """CANARY_RESULT, remembered in the cache. SequenceError if the oldest pending one is another."""
        oldest = next(iter(self._pending.items()), None)
        if oldest != (seq, result.split):
            raise SequenceError(
                f"canary {seq} at split {result.split} answered, due is {oldest}", code="engine_mismatch"
            )
        del self._pending[seq]
        self._cache[self._weights_hash, self._precision, result.split] = result
        return json_frame(MsgType.CANARY_RESULT, result, seq=seq)

"""Sessions over a real engine driven by hand: prefilled once, then decoded in rounds that can be repeated.

The edges are played by rows computed beforehand, so a step's time is the cloud's alone. Split sessions (and
the U-shape at K = 0) are teacher-forced: their next row is the next of those; offload sessions stream
their own tokens. A round begins by truncating to the prompt, so every round computes the same positions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self, TypeAlias

from isthmus.cloud.engine import Engine
from isthmus.cloud.engine_session import EngineOpen, EngineOutput, Failed, Hidden, Ids, Rows, Tokens
from isthmus.cloud.kv import columns_for
from isthmus.cloud.model import CloudModel
from isthmus.protocol.errors import IsthmusError

Shape: TypeAlias = Literal["prefix", "u"]


@dataclass(frozen=True)
class EdgeInputs:
    """What the edges send, for some texts: `ids[text]` int64 [n]; `rows[text][k]` float32 [n, hidden], the
    rows at the boundary before layer k. Session i speaks text i modulo the number of texts."""

    ids: Sequence[Ids]
    rows: Sequence[Sequence[Rows]]

    def of(self, number: int, split: int) -> Rows | list[int]:
        text = number % len(self.ids)
        return self.rows[text][split] if split else self.ids[text].tolist()


@dataclass(slots=True)
class FleetSession:
    """One session: `inputs` are its token ids at K = 0, else its boundary rows, of prompt and output."""

    number: int
    split: int
    shape: Shape
    inputs: Rows | list[int]
    num_tokens: int = 0
    """Tokens whose keys and values the cloud holds."""
    first_token: int | None = None
    num_streamed: int = 0

    @property
    def streams(self) -> bool:
        """Offload: the engine goes on by itself after one row."""
        return self.split == 0 and self.shape == "prefix"

    def row(self, position: int) -> Rows | list[int]:
        """The input of one decode step: for offload the token the cloud itself sampled after the prompt."""
        if self.first_token is not None:
            return [self.first_token]
        return self.inputs[position : position + 1]


@dataclass(frozen=True, slots=True)
class Decode:
    """One round: seconds and row-layers of the steps of each group."""

    seconds: tuple[float, ...]
    row_layers: tuple[int, ...]

    @property
    def total_s(self) -> float:
        return sum(self.seconds)


@dataclass(frozen=True, slots=True)
class KVAccount:
    """Pages in use, and what (N - K) x ceil(tokens / 16) summed over the sessions comes to."""

    pages: int
    expected_pages: int
    page_bytes: int

    def to_row(self) -> dict[str, int]:
        return {
            "bytes": self.pages * self.page_bytes,
            "expected_bytes": self.expected_pages * self.page_bytes,
            "pages": self.pages,
            "expected_pages": self.expected_pages,
        }


class CloudRig:
    """An engine over one model, driven by hand, and the fleets open in it."""

    def __init__(
        self,
        model: CloudModel,
        inputs: EdgeInputs,
        *,
        prompt_tokens: int,
        output_tokens: int,
        max_whole_sessions: int,
    ) -> None:
        """Every session holds at most `prompt_tokens + output_tokens` tokens; the pool has pages for
        `max_whole_sessions` such sessions at K = 0, so that none waits for another."""
        self.model = model
        self.inputs = inputs
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.max_context = prompt_tokens + output_tokens + 1
        pages = (max_whole_sessions + 1) * model.spec.num_layers * columns_for(self.max_context)
        self.engine = Engine.over(model, pages, on_bug=_raise)
        self.fleets: list[Fleet] = []

    def fleet(self, splits: Sequence[int], *, shape: Shape = "prefix", together: bool = True) -> Fleet:
        """Opens one session per entry layer in `splits` and computes their prompts."""
        return Fleet(self, splits, shape=shape, together=together)

    def step(self) -> list[EngineOutput]:
        """One engine step, which must compute something and fail no session."""
        before = self.engine.core.rows_computed_total
        outputs = self.engine.step()
        for output in outputs:
            if isinstance(output, Failed):
                raise output.error
        if self.engine.core.rows_computed_total == before:
            raise IsthmusError("an engine step with work to do computed no row", code="bench_stalled")
        self.synchronize()
        return outputs

    def synchronize(self) -> None:
        """Waits for the device: what it was given is done."""
        if self.model.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.model.device)

    def check_kv(self) -> KVAccount:
        """The pages in use are those of the open fleets' tokens, to the page.

        Raises:
            IsthmusError (`kv_accounting`): they are not.
        """
        num_layers = self.model.spec.num_layers
        expected = sum(
            (num_layers - session.split) * columns_for(session.num_tokens)
            for fleet in self.fleets
            for session in fleet.sessions
        )
        account = KVAccount(self.engine.pool.num_used, expected, self.model.page_bytes)
        if account.pages != expected:
            raise IsthmusError(
                f"{account.pages} KV pages of {account.page_bytes} bytes are in use, the sessions' layers "
                f"and tokens need {expected}",
                code="kv_accounting",
                hint="this is a bug in the page accounting",
            )
        return account


class Fleet:
    """Sessions that decode together, or one at a time (each a group of its own). Closed on exit."""

    def __init__(self, rig: CloudRig, splits: Sequence[int], *, shape: Shape, together: bool) -> None:
        self.rig = rig
        self.splits = tuple(splits)
        self.sessions = [self._open(i, split, shape) for i, split in enumerate(splits)]
        self.groups = [self.sessions] if together else [[session] for session in self.sessions]
        rig.fleets.append(self)
        self.prefill_s = self._prefill()

    @property
    def num_prompt_rows(self) -> int:
        return len(self.sessions) * self.rig.prompt_tokens

    @property
    def group_splits(self) -> list[list[int]]:
        """Entry layers by group."""
        return [[session.split for session in group] for group in self.groups]

    def _open(self, number: int, split: int, shape: Shape) -> FleetSession:
        rig = self.rig
        request = EngineOpen(
            split=split,
            shape=shape,
            prompt_tokens=rig.prompt_tokens,
            max_tokens=rig.output_tokens + 1,  # one after the prompt, then a round's
            max_context=rig.max_context,
            stream_window=0,  # offload waits for the first round
        )
        return FleetSession(rig.engine.open(request), split, shape, rig.inputs.of(number, split))

    def _prefill(self) -> float:
        """Seconds of the steps until every session has answered its prompt."""
        rig, waiting = self.rig, {session.number: session for session in self.sessions}
        for session in self.sessions:
            rig.engine.add_rows(session.number, session.inputs[: rig.prompt_tokens], output="last")
        begun = time.perf_counter()
        while waiting:
            for output in rig.step():
                if not isinstance(output, Tokens | Hidden):
                    continue
                session = waiting.pop(output.session_id)
                session.num_tokens = rig.prompt_tokens
                if session.streams and isinstance(output, Tokens):
                    session.first_token = output.sampled[0].token
        return time.perf_counter() - begun

    def decode(self, num_steps: int | None = None) -> Decode:
        """`num_steps` (the rig's `output_tokens` at most) steps of every group, each giving one token, or
        hidden row, per session. The KV accounting is checked afterwards.

        Raises:
            IsthmusError (`bench_uneven`): a step left a session out. Whatever the engine raises.
        """
        steps = self.rig.output_tokens if num_steps is None else num_steps
        rounds = [self._decode_group(group, steps) for group in self.groups]
        self.rig.check_kv()
        return Decode(tuple(s for s, _ in rounds), tuple(n for _, n in rounds))

    def _decode_group(self, group: Sequence[FleetSession], num_steps: int) -> tuple[float, int]:
        rig, core = self.rig, self.rig.engine.core
        expected = {session.number for session in group}
        row_layers = core.row_layers_total
        seconds = 0.0
        for index in range(num_steps):
            begun = time.perf_counter()
            for session in group:
                self._feed(session, index, num_steps)
            outputs = rig.step()
            seconds += time.perf_counter() - begun
            answered = {output.session_id for output in outputs if isinstance(output, Tokens | Hidden)}
            if answered != expected:
                raise IsthmusError(
                    f"a step answered {len(answered & expected)} of {len(expected)} decoding sessions",
                    code="bench_uneven",
                    hint="more sessions than the scheduler's rows per step?",
                )
        for session in group:
            session.num_tokens = rig.prompt_tokens + num_steps
        return seconds, core.row_layers_total - row_layers

    def _feed(self, session: FleetSession, index: int, num_steps: int) -> None:
        """The next row, unless the session produces it itself; the first one of a round rewinds."""
        engine, start = self.rig.engine, self.rig.prompt_tokens
        if index and session.streams:
            return
        row = session.row(start + index)
        engine.add_rows(session.number, row, output="last", truncate_to=start if index == 0 else None)
        if session.streams:
            session.num_streamed += num_steps - 1  # the first token answers this row
            engine.set_stream_limit(session.number, session.num_streamed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for session in self.sessions:
            self.rig.engine.cancel(session.number)
        self.rig.engine.step()
        self.rig.fleets.remove(self)


def _raise(error: BaseException) -> None:
    raise error


def spread(num_sessions: int, num_layers: int) -> tuple[int, ...]:
    """Entry layers of `num_sessions` sessions, even over 0..N-1 with both ends: their mean is (N-1)/2 for any
    number from two on, so that loads of different size are alike per session."""
    if num_sessions == 1:
        return (0,)
    return tuple(round(i * (num_layers - 1) / (num_sessions - 1)) for i in range(num_sessions))


def equal_work(num_uniform: int, num_layers: int) -> tuple[int, ...]:
    """Entry layers over all depths with the row-layers per step of `num_uniform` sessions at K = 0: one at
    K = 0, and num_uniform - 1 pairs (k, N - k), whose layers together are N."""
    half = num_layers // 2
    pairs = num_uniform - 1
    firsts = [1 + round(i * (half - 1) / max(1, pairs - 1)) for i in range(pairs)] if half else []
    return tuple(sorted([0, *firsts, *(num_layers - k for k in firsts)]))

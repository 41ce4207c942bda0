"""Edges for engine tests: they compute the layers below K with the same torch model and drive an engine."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from isthmus.cloud.attention import StepSequence
from isthmus.cloud.engine import Engine
from isthmus.cloud.engine_session import (
    Closed,
    EngineOpen,
    EngineOutput,
    Failed,
    Hidden,
    Opened,
    Progress,
    Tokens,
)
from isthmus.cloud.forward import MixedForward
from isthmus.cloud.kv import BlockTable, PagePool, columns_for
from isthmus.cloud.model import CloudModel, model_logits
from isthmus.cloud.scheduler import Scheduler, SchedulerConfig
from isthmus.protocol.errors import IsthmusError
from isthmus.protocol.prefix import digest_chain
from isthmus.protocol.sampling import Sampled, SamplingParams, TokenCounts, sample

GREEDY = SamplingParams(temperature=0.0)
SECRET, CONTEXT = b"s" * 32, b"context"


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 320), k=length)


def greedy_reference(model: CloudModel, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model_logits(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


def offer_of(ids: list[int], *extra: int) -> tuple[tuple[int, str], ...]:
    return tuple(digest_chain(SECRET, CONTEXT, ids, extra_lengths=extra).entries)


def make_engine(model: CloudModel, *, pages: int = 400, config: SchedulerConfig | None = None) -> Engine:
    """An engine to be driven by hand, with a clock that moves one second per step asked."""
    store = model.new_store(pages)
    pool = PagePool(pages, on_alloc=store.zero_pages)
    ticks = iter(range(10**9))
    return Engine(
        MixedForward(model, store),
        Scheduler(pool, store.copy_pages, config or SchedulerConfig()),
        clock=lambda: float(next(ticks)),
    )


class EdgeHalf:
    """Layers 0..K-1 for one sequence, with a KV of its own."""

    def __init__(self, model: CloudModel, split: int, *, capacity: int = 512) -> None:
        self.model, self.split = model, split
        pages = model.spec.num_layers * columns_for(capacity)
        self.store = model.new_store(pages)
        self.table = BlockTable(
            PagePool(pages, on_alloc=self.store.zero_pages), first_layer=0, num_layers=model.spec.num_layers
        )

    @torch.inference_mode()
    def rows(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Boundary rows [n, hidden] of the next `ids`."""
        self.table.ensure(self.table.length + len(ids))
        batch = self.model.prepare(self.store, [StepSequence(self.table, len(ids))])
        rows = self.model.embed(ids)
        for layer in range(self.split):
            rows = self.model.layer(layer, rows, batch)
        self.table.advance(len(ids))
        return np.array(rows.numpy())


@dataclass
class Client:
    """One edge: sends its prompt in chunks, then a row per token, until the cloud or it says stop."""

    engine: Engine
    model: CloudModel
    prompt: list[int]
    split: int = 0
    shape: str = "prefix"
    max_tokens: int = 8
    chunk: int = 1000
    sampling: SamplingParams = GREEDY
    end_ids: tuple[int, ...] = ()
    offer: tuple[tuple[int, str], ...] = ()
    context_ids: tuple[int, ...] | None = None
    tenant: str = "local"
    max_context: int = 256

    tokens: list[int] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    finish: str | None = None
    error: IsthmusError | None = None
    closed: Closed | None = None
    cached_rows: int = 0
    credits_back: int = 0
    kv_len: int = 0

    def start(self) -> Client:
        self.edge = EdgeHalf(self.model, self.split)
        self.counts = TokenCounts(self.prompt)
        self.session_id = self.engine.open(
            EngineOpen(
                split=self.split,
                shape="u" if self.shape == "u" else "prefix",
                prompt_tokens=len(self.prompt),
                max_tokens=self.max_tokens,
                max_context=self.max_context,
                sampling=self.sampling,
                end_ids=frozenset(self.end_ids),
                context_ids=self.context_ids,
                offer=self.offer,
                tenant=self.tenant,
            )
        )
        if not self.offer:
            self._send_prompt(0)
        return self

    @property
    def done(self) -> bool:
        return self.finish is not None or self.error is not None or self.closed is not None

    def take(self, output: EngineOutput) -> None:
        if isinstance(output, Opened):
            self.cached_rows = output.cached_rows
            if self.offer:
                self._send_prompt(output.cached_rows)
        elif isinstance(output, Progress):
            self.credits_back += output.num_rows
        elif isinstance(output, Tokens):
            assert output.first_index == len(self.tokens)
            self.kv_len = output.kv_len
            for one in output.sampled:
                self._emit(one, stream=self.split == 0)
            self.finish = output.finish
        elif isinstance(output, Hidden):
            self.kv_len = output.kv_len
            logits = self.model.head(torch.from_numpy(output.rows[-1:])).numpy()[0]
            position = len(self.prompt) + len(self.tokens)
            one = sample(logits, self.sampling, position=position, counts=self.counts)
            self.counts.add(one.token)
            if one.token in self.end_ids:
                self.finish = "stop"
            elif len(self.tokens) + 1 == self.max_tokens:
                self.finish = "length"
            self._emit(one, stream=False)
        elif isinstance(output, Failed):
            self.error = output.error
        elif isinstance(output, Closed):
            self.closed = output

    def _emit(self, one: Sampled, *, stream: bool) -> None:
        self.tokens.append(one.token)
        self.sampled.append(one)
        if not stream and len(self.tokens) < self.max_tokens and one.token not in self.end_ids:
            self._send([one.token], "last")

    def _send_prompt(self, start: int) -> None:
        if self.split and start:
            self.edge.rows(self.prompt[:start])
        for first in range(start, len(self.prompt), self.chunk):
            part = self.prompt[first : first + self.chunk]
            self._send(part, "last" if first + self.chunk >= len(self.prompt) else "none")

    def _send(self, ids: Sequence[int], output: str) -> None:
        rows = self.edge.rows(ids) if self.split else ids
        self.engine.add_rows(self.session_id, rows, output="last" if output == "last" else "none")


def run(engine: Engine, clients: Iterable[Client], *, max_steps: int = 2000) -> None:
    """Steps the engine until every client is done, checking the page accounting after each step."""
    by_id = {client.session_id: client for client in clients}
    for _ in range(max_steps):
        for output in engine.step():
            if output.session_id in by_id:
                by_id[output.session_id].take(output)
        engine.pool.check()
        if all(client.done for client in by_id.values()):
            return
    raise AssertionError(f"not done after {max_steps} steps: {[c for c in by_id.values() if not c.done]}")


def alone(model: CloudModel, **options: object) -> Client:
    """The same client on an engine of its own."""
    client = Client(make_engine(model), model, **options)  # type: ignore[arg-type]  # forwarded as given
    run(client.engine, [client.start()])
    return client

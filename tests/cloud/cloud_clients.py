"""Edges for engine tests: they compute the layers below K with the same torch model and drive an engine."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from isthmus.cloud.engine import Engine
from isthmus.cloud.engine_session import (
    Closed,
    EngineOpen,
    EngineOutput,
    Failed,
    Hidden,
    Opened,
    OutputRows,
    Progress,
    Tokens,
)
from isthmus.cloud.forward import MixedForward
from isthmus.cloud.kv import BlockTable, PagePool, columns_for
from isthmus.cloud.kv_store import StepSequence
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


def make_engine(
    model: CloudModel,
    *,
    pages: int = 400,
    config: SchedulerConfig | None = None,
    clock: Callable[[], float] | None = None,
) -> Engine:
    """An engine to be driven by hand, by default with a clock that moves one second each time it is asked."""
    store = model.new_store(pages)
    pool = PagePool(pages, on_alloc=store.zero_pages)
    return Engine(
        MixedForward(model, store),
        Scheduler(pool, store.copy_pages, config or SchedulerConfig()),
        clock=clock or map(float, itertools.count()).__next__,
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

    def truncate(self, to: int) -> None:
        self.table.truncate(min(to, self.table.length))


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
    priority: int = 0
    stream_window: int = 2**31

    tokens: list[int] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    finish: str | None = None
    error: IsthmusError | None = None
    closed: Closed | None = None
    cached_rows: int = 0
    credits_back: int = 0
    kv_len: int = 0
    num_sent: int = 0
    """Rows the cloud holds once all that was sent has been computed."""

    def start(self) -> Client:
        self.edge = EdgeHalf(self.model, self.split, capacity=self.max_context)
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
                priority=self.priority,
                stream_window=self.stream_window,
            )
        )
        if not self.offer:
            self._send_prompt(0)
        return self

    @property
    def offload(self) -> bool:
        return self.split == 0 and self.shape == "prefix"

    @property
    def known(self) -> list[int]:
        """All ids so far; the rows of all but the last are, or will be, in the cloud's KV."""
        return [*self.prompt, *self.tokens]

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
            assert output.kv_len == len(self.known) + len(output.sampled) - 1
            self.sampled += output.sampled
            self.tokens += [one.token for one in output.sampled]
            self.finish = output.finish
            self.kv_len = self.num_sent = output.kv_len  # the cloud itself cut what a draft chain lost
            self.go_on()
        elif isinstance(output, Hidden):
            self._judge(output)
            self.go_on()
        elif isinstance(output, Failed):
            self.error = output.error
        elif isinstance(output, Closed):
            self.closed = output

    def _judge(self, output: Hidden) -> None:
        """U-shape: draws from each row that came back, up to the first token that is not the next id."""
        first = output.kv_len - len(output.rows)
        ids = self._sent_ids[-len(output.rows) :]
        for at, line in enumerate(self.model.head(torch.from_numpy(output.rows)).numpy()):
            assert first + at + 1 == len(self.known)
            one = sample(line, self.sampling, position=len(self.known), counts=self.counts)
            self.counts.add(one.token)
            self.sampled.append(one)
            self.tokens.append(one.token)
            if one.token in self.end_ids:
                self.finish = "stop"
            elif len(self.tokens) == self.max_tokens:
                self.finish = "length"
            if self.finish or ids[at + 1 : at + 2] != [one.token]:
                break
        self.kv_len = len(self.known) - 1

    def go_on(self) -> None:
        self.edge.truncate(len(self.known) - 1)
        if self.finish is None and not self.offload:
            self.step()

    def step(self) -> None:
        """Sends the newest token's row."""
        self.before(len(self.known) - 1)
        self.send(self.tokens[-1:], "last")

    def _send_prompt(self, start: int) -> None:
        self.num_sent = start
        if self.split and start:
            self.edge.rows(self.prompt[:start])
        for first in range(start, len(self.prompt), self.chunk):
            part = self.prompt[first : first + self.chunk]
            self.before(first)
            self.send(part, "last" if first + self.chunk >= len(self.prompt) else "none", at=first)

    def before(self, at: int) -> None:
        """The rows for the positions from `at` on are about to be sent."""

    def send(
        self, ids: Sequence[int], output: OutputRows, *, at: int | None = None, chain: bool = False
    ) -> None:
        """Rows of `ids` for the positions from `at` on (default: that of the newest token), cutting off what
        was sent beyond; `chain`: a draft chain."""
        at = len(self.known) - 1 if at is None else at
        self.edge.truncate(at)
        rows = self.edge.rows(ids) if self.split else ids
        cut = at if at < self.num_sent else None
        self.engine.add_rows(
            self.session_id, rows, output=output, truncate_to=cut, drafts=ids if chain else None
        )
        self.num_sent = at + len(ids)
        self._sent_ids = list(ids)


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


def check_tokens(client: Client) -> None:
    """Greedy tokens equal the model's, but where its two best logits are closer than 1e-3."""
    ids = list(client.prompt)
    assert len(client.tokens) == client.max_tokens
    logits = model_logits(client.model, [*ids, *client.tokens])[len(ids) - 1 : -1]
    for index, (line, token) in enumerate(zip(logits, client.tokens, strict=True)):
        if token != int(line.argmax()):
            gap = float(line.max() - line[token])
            assert gap < 1e-3, f"token {index} is {token}, the model says {line.argmax()} by {gap}"
            print(f"near-tie at token {index}: {gap:.1e}")


def is_idle(engine: Engine) -> bool:
    """Every page is free or cached, nothing is scheduled."""
    engine.pool.check()
    engine.cache.check()
    stats = engine.stats()
    return stats.pages_used == stats.sessions == 0

"""Random schedules: sessions that do all that the protocol allows, on an engine short of pages and steps."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isthmus.cloud.engine import Engine
from isthmus.cloud.engine_session import EngineOutput, Tokens
from isthmus.cloud.kv import columns_for
from isthmus.cloud.model import CloudModel, model_logits
from isthmus.cloud.scheduler import SchedulerConfig
from isthmus.protocol.sampling import SamplingParams, TokenCounts, sample
from tests.cloud.cloud_clients import GREEDY, Client, alone, is_idle, make_engine, offer_of, prompt_of

LAYERS, VOCAB = 4, 320
MAX_STEPS = 5000
# Where a session's tokens differ from those it gets alone, logits that far off must give them as well.
NEAR_TIE = 1e-4

SAMPLINGS = (
    GREEDY,
    SamplingParams(temperature=0.0, repetition_penalty=1.4, presence_penalty=0.4, frequency_penalty=0.3),
    SamplingParams(temperature=0.9, top_k=40, seed=3),
    SamplingParams(temperature=1.1, top_p=0.9, repetition_penalty=1.2, seed=4, logprobs=2),
)


@dataclass(eq=False)
class Restless(Client):
    """Beside plain steps it sends draft chains, right and wrong; rows that it takes back; and rows once more.
    `reference`: its tokens alone."""

    draw: random.Random = field(default_factory=random.Random)
    reference: Sequence[int] = ()
    did: Counter[str] = field(default_factory=Counter)
    after: Restless | None = None
    """Whose conversation it goes on with."""
    chain: tuple[int, int] | None = None
    """Tokens there were, and rows, when the draft chain went out that is not answered yet."""

    def take(self, output: EngineOutput) -> None:
        super().take(output)
        if isinstance(output, Tokens) and output.stream:
            more = self.draw.randint(1, 3)  # after which the cloud has to wait
            self.engine.set_stream_limit(self.session_id, len(self.tokens) - 1 + more)

    def go_on(self) -> None:
        if self.chain is not None:
            before, num_rows = self.chain
            self.chain = None
            num_tokens = len(self.tokens) - before
            self.did["drafts accepted"] += num_tokens - 1
            self.did["chains rejected"] += num_tokens < num_rows and self.finish is None
        super().go_on()

    def step(self) -> None:
        at = len(self.known) - 1
        way = self.draw.random()
        if way < 0.5:
            self.before(at)
            ids = [self.tokens[-1], *self.drafts(min(6, self.max_context - at - 1))]
            self.did["chains"] += 1
            self.chain = len(self.tokens), len(ids)
            self.send(ids, "none", chain=True)
        elif way < 0.65 and (self.shape == "u" or not self.sampling.needs_context):
            # With penalties in the prefix shape the cloud would have to know whose rows it gets again.
            self.did["rows sent again"] += 1
            first = self.draw.randint(0, at)
            self.send(self.known[first:], "last", at=first)
        else:
            super().step()

    def drafts(self, most: int) -> list[int]:
        """Up to `most` ids, of which all, the first ones, or none are what comes."""
        known = len(self.tokens)
        ids = [*self.reference[known : known + most], *self.junk(most)][: self.draw.randint(0, most)]
        if ids and self.draw.random() < 0.6:
            wrong = self.draw.randrange(len(ids))
            ids[wrong] = (ids[wrong] + 1) % VOCAB
        return ids

    def before(self, at: int) -> None:
        """Now and then rows that the next step takes back, computed by then or not."""
        most = min(6, self.max_context - at)
        if most > 0 and self.draw.random() < 0.2:
            self.did["rows taken back"] += 1
            self.send(self.junk(self.draw.randint(1, most)), "none", at=at)

    def junk(self, count: int) -> list[int]:
        return self.draw.choices(range(3, VOCAB), k=count)


@dataclass(eq=False)
class Schedule:
    """One random schedule over one engine; `did` counts what happened in it."""

    model: CloudModel
    seed: int
    did: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.clients: list[Restless] = []
        for number in range(self.draw.randint(4, 10)):
            self._add(number)
        self.engine = self._engine()
        for client in self.clients:
            client.engine = self.engine

    def _add(self, number: int) -> None:
        """A session, and what it gets alone. Some go on from where an earlier one will have ended."""
        draw = self.draw
        split, shape, tenant = draw.randrange(LAYERS), draw.choice(["prefix", "u"]), draw.choice("ab")
        prompt = prompt_of(draw.randint(1, 30), 100 * self.seed + number)
        extra: tuple[int, ...] = ()
        earlier = draw.choice(self.clients) if self.clients else None
        if earlier is not None and draw.random() < 0.5:
            split, shape = earlier.split, earlier.shape
            tenant = earlier.tenant if draw.random() < 0.8 else tenant
            whole = [*earlier.prompt, *earlier.reference]
            extra = (len(whole) - 1,)
            prompt = [*whole, *prompt[:8]] if len(whole) < 90 else whole
        sampling = draw.choice(SAMPLINGS)
        told = sampling.needs_context and shape == "prefix"
        options: dict[str, Any] = {
            "prompt": prompt,
            "split": split,
            "shape": shape,
            "max_tokens": draw.randint(1, 24),
            "sampling": sampling,
            "end_ids": tuple(draw.sample(range(VOCAB), k=draw.choice([0, 12]))),
            "context_ids": tuple(prompt) if told else None,
        }
        plain = alone(self.model, **options)
        self.clients.append(
            Restless(
                plain.engine,
                self.model,
                **options,
                chunk=draw.randint(1, 50),
                offer=offer_of(prompt, *extra) if draw.random() < 0.8 else (),
                tenant=tenant,
                max_context=len(prompt) + options["max_tokens"] + draw.randint(0, 8),
                priority=draw.choice([0, 0, -5, 5]),
                stream_window=draw.randint(1, 4),
                draw=draw,
                reference=plain.tokens,
                did=self.did,
                after=earlier if extra else None,
            )
        )

    def _engine(self) -> Engine:
        draw = self.draw
        needs = [(LAYERS - one.split) * columns_for(one.max_context) for one in self.clients]
        config = SchedulerConfig(
            max_rows=draw.choice([2, 4, 8, 16, 40]),
            max_chunk_rows=draw.choice([1, 2, 4, 8, 40]),
            idle_preempt_s=draw.choice([0.0, 0.0, 5.0, 100.0]),
            policy=draw.choice(["fcfs", "mlfq"]),
            chunked=draw.random() < 0.8,
            reservation=draw.choice(["predicted", "worst-case", "none", "none", "none", "none"]),
            aging_s=draw.choice([3.0, 30.0]),
            mlfq_quantum_s=draw.choice([0.05, 3.0]),
        )
        pages = max(max(needs), int(sum(needs) * draw.choice([0.15, 0.25, 0.6])))
        return make_engine(self.model, pages=pages, config=config)

    def run(self) -> Counter[str]:
        """Plays the schedule to its end and checks it; the counts."""
        draw, engine = self.draw, self.engine
        waiting, running = list(self.clients), dict[int, Restless]()
        for _ in range(MAX_STEPS):
            if waiting and draw.random() < (0.5 if len(running) < 4 else 0.05):
                ready = [one for one in waiting if one.after not in running.values() or draw.random() < 0.1]
                client = draw.choice(ready or waiting)
                waiting.remove(client)
                client.start()
                running[client.session_id] = client
            if running and draw.random() < 0.01:
                self._leave(running.pop(draw.choice(list(running))), "left")
            for output in engine.step():
                if output.session_id in running:
                    running[output.session_id].take(output)
            engine.pool.check()
            for number in [number for number, client in running.items() if client.done]:
                self._leave(running.pop(number), "finished")
            if not waiting and not running:
                break
        assert not waiting, f"{len(waiting)} sessions did not start in {MAX_STEPS} steps"
        assert not running, f"{len(running)} sessions did not end in {MAX_STEPS} steps"
        engine.step()
        self._check()
        return self.did

    def _leave(self, client: Restless, how: str) -> None:
        """By CANCEL, or by CLOSE with an offer of what the cloud holds for sure."""
        self.did[how] += 1
        if client.kv_len and self.draw.random() < 0.7:
            held = client.known[: client.kv_len]
            self.engine.close(client.session_id, offer_of(held, len(held)))
        else:
            self.did["cancelled"] += 1
            self.engine.cancel(client.session_id)

    def _check(self) -> None:
        engine, stats = self.engine, self.engine.stats()
        for client in self.clients:
            assert client.error is None
            self._check_tokens(client)
        self.did["preemptions"] += stats.preemptions_total
        self.did["prefix hits"] += stats.prefix_hits_total
        assert is_idle(engine)
        engine.cache.clear()
        engine.pool.check()
        assert engine.pool.num_free == engine.pool.num_pages

    def _check_tokens(self, client: Restless) -> None:
        """What came is what comes alone: all of it, or its beginning where the session left early."""
        self.did["tokens"] += len(client.tokens)
        assert len(client.tokens) <= len(client.reference)
        pairs = zip(client.tokens, client.reference, strict=False)
        at = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
        if at is None:
            assert client.finish is None or len(client.tokens) == len(client.reference)
            return
        assert is_near_tie(client, at), (
            f"seed {self.seed}: token {at} is {client.tokens[at]}, alone it is {client.reference[at]}"
        )
        print(f"seed {self.seed}: near-tie at token {at}")
        self.did["near-ties"] += 1


def is_near_tie(client: Restless, at: int) -> bool:
    """Whether logits within NEAR_TIE of the model's give the client's token `at`."""
    before = list(client.reference[:at])
    logits = model_logits(client.model, [*client.prompt, *before])[-1]
    position = len(client.prompt) + at
    for seed in range(200):
        noise = np.random.default_rng(seed).choice([-NEAR_TIE, NEAR_TIE], size=logits.shape)
        counts = TokenCounts(client.prompt, before)
        one = sample((logits + noise).astype(np.float32), client.sampling, position=position, counts=counts)
        if one.token == client.tokens[at]:
            return True
    return False

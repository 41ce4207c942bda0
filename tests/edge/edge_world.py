"""Shared by the edge's tests: a tiny f32 pack, requests over it, and what an agent yields, collected."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.edge.agent import Agent
from isthmus.edge.requests import Finished, GenerateRequest, Started, Token
from isthmus.protocol.sampling import SamplingParams
from isthmus.splitter.build import build_pack
from isthmus.splitter.checkpoint import open_checkpoint
from isthmus.splitter.pack import Pack
from tests.packs import SideFiles
from tests.tiny import TINY_CHAT_TEMPLATE, make_tiny, tiny_tokenizer_json

GREEDY = SamplingParams(temperature=0.0)


TINY_FILES = SideFiles(tiny_tokenizer_json().encode(), TINY_CHAT_TEMPLATE)


@dataclass(frozen=True)
class TinyModel:
    """One random model: its checkpoint (for the cloud and the oracle) and its pack (for the edge)."""

    checkpoint: Path
    pack: Pack


def make_model(
    root: Path, *, family: str = "llama", seed: int = 0, bits: Any = 32, **overrides: Any
) -> TinyModel:
    """A tiny checkpoint and the pack built from it."""
    checkpoint = make_tiny(family, root / "checkpoint", seed=seed, **overrides)
    with open_checkpoint(checkpoint) as source:
        build_pack(source, TINY_FILES, root / "pack", bits=bits)
    return TinyModel(checkpoint, Pack.open(root / "pack"))


def prompt_of(length: int, *, start: int = 7) -> tuple[int, ...]:
    """A fixed prompt of ordinary tokens."""
    return tuple(3 + (start + 31 * i + i * i) % 250 for i in range(length))


def ask(prompt: tuple[int, ...] | list[int], max_tokens: int = 8, **fields: Any) -> GenerateRequest:
    """A greedy request without end ids, unless said otherwise."""
    fields.setdefault("sampling", GREEDY)
    return GenerateRequest(tuple(prompt), max_tokens, **fields)


@dataclass(frozen=True)
class Outcome:
    """All events of one request."""

    started: Started
    tokens: tuple[Token, ...]
    finished: Finished

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


async def collect(agent: Agent, request: GenerateRequest) -> Outcome:
    """Run a request to its end; checks what holds for every outcome."""
    started: Started | None = None
    tokens: list[Token] = []
    finished: Finished | None = None
    async with aclosing(agent.generate(request)) as events:
        async for event in events:
            assert finished is None, "nothing follows Finished"
            if isinstance(event, Started):
                assert not tokens
                started = event
            elif isinstance(event, Token):
                assert event.index == len(tokens)
                tokens.append(event)
            elif isinstance(event, Finished):
                finished = event
    assert started is not None
    assert finished is not None
    assert finished.token_ids == tuple(token.id for token in tokens)
    assert finished.text == "".join(token.text for token in tokens) + finished.tail
    assert finished.counts["completion_tokens"] == len(tokens)
    return Outcome(started, tuple(tokens), finished)

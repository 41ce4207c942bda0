"""What `bench router --live` asks, and under which conditions: phases drawn from a seed. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from isthmus.bench.workload import TraceRequest
from isthmus.relay import LinkShape

PROMPT_TOKENS: Final = (16, 512)
OUTPUT_TOKENS: Final = (8, 96)


@dataclass(frozen=True, slots=True)
class Span:
    """Where a figure is drawn from, evenly on a logarithmic scale."""

    low: float
    high: float

    def draw(self, rng: random.Random) -> float:
        return math.exp(rng.uniform(math.log(self.low), math.log(self.high)))


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of conditions: ranges of the link (ms, Mbit/s), the edge's factor, and whether its memory is
    too small for the whole model."""

    rtt_ms: Span
    mbps: Span
    throttle: float
    capped: bool


KINDS: Final = {
    "idle_edge": Kind(Span(5, 150), Span(1, 100), 1.0, capped=False),
    "small_near": Kind(Span(5, 8), Span(30, 100), 1.0, capped=True),
    "slow_edge": Kind(Span(5, 60), Span(5, 100), 6.0, capped=False),
    "small_far": Kind(Span(40, 150), Span(1, 20), 1.0, capped=True),
}
_SEQUENCE: Final = (*KINDS, *KINDS, *KINDS, "idle_edge", "small_near", "slow_edge")
"""How often each comes in 15 phases; shuffled before use."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One link and one edge. `throttle`: how many times as long the edge's blocks take; `capped`: its memory
    does not hold the whole model."""

    kind: str
    link: LinkShape
    throttle: float
    capped: bool

    def told(self) -> str:
        """For people."""
        link = self.link
        edge = f"edge slowed {self.throttle:g} times (emulated)" if self.throttle > 1 else "edge as it is"
        memory = "memory capped" if self.capped else "memory free"
        return (
            f"{self.kind}: RTT {link.rtt_ms:g} ms, {link.up_mbps:g} Mbit/s up, {link.down_mbps:g} down, "
            f"{edge}, {memory}"
        )


class Lengths(NamedTuple):
    """Tokens of one request: of its prompt, and of its answer (no end token is named, so it has all)."""

    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Phase:
    """Requests, one after the other, under one condition."""

    condition: Condition
    requests: tuple[Lengths, ...]


def draw_phases(requests: Sequence[Lengths], phase_requests: int, *, seed: int) -> tuple[Phase, ...]:
    """`requests`, in their order, in phases of `phase_requests`; shorter ones where not every kind of
    condition would come otherwise. The order of the conditions and their figures are drawn."""
    rng = random.Random(seed)
    size = max(1, min(phase_requests, len(requests) // len(KINDS)))
    starts = range(0, len(requests), size)
    names = [_SEQUENCE[number % len(_SEQUENCE)] for number in range(len(starts))]
    rng.shuffle(names)
    return tuple(
        Phase(_condition(name, rng), tuple(requests[at : at + size]))
        for name, at in zip(names, starts, strict=True)
    )


def _condition(name: str, rng: random.Random) -> Condition:
    kind = KINDS[name]
    link = LinkShape(
        rtt_ms=round(kind.rtt_ms.draw(rng), 1),
        up_mbps=round(kind.mbps.draw(rng), 2),
        down_mbps=round(kind.mbps.draw(rng), 2),
    )
    return Condition(name, link, kind.throttle, kind.capped)


def draw_lengths(num_requests: int, *, context: int, seed: int) -> list[Lengths]:
    """Evenly on a logarithmic scale within PROMPT_TOKENS and OUTPUT_TOKENS, and within `context` together."""
    rng = random.Random(seed)
    prompt, output = (Span(*bounds) for bounds in _bounds(context))
    return [Lengths(round(prompt.draw(rng)), round(output.draw(rng))) for _ in range(num_requests)]


def trace_lengths(
    trace: Sequence[TraceRequest], num_requests: int, *, context: int, seed: int
) -> list[Lengths]:
    """Those of requests drawn from `trace`, scaled so that its 95th percentiles become the greatest lengths
    of this bench; what lies outside its range is cut to it."""
    rng = random.Random(seed)
    (least_in, most_in), (least_out, most_out) = _bounds(context)
    scale_in = most_in / _percentile_95([request.prompt_tokens for request in trace])
    scale_out = most_out / _percentile_95([request.output_tokens for request in trace])
    return [
        Lengths(
            min(most_in, max(least_in, round(one.prompt_tokens * scale_in))),
            min(most_out, max(least_out, round(one.output_tokens * scale_out))),
        )
        for one in rng.choices(trace, k=num_requests)
    ]


def _bounds(context: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Least and most tokens of a prompt and of an answer, that fit in `context` together."""
    (least_in, most_in), (least_out, most_out) = PROMPT_TOKENS, OUTPUT_TOKENS
    most_out = min(most_out, context // 4)
    most_in = min(most_in, context - most_out)
    return (min(least_in, most_in), most_in), (min(least_out, most_out), most_out)


def _percentile_95(values: Sequence[int]) -> int:
    return max(1, sorted(values)[int(0.95 * (len(values) - 1))])

"""The requests of a simulated world: a stretch of a trace, with what a trace does not tell drawn by seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from isthmus.bench.router_scenarios import Scenario
from isthmus.bench.workload import TraceRequest
from isthmus.edge.requests import Privacy
from isthmus.protocol.errors import ConfigError

FOLLOW_UPS: Final = 0.5  # of the requests that may go on with the one before
NEIGHBOURS: Final = 64


@dataclass(frozen=True, slots=True)
class SimRequest:
    """`expected`: mean answer to prompts of about this length, over the whole trace. `follows`: it goes on
    with the request before it, of which `kept` tokens are its own first ones."""

    start_s: float
    prompt: int
    output: int
    expected: float
    privacy: Privacy
    follows: bool
    kept: int


def draw_requests(
    trace: Sequence[TraceRequest],
    window: Sequence[TraceRequest],
    scenario: Scenario,
    *,
    max_context: int,
    max_tokens: int,
    seed: int,
) -> tuple[list[SimRequest], int]:
    """The requests of `window`, a part of `trace`, at the scenario's pace, and how many were clipped."""
    if not 1 <= max_tokens < max_context:
        raise ConfigError(
            f"an answer of up to {max_tokens} tokens leaves no prompt in a context of {max_context}",
            hint="choose a smaller bound, at least 1",
        )
    rng = np.random.default_rng((seed, 7))
    first, last = window[0].arrival_s, window[-1].arrival_s
    pace = scenario.gap_s * max(1, len(window) - 1) / (last - first) if last > first else 0.0
    expected = _expected(trace, max_tokens)
    requests: list[SimRequest] = []
    num_clipped = 0
    before: SimRequest | None = None
    for line in window:
        prompt, output = (
            min(line.prompt_tokens, max_context - max_tokens),
            min(line.output_tokens, max_tokens),
        )
        num_clipped += (prompt, output) != (line.prompt_tokens, line.output_tokens)
        draw, again = rng.random(2)
        privacy: Privacy = "any"
        if draw < scenario.local_only:
            privacy = "local-only"
        elif draw < scenario.local_only + scenario.private:
            privacy = "activations-only"
        longer = before is not None and prompt > before.prompt + before.output
        follows = longer and again < FOLLOW_UPS
        if follows and before is not None:
            privacy = before.privacy
        kept = before.prompt + before.output - 1 if follows and before is not None else 0
        start_s = (line.arrival_s - first) * pace if pace else len(requests) * scenario.gap_s
        before = SimRequest(start_s, prompt, output, expected(prompt), privacy, follows, kept)
        requests.append(before)
    return requests, num_clipped


def _expected(trace: Sequence[TraceRequest], max_tokens: int) -> Callable[[int], float]:
    """The mean answer to the `NEIGHBOURS` prompts of the whole trace that are nearest in length."""
    lengths = sorted((line.prompt_tokens, min(line.output_tokens, max_tokens)) for line in trace)
    prompts = np.array([prompt for prompt, _ in lengths])
    sums = np.concatenate(([0.0], np.cumsum([output for _, output in lengths])))

    def expected(prompt: int) -> float:
        low = int(np.searchsorted(prompts, prompt, "left"))
        high = int(np.searchsorted(prompts, prompt, "right"))
        while high - low < min(NEIGHBOURS, len(prompts)):
            if high == len(prompts) or (low > 0 and prompt - prompts[low - 1] <= prompts[high] - prompt):
                low -= 1
            else:
                high += 1
        return float(sums[high] - sums[low]) / (high - low)

    return expected

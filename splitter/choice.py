"""Which weight scheme `auto` takes: pure functions over what was measured, with the reason in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isthmus.quant.schemes import SCHEMES
from isthmus.splitter.fidelity import Speed
from isthmus.splitter.packing import Bits

KL_LIMIT = 1e-2
"""`auto` only takes schemes whose mean KL to the fp32 source is at most this, in nats."""

SPEED_TIE = 1.1
"""Schemes within this factor of the fastest count as equally fast: short timings are no better than that."""

TYPICAL_PROMPT, TYPICAL_OUTPUT = 128, 64
"""Tokens of the request by whose total time schemes are ranked."""


@dataclass(frozen=True)
class Candidate:
    """One scheme as measured. `speed` is None where nothing was timed: KL too high, or no choice."""

    scheme: str
    kl: float
    weights_bytes: int
    speed: Speed | None = None

    @property
    def passes(self) -> bool:
        """Whether the KL allows it."""
        return self.kl <= KL_LIMIT

    @property
    def request_s(self) -> float:
        """Predicted seconds of the typical request; infinite where not timed."""
        if self.speed is None:
            return float("inf")
        return (
            TYPICAL_PROMPT / self.speed.prefill_tokens_per_s + TYPICAL_OUTPUT / self.speed.decode_tokens_per_s
        )

    def to_json(self) -> dict[str, Any]:
        """As `choice.candidates` of the report has it."""
        speed = dataclasses.asdict(self.speed) if self.speed else {}
        return {
            "scheme": self.scheme,
            "bits": SCHEMES[self.scheme],
            "kl": self.kl,
            "passes": self.passes,
            "weights_bytes": self.weights_bytes,
            **{name: round(value, 1) for name, value in speed.items()},
        }


def choose(candidates: Sequence[Candidate], *, asked: Bits) -> tuple[Candidate, str]:
    """The candidate to publish, and why.

    With explicit bits there is one candidate. `auto`: of those within KL_LIMIT the fastest; schemes within
    SPEED_TIE of it count as equally fast, and the lowest KL among them wins. What was not timed (too big for
    the memory) is only taken where nothing else passes, and then the smallest.
    """
    first = candidates[0]
    if asked != "auto":
        reason = f"{asked} bits were asked for"
        if not first.passes:
            reason += f"; its KL {first.kl:.2g} is above {KL_LIMIT:g}, which auto would not take"
        return first, reason
    passing = [candidate for candidate in candidates if candidate.passes]
    timed = [candidate for candidate in passing if candidate.speed]
    if not timed:
        smallest = min(passing, key=lambda candidate: candidate.weights_bytes)
        what = "only" if len(passing) == 1 else "smallest"
        return smallest, f"the {what} scheme with KL ≤ {KL_LIMIT:g}" + _others(candidates, passing, [])
    best = min(candidate.request_s for candidate in timed)
    tied = [candidate for candidate in timed if candidate.request_s <= best * SPEED_TIE]
    chosen = min(tied, key=lambda candidate: (candidate.kl, candidate.request_s))
    reason = (
        f"fastest with KL ≤ {KL_LIMIT:g}: {chosen.request_s:.2f} s for {TYPICAL_PROMPT} prompt and "
        f"{TYPICAL_OUTPUT} output tokens, KL {chosen.kl:.2g}"
    )
    if len(tied) > 1:
        others = ", ".join(f"{c.scheme} ({c.request_s:.2f} s, {c.kl:.2g})" for c in tied if c is not chosen)
        reason += f"; as fast within {SPEED_TIE - 1:.0%} but with a higher KL: {others}"
    return chosen, reason + _others(candidates, passing, tied)


def _others(candidates: Sequence[Candidate], passing: Sequence[Candidate], named: Sequence[Candidate]) -> str:
    """The rest of the reason: who was slower, who was not close enough to the source."""
    slower = [f"{c.scheme} ({c.request_s:.2f} s)" for c in passing if c.speed and c not in named]
    failing = [f"{c.scheme} ({c.kl:.2g})" for c in candidates if not c.passes]
    text = f"; slower: {', '.join(slower)}" if slower else ""
    return text + (f"; KL too high: {', '.join(failing)}" if failing else "")

"""The sampler: penalties, filters in a stated order, one draw. The same on edge and cloud.

Order: repetition penalty, then frequency and presence penalty → only what is allowed (by a grammar) →
temperature → top-k → top-p → min-p → one draw. Each filter sees the distribution its predecessors left,
renormalised. Tokens are ranked by descending score, ties by ascending id; the draw walks that ranking
(inverse CDF), so it depends on nothing but the scores and u = uniform(seed, choice, position). Sums are in
float64: two machines whose `exp` differs in the last bit disagree only where u falls within ~1e-15 of a
border.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from isthmus.protocol.draw import uniform
from isthmus.protocol.errors import CodecError, RequestError

__all__ = ["MAX_LOGPROBS", "Sampled", "SamplingParams", "TokenCounts", "sample", "uniform"]

MAX_LOGPROBS: Final = 20

# How many of the best tokens are ranked at first where no top-k says it, and by how much that grows. A
# language model's nucleus nearly always lies in the first 128, and a partition is O(vocabulary).
_FIRST_RANKED: Final = 128
_GROWTH: Final = 16

Scores = NDArray[np.floating[Any]]


class SamplingParams(BaseModel):
    """How the next token is chosen. Values that leave a stage out: temperature 0 = greedy (no filter, no
    draw), top_k 0, top_p 1, min_p 0, repetition_penalty 1, presence_penalty 0, frequency_penalty 0.

    seed: u64. choice: index among the answers of one request (OpenAI's `n`). logprobs: -1 = none, n ≥ 0 =
    the chosen token's and those of the n most probable ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    choice: Annotated[int, Field(ge=0, lt=2**32)] = 0
    logprobs: Annotated[int, Field(ge=-1, le=MAX_LOGPROBS)] = -1

    @property
    def needs_context(self) -> bool:
        """Whether the sampler must know the token ids so far (rule 10 of the protocol)."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class TokenCounts:
    """What the penalties look at: the tokens of prompt and output, and how often each was generated."""

    def __init__(self, prompt_ids: Iterable[int], output_ids: Iterable[int] = ()) -> None:
        self._slot: dict[int, int] = {}
        for token in prompt_ids:
            self._slot.setdefault(token, len(self._slot))
        # Arrays beside the dict, with room to grow: a step must not convert thousands of ids again.
        self._ids = np.fromiter(self._slot, np.int64, len(self._slot))
        self._generated = np.zeros(len(self._slot))
        for token in output_ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Count one more generated token."""
        slot = self._slot.setdefault(token, len(self._slot))
        if slot == len(self._ids):
            room = np.zeros(len(self._ids) + 64)
            self._ids = np.concatenate([self._ids, room.astype(np.int64)])
            self._generated = np.concatenate([self._generated, room])
        self._ids[slot] = token
        self._generated[slot] += 1

    def penalise(self, logits: Scores, params: SamplingParams) -> NDArray[np.float64]:
        """A penalised copy of `logits`. RequestError for a token outside the vocabulary.

        Repetition (Keskar et al., CTRL, 1909.05858): tokens of prompt or output, positive scores divided,
        negative ones multiplied. Frequency and presence (OpenAI): output only, subtracted per occurrence
        and once.
        """
        scores = logits.astype(np.float64)
        known = len(self._slot)
        if known == 0:
            return scores
        ids, generated = self._ids[:known], self._generated[:known]
        if ids.min() < 0 or ids.max() >= len(scores):
            raise RequestError(
                f"context tokens span {ids.min()}..{ids.max()}, the vocabulary has {len(scores)}",
                code="bad_token_id",
            )
        touched = scores[ids]
        factor = params.repetition_penalty
        touched = np.where(touched < 0, touched * factor, touched / factor)
        touched -= params.frequency_penalty * generated + params.presence_penalty * (generated > 0)
        scores[ids] = touched
        return scores


@dataclass(frozen=True)
class Sampled:
    """The token; and, where asked for, natural-log probabilities under the model's own distribution (before
    penalties, temperature and filters, as OpenAI reports them), `top` in ranking order."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(
    logits: Scores,
    params: SamplingParams,
    *,
    position: int,
    counts: TokenCounts | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> Sampled:
    """Choose the token at absolute index `position` of the sequence from `logits` f32[vocab]; where `allowed`
    bool[vocab] is given, among those alone.

    CodecError for logits that are not one finite vector; RequestError where penalties are asked for and
    `counts` is missing, or no token is allowed.
    """
    if logits.ndim != 1 or not logits.size:
        raise CodecError(f"logits have shape {list(logits.shape)}, expected [vocab]", code="bad_logits")
    if not (np.isfinite(logits.max()) and np.isfinite(logits.min())):
        raise CodecError(
            "logits hold NaN or infinity",
            code="bad_logits",
            hint="the model overflowed, or the rows it was given were damaged",
        )
    scores = logits
    if params.needs_context:
        if counts is None:
            raise RequestError("penalties need the token ids so far, none were given", code="context_needed")
        scores = counts.penalise(logits, params)
    ids = None
    if allowed is not None:  # the rest is left out, not set to -inf: ranking it would cost milliseconds
        ids = np.flatnonzero(allowed)
        if not ids.size:
            raise RequestError("no token of the vocabulary is allowed here", code="nothing_allowed")
        scores = scores[ids]
    if params.temperature == 0:
        token = int(scores.argmax())  # the first of equals: the lowest id
    else:
        token = _draw(scores, params, uniform(params.seed, params.choice, position))
    if ids is not None:
        token = int(ids[token])
    if params.logprobs < 0:
        return Sampled(token)
    peak = float(logits.max())
    log_total = peak + float(np.log(np.exp(logits.astype(np.float64) - peak).sum()))
    top = tuple((int(i), float(logits[i]) - log_total) for i in _ranked(logits, params.logprobs))
    return Sampled(token, float(logits[token]) - log_total, top)


def _draw(scores: Scores, params: SamplingParams, u: float) -> int:
    """Rank no more tokens than top-k, or else the other filters and the draw, need."""
    vocab = len(scores)
    size = min(params.top_k or vocab, vocab)  # tokens left by top-k
    filtered = params.top_p < 1 or params.min_p > 0
    if size < vocab:
        count, total = size, 0.0
    else:
        count, total = min(_FIRST_RANKED, vocab), float(_weights(scores, scores, params).sum())
    while True:
        ids = _ranked(scores, count)
        weights = _weights(scores[ids], scores, params)
        reach = np.cumsum(weights)
        complete = count == size
        mass = float(reach[-1]) if complete else total
        kept = _num_kept(weights, reach, mass, params)
        if complete or kept < count:
            mass = float(reach[kept - 1])
            break
        if not filtered and u * mass < reach[-1]:
            break
        count = min(count * _GROWTH, vocab)  # the filters' border, or the draw, is further down
    # u < 1 makes u * mass < mass in floating point too, so the search never runs past the end.
    return int(ids[int(np.searchsorted(reach[:kept], u * mass, side="right"))])


def _num_kept(
    weights: NDArray[np.float64], reach: NDArray[np.float64], mass: float, params: SamplingParams
) -> int:
    """How many of the ranked tokens pass top-p and min-p; all of them where no border is among them."""
    kept = len(weights)
    if params.top_p < 1:
        # A token stays while those before it hold less than top_p.
        kept = min(kept, int(np.searchsorted(reach, params.top_p * mass, side="left")) + 1)
    if params.min_p > 0:
        # weights[0] is 1, so "min_p times the best" is min_p itself. Weights descend: search from the end.
        kept = min(kept, len(weights) - int(np.searchsorted(weights[::-1], params.min_p, side="left")))
    return kept


def _weights(chosen: Scores, scores: Scores, params: SamplingParams) -> NDArray[np.float64]:
    """Probabilities before normalisation, 1 for the best token. Where exp underflows, 0 is right."""
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(np.exp((chosen.astype(np.float64) - float(scores.max())) / params.temperature))


def _ranked(scores: Scores, count: int) -> NDArray[np.intp]:
    """Ids of the `count` best scores, descending, ties by ascending id."""
    if count < len(scores):
        if count == 0:
            return np.empty(0, np.intp)
        threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
        ids = np.flatnonzero(scores >= threshold)
    else:
        ids = np.arange(len(scores))
    return ids[np.argsort(-scores[ids], kind="stable")[:count]]

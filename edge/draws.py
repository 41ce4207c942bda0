"""Draws the outputs of one request: the sampler, with what penalties count and what a grammar allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from isthmus.protocol.sampling import Sampled, SamplingParams, TokenCounts, sample

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from isthmus.edge.grammar import Compiled


class Draws:
    """Begins after `outputs`, the tokens so far behind the prompt; all its state follows from them."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        grammar: Compiled | None,
        outputs: Sequence[int],
    ) -> None:
        self._prompt = prompt
        self._sampling = sampling
        self._grammar = grammar
        self._begin(outputs)

    def _begin(self, outputs: Sequence[int]) -> None:
        self._outputs = list(outputs)
        self._counts = TokenCounts(self._prompt, outputs) if self._sampling.needs_context else None
        self._matcher = self._grammar.matcher(outputs) if self._grammar else None

    def draw(self, logits: NDArray[np.float32], index: int) -> Sampled:
        """Output `index` from `logits` f32[vocab]. A token drawn before that nobody took is drawn again."""
        if index != len(self._outputs):
            self._begin(self._outputs[:index])
        result = sample(
            logits,
            self._sampling,
            position=len(self._prompt) + index,
            counts=self._counts,
            allowed=self._matcher.allowed() if self._matcher else None,
        )
        self._outputs.append(result.token)
        if self._counts is not None:
            self._counts.add(result.token)
        if self._matcher is not None:
            self._matcher.accept(result.token)
        return result

"""Ids in, certain text out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus.edge.stop import StopMatcher

if TYPE_CHECKING:
    from isthmus.splitter.tokenizer import Tokenizer


class TextOut:
    """Detokenised, UTF-8 whole, stop strings held back and cut off."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._stream = tokenizer.stream()
        self._stops = StopMatcher(stops)
        self._parts: list[str] = []

    @property
    def stopped(self) -> bool:
        """Was a stop string completed?"""
        return self._stops.stopped

    @property
    def text(self) -> str:
        """All text released so far."""
        return "".join(self._parts)

    def push(self, token: int) -> str:
        """The text that became certain with this token."""
        return self._keep(self._stops.push(self._stream.push(token)))

    def finish(self) -> str:
        """What was still held back at the end."""
        released = self._stops.push(self._stream.flush())
        return self._keep(released + self._stops.flush())

    def _keep(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text

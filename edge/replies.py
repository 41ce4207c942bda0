"""From agent events to OpenAI's replies, whole or as server-sent events, for chat and completions."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from isthmus.edge.api_errors import error_body
from isthmus.edge.digest import best_of_routes
from isthmus.edge.merge import Numbered
from isthmus.edge.requests import AgentEvent, Finished, GenerateRequest, Started, Token
from isthmus.protocol.errors import IsthmusError

if TYPE_CHECKING:
    from isthmus.splitter.tokenizer import Tokenizer


@dataclass
class Choice:
    """What one choice has said so far. `chars`: characters of the tokens whose logprobs were written."""

    text: str = ""
    finish_reason: str | None = None
    tokens: list[Token] = field(default_factory=list)
    chars: int = 0
    started: Started | None = None
    finished: Finished | None = None


class Dialect(Protocol):
    """What differs between the two endpoints."""

    prefix: str
    whole_object: str
    chunk_object: str

    def chunk(self, text: str, *, first: bool) -> dict[str, Any]: ...
    def message(self, choice: Choice) -> dict[str, Any]: ...
    def logprobs(self, choice: Choice, tokens: Sequence[Token], tokenizer: Tokenizer) -> dict[str, Any]: ...


class _Chat:
    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def chunk(self, text: str, *, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant"} if first else {}
        return {"delta": {**delta, "content": text} if text or first else delta}

    def message(self, choice: Choice) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": choice.text, "refusal": None}}

    def logprobs(self, choice: Choice, tokens: Sequence[Token], tokenizer: Tokenizer) -> dict[str, Any]:
        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            # A token may be part of a character: then only `bytes` tell it whole.
            piece = tokenizer.token_bytes(token)
            return {"token": piece.decode(errors="replace"), "logprob": logprob, "bytes": list(piece)}

        content = [
            {**entry(token.id, token.logprob), "top_logprobs": [entry(*pair) for pair in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


class _Completion:
    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def chunk(self, text: str, *, first: bool) -> dict[str, Any]:
        return {"text": text}

    def message(self, choice: Choice) -> dict[str, Any]:
        return {"text": choice.text}

    def logprobs(self, choice: Choice, tokens: Sequence[Token], tokenizer: Tokenizer) -> dict[str, Any]:
        def piece(token: int) -> str:
            return tokenizer.token_bytes(token).decode(errors="replace")

        offsets = []
        for token in tokens:
            offsets.append(choice.chars)
            choice.chars += len(piece(token.id))
        return {
            "tokens": [piece(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            # As OpenAI has it: the most probable ones, and the drawn one in any case.
            "top_logprobs": [
                {piece(i): logprob for i, logprob in (*token.top, (token.id, token.logprob))}
                for token in tokens
            ],
            "text_offset": offsets,
        }


chat_dialect: Dialect = _Chat()
completion_dialect: Dialect = _Completion()


class Reply:
    """Builds one reply, to one request with one or more choices. `explain`: its decision lists every
    candidate instead of the best of each route."""

    def __init__(
        self,
        dialect: Dialect,
        model: str,
        tokenizer: Tokenizer,
        requests: list[GenerateRequest],
        *,
        explain: bool = False,
    ) -> None:
        self.dialect, self.model, self.tokenizer = dialect, model, tokenizer
        self.requests = requests
        self.explain = explain
        self.wants_logprobs = requests[0].sampling.logprobs >= 0
        self.choices = [Choice() for _ in requests]
        self.created = int(time.time())
        self.id = f"{dialect.prefix}-{requests[0].request_id.removeprefix('req-')}"

    @staticmethod
    def route_of(first: Numbered) -> str:
        """The route, from the first event of `merge`."""
        event = first[1]
        assert isinstance(event, Started)
        return event.route

    def _note(self, index: int, event: AgentEvent) -> str:
        """Take in one event; the text that it adds."""
        choice = self.choices[index]
        if isinstance(event, Started):
            choice.started = event
            return ""
        if isinstance(event, Finished):
            choice.finished = event
            choice.finish_reason = event.finish_reason
            text = event.tail
        else:
            choice.tokens.append(event)
            text = event.text
        choice.text += text
        return text

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage`, over all choices."""
        done = [choice.finished for choice in self.choices if choice.finished]
        prompt = len(self.requests[0].prompt_ids)
        completion = sum(len(finished.token_ids) for finished in done)
        cached = max((finished.counts.get("edge_cached_rows", 0) for finished in done), default=0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def extension(self) -> dict[str, Any]:
        """The `isthmus` object of the reply: how its first choice came to be."""
        started, finished = self.choices[0].started, self.choices[0].finished
        assert started is not None
        assert finished is not None
        decision = started.decision
        if not self.explain:
            decision = replace(decision, candidates=best_of_routes(decision))
        return {
            "route": finished.route,
            "split": finished.split,
            "shape": finished.shape,
            "request_id": started.request_id,
            "decision": decision.to_dict(),
            "timings": asdict(finished.timings),
            "link": asdict(finished.link),
            "counts": finished.counts,
            "events": list(finished.events),
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, choice: Choice, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return (
            self.dialect.logprobs(choice, tokens, self.tokenizer) if self.wants_logprobs and tokens else None
        )

    async def whole(self, events: AsyncGenerator[Numbered, None]) -> dict[str, Any]:
        """The reply when every choice has finished."""
        async for index, event in events:
            self._note(index, event)
        choices = [
            {
                "index": index,
                **self.dialect.message(choice),
                "logprobs": self._logprobs(choice, choice.tokens),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self.choices)
        ]
        head = self._head(self.dialect.whole_object)
        return {**head, "choices": choices, "usage": self.usage(), "isthmus": self.extension()}

    async def server_sent_events(
        self, first: Numbered, events: AsyncGenerator[Numbered, None], *, include_usage: bool
    ) -> AsyncGenerator[str, None]:
        """The reply as server-sent events, closing with `[DONE]`; a failure on the way is the last event
        before it. The `isthmus` object comes with the chunk that finishes the last choice."""
        opened: set[int] = set()
        head = self._head(self.dialect.chunk_object)
        usage_field = {"usage": None} if include_usage else {}

        def chunk(index: int, event: AgentEvent, text: str) -> dict[str, Any]:
            choice = self.choices[index]
            body = {
                "index": index,
                **self.dialect.chunk(text, first=index not in opened),
                "logprobs": self._logprobs(choice, [event] if isinstance(event, Token) else []),
                "finish_reason": choice.finish_reason,
            }
            opened.add(index)
            last = all(c.finished for c in self.choices)
            extension = {"isthmus": self.extension()} if last else {}
            return {**head, "choices": [body], **usage_field, **extension}

        async with aclosing(events):
            self._note(*first)
            try:
                async for index, event in events:
                    text = self._note(index, event)
                    silent = not text and not self.wants_logprobs
                    if isinstance(event, Started) or (isinstance(event, Token) and silent):
                        continue
                    yield _sse(chunk(index, event, text))
            except IsthmusError as error:
                yield _sse(error_body(error))
            else:
                if include_usage:
                    yield _sse({**head, "choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"


def _sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n"

"""From agent events to OpenAI's replies, whole or as server-sent events, for chat and completions."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from isthmus.edge.api_errors import error_body
from isthmus.edge.dialects import Choice, Dialect
from isthmus.edge.digest import best_of_routes
from isthmus.edge.merge import Numbered
from isthmus.edge.requests import AgentEvent, Finished, GenerateRequest, Moved, Started, Token
from isthmus.edge.tool_reader import AnswerReader, Piece
from isthmus.edge.tools import ToolFormat
from isthmus.protocol.errors import IsthmusError

if TYPE_CHECKING:
    from isthmus.splitter.tokenizer import Tokenizer


class Reply:
    """Builds one reply, to one request with one or more choices. `explain`: its decision lists every
    candidate instead of the best of each route. `calls`: how calls of functions are written in the answer;
    None: there are none."""

    def __init__(
        self,
        dialect: Dialect,
        model: str,
        tokenizer: Tokenizer,
        requests: list[GenerateRequest],
        *,
        explain: bool = False,
        calls: ToolFormat | None = None,
    ) -> None:
        self.dialect, self.model, self.tokenizer = dialect, model, tokenizer
        self.requests = requests
        self.explain = explain
        self.wants_logprobs = requests[0].sampling.logprobs >= 0
        self.choices = [Choice(AnswerReader(calls)) for _ in requests]
        # Markers of calls that detokenising leaves out, and by which they are read.
        markers = {tokenizer.special_tokens.get(text, -1): text for text in (calls.markers if calls else ())}
        self._markers = {token: text for token, text in markers.items() if tokenizer.is_skipped(token)}
        self.created = int(time.time())
        self.id = f"{dialect.prefix}-{requests[0].request_id.removeprefix('req-')}"

    @staticmethod
    def route_of(first: Numbered) -> str:
        """The route, from the first event of `merge`."""
        event = first[1]
        assert isinstance(event, Started)
        return event.route

    def _note(self, index: int, event: AgentEvent) -> list[Piece]:
        """Take in one event; what it adds to the answer."""
        choice = self.choices[index]
        if isinstance(event, Started):
            choice.started = event
        elif isinstance(event, Token):
            choice.tokens.append(event)
            return choice.answer.push(self._markers.get(event.id, "") + event.text)
        elif isinstance(event, Finished):
            choice.finished = event
            pieces = [*choice.answer.push(event.tail), *choice.answer.finish()]
            choice.finish_reason = choice.answer.finish_reason(event.finish_reason)
            return pieces
        return []

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
                **self.dialect.message(choice.answer),
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
        before it. The first chunk's `isthmus` object says which way is taken, that of the chunk that finishes
        the last choice how it went, and one in between what happened to the request just now."""
        head = self._head(self.dialect.chunk_object)
        usage_field = {"usage": None} if include_usage else {}

        def chunk(
            index: int,
            part: dict[str, Any],
            tokens: Sequence[Token] = (),
            finish_reason: str | None = None,
            isthmus: dict[str, Any] | None = None,
        ) -> str:
            logprobs = self._logprobs(self.choices[index], tokens)
            body = {"index": index, **part, "logprobs": logprobs, "finish_reason": finish_reason}
            extension = {"isthmus": isthmus} if isthmus else {}
            return _sse({**head, "choices": [body], **usage_field, **extension})

        def chunks(index: int, event: AgentEvent, way: dict[str, Any] | None = None) -> Iterator[str]:
            pieces = self._note(index, event)
            choice = self.choices[index]
            if isinstance(event, Started):
                yield chunk(index, self.dialect.opening(choice.answer), isthmus=way)
            elif isinstance(event, Moved):
                yield chunk(index, self.dialect.nothing(), isthmus={"events": list(event.events)})
            elif isinstance(event, Token):
                tokens = [event] if self.wants_logprobs else []
                parts = [self.dialect.piece(piece) for piece in pieces]
                for number, part in enumerate(parts or [self.dialect.nothing()] * len(tokens)):
                    yield chunk(index, part, tokens if number == 0 else ())
            else:
                yield from (chunk(index, self.dialect.piece(piece)) for piece in pieces)
                last = all(each.finished for each in self.choices)
                how = self.extension() if last else None
                nothing = self.dialect.nothing()
                yield chunk(index, nothing, finish_reason=choice.finish_reason, isthmus=how)

        async with aclosing(events):
            for line in chunks(*first, way=_way(first[1])):
                yield line
            try:
                async for index, event in events:
                    for line in chunks(index, event):
                        yield line
            except IsthmusError as error:
                yield _sse(error_body(error))
            else:
                if include_usage:
                    yield _sse({**head, "choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"


def _way(started: AgentEvent) -> dict[str, Any]:
    assert isinstance(started, Started), "the first event of `merge`"
    return {
        "route": started.route,
        "split": started.split,
        "shape": started.shape,
        "request_id": started.request_id,
        "reason": started.decision.reason,
    }


def _sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n"

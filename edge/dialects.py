"""One choice of a reply, and how OpenAI's two endpoints write it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from isthmus.edge.requests import Finished, Started, Token
from isthmus.edge.tool_reader import AnswerReader, Called, Piece, Said

if TYPE_CHECKING:
    from isthmus.splitter.tokenizer import Tokenizer


@dataclass
class Choice:
    """What one choice has said so far. `chars`: characters of the tokens whose logprobs were written."""

    answer: AnswerReader
    finish_reason: str | None = None
    tokens: list[Token] = field(default_factory=list)
    chars: int = 0
    started: Started | None = None
    finished: Finished | None = None


class Dialect(Protocol):
    """Of one endpoint. `opening`, `piece` and `nothing` are parts of a stream's chunks, `message` is one of a
    whole reply, `logprobs` of both."""

    prefix: str
    whole_object: str
    chunk_object: str

    def opening(self, answer: AnswerReader) -> dict[str, Any]: ...
    def piece(self, piece: Piece) -> dict[str, Any]: ...
    def nothing(self) -> dict[str, Any]: ...
    def message(self, answer: AnswerReader) -> dict[str, Any]: ...
    def logprobs(self, choice: Choice, tokens: Sequence[Token], tokenizer: Tokenizer) -> dict[str, Any]: ...


class _Chat:
    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, answer: AnswerReader) -> dict[str, Any]:
        # Where there may be calls instead, whether there is any text shows later.
        content = "" if answer.form is None else None
        return {"delta": {"role": "assistant", "content": content, "refusal": None}}

    def piece(self, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, Said):
            return {"delta": {"content": piece.text}}
        if isinstance(piece, Called):
            function = {"name": piece.name, "arguments": ""}
            call = {"index": piece.index, "id": piece.id, "type": "function", "function": function}
        else:
            call = {"index": piece.index, "function": {"arguments": piece.text}}
        return {"delta": {"tool_calls": [call]}}

    def nothing(self) -> dict[str, Any]:
        return {"delta": {}}

    def message(self, answer: AnswerReader) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.calls:
            message["content"] = answer.content or None
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in answer.calls
            ]
        return {"message": message}

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

    def opening(self, answer: AnswerReader) -> dict[str, Any]:
        return self.nothing()

    def piece(self, piece: Piece) -> dict[str, Any]:
        assert isinstance(piece, Said), "a completion has no tools"
        return {"text": piece.text}

    def nothing(self) -> dict[str, Any]:
        return {"text": ""}

    def message(self, answer: AnswerReader) -> dict[str, Any]:
        return {"text": answer.content}

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

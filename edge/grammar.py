"""Answers held to a grammar: which tokens may come next, by llguidance over the pack's vocabulary.

The library's tokeniser is fed what our own says each id stands for, so that the text checked is the text
emitted. It gets one token more than the model has: "the answer may end here". Which ids end it is the
request's to say. Spaces in JSON are bounded (one after `,` and `:`): small models fall into endless ones.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from isthmus.edge.jobs import Jobs
from isthmus.edge.schema_limits import check_schemas
from isthmus.protocol.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from isthmus.edge.requests import GenerateRequest, Grammar
    from isthmus.splitter.tokenizer import Tokenizer

# Compiled grammars kept: an application asks for the same few again and again.
_KEPT: Final = 16
# The compiler recurses, 8 KB a level, and a chain of $ref makes thousands of levels out of 64 KB.
_STACK_BYTES: Final = 64 << 20
# Of the library's own limits the one that bounds memory, 2 KB a state; the others bound a step to ~20 ms.
_MAX_LEXER_STATES: Final = 20_000
# Merges with nothing, and takes the space that some tokenisers put before the first word.
_BEFORE: Final = "\x02"
_EMBEDDED: Final = re.compile(r"%json\s*")


class Matcher:
    """Where one answer stands in its grammar. Not thread-safe."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._end_ids = list(end_ids)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool[vocab]. RequestError `bad_grammar` where that is too complex."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        _check(self._matcher)
        bits = np.unpackbits(mask, count=self._vocab_size + 1, bitorder="little").view(np.bool_)
        allowed, may_end = bits[:-1], bits[-1]
        allowed[self._end_ids] = may_end
        return allowed

    def accept(self, token: int) -> None:
        """The next token is `token`, which was allowed."""
        if token not in self._end_ids:
            self._matcher.consume_token(token)
            _check(self._matcher)


@dataclass(frozen=True)
class Compiled:
    """A grammar ready for use, and the ids that end an answer. Never changes; may be shared by threads."""

    fresh: LLMatcher
    vocab_size: int
    end_ids: tuple[int, ...]

    def matcher(self, output_ids: Sequence[int] = ()) -> Matcher:
        """After the answer's tokens so far."""
        matcher = Matcher(self.fresh.deep_copy(), self.vocab_size, self.end_ids)
        for token in output_ids:
            matcher.accept(token)
        return matcher


class Grammars:
    """Compiles for one model, in a thread of its own. Costs nothing before the first grammar."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._fresh = lru_cache(_KEPT)(self._compile)

    async def of(self, request: GenerateRequest) -> Compiled | None:
        """The request's grammar, compiled away from the event loop; None where it has none."""
        grammar = request.grammar
        if grammar is None:
            return None
        return await Jobs(self._thread).submit(partial(self.compile, grammar, request.end_ids))

    def compile(self, grammar: Grammar, end_ids: Sequence[int]) -> Compiled:
        """RequestError `bad_grammar` with the library's reason; `bad_token_id` for an end id that the model
        does not have."""
        for token in end_ids:
            if not 0 <= token < self._vocab_size:
                raise RequestError(f"end id {token} is not in 0..{self._vocab_size - 1}", code="bad_token_id")
        return Compiled(self._fresh(grammar), self._vocab_size, tuple(end_ids))

    def close(self) -> None:
        """No more is compiled."""
        if "_thread" in self.__dict__:
            self._thread.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        thread = ThreadPoolExecutor(1, thread_name_prefix="isthmus-grammar")
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread.submit(int)  # starts it, with that stack
        finally:
            threading.stack_size(before)
        return thread

    @cached_property
    def _tokens(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        vocabulary = _Vocabulary(self._tokenizer, self._vocab_size)
        tokens = LLTokenizer(TokenizerWrapper(vocabulary), n_vocab=self._vocab_size + 1)
        vocabulary.greedy = tokens.greedy_tokenize
        return tokens

    def _compile(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(self._tokens, _source(grammar), log_level=0, limits=limits)
        _check(matcher)
        begun = matcher.deep_copy()  # what cannot even begin is refused now
        begun.consume_tokens(begun.compute_ff_tokens())
        begun.compute_bitmask()
        _check(begun)
        return matcher


class _Vocabulary:
    """What llguidance asks of a tokeniser."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._before = tokenizer.encode(_BEFORE)
        self.tokens = [*map(tokenizer.token_bytes, range(vocab_size)), b""]
        self.special_token_ids = sorted(tokenizer.special_tokens.values())
        self.eos_token_id = vocab_size
        self.bos_token_id = None
        self.greedy: Callable[[str], list[int]] = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        """The ids of `text` behind other text: where the grammar leaves no choice, the answer is spelled as
        the model is used to."""
        ids = self._tokenizer.encode(_BEFORE + text, special=False)[len(self._before) :]
        if b"".join(map(self._tokenizer.token_bytes, ids)) == text.encode():
            return ids
        return self.greedy(text)  # the tokeniser normalises text, or has no such character before it


def _source(grammar: Grammar) -> str:
    """The grammar as the library takes it."""
    from llguidance import LLMatcher

    if grammar.kind == "lark":
        check_schemas(_embedded(grammar.text))
        return LLMatcher.grammar_from_lark(grammar.text)
    text = grammar.text if grammar.kind == "json_schema" else '{"type": "object"}'
    try:
        schema = json.loads(text)
        if not isinstance(schema, dict):
            raise _bad(f"the schema is of type {type(schema).__name__}, it must be an object")
        check_schemas([schema])
        return LLMatcher.grammar_from_json_schema(
            text,
            overrides={  # all of them: a schema could set them, too
                "whitespace_flexible": False,
                "item_separator": ", ?",
                "key_separator": ": ?",
                "lenient": False,
                "coerce_one_of": False,
            },
        )
    except (ValueError, RecursionError) as error:
        raise _bad(f"the schema is no JSON: {error}") from error


def _embedded(lark: str) -> Iterator[Any]:
    """The schemas in a Lark grammar."""
    for found in _EMBEDDED.finditer(lark):
        with suppress(ValueError, RecursionError):  # a comment, a string; or the compiler will refuse it
            yield json.JSONDecoder().raw_decode(lark, found.end())[0]


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        reason = matcher.get_error().replace("<non-verbose/>", "")
        raise _bad("nothing matches it" if reason.startswith("NoExtension") else reason)


def _bad(reason: str) -> RequestError:
    told = " ".join(reason.split())
    return RequestError(
        f"the grammar cannot be followed: {told if len(told) <= 300 else told[:300] + ' …'}",
        code="bad_grammar",
        hint="docs/api.md lists what a schema may hold",
    )

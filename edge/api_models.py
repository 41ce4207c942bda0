"""What the HTTP API accepts: OpenAI's request bodies, closed. A field that is not honoured is refused."""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from pydantic import Field, model_validator

from isthmus.edge.advice import sampling_params
from isthmus.edge.api_fields import MAX_TOOLS, ChosenTool, Closed, ResponseFormat, Tool, ToolChoice
from isthmus.edge.api_messages import ChatMessage
from isthmus.edge.requests import (
    Fallback,
    GenerateRequest,
    Grammar,
    Privacy,
    RouteAsk,
    RowFormatName,
    Shape,
    Slo,
    new_request_id,
)
from isthmus.edge.tools import Toolbox
from isthmus.protocol.messages import MAX_PRIORITY

Finite = Annotated[float, Field(allow_inf_nan=False)]

# OpenAI's defaults where neither the request nor the model's makers say anything.
DEFAULT_TEMPERATURE = 1.0
DEFAULT_COMPLETION_TOKENS = 16


class StreamOptions(Closed):
    include_usage: bool = False


class SloAsk(Closed):
    """What is expected: the first token within `ttft_s` seconds, then at least `tokens_per_s`."""

    ttft_s: Finite | None = Field(default=None, gt=0)
    tokens_per_s: Finite | None = Field(default=None, gt=0)

    def over(self, default: SloAsk) -> SloAsk:
        """This, and where it says nothing, the default."""
        return SloAsk(
            ttft_s=self.ttft_s or default.ttft_s, tokens_per_s=self.tokens_per_s or default.tokens_per_s
        )


class Ask(Closed):
    """How a request may run: what the agent was started with, and the part of it a request may say."""

    route: RouteAsk | None = None
    split: int | None = None
    shape: Shape | None = None
    codec: RowFormatName | None = None
    fallback: Fallback | None = None
    slo: SloAsk | None = None
    max_cost_usd: Finite | None = Field(default=None, ge=0)

    def over(self, default: Ask) -> Ask:
        """This, and where it says nothing, the default; but a K or route asked here is not bound to the
        default's route or K."""
        route = self.route or (default.route if self.split is None else None)
        split = self.split
        if split is None and route in (None, "auto", "split"):
            split = default.split
        return Ask(
            route=route,
            split=split,
            shape=self.shape or default.shape,
            codec=self.codec or default.codec,
            fallback=self.fallback or default.fallback,
            slo=(self.slo or SloAsk()).over(default.slo or SloAsk()),
            max_cost_usd=default.max_cost_usd if self.max_cost_usd is None else self.max_cost_usd,
        )

    def expected(self) -> Slo:
        """`slo`, as a GenerateRequest has it."""
        slo = self.slo or SloAsk()
        return Slo(slo.ttft_s, slo.tokens_per_s)


class Extension(Ask):
    """The `isthmus` object of a request. `explain`: the reply's decision lists every candidate."""

    privacy: Privacy = "any"
    priority: int = Field(default=0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    explain: bool = False


class _Generation(Closed):
    """What chat and completions have in common. OpenAI allows null wherever there is a default."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: Finite | None = Field(default=None, ge=0, le=2)
    top_p: Finite | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: Finite | None = Field(default=None, ge=0, le=1)
    repetition_penalty: Finite | None = Field(default=None, gt=0, le=10)
    presence_penalty: Finite | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: Finite | None = Field(default=None, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    n: int | None = Field(default=None, ge=1, le=16)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    isthmus: Extension | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream=true only")
        return self

    def wants_usage(self) -> bool:
        """Does a stream end with the usage?"""
        return self.stream_options is not None and self.stream_options.include_usage

    def wants_explanation(self) -> bool:
        """Shall the reply's decision list every candidate?"""
        return self.isthmus is not None and self.isthmus.explain

    def wanted_tokens(self) -> int | None:
        """The most tokens asked for; None: as many as fit."""
        return self.max_tokens

    def num_logprobs(self) -> int:
        """-1: none, n ≥ 0: the drawn token's and those of the n most probable ones."""
        return -1

    def to_requests(
        self,
        prompt_ids: list[int],
        *,
        defaults: dict[str, Any],
        end_ids: tuple[int, ...],
        context: int,
        ask: Ask,
        grammar: Grammar | None = None,
        request_id: str = "",
    ) -> list[GenerateRequest]:
        """One GenerateRequest per choice. `defaults`: the model's generation.json; `context`: its length;
        `ask`: what the agent was started with; `grammar`: what the answer must match. `request_id`: that of
        the first choice, the others' have their number behind it; "": a new one."""
        extension = self.isthmus or Extension()
        how = extension.over(ask)
        asked = {
            name: getattr(self, name)
            for name in (
                "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
                "frequency_penalty",
            )
        }  # fmt: skip
        request_id = request_id or new_request_id()
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return [
            GenerateRequest(
                prompt_ids=tuple(prompt_ids),
                max_tokens=self.wanted_tokens() or max(1, context - len(prompt_ids)),
                sampling=sampling_params(
                    asked,
                    defaults,
                    temperature=DEFAULT_TEMPERATURE,
                    seed=seed,
                    choice=choice,
                    logprobs=self.num_logprobs(),
                ),
                end_ids=end_ids,
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
                route=how.route or "auto",
                split=how.split,
                shape=how.shape,
                privacy=extension.privacy,
                row_format=how.codec,
                fallback=how.fallback or "any",
                priority=extension.priority,
                slo=how.expected(),
                max_cost_usd=how.max_cost_usd,
                grammar=grammar,
                request_id=f"{request_id}-{choice}" if choice else request_id,
            )
            for choice in range(self.n or 1)
        ]


class ChatRequest(_Generation):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(default=None, min_length=1, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same thing; send one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs=true only")
        return self

    @model_validator(mode="after")
    def _consistent_tools(self) -> ChatRequest:
        if self.tools is None:
            for name in ("tool_choice", "parallel_tool_calls"):
                if getattr(self, name) not in (None, "none"):
                    raise ValueError(f"{name} goes with tools only")
            return self
        names = [tool.function.name for tool in self.tools]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"tools: two functions have the name {min(twice)!r}")
        if isinstance(self.tool_choice, ChosenTool) and self.tool_choice.function.name not in names:
            raise ValueError(
                f"tool_choice: there is no function {self.tool_choice.function.name!r} among the tools"
            )
        return self

    def grammar(self) -> Grammar | None:
        """What the answer must match, where it is no call."""
        return self.response_format.grammar() if self.response_format else None

    def toolbox(self) -> Toolbox | None:
        """What the model may call, or must; None: nothing. With `tool_choice` "none" it is told of no tools
        at all."""
        if self.tools is None or self.tool_choice == "none":
            return None
        only = self.tool_choice.function.name if isinstance(self.tool_choice, ChosenTool) else None
        return Toolbox(
            tuple(tool.plain() for tool in self.tools),
            must=self.tool_choice == "required" or only is not None,
            only=only,
            many=self.parallel_tool_calls is not False,
        )

    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def num_logprobs(self) -> int:
        return (self.top_logprobs or 0) if self.logprobs else -1


class CompletionRequest(_Generation):
    """Body of POST /v1/completions. `prompt` is text or token ids."""

    prompt: str | list[int]
    logprobs: int | None = Field(default=None, ge=0, le=20)

    def wanted_tokens(self) -> int | None:
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS

    def num_logprobs(self) -> int:
        return -1 if self.logprobs is None else self.logprobs

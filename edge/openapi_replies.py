"""The replies of the HTTP API as models, for its OpenAPI document. More fields may be added to each."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from isthmus.edge.requests import Decision, FinishReason, LinkUse, Route, Shape, Timings

# ---- errors ------------------------------------------------------------------------------------------


class Problem(BaseModel):
    """What went wrong. `code` is stable; `param` names the offending field (`messages.0.content`)."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class Error(BaseModel):
    """OpenAI's form of an error."""

    error: Problem


# ---- generation --------------------------------------------------------------------------------------


class CachedTokens(BaseModel):
    """`cached_tokens`: those of the prompt whose rows this device still had."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens over all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Explanation(BaseModel):
    """How the first choice came to be: where it ran (at the end), why, how long it took, what crossed the
    link (bytes), and what happened on the way."""

    route: Route
    split: int
    shape: Shape | None
    request_id: str
    decision: Decision
    timings: Timings
    link: LinkUse
    counts: dict[str, int]
    events: list[dict[str, Any]]


class CalledFunction(BaseModel):
    """`arguments` is JSON as text."""

    name: str
    arguments: str


class CalledTool(BaseModel):
    """One call that the model asks for."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    """What the model said; `content` is null where it only calls tools."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[CalledTool] | None = None


class ChatLogprobs(BaseModel):
    """One entry per token: token, logprob, bytes, top_logprobs."""

    content: list[dict[str, Any]]
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"]


class ChatReply(BaseModel):
    """The whole answer to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    isthmus: Explanation


class CompletionChoice(BaseModel):
    """One continuation. `logprobs`: tokens, token_logprobs, top_logprobs, text_offset."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason


class CompletionReply(BaseModel):
    """The whole answer to a completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    isthmus: Explanation


class ChatChunkChoice(BaseModel):
    """What one answer goes on with. `finish_reason` comes last."""

    index: int
    delta: dict[str, Any]
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"] | None


class ChatChunk(BaseModel):
    """A part of a streamed chat. `isthmus`: in the first chunk where it runs and why; in a chunk between,
    `events`: what moved the request just now; in the last one, an Explanation."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    isthmus: dict[str, Any] | None = None


class CompletionChunkChoice(BaseModel):
    """What one continuation goes on with. `finish_reason` comes last."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason | None


class CompletionChunk(BaseModel):
    """A part of a streamed completion; `isthmus` as in ChatChunk."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None
    isthmus: dict[str, Any] | None = None


class Asked(BaseModel):
    """The size of the request that was decided upon."""

    prompt_tokens: int
    max_tokens: int


class RouteReply(BaseModel):
    """The decision about a request that was not run."""

    route: Route
    split: int
    shape: Shape | None
    reason: str
    decision: Decision
    request: Asked


# ---- the model and the agent -------------------------------------------------------------------------


class CardDetails(BaseModel):
    """`bits`, `scheme`: of the pack's weights."""

    num_layers: int
    context_length: int
    bits: int
    scheme: str


class ModelCard(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    isthmus: CardDetails


class ModelList(BaseModel):
    """The one model that there is."""

    object: Literal["list"]
    data: list[ModelCard]


class Alive(BaseModel):
    """The process answers."""

    status: Literal["alive"]


class Ready(BaseModel):
    """Requests would be answered; else `reason` says why not."""

    status: Literal["ready", "not ready"]
    reason: str | None = None


class ServedPack(BaseModel):
    """`bytes_per_block`: weights of the embedding, each layer, norm with head."""

    id: str
    num_layers: int
    hidden: int
    bits: int
    scheme: str
    context_length: int
    bytes_per_block: list[int]


class ActiveRequest(BaseModel):
    """A request that runs, as it runs now. `tokens`: those it has generated."""

    request_id: str
    route: Route
    split: int
    shape: Shape | None
    prompt_tokens: int
    tokens: int


class CloudStats(BaseModel):
    """One cloud and the link to it; null where something was never known."""

    url: str
    state: Literal["up", "unknown", "down", "refused"]
    detail: str
    circuit: str
    rtt_s: float | None
    rtt_age_s: float | None
    up_bytes_per_s: float | None
    down_bytes_per_s: float | None
    bytes_up: int
    bytes_down: int
    connects: int
    precision: str | None
    device: str | None


class Stats(BaseModel):
    """What the agent is doing. `requests` … `tokens` and `resumes` … `moves` count since the start; `routes`:
    decisions by route; `weights_bytes`: of the loaded blocks; `kv_bytes`: of the running requests;
    `history_bytes`: rows kept to go on elsewhere; `min_depth`: fewest layers that a split keeps here."""

    model: ServedPack
    pid: int
    uptime_s: float
    rss_bytes: int
    requests: int
    finished: int
    failed: int
    cancelled: int
    tokens: int
    running: int
    waiting: int
    parallel: int
    queue: int
    provider: str
    loaded_layers: list[int]
    weights_bytes: int
    kv_bytes: int
    kept_caches: int
    kept_cache_bytes: int
    history_bytes: int
    resumes: int
    failovers: int
    fallbacks: int
    moves: int
    min_depth: int
    routes: dict[Route, int]
    active: list[ActiveRequest]
    clouds: list[CloudStats]
    router: dict[str, Any]
    conversations: bool


# ---- conversations -----------------------------------------------------------------------------------


class ConversationSummary(BaseModel):
    """`created`, `updated`: Unix time in seconds."""

    id: str
    title: str
    created: float
    updated: float
    num_messages: int


class WholeConversation(ConversationSummary):
    """With the messages, as they were put."""

    messages: list[dict[str, Any]]


class ConversationList(BaseModel):
    """Newest first. `enabled` false: this agent keeps none."""

    enabled: bool
    data: list[ConversationSummary]

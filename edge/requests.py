"""The words of the edge: a generation request, the decision about it, the events it yields.

Pure data, shared by the agent, the router, the HTTP API and the command line.
"""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from isthmus.protocol.errors import RequestError
from isthmus.protocol.messages import MAX_PRIORITY
from isthmus.protocol.sampling import SamplingParams
from isthmus.splitter.situation import Route as Route
from isthmus.splitter.situation import Shape as Shape

if TYPE_CHECKING:
    from isthmus.edge.calibration import Observed

RouteAsk = Literal["auto", "local", "split", "offload"]
Privacy = Literal["any", "activations-only", "local-only"]
RowFormatName = Literal["f32", "bf16", "int8o"]
Fallback = Literal["any", "cloud", "none"]
FinishReason = Literal["stop", "length"]

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_END_IDS = 256
MAX_REQUEST_ID_CHARS = 128
MAX_SCHEMA_BYTES = 64 << 10
MAX_LARK_BYTES = 256 << 10


def new_request_id() -> str:
    """A fresh request id, `req-` and 32 hex digits."""
    return f"req-{uuid.uuid4().hex}"


@dataclass(frozen=True, slots=True)
class Slo:
    """What the user expects: the first token within `ttft_s`, then at least `tokens_per_s`. A wish, unlike
    privacy: missing it costs, and where nothing can keep it, the best that there is still answers."""

    ttft_s: float | None = None
    tokens_per_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("slo.ttft_s", self.ttft_s), ("slo.tokens_per_s", self.tokens_per_s)):
            if value is not None and not (isfinite(value) and value > 0):
                raise RequestError(f"{name} is {value}, it must be positive", code="bad_slo")

    def __bool__(self) -> bool:
        return self.ttft_s is not None or self.tokens_per_s is not None


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must match. "json_object": any JSON object (`text` is empty); "json_schema": `text` is
    the schema as JSON; "lark": `text` is in llguidance's dialect of Lark, with `%json` before schemas in it.

    RequestError `bad_grammar` for a text that is too long; what it says is looked at when it is compiled
    (grammar.py).
    """

    kind: Literal["json_object", "json_schema", "lark"]
    text: str = ""

    def __post_init__(self) -> None:
        most = {"json_object": 0, "json_schema": MAX_SCHEMA_BYTES, "lark": MAX_LARK_BYTES}
        if self.kind not in most:
            raise RequestError(
                f"grammar kind is {self.kind!r}, allowed are {', '.join(most)}", code="bad_grammar"
            )
        try:
            size = len(self.text.encode())
        except UnicodeEncodeError as error:
            raise RequestError(
                "the grammar holds a lone surrogate, which is no valid Unicode", code="bad_grammar"
            ) from error
        if size > most[self.kind]:
            raise RequestError(
                f"the {self.kind} grammar has {size} bytes, at most {most[self.kind]} are taken",
                code="bad_grammar",
                hint="take descriptions and unused definitions out of the schema",
            )


@dataclass(frozen=True)
class GenerateRequest:
    """One sequence to generate. Whatever the agent cannot honour is refused, never ignored.

    `prompt_ids`: the tokenised prompt, at least one id. `max_tokens` ≥ 1. `end_ids`: ids that end the
    sequence (finish reason "stop"; the end id itself is kept in `token_ids`, it has no text).
    `stop`: strings that end it; the text is cut before the first of them.
    `split`: number of layers on the edge, only with route "split" or "auto".
    `row_format` None: the agent's default. `priority`, -10 … 10: the higher goes first, in the agent's queue
    and in the cloud's (see queueing there: nobody starves). With `n` > 1 choices, send n requests whose
    `sampling.choice` differ.

    `fallback`: where a request may go on whose cloud is lost in the middle. "any": at the cloud once it is
    back, at another cloud, or on this device; "cloud": not on this device; "none": nowhere, it fails.

    `max_cost_usd`: a way that might cost more, if the answer took all of `max_tokens`, is not taken.

    `grammar`: every token keeps to it, and an end id comes only where the answer is complete; so it needs
    `end_ids`, and runs only where this device samples. Cut by `max_tokens` it may be incomplete.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    end_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    route: RouteAsk = "auto"
    split: int | None = None
    shape: Shape | None = None
    privacy: Privacy = "any"
    row_format: RowFormatName | None = None
    priority: int = 0
    fallback: Fallback = "any"
    slo: Slo = Slo()
    max_cost_usd: float | None = None
    grammar: Grammar | None = None
    request_id: str = field(default_factory=new_request_id)

    def __post_init__(self) -> None:
        """Refuse what no agent could honour (RequestError); limits of the model are the agent's."""
        if not self.prompt_ids:
            raise RequestError("the prompt has 0 tokens", code="empty_prompt", hint="send at least one token")
        if self.max_tokens < 1:
            raise RequestError(
                f"max_tokens is {self.max_tokens}, the least is 1", code="bad_max_tokens", hint="ask for ≥ 1"
            )
        if len(self.end_ids) > MAX_END_IDS:
            raise RequestError(
                f"{len(self.end_ids)} end ids, at most {MAX_END_IDS} are allowed", code="too_many_end_ids"
            )
        if len(self.request_id) > MAX_REQUEST_ID_CHARS:
            raise RequestError(
                f"request_id has {len(self.request_id)} characters, at most {MAX_REQUEST_ID_CHARS} are taken",
                code="bad_request_id",
            )
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise RequestError(
                f"priority is {self.priority}, allowed are {-MAX_PRIORITY} to {MAX_PRIORITY}",
                code="bad_priority",
            )
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(
                f"{len(self.stop)} stop strings, at most {MAX_STOP_STRINGS} are allowed",
                code="too_many_stops",
                hint="send fewer stop strings",
            )
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise RequestError(
                    f"a stop string has {len(text)} characters, allowed are 1 to {MAX_STOP_CHARS}",
                    code="bad_stop",
                    hint="shorten the stop string, or leave it out",
                )
        for name, value, allowed in (
            ("route", self.route, ("auto", "local", "split", "offload")),
            ("shape", self.shape, (None, "prefix", "u")),
            ("privacy", self.privacy, ("any", "activations-only", "local-only")),
            ("row_format", self.row_format, (None, "f32", "bf16", "int8o")),
            ("fallback", self.fallback, ("any", "cloud", "none")),
        ):
            if value not in allowed:
                raise RequestError(
                    f"{name} is {value!r}, allowed are {', '.join(str(a) for a in allowed if a)}",
                    code=f"bad_{name}",
                )
        if self.max_cost_usd is not None and not (isfinite(self.max_cost_usd) and self.max_cost_usd >= 0):
            raise RequestError(
                f"max_cost_usd is {self.max_cost_usd}, it must be 0 or more", code="bad_max_cost_usd"
            )
        if self.grammar is not None and not self.end_ids:
            raise RequestError(
                "a grammar was given and 0 end ids: the answer could not end",
                code="bad_grammar",
                hint="send the model's end ids with it",
            )
        if self.split is not None and self.route in ("local", "offload"):
            raise RequestError(
                f"split={self.split} was asked together with route={self.route!r}",
                code="bad_split",
                hint="split goes with route 'split' or 'auto' only",
            )


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to serve a request. `violated` names the first hard constraint it breaks, or is None.

    The figures are predictions, None where nothing was measured to predict from. `terms`: the parts of
    `total_s`, in seconds. `score`: what the router minimises, in dollars, and `score_parts` what adds up to
    it. `energy_j` is the edge's; `most_usd`: the cost if the answer took all of its tokens.
    """

    route: Route
    split: int
    shape: Shape | None
    feasible: bool
    violated: str | None = None
    detail: str = ""
    ttft_s: float | None = None
    total_s: float | None = None
    tokens_per_s: float | None = None
    energy_j: float | None = None
    cost_usd: float | None = None
    most_usd: float | None = None
    bytes_up: float | None = None
    bytes_down: float | None = None
    memory_bytes: int | None = None
    terms: dict[str, float] | None = None
    score: float | None = None
    score_parts: dict[str, float] | None = None


@dataclass(frozen=True)
class Decision:
    """The route taken, why, and what else was looked at. `split`: layers on the edge (0 … N).

    `margin`: by how many dollars of score the best way of another route is worse (below 0: the chosen one is
    kept although another is a little better). `basis`: what the predictions rest on, and how old that is.
    """

    route: Route
    split: int
    shape: Shape | None
    reason: str
    candidates: tuple[Candidate, ...] = ()
    margin: float | None = None
    expected_tokens: float | None = None
    basis: dict[str, Any] = field(default_factory=dict)

    @property
    def chosen(self) -> Candidate | None:
        """The candidate taken, with its figures; None where none are listed."""
        way = (self.route, self.split, self.shape)
        return next((c for c in self.candidates if (c.route, c.split, c.shape) == way), None)

    def to_dict(self) -> dict[str, Any]:
        """The `decision` object of the JSON outputs."""
        return asdict(self)


@dataclass(frozen=True)
class Timings:
    """Seconds from the moment the request got its slot. `decode_tokens_per_s` counts the tokens after
    the first; 0.0 where there is none."""

    ttft_s: float
    decode_tokens_per_s: float
    total_s: float


@dataclass(frozen=True)
class LinkUse:
    """What this request alone sent and received, in bytes of websocket payload; RTT is the link's EWMA
    (None where nothing crossed it)."""

    rtt_s: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True)
class Started:
    """First event: the decision is made, a slot is held."""

    request_id: str
    decision: Decision
    route: Route
    split: int
    shape: Shape | None


@dataclass(frozen=True)
class Token:
    """One generated token; indexes run 0, 1, 2 … without gap or repetition.

    `text`: the text that became certain with this token; may be "" while UTF-8 or a possible stop
    string is incomplete. `logprob` and `top` (id, logprob pairs) only if asked.
    """

    index: int
    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Moved:
    """Something happened to the way the request takes: `events` (as in `Finished`) are those not told yet.
    They come when they happen, so a lost link is told before it is found again."""

    events: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Finished:
    """Last event. `"".join(token texts) + tail == text`. `route`, `split` and `shape` are those at the end:
    `events` says what moved the request, if anything did.

    `observed`: what the router can learn from it; None where it moved, or nothing was predicted.

    `counts`: prompt_tokens, completion_tokens, edge_rows_computed (positions the edge ran through its
    layers), edge_cached_rows (prompt positions its cache already had), rows_sent (rows or ids that
    crossed the link), cloud_cached_rows (rows the cloud did not need).
    """

    finish_reason: FinishReason
    token_ids: tuple[int, ...]
    text: str
    tail: str
    timings: Timings
    link: LinkUse
    counts: dict[str, int]
    route: Route
    split: int
    shape: Shape | None
    events: tuple[dict[str, Any], ...] = ()
    observed: Observed | None = None


AgentEvent = Started | Token | Moved | Finished

"""The control bodies of the session protocol: pydantic models, compact JSON on the wire.

Every model is frozen and refuses unknown fields, NaN and infinities. What is not here rides in the
frame header:

* `epoch`, `seq`, `pos` (row position of a STEP; `kv_len` of a RESULT and STREAM), `n_tok`.
* `next_index` needs no field: a FINAL step over rows [pos, pos + n_tok) produces the token of index
  pos + n_tok - prompt_tokens (`Open.index_after`); a VERIFY those from pos + 1 - prompt_tokens on.
* a CANARY frame carries raw F32 rows, its split in `pos`, its number in `seq`; stream 0.
* PING and PONG have no body; `seq` is the counter that PONG echoes.
* PROBE and PROBE_REPLY carry padding (probes.py); PROBE_REPLY echoes `seq`.

Public: Hello Welcome Reject Open Opened Resume Resumed ResultBody StreamBody Credit Cancel Close Closed Load
Status GoAway ErrorBody CanaryResult WireLimits.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from isthmus.protocol.errors import (
    CloudError,
    CodecError,
    FrameError,
    IsthmusError,
    NotFoundError,
    OverloadedError,
    ProtocolError,
    RejectedError,
    RequestError,
    SequenceError,
)
from isthmus.protocol.identity import ModelIdentity
from isthmus.protocol.prefix import PrefixOffer
from isthmus.protocol.profiles import DeviceProfile, Prices
from isthmus.protocol.sampling import SamplingParams
from isthmus.protocol.wire_types import U32, Count, Message, Name, Seconds, Text

Finish = Literal["stop", "length"]
ResumeAction = Literal["ok", "replay", "rebuild"]
SessionId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
RowDigest = Annotated[str, Field(pattern=r"^([0-9a-f]{32})?$")]
TopTokens = tuple[tuple[U32, float], ...]

MAX_PRIORITY: Final = 10
"""A request's priority goes from minus this to this; 0 is everybody's."""


class WireLimits(Message):
    """The cloud's bounds that an edge has to keep to (see limits.Limits)."""

    max_message_bytes: Count
    max_control_bytes: Count
    max_rows_per_step: Annotated[int, Field(ge=1, le=2**16 - 1)]
    max_tokens_per_session: U32
    max_sessions: Count
    initial_credits_rows: Annotated[int, Field(ge=1, le=2**32 - 1)]
    stream_window_tokens: Annotated[int, Field(ge=1, le=2**32 - 1)]
    heartbeat_s: Seconds
    dead_after_s: Seconds
    max_probe_bytes: Count


class Load(Message):
    """How busy the cloud is. `queue` waits, `running` computes; pages are of 16 tokens of one layer.

    `step_s`: mean seconds of the recent steps that only decoded, 0 where there were none lately. `queue_s`:
    estimated seconds until a new session's first row would be computed.
    """

    queue: Count = 0
    running: Count = 0
    kv_total_pages: Count = 0
    kv_free_pages: Count = 0
    kv_cached_pages: Count = 0
    rows_computed: Count = 0
    step_s: Seconds = 0.0
    queue_s: Seconds = 0.0


class Hello(Message):
    """edge → cloud, the first frame, within `hello_timeout_s` of the upgrade."""

    versions: Annotated[tuple[U32, ...], Field(min_length=1, max_length=16)]
    identity: ModelIdentity
    edge_precision: Name
    row_formats: Annotated[tuple[Name, ...], Field(max_length=16)]
    client: Name = ""


class Welcome(Message):
    """cloud → edge: the terms. `match` "canary": splits not in `canary_passed` need a CANARY first.

    `profile`: of the cloud by itself, None where it was not measured. `prices` None: nobody said what it
    charges.
    """

    version: U32
    identity: ModelIdentity
    match: Literal["equal", "canary"]
    cloud_precision: Name
    limits: WireLimits
    server: Name = ""
    num_layers: U32
    hidden: U32
    vocab_size: U32
    context_length: U32
    row_formats: Annotated[tuple[Name, ...], Field(max_length=16)]
    kl: dict[Name, float] = Field(default_factory=dict)
    profile: DeviceProfile | None = None
    prices: Prices | None = None
    load: Load = Load()
    canary_passed: tuple[U32, ...] = ()


class Reject(Message):
    """cloud → edge instead of WELCOME: version, auth, model mismatch, capacity. The connection ends."""

    code: Name
    message: Text
    hint: Text = ""
    retry_after_s: Seconds | None = None

    def to_error(self) -> RejectedError:
        return RejectedError(self.message, code=self.code, hint=self.hint, retry_after_s=self.retry_after_s)

    @classmethod
    def from_error(cls, error: RejectedError) -> Reject:
        return cls(
            code=error.code,
            message=error.message[:4096],
            hint=error.hint[:4096],
            retry_after_s=error.retry_after_s,
        )


class Open(Message):
    """edge → cloud: starts a session on the frame's stream.

    `split` is K: the cloud runs layers K..N-1 on the rows it is sent; at 0 STEPs carry token ids.
    `shape` "prefix": the cloud samples, "u": it returns the final hidden rows. K = 0 in the prefix shape
    is offload: after the FINAL step the cloud goes on by itself and sends STREAM frames.
    `max_context` bounds the rows the session's KV may ever hold (prompt_tokens + max_tokens must fit).
    `context_ids` are the prompt's token ids, only where sampling needs them (rule 10). A session that goes on
    with another's answer keeps its prompt_tokens; the ids beyond are the tokens emitted so far.
    `priority`: where sessions compete for the cloud's steps and pages, the higher goes first.
    """

    split: U32
    shape: Literal["prefix", "u"]
    row_format: Name
    outliers: Annotated[tuple[U32, ...], Field(max_length=256)] = ()
    max_tokens: Annotated[int, Field(ge=1, le=2**32 - 1)]
    prompt_tokens: Annotated[int, Field(ge=1, le=2**32 - 1)]
    max_context: U32
    sampling: SamplingParams
    end_ids: Annotated[tuple[U32, ...], Field(max_length=256)] = ()
    offer: PrefixOffer = PrefixOffer()
    context_ids: tuple[U32, ...] | None = None
    request_id: Name = ""
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0

    @property
    def streams(self) -> bool:
        """Whether the cloud generates on its own after the FINAL step (offload)."""
        return self.split == 0 and self.shape == "prefix"

    @property
    def result_format(self) -> str:
        """Row format of U-shape RESULTs: f32 stays f32, everything else comes down as bf16
        (the outlier channels of the boundary are not those of the final hidden state)."""
        return "f32" if self.row_format == "f32" else "bf16"

    def index_after(self, rows: int) -> int:
        """Index of the token that a FINAL step produces when the KV then holds `rows` rows."""
        return rows - self.prompt_tokens


class Opened(Message):
    """cloud → edge. `credits`: rows the edge may have sent in this epoch, counted from its start (never
    less than WELCOME's initial_credits_rows). `chunk_rows`: the largest n_tok the cloud likes."""

    session_id: SessionId
    resume_token: Text = ""
    cached_rows: U32 = 0
    credits: Annotated[int, Field(ge=1, le=2**53)]
    chunk_rows: Annotated[int, Field(ge=1, le=2**16 - 1)]


class Resume(Message):
    """edge → cloud, on a new stream of a new connection: go on with a session whose connection is gone.

    `attempt` grows with each RESUME of the session. `next_index`: the first token not yet received,
    `last_seq`: the newest step sent. `rows` and `digest`: the edge's digest chain after that step.
    """

    session_id: SessionId
    resume_token: Text
    attempt: Annotated[int, Field(ge=1, le=2**53)]
    next_index: U32
    last_seq: Count
    rows: U32
    digest: RowDigest


class Resumed(Message):
    """cloud → edge, in the new epoch. `seq`: the newest step taken; `kv_len` rows are held, `rows` and
    `digest` are the cloud's chain over the uploaded ones. `credits`: rows that may be sent in this epoch now.

    `action` "ok": nothing was lost. "replay": the steps after `seq` are to be sent again. "rebuild": the
    rows differ, all are to be sent again, the first with TRUNCATE to 0.
    """

    epoch: U32
    seq: Count
    kv_len: U32
    rows: U32
    digest: RowDigest
    action: ResumeAction
    credits: Count
    chunk_rows: Annotated[int, Field(ge=1, le=2**16 - 1)]
    resume_token: Text


class _Tokens(Message):
    """Consecutive output tokens from `first_index` on; natural-log probabilities of the raw distribution.

    `cloud_us`: microseconds from the arrival of the step that asked for the first of them to their leaving,
    queue and computing together; 0 where that is not known, and in all but the first STREAM of a session.
    """

    first_index: U32
    tokens: Annotated[tuple[U32, ...], Field(max_length=2**16)]
    logprobs: tuple[float | None, ...] | None = None
    top: tuple[TopTokens, ...] | None = None
    finish: Finish | None = None
    cloud_us: U32 = 0

    @model_validator(mode="after")
    def _same_length(self) -> _Tokens:
        for name, values in (("logprobs", self.logprobs), ("top", self.top)):
            if values is not None and len(values) != len(self.tokens):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.tokens)} tokens")
        return self

    def part(self, start: int, stop: int | None = None) -> Self:
        """Output indexes [start, stop) of this. `finish` stays with the last token, `cloud_us` with the
        first."""
        low = max(0, start - self.first_index)
        high = len(self.tokens) if stop is None else min(len(self.tokens), stop - self.first_index)
        return self.model_copy(
            update={
                "first_index": self.first_index + low,
                "tokens": self.tokens[low:high],
                "logprobs": None if self.logprobs is None else self.logprobs[low:high],
                "top": None if self.top is None else self.top[low:high],
                "finish": self.finish if high == len(self.tokens) else None,
                "cloud_us": 0 if low else self.cloud_us,
            }
        )


class ResultBody(_Tokens):
    """cloud → edge, prefix shape: answers the FINAL step or the VERIFY `seq`, acknowledges all up to it and
    returns their credits. Header `pos` = kv_len, to which a VERIFY's rejected rows were cut. (U-shape
    RESULTs are tensor bodies.)"""


class StreamBody(_Tokens):
    """cloud → edge, offload: tokens without a step each; kept by the cloud until acknowledged."""


class Credit(Message):
    """Flow control of one stream and epoch. Cumulative, so a repeated frame changes nothing.

    cloud → edge: `rows`, how many rows may have been sent since the epoch began.
    edge → cloud: `ack_index`, every token below it has arrived; `window`, tokens that may be in flight.
    """

    rows: Count = 0
    ack_index: U32 = 0
    window: U32 = 0


class Cancel(Message):
    """edge → cloud: stop and keep nothing. Answered by CLOSED; idempotent."""


class Close(Message):
    """edge → cloud: stop; the KV rows may be kept under `offer` for the next turn. Idempotent."""

    offer: PrefixOffer = PrefixOffer()
    reason: Name = ""


class Closed(Message):
    """cloud → edge: the session is over. `kv_len` rows were held, `pages_freed` pages went back to the
    pool, `cached`: the prefix stays available under the offer of CLOSE."""

    pages_freed: Count = 0
    kv_len: U32 = 0
    cached: bool = False


class Status(Message):
    """cloud → edge, unasked: load, the seq of the newest PING as an echo, and the bytes that have come in on
    this connection. While an upload fills every buffer on the way, no PING gets through; growing bytes show
    that the link is slow, not dead."""

    load: Load
    echo: Count = 0
    received: Count = 0


class GoAway(Message):
    """cloud → edge: open nothing new here; what runs may finish within `deadline_s`."""

    deadline_s: Seconds
    alternative: Name = ""


class CanaryResult(Message):
    """cloud → edge: whether the edge's rows at `split` agree with the cloud's own (rule 8)."""

    split: U32
    ok: bool
    error: float
    tolerance: float


_KINDS: dict[str, type[IsthmusError]] = {
    "frame": FrameError,
    "codec": CodecError,
    "sequence": SequenceError,
    "protocol": ProtocolError,
    "rejected": RejectedError,
    "overloaded": OverloadedError,
    "request": RequestError,
    "not_found": NotFoundError,
    "cloud": CloudError,
}


class ErrorBody(Message):
    """both ways. On stream 0 it is fatal for the connection; otherwise it ends that session only.
    `expected_seq` and `expected_pos` tell what a refused STEP should have been."""

    kind: Literal[
        "frame", "codec", "sequence", "protocol", "rejected", "overloaded", "request", "not_found", "cloud"
    ]
    code: Name
    message: Text
    hint: Text = ""
    fatal: bool = False
    retry_after_s: Seconds | None = None
    expected_seq: Count | None = None
    expected_pos: U32 | None = None

    def to_error(self) -> IsthmusError:
        """The typed error this frame reports, for the receiving side to raise."""
        cls = _KINDS[self.kind]
        error = cls(self.message, code=self.code, hint=self.hint)
        if isinstance(error, RejectedError | OverloadedError) and self.retry_after_s is not None:
            error.retry_after_s = self.retry_after_s
        return error

    @classmethod
    def from_error(
        cls, error: IsthmusError, *, fatal: bool = False, expected: tuple[int, int] | None = None
    ) -> ErrorBody:
        """`error` as it travels: its nearest kind (anything unnamed is "cloud"), code, message, hint, and
        the (seq, pos) of the step that would have been right."""
        kind = next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "cloud")
        return cls.model_validate(
            {
                "kind": kind,
                "code": error.code,
                "message": error.message[:4096],
                "hint": error.hint[:4096],
                "fatal": fatal,
                "retry_after_s": getattr(error, "retry_after_s", None),
                "expected_seq": expected and expected[0],
                "expected_pos": expected and expected[1],
            }
        )

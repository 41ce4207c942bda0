"""What the sans-IO connections report to their owners: frozen dataclasses, no behaviour.

Edge:  Welcomed Rejected SessionOpened ResultTokens ResultRows StreamTokens CreditGranted SessionClosed
       SessionSuspended SessionResumed StatusReceived CanaryDone GoingAway RttMeasured ChunkArrived ProbeDone
Cloud: HelloAccepted SessionOpenRequested StepReceived CancelRequested CloseRequested StreamWindow
       SessionDetached ResumeRequested CanaryRequested
Both:  SessionFailed ConnectionFailed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from isthmus.protocol.errors import IsthmusError, RejectedError
from isthmus.protocol.frames import Frame
from isthmus.protocol.messages import (
    CanaryResult,
    Close,
    Closed,
    Finish,
    GoAway,
    Hello,
    Open,
    Opened,
    Resume,
    ResumeAction,
    Status,
    TopTokens,
    Welcome,
)

if TYPE_CHECKING:
    from isthmus.protocol.cloud_session import CloudSession

# ---- both ends ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SessionFailed:
    """This session is over with `error`; the connection and its other sessions go on (unless a
    ConnectionFailed follows). On the cloud: free what the session held, answer nothing."""

    stream: int
    error: IsthmusError


@dataclass(frozen=True, slots=True)
class ConnectionFailed:
    """The connection is over: flush data_to_send(), close the socket. Every live session was reported by
    its own SessionFailed, SessionSuspended or SessionDetached before."""

    error: IsthmusError


# ---- edge ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcomed:
    """The handshake is done; sessions may be opened."""

    welcome: Welcome


@dataclass(frozen=True, slots=True)
class Rejected:
    """The cloud refused the connection; it is closed."""

    error: RejectedError


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """`opened.cached_rows` rows of the offered prefix need no upload: go on at that position."""

    stream: int
    opened: Opened


@dataclass(frozen=True, slots=True)
class ResultTokens:
    """Prefix shape: the token of FINAL step `seq`, or of VERIFY those up to the first that differs from its
    draft (or ends the answer). Only indexes never reported before; `kv_len` rows lie in the cloud's KV."""

    stream: int
    seq: int
    kv_len: int
    first_index: int
    tokens: tuple[int, ...]
    logprobs: tuple[float | None, ...] | None = None
    top: tuple[TopTokens, ...] | None = None
    finish: Finish | None = None
    cloud_us: int = 0


@dataclass(frozen=True, slots=True)
class ResultRows:
    """U-shape: final hidden rows of step `seq`, `frame.n_tok` of them (VERIFY: one per row of the chain),
    still encoded in `open.result_format`."""

    stream: int
    seq: int
    kv_len: int
    frame: Frame


@dataclass(frozen=True, slots=True)
class StreamTokens:
    """Offload: further tokens, each index reported once and in order."""

    stream: int
    first_index: int
    tokens: tuple[int, ...]
    logprobs: tuple[float | None, ...] | None = None
    top: tuple[TopTokens, ...] | None = None
    finish: Finish | None = None
    cloud_us: int = 0


@dataclass(frozen=True, slots=True)
class CreditGranted:
    """`rows` rows may be sent now (the whole room, not the increment)."""

    stream: int
    rows: int


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """The cloud's answer to CANCEL or CLOSE."""

    stream: int
    closed: Closed


@dataclass(frozen=True, slots=True)
class SessionSuspended:
    """The connection is gone with `error`, the session may go on: EdgeConnection.resume on a new one."""

    stream: int
    error: IsthmusError


class Replay(NamedTuple):
    """Rows [start, stop), as the owner has them now, are to be sent again by ordinary steps; then the session
    stands where it stood. The first step with `truncate` if set.

    Where an output was due, the last `last_rows` rows go as one step: as a VERIFY that shows `drafts` (one id
    per row) if there are any, else with `final` and `all_rows`. The rows before it are plain.
    """

    start: int
    stop: int
    truncate: bool = False
    final: bool = False
    all_rows: bool = False
    drafts: tuple[int, ...] = ()
    last_rows: int = 0


@dataclass(frozen=True, slots=True)
class SessionResumed:
    """The session goes on, on its new stream. `replay` is None where nothing was lost; then `action` is "ok".
    If the connection is lost within a replay, the next SessionResumed tells what is left of it."""

    stream: int
    action: ResumeAction
    replay: Replay | None


@dataclass(frozen=True, slots=True)
class StatusReceived:
    status: Status


@dataclass(frozen=True, slots=True)
class CanaryDone:
    """The cloud compared the canary rows; `result.ok` allows splits at `result.split`."""

    result: CanaryResult


@dataclass(frozen=True, slots=True)
class GoingAway:
    """The cloud drains: `open` is refused from now on; running sessions go on."""

    goaway: GoAway


@dataclass(frozen=True, slots=True)
class RttMeasured:
    """A PING that had the link to itself was answered after `seconds`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class ChunkArrived:
    """A large upload has arrived. If the link was idle when it began, `num_bytes` took `since_sent_s` less a
    round trip. If not, the `bytes_between` it and the upload before took `since_previous_s`. The shorter of
    the two times is the true one."""

    num_bytes: int
    since_sent_s: float
    bytes_between: int
    since_previous_s: float


@dataclass(frozen=True, slots=True)
class ProbeDone:
    """The PROBE `seq` was answered `seconds` after it left. `down_bytes` is 0 where no padding came back."""

    seq: int
    up_bytes: int
    down_bytes: int
    seconds: float


# ---- cloud --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HelloAccepted:
    """WELCOME is queued."""

    hello: Hello
    match: str


@dataclass(frozen=True, slots=True)
class SessionOpenRequested:
    """Checked against limits, quota and model. Answer with `opened` or `fail`. Where the offer is empty
    the session's StepReceived events may come before that answer."""

    stream: int
    open: Open


@dataclass(frozen=True, slots=True)
class StepReceived:
    """Rows to append, exactly once and in order: cut the KV to `pos` if `truncate`, append `n_tok` rows.

    `final`: the last row produces output, `all_rows`: every row does. `next_index`: the token index that
    output has, of VERIFY the first one (meaningless in the U-shape before the prompt's end). The rows are
    still encoded: the body of `frame`.

    VERIFY has `all_rows`. In the prefix shape `drafts` are the ids of its rows: once the token drawn from a
    row is not the id of the next one, the rows after it produce nothing and are cut from the KV.
    """

    stream: int
    seq: int
    pos: int
    n_tok: int
    truncate: bool
    final: bool
    all_rows: bool
    next_index: int
    frame: Frame
    drafts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """Stop, free the pages, answer with `closed`."""

    stream: int


@dataclass(frozen=True, slots=True)
class CloseRequested:
    """Stop, keep the KV under `close.offer` if there is room, answer with `closed`."""

    stream: int
    close: Close


@dataclass(frozen=True, slots=True)
class StreamWindow:
    """Offload: the edge acknowledged; `room` more tokens may go out at once."""

    stream: int
    room: int


@dataclass(frozen=True, slots=True)
class SessionDetached:
    """The connection is gone, the session is not: it takes what the engine puts out, and waits for a RESUME.
    It is still charged; after CloudSession.evict() give back its `kv_bytes` by TenantUsage.release."""

    stream: int
    session: CloudSession


@dataclass(frozen=True, slots=True)
class ResumeRequested:
    """Nothing was checked. Answer with CloudConnection.resumed or refuse."""

    stream: int
    resume: Resume


@dataclass(frozen=True, slots=True)
class CanaryRequested:
    """Compare `frame` (raw F32 rows at layer `split` of `identity.canary_ids`) and answer with
    `canary_result(seq, …)`."""

    split: int
    seq: int
    frame: Frame


EdgeEvent = (
    Welcomed
    | Rejected
    | SessionOpened
    | ResultTokens
    | ResultRows
    | StreamTokens
    | CreditGranted
    | SessionClosed
    | SessionFailed
    | SessionSuspended
    | SessionResumed
    | StatusReceived
    | CanaryDone
    | GoingAway
    | RttMeasured
    | ChunkArrived
    | ProbeDone
    | ConnectionFailed
)
CloudEvent = (
    HelloAccepted
    | SessionOpenRequested
    | StepReceived
    | CancelRequested
    | CloseRequested
    | StreamWindow
    | SessionDetached
    | ResumeRequested
    | CanaryRequested
    | SessionFailed
    | ConnectionFailed
)

"""Every state a session (and a connection) can be in, on either end, and every transition: one table each.

    edge   IDLE → OPENING → PREFILL → DECODE → CLOSING → CLOSED
           a lost connection leads to SUSPENDED → RESUMING → DECODE
    cloud  NEW → OPENING → ACTIVE → CLOSING → CLOSED
           a lost connection leads to DETACHED → {ACTIVE, EVICTED}

A pair that is not in its table is illegal: `advance` raises SequenceError and changes nothing. Pairs that
look pointless are there because messages cross on the wire: a RESULT may meet a CANCEL half way, and
CANCEL and CLOSE may be said twice. What such a pair does is "stay": the state says that its payload is
dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, TypeVar

from isthmus.protocol.errors import SequenceError


class EdgeState(StrEnum):
    IDLE = "idle"
    OPENING = "opening"  # OPEN sent; with an empty offer STEPs may follow at once
    PREFILL = "prefill"  # OPENED; nothing came out yet
    DECODE = "decode"  # the first output is here
    CLOSING = "closing"  # CANCEL or CLOSE sent; whatever still arrives is dropped
    CLOSED = "closed"
    SUSPENDED = "suspended"  # the connection is gone, the history is not
    RESUMING = "resuming"  # RESUME sent on a new connection


class EdgeInput(StrEnum):
    """What happens to an edge session: `send_` by its owner, `recv_` from the cloud."""

    SEND_OPEN = "send_open"
    SEND_STEP = "send_step"
    SEND_VERIFY = "send_verify"
    SEND_CANCEL = "send_cancel"
    SEND_CLOSE = "send_close"
    RECV_OPENED = "recv_opened"
    RECV_RESULT = "recv_result"
    RECV_STREAM = "recv_stream"
    RECV_CREDIT = "recv_credit"
    RECV_CLOSED = "recv_closed"
    ERROR = "error"  # ERROR came or went, for this stream or the connection
    LOST = "lost"  # the connection is gone for good
    SUSPEND = "suspend"  # the connection is gone, the session goes on elsewhere
    SEND_RESUME = "send_resume"
    RECV_RESUMED = "recv_resumed"


_S, _I = EdgeState, EdgeInput

EDGE_TABLE: Final[Mapping[tuple[EdgeState, EdgeInput], EdgeState]] = {
    (_S.IDLE, _I.SEND_OPEN): _S.OPENING,
    (_S.OPENING, _I.SEND_STEP): _S.OPENING,  # pipelined start
    (_S.OPENING, _I.SEND_VERIFY): _S.OPENING,
    (_S.OPENING, _I.RECV_CREDIT): _S.OPENING,
    (_S.OPENING, _I.RECV_OPENED): _S.PREFILL,
    (_S.OPENING, _I.SEND_CANCEL): _S.CLOSING,
    (_S.OPENING, _I.SEND_CLOSE): _S.CLOSING,
    (_S.OPENING, _I.ERROR): _S.CLOSED,
    (_S.OPENING, _I.LOST): _S.CLOSED,
    (_S.PREFILL, _I.SEND_STEP): _S.PREFILL,
    (_S.PREFILL, _I.SEND_VERIFY): _S.PREFILL,
    (_S.PREFILL, _I.RECV_CREDIT): _S.PREFILL,
    (_S.PREFILL, _I.RECV_RESULT): _S.DECODE,
    (_S.PREFILL, _I.SEND_CANCEL): _S.CLOSING,
    (_S.PREFILL, _I.SEND_CLOSE): _S.CLOSING,
    (_S.PREFILL, _I.ERROR): _S.CLOSED,
    (_S.PREFILL, _I.LOST): _S.CLOSED,
    (_S.DECODE, _I.SEND_STEP): _S.DECODE,
    (_S.DECODE, _I.SEND_VERIFY): _S.DECODE,
    (_S.DECODE, _I.RECV_CREDIT): _S.DECODE,
    (_S.DECODE, _I.RECV_RESULT): _S.DECODE,
    (_S.DECODE, _I.RECV_STREAM): _S.DECODE,
    (_S.DECODE, _I.SEND_CANCEL): _S.CLOSING,
    (_S.DECODE, _I.SEND_CLOSE): _S.CLOSING,
    (_S.DECODE, _I.ERROR): _S.CLOSED,
    (_S.DECODE, _I.LOST): _S.CLOSED,
    # Crossed messages.
    (_S.CLOSING, _I.RECV_OPENED): _S.CLOSING,
    (_S.CLOSING, _I.RECV_CREDIT): _S.CLOSING,
    (_S.CLOSING, _I.RECV_RESULT): _S.CLOSING,
    (_S.CLOSING, _I.RECV_STREAM): _S.CLOSING,
    (_S.CLOSING, _I.SEND_CANCEL): _S.CLOSING,
    (_S.CLOSING, _I.SEND_CLOSE): _S.CLOSING,
    (_S.CLOSING, _I.RECV_CLOSED): _S.CLOSED,
    (_S.CLOSING, _I.ERROR): _S.CLOSED,
    (_S.CLOSING, _I.LOST): _S.CLOSED,
    (_S.CLOSED, _I.SEND_CANCEL): _S.CLOSED,
    (_S.CLOSED, _I.SEND_CLOSE): _S.CLOSED,
    # Resume. A replay is part of DECODE.
    (_S.PREFILL, _I.SUSPEND): _S.SUSPENDED,
    (_S.DECODE, _I.SUSPEND): _S.SUSPENDED,
    (_S.RESUMING, _I.SUSPEND): _S.SUSPENDED,
    (_S.SUSPENDED, _I.SEND_RESUME): _S.RESUMING,
    (_S.SUSPENDED, _I.SEND_CANCEL): _S.CLOSED,
    (_S.SUSPENDED, _I.SEND_CLOSE): _S.CLOSED,
    (_S.RESUMING, _I.RECV_RESUMED): _S.DECODE,
    (_S.RESUMING, _I.SEND_CANCEL): _S.CLOSING,  # CANCEL goes out once the cloud has told the new epoch
    (_S.RESUMING, _I.SEND_CLOSE): _S.CLOSING,
    (_S.RESUMING, _I.ERROR): _S.CLOSED,
    (_S.RESUMING, _I.LOST): _S.CLOSED,
    (_S.CLOSING, _I.RECV_RESUMED): _S.CLOSING,
}


class CloudState(StrEnum):
    NEW = "new"
    OPENING = "opening"  # OPEN accepted, the engine has not answered; pipelined STEPs are taken
    ACTIVE = "active"
    CLOSING = "closing"  # CANCEL or CLOSE came; late STEPs and late engine output are dropped
    CLOSED = "closed"
    DETACHED = "detached"  # the connection is gone, the KV is kept for a while
    EVICTED = "evicted"  # the KV is gone: `unknown_session`


class CloudInput(StrEnum):
    """What happens to a cloud session: `recv_` from the edge, `send_` by the engine."""

    RECV_OPEN = "recv_open"
    RECV_STEP = "recv_step"
    RECV_VERIFY = "recv_verify"
    RECV_CREDIT = "recv_credit"
    RECV_CANCEL = "recv_cancel"
    RECV_CLOSE = "recv_close"
    SEND_OPENED = "send_opened"
    SEND_RESULT = "send_result"
    SEND_STREAM = "send_stream"
    SEND_CREDIT = "send_credit"
    SEND_CLOSED = "send_closed"
    ERROR = "error"
    LOST = "lost"
    DETACH = "detach"
    RECV_RESUME = "recv_resume"
    EVICT = "evict"


_C, _J = CloudState, CloudInput

CLOUD_TABLE: Final[Mapping[tuple[CloudState, CloudInput], CloudState]] = {
    (_C.NEW, _J.RECV_OPEN): _C.OPENING,
    (_C.OPENING, _J.RECV_STEP): _C.OPENING,
    (_C.OPENING, _J.RECV_VERIFY): _C.OPENING,
    (_C.OPENING, _J.SEND_OPENED): _C.ACTIVE,
    (_C.OPENING, _J.RECV_CANCEL): _C.CLOSING,
    (_C.OPENING, _J.RECV_CLOSE): _C.CLOSING,
    (_C.OPENING, _J.ERROR): _C.CLOSED,
    (_C.OPENING, _J.LOST): _C.CLOSED,
    (_C.ACTIVE, _J.RECV_STEP): _C.ACTIVE,
    (_C.ACTIVE, _J.RECV_VERIFY): _C.ACTIVE,
    (_C.ACTIVE, _J.RECV_CREDIT): _C.ACTIVE,
    (_C.ACTIVE, _J.SEND_RESULT): _C.ACTIVE,
    (_C.ACTIVE, _J.SEND_STREAM): _C.ACTIVE,
    (_C.ACTIVE, _J.SEND_CREDIT): _C.ACTIVE,
    (_C.ACTIVE, _J.RECV_CANCEL): _C.CLOSING,
    (_C.ACTIVE, _J.RECV_CLOSE): _C.CLOSING,
    (_C.ACTIVE, _J.ERROR): _C.CLOSED,
    (_C.ACTIVE, _J.LOST): _C.CLOSED,
    # Crossed messages, and engine output that meets a CANCEL.
    (_C.CLOSING, _J.RECV_STEP): _C.CLOSING,
    (_C.CLOSING, _J.RECV_VERIFY): _C.CLOSING,
    (_C.CLOSING, _J.RECV_CREDIT): _C.CLOSING,
    (_C.CLOSING, _J.RECV_CANCEL): _C.CLOSING,
    (_C.CLOSING, _J.RECV_CLOSE): _C.CLOSING,
    (_C.CLOSING, _J.SEND_OPENED): _C.CLOSING,
    (_C.CLOSING, _J.SEND_RESULT): _C.CLOSING,
    (_C.CLOSING, _J.SEND_STREAM): _C.CLOSING,
    (_C.CLOSING, _J.SEND_CREDIT): _C.CLOSING,
    (_C.CLOSING, _J.SEND_CLOSED): _C.CLOSED,
    (_C.CLOSING, _J.ERROR): _C.CLOSED,
    (_C.CLOSING, _J.LOST): _C.CLOSED,
    # Resume. A second connection fences the first: it detaches the session, then takes it.
    (_C.ACTIVE, _J.DETACH): _C.DETACHED,
    (_C.DETACHED, _J.RECV_RESUME): _C.ACTIVE,
    (_C.DETACHED, _J.SEND_RESULT): _C.DETACHED,  # a step finished after the loss: kept for the resend
    (_C.DETACHED, _J.SEND_STREAM): _C.DETACHED,
    (_C.DETACHED, _J.SEND_CREDIT): _C.DETACHED,
    (_C.DETACHED, _J.EVICT): _C.EVICTED,
}


class ConnectionState(StrEnum):
    IDLE = "idle"
    HANDSHAKE = "handshake"  # edge: HELLO sent; cloud: waiting for it
    OPEN = "open"
    CLOSED = "closed"


class ConnectionInput(StrEnum):
    """What happens to a connection, on either end."""

    HELLO = "hello"
    WELCOME = "welcome"
    REJECT = "reject"
    MESSAGE = "message"  # any other frame
    FAIL = "fail"  # ERROR on stream 0, deadline, lost socket, close()


_N, _K = ConnectionState, ConnectionInput

# The edge starts IDLE and sends HELLO; the cloud starts in HANDSHAKE and answers at once. WELCOME and
# REJECT move whoever sends and whoever gets them.
CONNECTION_TABLE: Final[Mapping[tuple[ConnectionState, ConnectionInput], ConnectionState]] = {
    (_N.IDLE, _K.HELLO): _N.HANDSHAKE,
    (_N.IDLE, _K.FAIL): _N.CLOSED,
    (_N.HANDSHAKE, _K.WELCOME): _N.OPEN,
    (_N.HANDSHAKE, _K.REJECT): _N.CLOSED,
    (_N.HANDSHAKE, _K.FAIL): _N.CLOSED,
    (_N.OPEN, _K.MESSAGE): _N.OPEN,
    (_N.OPEN, _K.FAIL): _N.CLOSED,
    (_N.CLOSED, _K.FAIL): _N.CLOSED,
}

_State = TypeVar("_State", EdgeState, CloudState, ConnectionState)
_Input = TypeVar("_Input", EdgeInput, CloudInput, ConnectionInput)


def advance(table: Mapping[tuple[_State, _Input], _State], state: _State, happened: _Input) -> _State:
    """The state after `happened`; SequenceError `wrong_state` if the table has no such pair."""
    try:
        return table[state, happened]
    except KeyError:
        raise SequenceError(
            f"{happened.replace('_', ' ')} is not possible in state {state}",
            code="wrong_state",
        ) from None

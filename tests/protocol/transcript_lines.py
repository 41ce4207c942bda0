"""What golden transcripts are written in: frames, whole lines, and the lines that many of them share.

A line is one message: who sends it, the exact header fields and JSON text, the owner's call that makes the
sender produce it (None: the connection does so by itself), and the events the receiver reports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from isthmus.protocol.activations import Encoded, encode_ids
from isthmus.protocol.cloud_connection import CloudConnection
from isthmus.protocol.edge_connection import EdgeConnection
from isthmus.protocol.errors import OverloadedError
from isthmus.protocol.events import (
    CancelRequested,
    CloudEvent,
    EdgeEvent,
    ResultTokens,
    SessionClosed,
    SessionOpened,
    StepReceived,
    StreamTokens,
)
from isthmus.protocol.frames import Codec, Dtype, Flag, Frame, MsgType
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import Closed, Finish, Opened
from tests.protocol.pairing import LIMITS, SESSION_ID


@dataclass(frozen=True)
class Line:
    frame: Frame
    events: tuple[EdgeEvent | CloudEvent, ...] = ()
    edge: Callable[[EdgeConnection], Any] | None = None
    cloud: Callable[[CloudConnection], Any] | None = None
    by: str = ""

    @property
    def sender(self) -> str:
        return self.by or ("edge" if self.edge else "cloud")


@dataclass(frozen=True)
class Transcript:
    name: str
    lines: tuple[Line, ...]
    limits: Limits = LIMITS


def control(
    msg_type: MsgType, text: str, *, stream: int = 1, epoch: int = 1, seq: int = 0, pos: int = 0
) -> Frame:
    body = text.encode()
    return Frame(msg_type, stream, epoch, seq, pos, dtype=Dtype.JSON, raw_len=len(body), body=body)


def tensor(
    msg_type: MsgType,
    data: Encoded,
    n_tok: int,
    *,
    seq: int,
    pos: int,
    flags: Flag = Flag.NONE,
    stream: int = 1,
) -> Frame:
    return Frame(
        msg_type,
        stream,
        1 if stream else 0,
        seq,
        pos,
        n_tok,
        flags,
        data.dtype,
        data.codec,
        data.raw_len,
        data.body,
    )


def ids(values: list[int]) -> Encoded:
    body = encode_ids(values)
    return Encoded(body, Dtype.TOKEN_IDS, Codec.NONE, len(body))


def verify_frame(data: Encoded, drafts: list[int], *, seq: int, pos: int, flags: Flag = Flag.NONE) -> Frame:
    """VERIFY of the rows of `data`, one per draft id."""
    prefix = encode_ids(drafts)
    body = data._replace(body=prefix + data.body, raw_len=len(prefix) + data.raw_len)
    return tensor(MsgType.VERIFY, body, len(drafts), seq=seq, pos=pos, flags=flags)


def verified(frame: Frame, data: Encoded, drafts: tuple[int, ...], *, next_index: int) -> StepReceived:
    """What the cloud reports of a VERIFY: its rows alone, as if all of them were to produce output."""
    rows_alone = replace(frame, body=data.body, raw_len=data.raw_len)
    return replace(step(rows_alone, next_index=next_index), all_rows=True, drafts=drafts)


def step(frame: Frame, *, next_index: int) -> StepReceived:
    return StepReceived(
        frame.stream,
        frame.seq,
        frame.pos,
        frame.n_tok,
        Flag.TRUNCATE in frame.flags,
        Flag.FINAL in frame.flags,
        Flag.ALL_ROWS in frame.flags,
        next_index,
        frame,
    )


SAMPLING = (
    '{"temperature":0.0,"top_k":0,"top_p":1.0,"min_p":0.0,"repetition_penalty":1.0,"presence_penalty":0.0,'
    '"frequency_penalty":0.0,"seed":0,"choice":0,"logprobs":-1}'
)


def open_json(split: int, shape: str, row_format: str, entries: str = "[]") -> str:
    return (
        f'{{"split":{split},"shape":"{shape}","row_format":"{row_format}","outliers":[],"max_tokens":8,'
        f'"prompt_tokens":4,"max_context":64,"sampling":{SAMPLING},"end_ids":[],'
        f'"offer":{{"entries":{entries}}},"context_ids":null,"request_id":"","priority":0}}'
    )


OPENED = Opened(session_id=SESSION_ID, credits=2048, chunk_rows=512)

OPENED_LINE = Line(
    control(
        MsgType.OPENED,
        f'{{"session_id":"{SESSION_ID}","resume_token":"","cached_rows":0,"credits":2048,"chunk_rows":512}}',
    ),
    (SessionOpened(1, OPENED),),
    cloud=lambda c: c.opened(1, session_id=SESSION_ID),
)

CLOSED_LINE = Line(
    control(MsgType.CLOSED, '{"pages_freed":3,"kv_len":5,"cached":false}'),
    (SessionClosed(1, Closed(pages_freed=3, kv_len=5)),),
    cloud=lambda c: c.closed(1, pages_freed=3),
)

CANCEL_LINE = Line(
    control(MsgType.CANCEL, "{}"), (CancelRequested(1),), edge=lambda e: e.sessions[1].cancel()
)


def result_line(seq: int, first: int, tokens: list[int], pos: int, finish: Finish | None = None) -> Line:
    text = ",".join(map(str, tokens))
    end = f'"{finish}"' if finish else "null"
    return Line(
        control(
            MsgType.RESULT,
            f'{{"first_index":{first},"tokens":[{text}],"logprobs":null,"top":null,"finish":{end},"cloud_us":0}}',
            seq=seq,
            pos=pos,
        ),
        (ResultTokens(1, seq, pos, first, tuple(tokens), finish=finish),),
        cloud=lambda c: c.result_tokens(1, tokens, kv_len=pos, finish=finish),
    )


def stream_line(first: int, tokens: list[int], pos: int, finish: str | None = None) -> Line:
    text = ",".join(map(str, tokens))
    end = f'"{finish}"' if finish else "null"
    return Line(
        control(
            MsgType.STREAM,
            f'{{"first_index":{first},"tokens":[{text}],"logprobs":null,"top":null,"finish":{end},"cloud_us":0}}',
            seq=1,
            pos=pos,
        ),
        (StreamTokens(1, first, tuple(tokens), finish="stop" if finish else None),),
        cloud=lambda c: c.stream_tokens(1, tokens, finish="stop" if finish else None),
    )


# ---- ERROR, from either side

BUSY = OverloadedError("no page free", code="kv_full", hint="later", retry_after_s=2.0)

ERROR_DOWN = control(
    MsgType.ERROR,
    '{"kind":"overloaded","code":"kv_full","message":"no page free","hint":"later","fatal":false,'
    '"retry_after_s":2.0,"expected_seq":1,"expected_pos":0}',
)

WRONG_RESULT = control(MsgType.RESULT, '{"first_index":0,"tokens":[42]}', seq=9, pos=4)

ERROR_UP = control(
    MsgType.ERROR,
    '{"kind":"sequence","code":"unexpected_result","message":"RESULT for step 9, none is due",'
    '"hint":"","fatal":false,"retry_after_s":null,"expected_seq":null,"expected_pos":null}',
)

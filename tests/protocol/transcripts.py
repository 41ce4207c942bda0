"""Golden transcripts: whole conversations, frame by frame, each written once and played in both directions.

The tests of the edge play the cloud's lines into an EdgeConnection and compare what it sends, those of the
cloud do the reverse, so neither end can drift without the other noticing.
"""

from __future__ import annotations

from isthmus.protocol.activations import RowFormat
from isthmus.protocol.events import (
    CanaryDone,
    CanaryRequested,
    CloseRequested,
    CreditGranted,
    GoingAway,
    ProbeDone,
    ResultRows,
    ResultTokens,
    RttMeasured,
    SessionClosed,
    SessionOpened,
    SessionOpenRequested,
    StatusReceived,
    StreamWindow,
)
from isthmus.protocol.frames import Dtype, Flag, Frame, MsgType
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import CanaryResult, Close, Closed, GoAway, Load, Opened, Status
from tests.protocol.pairing import SESSION_ID, encoded, make_open, offer, rows
from tests.protocol.transcript_lines import (
    CANCEL_LINE,
    CLOSED_LINE,
    OPENED_LINE,
    Line,
    Transcript,
    control,
    ids,
    open_json,
    result_line,
    step,
    stream_line,
    tensor,
    verified,
    verify_frame,
)

# ---- split in the prefix shape: pipelined start, two chunks, one decode step, CLOSE with an offer

CHUNK_1 = tensor(MsgType.STEP, encoded(3), 3, seq=1, pos=0)
CHUNK_2 = tensor(MsgType.STEP, encoded(1, 3), 1, seq=2, pos=3, flags=Flag.FINAL)
DECODE = tensor(MsgType.STEP, encoded(1, 4), 1, seq=3, pos=4, flags=Flag.FINAL)
KEPT = Close(offer=offer(5), reason="done")

PREFIX = (
    Line(
        control(MsgType.OPEN, open_json(1, "prefix", "f32")),
        (SessionOpenRequested(1, make_open()),),
        edge=lambda e: e.open(make_open()),
    ),
    Line(
        CHUNK_1,
        (step(CHUNK_1, next_index=-1),),
        edge=lambda e: e.sessions[1].step_rows(encoded(3), 0, 3, final=False),
    ),
    Line(
        CHUNK_2,
        (step(CHUNK_2, next_index=0),),
        edge=lambda e: e.sessions[1].step_rows(encoded(1, 3), 3, 1, final=True),
    ),
    OPENED_LINE,
    Line(
        control(MsgType.CREDIT, '{"rows":2051,"ack_index":0,"window":0}'),
        (CreditGranted(1, 2047),),
        cloud=lambda c: c.credit(1, 3),
    ),
    Line(
        control(
            MsgType.RESULT,
            '{"first_index":0,"tokens":[42],"logprobs":null,"top":null,"finish":null,"cloud_us":0}',
            seq=2,
            pos=4,
        ),
        (ResultTokens(1, 2, 4, 0, (42,)),),
        cloud=lambda c: c.result_tokens(1, [42], kv_len=4),
    ),
    Line(
        DECODE,
        (step(DECODE, next_index=1),),
        edge=lambda e: e.sessions[1].step_rows(encoded(1, 4), 4, 1, final=True),
    ),
    Line(
        control(
            MsgType.RESULT,
            '{"first_index":1,"tokens":[43],"logprobs":[-0.5],"top":[[[43,-0.5],[7,-1.5]]],"finish":"stop",'
            '"cloud_us":1500}',
            seq=3,
            pos=5,
        ),
        (ResultTokens(1, 3, 5, 1, (43,), (-0.5,), (((43, -0.5), (7, -1.5)),), "stop", 1500),),
        cloud=lambda c: c.result_tokens(
            1, [43], kv_len=5, logprobs=[-0.5], top=[((43, -0.5), (7, -1.5))], finish="stop", cloud_us=1500
        ),
    ),
    Line(
        control(MsgType.CLOSE, f'{{"offer":{{"entries":[[5,"{5:032x}"]]}},"reason":"done"}}'),
        (CloseRequested(1, KEPT),),
        edge=lambda e: e.sessions[1].close(KEPT.offer, "done"),
    ),
    CLOSED_LINE,
)

# ---- split in the U-shape: bf16 rows, a rewind with ALL_ROWS, CANCEL that meets a RESULT

U_OPEN = make_open(shape="u", row_format="bf16", split=2)
U_PROMPT = tensor(MsgType.STEP, encoded(4, 0, RowFormat.BF16), 4, seq=1, pos=0, flags=Flag.FINAL)
U_ROW = tensor(MsgType.RESULT, encoded(1, 9, RowFormat.BF16), 1, seq=1, pos=4)
U_REWIND = tensor(
    MsgType.STEP, encoded(3, 2, RowFormat.BF16), 3, seq=2, pos=2, flags=Flag.TRUNCATE | Flag.ALL_ROWS
)
U_ROWS = tensor(MsgType.RESULT, encoded(3, 2, RowFormat.BF16), 3, seq=2, pos=5)

U_SHAPE = (
    Line(
        control(MsgType.OPEN, open_json(2, "u", "bf16")),
        (SessionOpenRequested(1, U_OPEN),),
        edge=lambda e: e.open(U_OPEN),
    ),
    OPENED_LINE,
    Line(
        U_PROMPT,
        (step(U_PROMPT, next_index=0),),
        edge=lambda e: e.sessions[1].step_rows(encoded(4, 0, RowFormat.BF16), 0, 4, final=True),
    ),
    Line(
        U_ROW,
        (ResultRows(1, 1, 4, U_ROW),),
        cloud=lambda c: c.result_rows(1, encoded(1, 9, RowFormat.BF16), 1, kv_len=4),
    ),
    Line(
        U_REWIND,
        (step(U_REWIND, next_index=1),),
        edge=lambda e: e.sessions[1].step_rows(
            encoded(3, 2, RowFormat.BF16), 2, 3, final=False, all_rows=True, truncate=True
        ),
    ),
    Line(
        U_ROWS,
        (ResultRows(1, 2, 5, U_ROWS),),
        cloud=lambda c: c.result_rows(1, encoded(3, 2, RowFormat.BF16), 3, kv_len=5),
    ),
    CANCEL_LINE,
    CLOSED_LINE,
)

# ---- draft chains: one of two drafts accepted; then in the U-shape, two of three cut off by the edge


V_PROMPT = tensor(MsgType.STEP, encoded(4), 4, seq=1, pos=0, flags=Flag.FINAL)
V_CHAIN = verify_frame(encoded(3, 4), [42, 43, 44], seq=2, pos=4)
V_LAST = verify_frame(encoded(3, 6), [50, 51, 52], seq=3, pos=6)

VERIFY = (
    Line(
        control(MsgType.OPEN, open_json(1, "prefix", "f32")),
        (SessionOpenRequested(1, make_open()),),
        edge=lambda e: e.open(make_open()),
    ),
    OPENED_LINE,
    Line(
        V_PROMPT,
        (step(V_PROMPT, next_index=0),),
        edge=lambda e: e.sessions[1].step_rows(encoded(4), 0, 4, final=True),
    ),
    result_line(1, 0, [42], 4),
    Line(
        V_CHAIN,
        (verified(V_CHAIN, encoded(3, 4), (42, 43, 44), next_index=1),),
        edge=lambda e: e.sessions[1].verify_rows([42, 43, 44], encoded(3, 4), 4),
    ),
    result_line(2, 1, [43, 50], 6),
    Line(
        V_LAST,
        (verified(V_LAST, encoded(3, 6), (50, 51, 52), next_index=3),),
        edge=lambda e: e.sessions[1].verify_rows([50, 51, 52], encoded(3, 6), 6),
    ),
    result_line(3, 3, [51, 52, 9], 9, "stop"),
    CANCEL_LINE,
    Line(
        control(MsgType.CLOSED, '{"pages_freed":3,"kv_len":9,"cached":false}'),
        (SessionClosed(1, Closed(pages_freed=3, kv_len=9)),),
        cloud=lambda c: c.closed(1, pages_freed=3),
    ),
)

UV_CHAIN = verify_frame(encoded(3, 4, RowFormat.BF16), [0, 0, 0], seq=2, pos=4)
UV_ROWS = tensor(MsgType.RESULT, encoded(3, 4, RowFormat.BF16), 3, seq=2, pos=7)
UV_NEXT = verify_frame(encoded(1, 5, RowFormat.BF16), [0], seq=3, pos=5, flags=Flag.TRUNCATE)
UV_ROW = tensor(MsgType.RESULT, encoded(1, 5, RowFormat.BF16), 1, seq=3, pos=6)

VERIFY_U = (
    Line(
        control(MsgType.OPEN, open_json(2, "u", "bf16")),
        (SessionOpenRequested(1, U_OPEN),),
        edge=lambda e: e.open(U_OPEN),
    ),
    OPENED_LINE,
    Line(
        U_PROMPT,
        (step(U_PROMPT, next_index=0),),
        edge=lambda e: e.sessions[1].step_rows(encoded(4, 0, RowFormat.BF16), 0, 4, final=True),
    ),
    Line(
        U_ROW,
        (ResultRows(1, 1, 4, U_ROW),),
        cloud=lambda c: c.result_rows(1, encoded(1, 9, RowFormat.BF16), 1, kv_len=4),
    ),
    Line(
        UV_CHAIN,
        (verified(UV_CHAIN, encoded(3, 4, RowFormat.BF16), (), next_index=1),),
        edge=lambda e: e.sessions[1].verify_rows([7, 8, 9], encoded(3, 4, RowFormat.BF16), 4),
    ),
    Line(
        UV_ROWS,
        (ResultRows(1, 2, 7, UV_ROWS),),
        cloud=lambda c: c.result_rows(1, encoded(3, 4, RowFormat.BF16), 3, kv_len=7),
    ),
    Line(
        UV_NEXT,
        (verified(UV_NEXT, encoded(1, 5, RowFormat.BF16), (), next_index=2),),
        edge=lambda e: e.sessions[1].verify_rows([5], encoded(1, 5, RowFormat.BF16), 5, truncate=True),
    ),
    Line(
        UV_ROW,
        (ResultRows(1, 3, 6, UV_ROW),),
        cloud=lambda c: c.result_rows(1, encoded(1, 5, RowFormat.BF16), 1, kv_len=6),
    ),
)

# ---- offload: token ids up, a RESULT, then STREAM under a window of 4 tokens (see STREAM_LIMITS)

O_OPEN = make_open(split=0)
O_PROMPT = tensor(MsgType.STEP, ids([1, 2, 3, 4]), 4, seq=1, pos=0, flags=Flag.FINAL)


OFFLOAD = (
    Line(
        control(MsgType.OPEN, open_json(0, "prefix", "f32")),
        (SessionOpenRequested(1, O_OPEN),),
        edge=lambda e: e.open(O_OPEN),
    ),
    OPENED_LINE,
    Line(
        O_PROMPT,
        (step(O_PROMPT, next_index=0),),
        edge=lambda e: e.sessions[1].step_ids([1, 2, 3, 4], 0, final=True),
    ),
    Line(
        control(
            MsgType.RESULT,
            '{"first_index":0,"tokens":[10],"logprobs":null,"top":null,"finish":null,"cloud_us":0}',
            seq=1,
            pos=4,
        ),
        (ResultTokens(1, 1, 4, 0, (10,)),),
        cloud=lambda c: c.result_tokens(1, [10], kv_len=4),
    ),
    stream_line(1, [11], 5),
    stream_line(2, [12], 6),
    Line(
        control(MsgType.CREDIT, '{"rows":0,"ack_index":3,"window":4}'),
        (StreamWindow(1, 4),),
        by="edge",
    ),
    stream_line(3, [13], 7, "stop"),
    CANCEL_LINE,
    Line(
        control(MsgType.CLOSED, '{"pages_freed":3,"kv_len":7,"cached":false}'),
        (SessionClosed(1, Closed(pages_freed=3, kv_len=7)),),
        cloud=lambda c: c.closed(1, pages_freed=3),
    ),
)

# ---- a prefix offer: no step before OPENED says what is cached

P_OPEN = make_open(offer=offer(2, 3))
P_STEP = tensor(MsgType.STEP, encoded(1, 3), 1, seq=1, pos=3, flags=Flag.FINAL)
OFFER = (
    Line(
        control(MsgType.OPEN, open_json(1, "prefix", "f32", f'[[2,"{2:032x}"],[3,"{3:032x}"]]')),
        (SessionOpenRequested(1, P_OPEN),),
        edge=lambda e: e.open(P_OPEN),
    ),
    Line(
        control(
            MsgType.OPENED,
            f'{{"session_id":"{SESSION_ID}","resume_token":"t","cached_rows":3,"credits":4096,"chunk_rows":16}}',
        ),
        (
            SessionOpened(
                1,
                Opened(session_id=SESSION_ID, resume_token="t", cached_rows=3, credits=4096, chunk_rows=16),
            ),
        ),
        cloud=lambda c: c.opened(
            1, session_id=SESSION_ID, resume_token="t", cached_rows=3, credits=4096, chunk_rows=16
        ),
    ),
    Line(
        P_STEP,
        (step(P_STEP, next_index=0),),
        edge=lambda e: e.sessions[1].step_rows(encoded(1, 3), 3, 1, final=True),
    ),
)

# ---- beside the sessions: ping, load, canary, drain, refusal

CANARY_FRAME = tensor(MsgType.CANARY, encoded(2), 2, seq=1, pos=2, stream=0)
LOAD = Load(
    queue=1,
    running=2,
    kv_total_pages=10,
    kv_free_pages=7,
    kv_cached_pages=1,
    rows_computed=99,
    step_s=0.004,
    queue_s=1.5,
)
PADDING = bytes.fromhex("0b642d3885")
PROBE_FRAME = Frame(MsgType.PROBE, seq=1, pos=5, dtype=Dtype.PADDING, raw_len=3, body=PADDING[:3])
REPLY_FRAME = Frame(MsgType.PROBE_REPLY, seq=1, dtype=Dtype.PADDING, raw_len=5, body=PADDING)
VERDICT = CanaryResult(split=2, ok=True, error=0.01, tolerance=0.1)

BESIDE = (
    Line(Frame(MsgType.PING, seq=1), edge=lambda e: e.ping(0.0)),
    Line(Frame(MsgType.PONG, seq=1), (RttMeasured(0.0),), by="cloud"),
    Line(PROBE_FRAME, edge=lambda e: e.probe(3, 5, 0.0)),
    Line(REPLY_FRAME, (ProbeDone(1, 3, 5, 0.0),), by="cloud"),
    Line(
        control(
            MsgType.STATUS,
            '{"load":{"queue":1,"running":2,"kv_total_pages":10,"kv_free_pages":7,"kv_cached_pages":1,'
            '"rows_computed":99,"step_s":0.004,"queue_s":1.5},"echo":1,"received":512}',
            stream=0,
            epoch=0,
        ),
        (StatusReceived(Status(load=LOAD, echo=1, received=512)),),
        cloud=lambda c: c.status(LOAD, 512),
    ),
    Line(
        CANARY_FRAME,
        (CanaryRequested(2, 1, CANARY_FRAME),),
        edge=lambda e: e.canary(2, rows(2)),
    ),
    Line(
        control(
            MsgType.CANARY_RESULT,
            '{"split":2,"ok":true,"error":0.01,"tolerance":0.1}',
            stream=0,
            epoch=0,
            seq=1,
        ),
        (CanaryDone(VERDICT),),
        cloud=lambda c: c.canary_result(1, 2, ok=True, error=0.01, tolerance=0.1),
    ),
    Line(
        control(MsgType.GOAWAY, '{"deadline_s":30.0,"alternative":"b"}', stream=0, epoch=0),
        (GoingAway(GoAway(deadline_s=30.0, alternative="b")),),
        cloud=lambda c: c.go_away(30.0, "b"),
    ),
)


TRANSCRIPTS = (
    Transcript("prefix", PREFIX),
    Transcript("u-shape", U_SHAPE),
    Transcript("verify", VERIFY),
    Transcript("verify in the u-shape", VERIFY_U),
    Transcript("offload", OFFLOAD, Limits(stream_window_tokens=4)),
    Transcript("offer", OFFER),
    Transcript("beside", BESIDE),
)

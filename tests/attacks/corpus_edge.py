"""Cases hostile to the edge: a cloud that says what it must not.

The stages, as the edge sees them: CONNECTED: it has sent HELLO. GREETED: it was welcomed. OPENED: its
session has a stream, nothing was sent. STEPPED: it waits for the RESULT of step 1, which is four rows in the
prefix shape, one row in the U-shape.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from functools import partial

import numpy as np

from isthmus.protocol.frames import Codec, Dtype, MsgType
from tests.attacks.bad_inputs import Attack, Stage
from tests.attacks.corpus_framing import FRAMING_ATTACKS
from tests.attacks.corpus_tensor import TENSOR_ATTACKS, ZSTD_BODIES
from tests.attacks.messages import PING, control, message

# A row as large as the compressed bodies of the corpus claim to be.
HIDDEN, ROW_BYTES = 32_768, 131_072
VOCAB = 320
U = {"shape": "u", "prompt_tokens": 1}
OPENED = '{"session_id":"%s","credits":2048,"chunk_rows":512}' % ("0" * 32)

_shift = partial(Attack, "duplicate seq with a different payload")
_gap = partial(Attack, "gap")
_held = partial(Attack, "pos ≠ kv_len", code="bad_kv_len")
_early = partial(Attack, "STEP before HELLO", stage=Stage.CONNECTED, fatal=True)
_rows = partial(Attack, "NaN/Inf rows", opening=U)


def tokens(text: str, *, seq: int = 1, pos: int = 4, epoch: int = 1) -> bytes:
    """A RESULT of tokens, by its JSON body."""
    return control(MsgType.RESULT, text, seq=seq, pos=pos, epoch=epoch)


def row(body: bytes, n_tok: int = 1, *, pos: int = 1, dtype: int = Dtype.F32, codec: int = 0) -> bytes:
    """A RESULT of rows; compressed ones claim to hold one row."""
    raw_len = len(body) if codec == Codec.NONE else ROW_BYTES
    return message(
        MsgType.RESULT, body, seq=1, pos=pos, n_tok=n_tok, dtype=dtype, codec=codec, raw_len=raw_len
    )


def _with(value: float) -> bytes:
    values = np.zeros(HIDDEN, np.float32)
    values[HIDDEN // 2] = value
    return values.tobytes()


# What a header says is judged alike on both sides, whatever the session's state.
_HEADERS = tuple(
    replace(attack, opening={}, stage=Stage.CONNECTED if attack.stage is Stage.CONNECTED else Stage.STEPPED)
    for attack in (*FRAMING_ATTACKS, *TENSOR_ATTACKS)
    if attack.fatal and attack.code != "unexpected_message"
)

EDGE_ATTACKS: tuple[Attack, ...] = (
    *_HEADERS,
    Attack(
        "unknown type",
        "HELLO from the cloud",
        (control(MsgType.HELLO, "{}", stream=0, epoch=0),),
        "unexpected_message",
        fatal=True,
    ),
    Attack("unknown type", "OPEN from the cloud", (control(MsgType.OPEN, "{}"),), "unexpected_message"),
    Attack(
        "unknown type",
        "a step from the cloud",
        (message(MsgType.STEP, b"\1\0\0\0", n_tok=1, dtype=Dtype.TOKEN_IDS),),
        "unexpected_message",
    ),
    # ---- the handshake
    _early(
        name="RESULT before WELCOME", messages=(tokens('{"first_index":0,"tokens":[7]}'),), code="wrong_state"
    ),
    _early(
        name="a pong before WELCOME",
        messages=(message(MsgType.PONG, stream=0, epoch=0, seq=1),),
        code="wrong_state",
    ),
    _early(
        name="WELCOME that is no JSON",
        messages=(control(MsgType.WELCOME, "{", stream=0, epoch=0),),
        code="bad_message",
    ),
    _early(
        name="WELCOME with a profile that is none",
        messages=(control(MsgType.WELCOME, '{"version":1,"profile":{"threads":2}}', stream=0, epoch=0),),
        code="bad_message",
    ),
    _early(
        name="WELCOME of a megabyte",
        messages=(control(MsgType.WELCOME, '"' + "x" * 2**20 + '"', stream=0, epoch=0),),
        code="too_large",
    ),
    _early(
        name="REJECT that is none",
        messages=(control(MsgType.REJECT, '{"code":1}', stream=0, epoch=0),),
        code="bad_message",
    ),
    _early(
        name="ERROR that is none",
        messages=(control(MsgType.ERROR, '{"kind":"?"}', stream=0, epoch=0),),
        code="bad_message",
    ),
    Attack(
        "HELLO twice",
        "GOAWAY with a deadline in the past",
        (control(MsgType.GOAWAY, '{"deadline_s":-1}', stream=0, epoch=0),),
        "bad_message",
        fatal=True,
    ),
    Attack(
        "HELLO twice",
        "GOAWAY with a deadline that is none",
        (control(MsgType.GOAWAY, '{"deadline_s":NaN}', stream=0, epoch=0),),
        "bad_message",
        fatal=True,
    ),
    Attack(
        "HELLO twice",
        "STATUS with a load below zero",
        (control(MsgType.STATUS, '{"load":{"queue":-1}}', stream=0, epoch=0),),
        "bad_message",
        fatal=True,
    ),
    Attack(
        "same identity with other weights whose canary disagrees",
        "a canary's result nobody asked for",
        (
            control(
                MsgType.CANARY_RESULT,
                '{"split":1,"ok":true,"error":0.0,"tolerance":1.0}',
                stream=0,
                epoch=0,
                seq=1,
            ),
        ),
        "unexpected_canary_result",
        fatal=True,
    ),
    # ---- opening
    Attack("HELLO twice", "OPENED twice", (control(MsgType.OPENED, OPENED),), "wrong_state"),
    Attack(
        "gap",
        "RESULT before OPENED",
        (tokens('{"first_index":0,"tokens":[7]}'),),
        "wrong_state",
        Stage.GREETED,
    ),
    Attack(
        "gap",
        "OPENED without a session id",
        (control(MsgType.OPENED, OPENED.replace("0" * 32, "x")),),
        "bad_message",
        Stage.GREETED,
    ),
    Attack(
        "gap",
        "OPENED with fewer credits than promised",
        (control(MsgType.OPENED, OPENED.replace("2048", "1")),),
        "bad_credits",
        Stage.GREETED,
    ),
    Attack(
        "gap",
        "OPENED with rows that were never offered",
        (control(MsgType.OPENED, OPENED[:-1] + ',"cached_rows":3}'),),
        "bad_cached_rows",
        Stage.GREETED,
    ),
    Attack(
        "gap",
        "a stream that was never opened",
        (control(MsgType.OPENED, OPENED, stream=99),),
        "unknown_stream",
    ),
    # ---- results
    _gap(
        name="an answer to a step that was never sent",
        code="unexpected_result",
        messages=(tokens('{"first_index":0,"tokens":[7]}', seq=2),),
    ),
    _gap(
        name="an answer to no step",
        code="unexpected_result",
        stage=Stage.OPENED,
        messages=(tokens('{"first_index":0,"tokens":[7]}'),),
    ),
    _gap(
        name="token 1 before token 0",
        code="bad_output_index",
        messages=(tokens('{"first_index":1,"tokens":[7]}'),),
    ),
    _gap(
        name="two tokens where one is due",
        code="bad_output_index",
        messages=(tokens('{"first_index":0,"tokens":[7,7]}'),),
    ),
    _gap(name="no token", code="bad_output_index", messages=(tokens('{"first_index":0,"tokens":[]}'),)),
    _gap(
        name="a stream nobody asked for",
        code="wrong_state",
        messages=(control(MsgType.STREAM, '{"first_index":0,"tokens":[7]}', pos=4),),
    ),
    Attack(
        "seq wrap",
        "RESULT of step 2⁶⁴−1",
        (tokens('{"first_index":0,"tokens":[7]}', seq=2**64 - 1),),
        "unexpected_result",
    ),
    _shift(
        name="the answer again, another token",
        reply=MsgType.RESULT,
        messages=(tokens('{"first_index":0,"tokens":[7]}'), tokens('{"first_index":0,"tokens":[8]}')),
    ),
    _held(name="more rows than were sent", messages=(tokens('{"first_index":0,"tokens":[7]}', pos=5),)),
    _held(name="fewer", messages=(tokens('{"first_index":0,"tokens":[7]}', pos=0),)),
    Attack(
        "stale epoch",
        "an answer of epoch 0 is dropped",
        (tokens('{"first_index":0,"tokens":[8]}', epoch=0), tokens('{"first_index":0,"tokens":[7]}')),
        reply=MsgType.RESULT,
    ),
    Attack(
        "stale epoch",
        "an answer of an epoch to come",
        (tokens('{"first_index":0,"tokens":[7]}', epoch=2),),
        "epoch_ahead",
    ),
    Attack(
        "CANCEL racing RESULT",
        "CLOSED that nobody asked for",
        (control(MsgType.CLOSED, '{"kv_len":-1}'),),
        "bad_message",
    ),
    Attack(
        "wrong hidden size", "token 320 of 320", (tokens('{"first_index":0,"tokens":[320]}'),), "bad_token_id"
    ),
    *(
        Attack("wrong hidden size", f"a body like {text}", (tokens(text),), "bad_message")
        for text in (
            "{}",
            "[]",
            '{"first_index":0,"tokens":[-1]}',
            '{"first_index":0,"tokens":[7],"x":1}',
            '{"first_index":0,"tokens":[7.5]}',
            '{"first_index":0,"tokens":["7"]}',
            '{"first_index":0,"tokens":[7],"logprobs":[1.0,2.0]}',
            "\x00",
            '{"first_index":0,"tokens":[7],"logprobs":[NaN]}',
            '{"first_index":1e9,"tokens":[7]}',
            '{"first_index":0,"tokens":[7],"finish":"because"}',
        )
    ),
    Attack("wrong hidden size", "rows where tokens are due", (row(_with(0), pos=4),), "bad_dtype"),
    Attack(
        "wrong hidden size",
        "tokens where rows are due",
        (tokens('{"first_index":0,"tokens":[7]}', pos=1),),
        "bad_dtype",
        opening=U,
    ),
    Attack("wrong hidden size", "half a row", (row(_with(0)[: ROW_BYTES // 2]),), "bad_length", opening=U),
    Attack(
        "n_tok > limit", "two rows where one is due", (row(_with(0) * 2, 2),), "bad_output_rows", opening=U
    ),
    Attack(
        "unknown dtype or codec",
        "bf16 where f32 was agreed",
        (row(_with(0), dtype=Dtype.BF16),),
        "bad_dtype",
        opening=U,
    ),
    *(
        _rows(name=f"{value}", messages=(row(_with(value)),), code="bad_values")
        for value in (float("nan"), float("inf"), 2.0**127)
    ),
    *(
        Attack(item, name, (row(body, codec=Codec.ZSTD),), "bad_compression", opening=U)
        for item, name, body in ZSTD_BODIES
    ),
    # ---- floods of what is legal
    Attack(
        "ping flood",
        "10,000 pongs nobody asked for",
        (
            *[message(MsgType.PONG, stream=0, epoch=0, seq=9)] * 10_000,
            tokens('{"first_index":0,"tokens":[7]}'),
        ),
        reply=MsgType.RESULT,
    ),
    Attack("ping flood", "a ping from the cloud", (PING,), "unexpected_message", fatal=True),
    Attack(
        "ping flood",
        "100 replies to no probe",
        (
            *[message(MsgType.PROBE_REPLY, bytes(1000), stream=0, seq=9, dtype=Dtype.PADDING)] * 100,
            tokens('{"first_index":0,"tokens":[7]}'),
        ),
        reply=MsgType.RESULT,
    ),
    Attack(
        "ping flood",
        "a probe from the cloud",
        (message(MsgType.PROBE, stream=0, dtype=Dtype.PADDING),),
        "unexpected_message",
        fatal=True,
    ),
    Attack(
        "ping flood",
        "credits without end",
        (
            *[control(MsgType.CREDIT, '{"rows":9007199254740992}')] * 100,
            tokens('{"first_index":0,"tokens":[7]}'),
        ),
        reply=MsgType.RESULT,
    ),
    Attack(
        "outlier index out of range or repeated",
        "a token id that is no id",
        (message(MsgType.RESULT, struct.pack("<i", -1), seq=1, pos=4, n_tok=1, dtype=Dtype.TOKEN_IDS),),
        "bad_dtype",
        fatal=True,
    ),
)

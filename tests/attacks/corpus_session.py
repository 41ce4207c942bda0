"""Cases of the session's order: what comes too early, twice, out of turn or too late."""

from __future__ import annotations

from functools import partial
from typing import Any

from isthmus.protocol.frames import Dtype, Flag, MsgType
from isthmus.protocol.limits import Limits
from tests.attacks.bad_inputs import Attack, Ours, Stage
from tests.attacks.messages import (
    FIRST_STEP,
    LAST_STEP,
    NEXT_STEP,
    PING,
    SHORT,
    control,
    message,
    open_message,
    raw_rows,
    step,
)

_probed = partial(Attack, "ping flood", code="probe_too_large", fatal=True)
_early = partial(Attack, "STEP before HELLO", code="wrong_state", stage=Stage.CONNECTED, fatal=True)
_duplicate = partial(Attack, "duplicate seq with a different payload", code="duplicate_seq_payload")
_gap = partial(Attack, "gap", code="sequence_gap")
_wrap = partial(Attack, "seq wrap", code="sequence_gap")
_position = partial(Attack, "pos ≠ kv_len", code="bad_position")
_cut = partial(Attack, "TRUNCATE past the end", code="bad_position")
_epoch = partial(Attack, "stale epoch")
_race = partial(Attack, "CANCEL racing RESULT", opening=SHORT, reply=MsgType.CLOSED)

CANCEL = control(MsgType.CANCEL, "{}")
CLOSE = control(MsgType.CLOSE, "{}")


def _verify(ids: tuple[int, ...], **header: int) -> bytes:
    body = b"".join(token.to_bytes(4, "little", signed=True) for token in ids) + raw_rows(len(ids))
    values: dict[str, Any] = {"seq": 2, "pos": 2, "dtype": Dtype.F32, "n_tok": len(ids), **header}
    return message(MsgType.VERIFY, body, **values)


def probe(body: bytes, *, pos: int = 0, seq: int = 1) -> bytes:
    return message(MsgType.PROBE, body, stream=0, epoch=0, seq=seq, pos=pos, dtype=Dtype.PADDING)


MOST = Limits().max_probe_bytes

SESSION_ATTACKS: tuple[Attack, ...] = (
    _early(name="a step", messages=(FIRST_STEP,)),
    _early(name="OPEN", messages=(open_message(),)),
    _early(name="a ping", messages=(PING,)),
    _early(name="a probe", messages=(probe(b"x"),)),
    Attack("HELLO twice", "the same", (Ours.HELLO,), "hello_twice", Stage.GREETED, fatal=True),
    Attack("HELLO twice", "in a running session", (Ours.HELLO,), "hello_twice", fatal=True),
    _duplicate(name="other rows", messages=(step(raw_rows(2)[::-1], 2, seq=1, pos=0),)),
    _duplicate(name="fewer rows", messages=(step(raw_rows(1), 1, seq=1, pos=0),)),
    _duplicate(name="one bit", messages=(step(raw_rows(2)[:-1] + b"\x01", 2, seq=1, pos=0),)),
    _duplicate(
        name="the same rows, now with output",
        messages=(step(raw_rows(2), 2, seq=1, pos=0, flags=Flag.FINAL),),
    ),
    _duplicate(name="the same rows at another place", messages=(step(raw_rows(2), 2, seq=1, pos=2),)),
    _duplicate(
        name="the same payload is a repetition, and dropped",
        code="",
        reply=MsgType.RESULT,
        messages=(FIRST_STEP, FIRST_STEP, LAST_STEP),
        opening=SHORT,
    ),
    *(_gap(name=f"seq {n}", messages=(step(raw_rows(1), 1, seq=n),)) for n in (0, 3, 9, 1000)),
    _gap(name="the first step has seq 2", messages=(step(raw_rows(1), 1, seq=2, pos=0),), stage=Stage.OPENED),
    *(_wrap(name=f"seq {n}", messages=(step(raw_rows(1), 1, seq=n),)) for n in (2**63, 2**64 - 1, 2**32 + 2)),
    *(
        _position(name=f"at {n}, 2 are held", messages=(step(raw_rows(1), 1, pos=n),))
        for n in (0, 1, 3, 512, 2**31, 2**32 - 1)
    ),
    *(
        _cut(name=f"to {n}, 2 are held", messages=(step(raw_rows(1), 1, pos=n, flags=Flag.TRUNCATE),))
        for n in (3, 512, 2**32 - 1)
    ),
    _cut(name="of a draft chain", messages=(_verify((1, 2), pos=3, flags=Flag.TRUNCATE),)),
    _cut(
        name="before the first step",
        stage=Stage.OPENED,
        messages=(step(raw_rows(1), 1, seq=1, pos=1, flags=Flag.TRUNCATE),),
    ),
    _epoch(
        name="a step of epoch 0 is dropped",
        reply=MsgType.RESULT,
        opening=SHORT,
        messages=(step(raw_rows(1), 1, epoch=0), step(raw_rows(9), 9, epoch=0, seq=77), LAST_STEP),
    ),
    _epoch(
        name="CANCEL of epoch 0 is dropped",
        reply=MsgType.RESULT,
        opening=SHORT,
        messages=(control(MsgType.CANCEL, "{}", epoch=0), LAST_STEP),
    ),
    _epoch(name="a step of an epoch to come", messages=(step(raw_rows(1), 1, epoch=2),), code="epoch_ahead"),
    _epoch(name="the last epoch", messages=(step(raw_rows(1), 1, epoch=2**32 - 1),), code="epoch_ahead"),
    _epoch(
        name="OPEN in epoch 2",
        stage=Stage.GREETED,
        code="epoch_ahead",
        messages=(message(MsgType.OPEN, open_message()[42:], dtype=Dtype.JSON, epoch=2),),
    ),
    _race(name="at once", messages=(LAST_STEP, CANCEL)),
    _race(
        name="and again, and CLOSE, and steps behind",
        messages=(LAST_STEP, CANCEL, CANCEL, CLOSE, step(raw_rows(1), 1, seq=3, pos=4), CANCEL),
    ),
    _race(name="CLOSE", messages=(LAST_STEP, CLOSE, CANCEL)),
    Attack("CANCEL racing RESULT", "before OPEN", (CANCEL,), "unknown_stream", Stage.GREETED),
    Attack(
        "CANCEL racing RESULT", "a field that is none", (control(MsgType.CANCEL, '{"x":1}'),), "bad_message"
    ),
    _probed(name="a probe above its bound", messages=(probe(bytes(MOST + 1)),)),
    _probed(name="a probe that asks for 4 GiB", messages=(probe(b"", pos=2**32 - 1),)),
    _probed(
        name="a reply nobody may send",
        messages=(message(MsgType.PROBE_REPLY, stream=0, dtype=Dtype.PADDING),),
        code="unexpected_message",
    ),
    Attack(
        "ping flood",
        "1,000 probes that ask for all there is",
        tuple(probe(b"", pos=MOST, seq=seq) for seq in range(1000)),
        reply=MsgType.PROBE_REPLY,
    ),
    # Neighbours of the list's items: ids that are none, JSON that is none, orders of another kind.
    _position(
        name="output of a token before the first", messages=(_verify((1, 2)),), code="bad_output_index"
    ),
    _position(name="a draft id beyond the vocabulary", messages=(_verify((1, 320)),), code="bad_token_id"),
    Attack("HELLO twice", "OPEN twice on a stream", (open_message(),), "stream_reused"),
    Attack("STEP before HELLO", "a step before OPEN", (FIRST_STEP,), "unknown_stream", Stage.GREETED),
    Attack(
        "STEP before HELLO",
        "HELLO that is no JSON",
        (control(MsgType.HELLO, "{", stream=0, epoch=0),),
        "bad_message",
        Stage.CONNECTED,
        fatal=True,
    ),
    Attack(
        "STEP before HELLO",
        "HELLO nested without end",
        (control(MsgType.HELLO, "[" * 200_000, stream=0, epoch=0),),
        "bad_message",
        Stage.CONNECTED,
        fatal=True,
    ),
    Attack(
        "STEP before HELLO",
        "HELLO of a megabyte",
        (control(MsgType.HELLO, '"' + "x" * 2**20 + '"', stream=0, epoch=0),),
        "too_large",
        Stage.CONNECTED,
        fatal=True,
    ),
    Attack(
        "pos ≠ kv_len",
        "ALL_ROWS where the cloud samples",
        (step(raw_rows(1), 1, flags=Flag.ALL_ROWS),),
        "all_rows_in_prefix_shape",
    ),
    Attack(
        "pos ≠ kv_len",
        "NEXT_STEP is fine",
        (NEXT_STEP, step(raw_rows(1), 1, seq=3, pos=3, flags=Flag.FINAL)),
        opening=SHORT,
        reply=MsgType.RESULT,
    ),
)

"""VERIFY: a draft chain is a step like any other, of which the cloud keeps as many rows as it drew along."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from isthmus.protocol.activations import RowCodec, RowFormat, encode_ids
from isthmus.protocol.drafts import split_drafts, with_drafts
from isthmus.protocol.edge_session import EdgeSession
from isthmus.protocol.errors import CodecError, FrameError, SequenceError
from isthmus.protocol.events import ResultRows, ResultTokens, SessionFailed, StepReceived
from isthmus.protocol.frames import Codec, Dtype, Flag, Frame, MsgType, encode_frame, parse_json
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import ResultBody
from tests.protocol import cloud_side, edge_side
from tests.protocol.pairing import (
    HIDDEN,
    VOCAB,
    Pair,
    connected,
    encoded,
    make_open,
    offer,
    opened,
    parse,
    rows,
)
from tests.protocol.transcript_lines import control, ids, tensor, verify_frame


def decoding(pair: Pair, **changes: Any) -> EdgeSession:
    """A session whose token 0 is 40; 4 rows are held."""
    session = opened(pair, **changes)
    session.step_rows(encoded(4), 0, 4, final=True)
    pair.up()
    if session.open.shape == "prefix":
        pair.cloud.result_tokens(session.stream, [40], kv_len=4)
    else:
        pair.cloud.result_rows(session.stream, encoded(1), 1, kv_len=4)
    pair.down()
    pair.sent_up.clear()
    return session


def received(pair: Pair) -> StepReceived:
    (event,) = pair.up()
    assert isinstance(event, StepReceived)
    return event


# ---- the body


def test_the_body_is_ids_then_rows_byte_for_byte() -> None:
    pair = connected()
    raw = RowCodec(RowFormat.F32, HIDDEN, zstd=False).encode(rows(2, 4))
    decoding(pair).verify_rows([40, 41], raw, 4)
    event = received(pair)
    (frame,) = pair.sent_up
    assert (frame.type, frame.n_tok, frame.dtype, frame.codec) == (MsgType.VERIFY, 2, Dtype.F32, Codec.NONE)
    assert frame.body == struct.pack("<2i", 40, 41) + rows(2, 4).tobytes()
    assert event.drafts == (40, 41)
    assert event.frame.body == rows(2, 4).tobytes()


@pytest.mark.parametrize("fmt", list(RowFormat))
def test_zstd_is_over_the_rows_alone_and_bounded_by_raw_len(fmt: RowFormat) -> None:
    codec = RowCodec(fmt, HIDDEN * 8)
    values = np.tile(np.arange(8, dtype=np.float32), (6, HIDDEN))
    body = codec.encode(values)
    assert body.codec is Codec.ZSTD
    frame = with_drafts(range(6), tensor(MsgType.VERIFY, body, 6, seq=1, pos=0), VOCAB)
    assert frame.raw_len == 6 * 4 + 6 * codec.row_bytes
    assert frame.body[:24] == encode_ids(range(6))
    drafts, alone = split_drafts(parse(encode_frame(frame)), VOCAB)
    assert drafts == (0, 1, 2, 3, 4, 5)
    assert alone == tensor(MsgType.VERIFY, body, 6, seq=1, pos=0)
    assert np.abs(codec.decode_frame(alone, max_raw=alone.raw_len) - values).max() < 0.1
    with pytest.raises(CodecError, match="the limit is"):
        codec.decode_frame(alone, max_raw=alone.raw_len - 1)
    forged = Frame(**{**as_dict(frame), "raw_len": frame.raw_len + 6 * codec.row_bytes})
    with pytest.raises(CodecError, match="the frame declares"):
        codec.decode_frame(split_drafts(forged, VOCAB)[1], max_raw=1 << 20)


def as_dict(frame: Frame) -> dict[str, Any]:
    return {name: getattr(frame, name) for name in Frame.__slots__}


@pytest.mark.parametrize("bad", [[40, VOCAB], [-1, 3], [2**31, 0]])
def test_ids_outside_the_vocabulary_are_neither_sent_nor_taken(bad: list[int]) -> None:
    pair = connected()
    session = decoding(pair)
    with pytest.raises(CodecError) as caught:
        session.verify_rows(bad, encoded(2, 4), 4)
    assert caught.value.code == "bad_token_id"
    assert not pair.edge.has_data
    frame = verify_frame(encoded(2, 4), [0, 0], seq=2, pos=4)
    prefix = struct.pack("<2I", *(value % 2**32 for value in bad))
    (failed,) = pair.inject_up(frame, body=prefix + frame.body[8:])
    assert isinstance(failed, SessionFailed)
    assert failed.error.code == "bad_token_id"


# ---- prefix shape


@pytest.mark.parametrize("tokens", [[9], [41, 9], [41, 42, 9]])
def test_the_cloud_keeps_the_rows_it_drew_along_and_the_edge_takes_that_over(tokens: list[int]) -> None:
    pair = connected()
    session = decoding(pair)
    assert session.verify_rows([40, 41, 42], encoded(3, 4), 4) == 2
    event = received(pair)
    assert (event.seq, event.pos, event.n_tok, event.next_index) == (2, 4, 3, 1)
    assert (event.all_rows, event.final, event.truncate) == (True, False, False)
    assert (session.kv_len, pair.cloud.sessions[1].kv_len) == (5, 5)  # the first row, for certain
    assert session.awaiting_result
    assert not session.can_send(1)
    held = 4 + len(tokens)
    pair.cloud.result_tokens(1, tokens, kv_len=held)
    assert pair.down() == [ResultTokens(1, 2, held, 1, tuple(tokens))]
    assert (session.kv_len, pair.cloud.sessions[1].kv_len) == (held, held)
    assert session.next_index == pair.cloud.sessions[1].next_index == 1 + len(tokens)
    session.step_rows(encoded(1, held), held, 1, final=True)
    assert received(pair).next_index == 1 + len(tokens)


def test_logprobs_and_finish_come_with_every_token() -> None:
    pair = connected()
    decoding(pair).verify_rows([40, 41, 42], encoded(3, 4), 4)
    pair.up()
    pair.cloud.result_tokens(
        1, [41, 2], kv_len=6, logprobs=[-0.5, -1.0], top=[((41, -0.5),), ((2, -1.0),)], finish="stop"
    )
    assert pair.down() == [
        ResultTokens(1, 2, 6, 1, (41, 2), (-0.5, -1.0), (((41, -0.5),), ((2, -1.0),)), "stop")
    ]


def test_the_repeated_verify_gets_the_cached_result_and_another_payload_is_an_error() -> None:
    pair = connected()
    decoding(pair).verify_rows([40, 41, 42], encoded(3, 4), 4)
    pair.up()
    (verify,) = pair.sent_up
    assert pair.inject_up(verify) == []  # still computing
    assert not pair.cloud.has_data
    pair.cloud.result_tokens(1, [41, 9], kv_len=6)
    (answer,) = pair.cloud.data_to_send()
    assert pair.inject_up(verify) == []
    assert pair.cloud.data_to_send() == [answer]
    pair.edge.receive(answer, 0.0)
    assert pair.edge.receive(answer, 0.0) == []
    step = tensor(MsgType.STEP, encoded(3, 4), 3, seq=2, pos=4)
    for other in (verify_frame(encoded(3, 4), [40, 41, 43], seq=2, pos=4), step):
        pair = connected()
        decoding(pair).verify_rows([40, 41, 42], encoded(3, 4), 4)
        pair.up()
        (failed,) = pair.inject_up(other)
        assert isinstance(failed, SessionFailed)
        assert failed.error.code == "duplicate_seq_payload"


def test_a_chain_spends_credits_and_its_result_returns_them() -> None:
    pair = connected(limits=Limits(initial_credits_rows=5))
    session = decoding(pair)
    with pytest.raises(SequenceError, match="6 rows, 5 are credited"):
        session.verify_rows(range(6), encoded(6, 4), 4)
    session.verify_rows(range(5), encoded(5, 4), 4)
    pair.up()
    assert session.credits == pair.cloud.sessions[1].credits == 0
    pair.cloud.result_tokens(1, [1, 2], kv_len=6)
    assert [type(event) for event in pair.down()] == [ResultTokens]
    assert session.credits == pair.cloud.sessions[1].credits == 5


def test_rule_7_holds_for_a_chain_on_either_side() -> None:
    pair = connected()
    session = decoding(pair)
    session.verify_rows([40, 41], encoded(2, 4), 4)
    with pytest.raises(SequenceError, match="step 3 while step 2 is unanswered"):
        session.verify_rows([40], encoded(1, 5), 5)
    pair.up()
    (failed,) = pair.inject_up(verify_frame(encoded(1, 5), [41], seq=3, pos=5))
    assert isinstance(failed, SessionFailed)
    assert failed.error.code == "step_pending"


def test_a_chain_may_reach_beyond_the_last_token_but_not_begin_there() -> None:
    pair = connected()
    session = decoding(pair, max_tokens=3)
    session.verify_rows([40, 41, 42, 43, 44], encoded(5, 4), 4)
    assert received(pair).next_index == 1
    with pytest.raises(SequenceError, match="answers with 3 outputs"):
        pair.cloud.result_tokens(1, [41, 42, 43], kv_len=7)  # token 3 of 3
    pair.cloud.result_tokens(1, [41, 42], kv_len=6, finish="length")
    pair.down()
    with pytest.raises(SequenceError, match="would produce token 3") as caught:
        session.verify_rows([42], encoded(1, 6), 6)
    assert caught.value.code == "bad_output_index"
    (failed,) = pair.inject_up(verify_frame(encoded(1, 6), [42], seq=3, pos=6))
    assert isinstance(failed, SessionFailed)
    assert failed.error.code == "bad_output_index"


def test_a_chain_begins_with_the_newest_token_never_before() -> None:
    pair = connected()
    session = opened(pair)
    with pytest.raises(SequenceError, match="would produce token -3"):
        session.verify_rows([1, 2], encoded(2), 0)
    session.step_rows(encoded(3), 0, 3, final=False)
    session.verify_rows([4, 5], encoded(2, 3), 3)  # the prompt's last token and a draft of the first
    assert [event.next_index for event in pair.up() if isinstance(event, StepReceived)] == [-1, 0]
    pair.cloud.result_tokens(1, [5, 6], kv_len=5)
    assert pair.down() == [ResultTokens(1, 2, 5, 0, (5, 6))]
    with pytest.raises(SequenceError, match="would produce token 1 again; the next one is 2"):
        session.verify_rows([5, 6], encoded(2, 4), 4, truncate=True)


def test_truncate_goes_with_a_chain() -> None:
    pair = connected()
    session = decoding(pair)
    session.step_rows(encoded(2, 4), 4, 2, final=False)  # rows that turn out useless
    with pytest.raises(SequenceError, match="expected 6"):
        session.verify_rows([40, 41], encoded(2, 4), 4)
    session.verify_rows([40, 41], encoded(2, 4), 4, truncate=True)
    event = pair.up()[-1]
    assert isinstance(event, StepReceived)
    assert (event.pos, event.truncate, event.next_index) == (4, True, 1)
    pair.cloud.result_tokens(1, [7], kv_len=5)
    pair.down()
    assert session.kv_len == pair.cloud.sessions[1].kv_len == 5


def test_no_close_offers_rows_that_a_chain_may_still_lose() -> None:
    pair = connected()
    session = decoding(pair)
    session.verify_rows([40, 41, 42], encoded(3, 4), 4)
    with pytest.raises(Exception, match="the offer names 6 rows, the cloud holds 5"):
        session.close(offer(6))
    session.close(offer(5))
    pair.up()
    pair.cloud.result_tokens(1, [9], kv_len=5)
    pair.cloud.closed(1)
    assert [type(event).__name__ for event in pair.down()] == ["SessionClosed"]


def test_a_chain_that_meets_a_cancel_is_dropped() -> None:
    pair = connected()
    session = decoding(pair)
    session.verify_rows([40, 41], encoded(2, 4), 4)
    (chain,) = pair.edge.data_to_send()
    session.cancel()
    assert [type(event).__name__ for event in pair.up()] == ["CancelRequested"]
    assert pair.cloud.receive(chain, 0.0) == []
    pair.cloud.result_tokens(1, [41, 9], kv_len=6)
    assert not pair.cloud.has_data


@pytest.mark.parametrize("flags", [Flag.FINAL, Flag.ALL_ROWS])
def test_no_other_flag_goes_with_a_chain(flags: Flag) -> None:
    with pytest.raises(FrameError, match="allowed 0x0001"):
        encode_frame(verify_frame(encoded(1), [0], seq=1, pos=0, flags=flags))


# ---- what the cloud must not answer


@pytest.mark.parametrize(
    ("tokens", "pos", "code"),
    [
        ([41, 42, 43, 9], 8, "bad_output_index"),
        ([], 4, "bad_output_index"),
        ([9], 7, "bad_kv_len"),
        ([41, 9], 5, "bad_kv_len"),
        ([9, 9], 6, "bad_verification"),
        ([41, 9, 9], 7, "bad_verification"),
        ([41, VOCAB], 6, "bad_token_id"),
    ],
)
def test_the_edge_believes_no_result_that_contradicts_its_draft(
    tokens: list[int], pos: int, code: str
) -> None:
    edge = edge_side.welcomed()
    session = edge_side.started(edge)
    session.step_rows(encoded(4), 0, 4, final=True)
    edge_side.feed(edge, edge_side.result(0, 40, seq=1, pos=4))
    session.verify_rows([40, 41, 42], encoded(3, 4), 4)
    (event,) = edge_side.feed(
        edge, control(MsgType.RESULT, f'{{"first_index":1,"tokens":{tokens}}}', seq=2, pos=pos)
    )
    assert isinstance(event, SessionFailed)
    assert event.error.code == code


def test_the_edge_takes_no_token_beyond_max_tokens() -> None:
    edge = edge_side.welcomed()
    session = edge_side.started(edge, make_open(max_tokens=2))
    session.step_rows(encoded(4), 0, 4, final=True)
    edge_side.feed(edge, edge_side.result(0, 40, seq=1, pos=4))
    session.verify_rows([40, 41], encoded(2, 4), 4)
    (event,) = edge_side.feed(
        edge, control(MsgType.RESULT, '{"first_index":1,"tokens":[41,9]}', seq=2, pos=6)
    )
    assert isinstance(event, SessionFailed)
    assert "holds 2 tokens from 1, expected 1 from 1" in event.error.message


@pytest.mark.parametrize(("tokens", "kv_len"), [([], 4), ([9], 7), ([1, 2, 3, 4], 8), ([41, 42, 43], 6)])
def test_the_engine_must_not_contradict_the_chain(tokens: list[int], kv_len: int) -> None:
    cloud = cloud_side.greeted()
    cloud_side.active(cloud)
    cloud_side.feed(cloud, cloud_side.step(4, seq=1, pos=0, flags=Flag.FINAL))
    cloud.result_tokens(1, [40], kv_len=4)
    cloud_side.feed(cloud, verify_frame(encoded(3, 4), [40, 41, 42], seq=2, pos=4))
    with pytest.raises(SequenceError) as caught:
        cloud.result_tokens(1, tokens, kv_len=kv_len)
    assert caught.value.code == "engine_mismatch"
    cloud.data_to_send()
    cloud.result_tokens(1, [41, 9], kv_len=6)
    (frame,) = cloud_side.sent(cloud)
    assert parse_json(frame, ResultBody).tokens == (41, 9)


# ---- U-shape


@pytest.mark.parametrize("split", [0, 2])
def test_in_the_u_shape_every_row_comes_back_and_no_draft_id_leaves(split: int) -> None:
    pair = connected()
    session = opened(pair, shape="u", split=split)
    if split:
        session.verify_rows([40, 41, 42], encoded(3), 0)
    else:
        session.verify_ids([40, 41, 42], 0)
    event = received(pair)
    (frame,) = pair.sent_up
    assert frame.body[:12] == bytes(12)
    assert frame.body[12:] == event.frame.body == (encoded(3).body if split else ids([40, 41, 42]).body)
    assert (event.drafts, event.all_rows) == ((), True)
    assert session.kv_len == pair.cloud.sessions[1].kv_len == 3
    with pytest.raises(SequenceError, match="answers with 2 outputs"):
        pair.cloud.result_rows(1, encoded(2), 2, kv_len=2)
    pair.cloud.result_rows(1, encoded(3), 3, kv_len=3)
    (result,) = pair.down()
    assert isinstance(result, ResultRows)
    assert (result.kv_len, result.frame.n_tok) == (3, 3)
    if split:
        session.step_rows(encoded(1, 1), 1, 1, final=True, truncate=True)
    else:
        session.step_ids([9], 1, final=True, truncate=True)
    assert received(pair).truncate
    assert session.kv_len == pair.cloud.sessions[1].kv_len == 2


def test_ids_in_the_u_shape_are_refused_by_the_cloud() -> None:
    pair = connected()
    opened(pair, shape="u")
    (failed,) = pair.inject_up(verify_frame(encoded(2), [0, 7], seq=1, pos=0))
    assert isinstance(failed, SessionFailed)
    assert failed.error.code == "draft_ids_refused"
    assert "zeros" in failed.error.hint


# ---- offload


def test_in_offload_a_chain_is_refused_on_either_side() -> None:
    pair = connected()
    session = opened(pair, split=0)
    session.step_ids([1, 2, 3], 0, final=False)
    with pytest.raises(SequenceError, match="where the cloud generates by itself") as caught:
        session.verify_ids([4, 5], 3)
    assert (caught.value.code, bool(caught.value.hint)) == ("verify_in_offload", True)
    pair.up()
    (failed,) = pair.inject_up(verify_frame(ids([4, 5]), [4, 5], seq=2, pos=3))
    assert isinstance(failed, SessionFailed)
    assert failed.error.code == "verify_in_offload"


@pytest.mark.parametrize("split", [0, 1])
def test_ids_and_rows_are_not_mixed_up(split: int) -> None:
    session = opened(connected(), shape="u", split=split)
    with pytest.raises(SequenceError) as caught:
        session.verify_ids([1], 0) if split else session.verify_rows([1], encoded(1), 0)
    assert caught.value.code == "bad_dtype"


def test_a_chain_larger_than_a_message_is_not_sent() -> None:
    pair = connected(limits=Limits(max_message_bytes=42 + 4 * 4 * HIDDEN, max_control_bytes=2000))
    session = decoding(pair)
    with pytest.raises(FrameError, match="the cloud takes") as caught:
        session.verify_rows([1, 2, 3, 4], encoded(4, 4), 4)
    assert caught.value.code == "too_large"
    session.verify_rows([1, 2, 3], encoded(3, 4), 4)

"""PROTOCOL.md rules 8 to 11, both ends paired: identity, prefix offers, context ids, limits."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from isthmus.protocol.canaries import CanaryCache
from isthmus.protocol.errors import IsthmusError, OverloadedError, RejectedError, RequestError, SequenceError
from isthmus.protocol.events import (
    CanaryDone,
    CanaryRequested,
    CancelRequested,
    CloseRequested,
    ConnectionFailed,
    Rejected,
    SessionClosed,
    SessionFailed,
    SessionOpened,
    SessionOpenRequested,
    StepReceived,
)
from isthmus.protocol.frames import HEADER, Flag, Frame, MsgType, encode_frame, json_frame, parse_json
from isthmus.protocol.identity import canary_ids, canary_tolerance
from isthmus.protocol.limits import Limits, TenantUsage
from isthmus.protocol.messages import ErrorBody, Open
from isthmus.protocol.sampling import SamplingParams
from tests.protocol.pairing import (
    HELLO,
    HIDDEN,
    IDENTITY,
    OTHER_WEIGHTS,
    SESSION_ID,
    Pair,
    connected,
    encoded,
    make_open,
    offer,
    opened,
    parse,
    rows,
)

PENALTY = SamplingParams(repetition_penalty=1.2)

# ---- rule 8: model identity


def test_rule_8_another_model_is_refused_by_name() -> None:
    other = IDENTITY.model_copy(update={"tokenizer_hash": "x"})
    pair = Pair(hello=HELLO.model_copy(update={"identity": other}))
    pair.edge.start(0.0)
    pair.pump()
    (event,) = pair.edge_events
    assert isinstance(event, Rejected)
    assert event.error.code == "model_mismatch"
    assert "tokenizer_hash" in event.error.message
    assert pair.edge.is_closed
    assert pair.cloud.is_closed


@pytest.mark.parametrize("ok", [True, False])
def test_rule_8_other_weights_need_an_agreeing_canary_and_its_result_is_cached(ok: bool) -> None:
    cache: CanaryCache = {}
    hello = HELLO.model_copy(update={"identity": OTHER_WEIGHTS})
    pair = connected(hello=hello, canaries=cache)
    assert pair.edge.welcome is not None
    assert pair.edge.welcome.match == "canary"
    with pytest.raises(RejectedError):
        pair.edge.open(make_open())
    pair.edge.canary(1, rows(len(canary_ids(100))))
    (asked,) = pair.up()
    assert isinstance(asked, CanaryRequested)
    assert (asked.split, asked.frame.n_tok) == (1, 16)
    pair.cloud.canary_result(asked.seq, 1, ok=ok, error=0.0, tolerance=canary_tolerance(1))
    (done,) = pair.down()
    assert isinstance(done, CanaryDone)
    assert done.result.ok is ok
    again = connected(hello=hello, canaries=cache)
    for each in (pair, again):
        assert each.edge.needs_canary(1) is not ok
    other_edge = HELLO.model_copy(update={"identity": OTHER_WEIGHTS, "edge_precision": "q8"})
    assert connected(hello=other_edge, canaries=cache).edge.needs_canary(1)


# ---- rule 9: prefix offer


def test_rule_9_cached_rows_are_not_uploaded_and_the_rest_goes_on_there() -> None:
    pair = connected()
    session = pair.edge.open(make_open(prompt_tokens=20, offer=offer(16, 19)))
    pair.up()
    pair.cloud.opened(1, session_id=SESSION_ID, cached_rows=16)
    pair.down()
    assert session.kv_len == 16
    session.step_rows(encoded(4, 16), 16, 4, final=True)
    (step,) = pair.up()
    assert isinstance(step, StepReceived)
    assert (step.pos, step.next_index) == (16, 0)


def test_rule_9_close_leaves_the_offer_for_the_next_turn() -> None:
    pair = connected()
    session = opened(pair)
    session.step_rows(encoded(4), 0, 4, final=False)
    kept = offer(4)
    session.close(kept)
    events = pair.up()
    assert isinstance(events[-1], CloseRequested)
    assert events[-1].close.offer == kept
    pair.cloud.closed(1, cached=True)
    (closed,) = pair.down()
    assert isinstance(closed, SessionClosed)
    assert (closed.closed.cached, closed.closed.kv_len) == (True, 4)


def test_rule_9_at_least_one_row_is_computed_whatever_is_cached() -> None:
    pair = connected()
    pair.edge.open(make_open(offer=offer(4)))
    pair.up()
    with pytest.raises(IsthmusError, match="4 cached rows of at most 3"):
        pair.cloud.opened(1, session_id=SESSION_ID, cached_rows=4)
    pair.cloud.opened(1, session_id=SESSION_ID, cached_rows=3)
    assert [type(e) for e in pair.down()] == [SessionOpened]


# ---- rule 10: context ids


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"sampling": PENALTY}, "context_ids_required"),
        ({"sampling": PENALTY, "split": 0, "offer": offer(2)}, "context_ids_required"),
        ({"sampling": PENALTY, "context_ids": (1, 2, 3)}, "bad_context_ids"),
        ({"sampling": PENALTY, "context_ids": (1, 2, 3, 100)}, "bad_token_id"),
        ({"context_ids": (1, 2, 3, 4)}, "context_ids_refused"),
        ({"sampling": PENALTY, "context_ids": (1, 2, 3, 4), "shape": "u"}, "context_ids_refused"),
        ({"sampling": PENALTY, "context_ids": (1, 2, 3, 4)}, None),
        (
            {"sampling": PENALTY, "context_ids": (1,) * 11},
            None,
        ),  # seven of eight tokens were emitted elsewhere
        ({"sampling": PENALTY, "context_ids": (1,) * 12}, "bad_context_ids"),
        ({"sampling": PENALTY, "split": 0}, None),
        ({"sampling": PENALTY, "shape": "u"}, None),
    ],
)
def test_rule_10_context_ids_where_the_sampler_needs_them_and_nowhere_else(
    changes: dict[str, Any], code: str | None
) -> None:
    """The edge refuses before it sends; a cloud that is sent it all the same refuses too."""
    pair = connected()
    request: Open = make_open(**changes)
    if code is None:
        pair.edge.open(request)
        assert [type(e) for e in pair.up()] == [SessionOpenRequested]
        return
    with pytest.raises(RequestError) as caught:
        pair.edge.open(request)
    assert caught.value.code == code
    assert pair.inject_up(json_frame(MsgType.OPEN, request, stream=1, epoch=1)) == []
    assert parse_json(parse(pair.cloud.data_to_send()[0]), ErrorBody).code == code


# ---- rule 11: limits before allocation


def test_rule_11_sessions_and_kv_bytes_of_a_tenant_span_its_connections() -> None:
    limits = Limits(max_sessions_per_tenant=3, max_kv_bytes_per_tenant=10_000)
    usage = TenantUsage.from_limits(limits)
    here, there = (connected(limits=limits, usage=usage) for _ in range(2))
    for pair in (here, there):
        opened(pair)  # 64 rows x 3 layers x 16 bytes = 3,072 bytes each
    here.edge.open(make_open(split=0, max_context=64))  # 4 layers: 4,096 more exceed 10,000
    here.up()
    (refused,) = here.down()
    assert isinstance(refused, SessionFailed)
    assert isinstance(refused.error, OverloadedError)
    assert refused.error.code == "tenant_kv_bytes"
    there.edge.open(make_open())
    there.up()
    assert (usage.num_sessions, usage.kv_bytes) == (3, 3 * 3072)
    here.edge.open(make_open(split=3, max_context=12))
    here.up()
    (full,) = here.down()
    assert isinstance(full, SessionFailed)
    assert full.error.code == "tenant_sessions"
    here.cloud.lost()
    there.edge.sessions[1].cancel()
    assert [type(e) for e in there.up()] == [CancelRequested]
    there.cloud.closed(1)
    assert usage.num_sessions == 1


def test_rule_11_sessions_of_a_connection() -> None:
    pair = connected(limits=Limits(max_sessions=2))
    opened(pair)
    opened(pair)
    with pytest.raises(OverloadedError):
        pair.edge.open(make_open())
    assert pair.inject_up(json_frame(MsgType.OPEN, make_open(), stream=9, epoch=1)) == []
    assert parse_json(parse(pair.cloud.data_to_send()[0]), ErrorBody).code == "too_many_sessions"


def test_rule_11_huge_declared_sizes_allocate_nothing() -> None:
    pair = connected()
    opened(pair)
    message = bytearray(encode_frame(Frame(MsgType.STEP, 1, 1, 1, 0, 4, Flag.FINAL, *_zstd_fields())))
    header = list(HEADER.unpack_from(message))
    header[11] = 2**32 - 1  # raw_len
    message[: HEADER.size] = HEADER.pack(*header)
    tracemalloc.start()
    *_, failed = pair.cloud.receive(bytes(message), 0.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(failed, ConnectionFailed)
    assert failed.error.code == "too_large"
    assert peak < 1 << 20


def _zstd_fields() -> tuple[Any, ...]:
    from isthmus.protocol.activations import RowCodec, RowFormat

    data = RowCodec(RowFormat.F32, HIDDEN).encode(np.zeros((4, HIDDEN), np.float32))
    return data.dtype, data.codec, data.raw_len, data.body


def test_a_session_that_was_told_the_tokens_so_far_begins_with_the_next_one() -> None:
    for n in (4, 5, 7):
        pair = connected()
        session = opened(pair, sampling=PENALTY, context_ids=(1, 2, 3, 4, 50, 51))
        with pytest.raises(SequenceError, match="the context ends before token 2") as caught:
            session.step_rows(encoded(n), 0, n, final=True)
        assert caught.value.code == "bad_output_index"
    session.step_rows(encoded(6), 0, 6, final=True)
    pair.up()
    pair.cloud.result_tokens(1, [60], kv_len=6)
    pair.down()
    assert session.next_index == 3
    pair.edge_events.clear()
    session.step_rows(encoded(2, 6), 6, 2, final=True)  # afterwards the order is the edge's affair
    (event,) = pair.up()
    assert isinstance(event, StepReceived)
    assert event.next_index == 4


def test_the_cloud_checks_the_beginning_too() -> None:
    pair = connected()
    session = opened(pair, sampling=PENALTY, context_ids=(1, 2, 3, 4, 50))
    session.step_rows(encoded(5), 0, 5, final=True)
    (message,) = pair.edge.data_to_send()
    (event,) = pair.inject_up(parse(message), n_tok=4, raw_len=4 * 32, body=parse(message).body[: 4 * 32])
    assert isinstance(event, SessionFailed)
    assert event.error.code == "bad_output_index"

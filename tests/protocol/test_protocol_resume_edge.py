"""The edge's end of a resume: what is suspended, what RESUME claims, what a RESUMED may say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from isthmus.protocol.errors import CloudLostError, OverloadedError, ProtocolError, SequenceError
from isthmus.protocol.events import (
    ConnectionFailed,
    ResultTokens,
    SessionClosed,
    SessionFailed,
    SessionResumed,
    SessionSuspended,
    StreamTokens,
)
from isthmus.protocol.frames import Frame, MsgType, json_frame
from isthmus.protocol.messages import Closed, Credit, ErrorBody, GoAway, Resume
from isthmus.protocol.states import EdgeState
from tests.protocol.edge_side import feed, result, sent, stream, welcomed
from tests.protocol.pairing import INFO, SESSION_ID, make_open
from tests.protocol.resume_side import OPENED, Owner, again, chain_of, code, resumed, send, started

# ---- a connection ends


def endings() -> list[Any]:
    fatal = ErrorBody.from_error(ProtocolError("no"), fatal=True)
    return [
        lambda e: e.lost(),
        lambda e: e.lost(CloudLostError("x")),
        lambda e: e.fail_connection(ProtocolError("x")),
        lambda e: feed(e, json_frame(MsgType.ERROR, fatal)),
        lambda e: e.receive(b"garbage", 0.0),
    ]


@pytest.mark.parametrize("end", endings())
def test_a_session_outlives_its_connection(end: Any) -> None:
    edge = welcomed()
    session = started(edge)
    first, last = end(edge)
    assert isinstance(last, ConnectionFailed)
    assert first == SessionSuspended(1, last.error)
    assert session.state is EdgeState.SUSPENDED
    assert edge.sessions == {}
    assert not session.can_send(1)


def test_closing_the_connection_ends_its_sessions() -> None:
    edge = welcomed()
    session = started(edge)
    edge.close()
    assert session.state is EdgeState.CLOSED


def test_what_cannot_go_on_fails() -> None:
    edge = welcomed()
    opening = edge.open(make_open())
    tokenless = edge.open(make_open())
    bare = OPENED.model_copy(update={"resume_token": ""})
    feed(edge, json_frame(MsgType.OPENED, bare, stream=tokenless.stream, epoch=1))
    leaving = started(edge)
    leaving.cancel()
    events = edge.lost()
    assert [type(event) for event in events] == [SessionFailed] * 3 + [ConnectionFailed]
    assert {s.state for s in (opening, tokenless, leaving)} == {EdgeState.CLOSED}


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_suspended_session_ends_at_once(how: str) -> None:
    edge = welcomed()
    session = started(edge)
    edge.lost()
    for _ in range(2):
        getattr(session, how)()
        assert session.state is EdgeState.CLOSED
    with pytest.raises(SequenceError, match="closed"):
        welcomed().resume(session)


# ---- RESUME


def test_resume_claims_what_was_sent() -> None:
    edge = welcomed()
    session = started(edge)
    send(session, 3, 0)
    send(session, 1, 3, final=True)
    feed(edge, result(0, 42, seq=2, pos=4))
    send(session, 1, 4, final=True)
    edge.lost()
    _, body = again(session)
    assert body == Resume(
        session_id=SESSION_ID,
        resume_token="t",
        attempt=1,
        next_index=1,
        last_seq=3,
        rows=5,
        digest=chain_of(5).at(5),
    )


def test_attempts_grow_and_the_token_is_the_newest() -> None:
    edge = welcomed()
    session = started(edge)
    edge.lost()
    for attempt in (1, 2):
        edge, body = again(session)
        assert (body.attempt, body.resume_token) == (attempt, "t")
        assert isinstance(edge.lost()[0], SessionSuspended)
    edge, _ = again(session)
    resumed(edge, 0, 0, "ok")
    edge.lost()
    _, body = again(session)
    assert (body.attempt, body.resume_token) == (4, "fresh")


def test_resume_is_refused_before_anything_is_sent() -> None:
    edge = welcomed()
    session = started(edge)
    with pytest.raises(SequenceError, match="prefill"):
        welcomed().resume(session)
    send(session, 2, 0)
    edge.lost()
    with pytest.raises(SequenceError) as closed:
        edge.resume(session)
    assert closed.value.code == "not_open"
    draining = welcomed()
    feed(draining, json_frame(MsgType.GOAWAY, GoAway(deadline_s=1.0)))
    with pytest.raises(OverloadedError) as drained:
        draining.resume(session)
    assert drained.value.code == "draining"
    other = welcomed(info=replace(INFO, vocab_size=101))
    with pytest.raises(SequenceError, match="8 channels and 101 tokens") as terms:
        other.resume(session)
    assert terms.value.code == "other_terms"
    session.digests.truncate(1)
    here = welcomed()
    with pytest.raises(SequenceError, match="end at row 1, 2 rows") as digests:
        here.resume(session)
    assert digests.value.code == "digests_incomplete"
    for edge in (draining, other, here):
        assert edge.sessions == {}
        assert not edge.has_data
    assert (session.state, session.attempt) == (EdgeState.SUSPENDED, 0)


def test_the_stream_ids_of_a_connection_are_shared_with_open() -> None:
    edge = welcomed()
    session = started(edge)
    edge.lost()
    edge = welcomed()
    first = edge.open(make_open())
    edge.resume(session)
    assert edge.open(make_open()).stream == 3
    assert (first.stream, session.stream) == (1, 2)
    assert set(edge.sessions) == {1, 2, 3}


# ---- RESUMED: nothing lost


def test_an_output_that_is_due_comes_once() -> None:
    edge = welcomed()
    session = started(edge)
    send(session, 4, 0, final=True)
    edge.lost()
    edge, _ = again(session)
    assert resumed(edge, 1, 4, "ok") == [SessionResumed(1, "ok", None)]
    assert (session.state, session.epoch, session.chunk_rows) == (EdgeState.DECODE, 2, 64)
    assert session.awaiting_result
    frame = replace(result(0, 5, seq=1, pos=4), epoch=2)
    assert feed(edge, replace(frame, epoch=1)) == []  # of the older epoch
    assert feed(edge, frame) == [ResultTokens(1, 1, 4, 0, (5,))]
    assert feed(edge, frame) == []
    assert session.credits == 2048
    send(session, 1, 4, final=True)
    (step,) = sent(edge)
    assert (step.epoch, step.seq) == (2, 2)


def test_credits_begin_anew() -> None:
    edge = welcomed()
    session = started(edge)
    send(session, 4, 0)
    edge.lost()
    edge, _ = again(session)
    resumed(edge, 1, 4, "ok", credits=3)
    assert session.credits == 3
    send(session, 3, 4)
    assert not session.can_send(1)
    feed(edge, json_frame(MsgType.CREDIT, Credit(rows=9), stream=1, epoch=2))
    assert session.credits == 6


def test_a_stream_goes_on_where_it_was_cut() -> None:
    edge = welcomed()
    session = started(edge, split=0)
    session.step_ids([1, 2, 3, 4], 0, final=True)
    feed(edge, result(0, 5, seq=1, pos=4))
    feed(edge, stream(1, [6, 7], pos=6))
    edge.lost()
    edge, body = again(session)
    assert body.next_index == 3
    resumed(edge, 1, 9, "ok", rows=0, digest="")
    (event,) = feed(edge, replace(stream(1, [6, 7, 8], pos=7), epoch=2))
    assert event == StreamTokens(1, 3, (8,))
    (event,) = feed(edge, replace(stream(4, [9], pos=8, finish='"stop"'), epoch=2))
    assert event == StreamTokens(1, 4, (9,), finish="stop")


def test_a_verify_may_be_answered_meanwhile() -> None:
    for held in (5, 6, 7):
        edge = welcomed()
        session = started(edge)
        send(session, 4, 0, final=True)
        feed(edge, result(0, 9, seq=1, pos=4))
        send(session, 3, 4, drafts=(9, 10, 11))
        edge.lost()
        edge, body = again(session)
        assert body.rows == 7
        assert resumed(edge, 2, held, "ok") == [SessionResumed(1, "ok", None)]
    assert len(session.digests) == 7


# ---- a cloud that says what can't be


@pytest.mark.parametrize(
    ("seq", "kv_len", "action", "changes", "expected"),
    [
        (2, 5, "ok", {"header": 3}, "bad_resumed"),
        (0, 0, "replay", {}, "bad_resumed"),  # step 1 was answered
        (3, 5, "ok", {}, "bad_resumed"),  # never sent
        (1, 4, "ok", {}, "bad_resumed"),
        (2, 5, "replay", {}, "bad_resumed"),
        (1, 3, "replay", {}, "bad_kv_len"),
        (1, 5, "replay", {}, "bad_kv_len"),
        (2, 4, "ok", {}, "bad_kv_len"),
        (2, 6, "ok", {}, "bad_kv_len"),
        (2, 5, "ok", {"digest": "ab" * 16}, "bad_digest"),
        (2, 5, "ok", {"rows": 6}, "bad_digest"),
    ],
)
def test_an_impossible_answer_ends_the_session(
    seq: int, kv_len: int, action: str, changes: dict[str, Any], expected: str
) -> None:
    owner = Owner()
    owner.send(1, 4, final=True)
    edge = owner.lose()
    assert code(resumed(edge, seq, kv_len, action, **changes)) == expected
    assert owner.session.state is EdgeState.CLOSED
    assert [frame.type for frame in sent(edge)] == [MsgType.ERROR]
    assert not edge.is_closed


def test_an_answer_is_heard_once_and_only_when_asked() -> None:
    owner = Owner()
    edge = owner.lose()
    assert resumed(edge, 1, 4, "ok", epoch=1) == []  # the epoch must grow
    assert resumed(edge, 1, 4, "ok") == [SessionResumed(1, "ok", None)]
    assert resumed(edge, 1, 4, "ok") == []
    assert code(resumed(edge, 1, 4, "ok", epoch=3)) == "wrong_state"


def test_nothing_else_may_come_before_the_answer() -> None:
    owner = Owner()
    edge = owner.lose()
    assert code(feed(edge, result(1, 5, seq=2, pos=5))) == "wrong_state"


# ---- refused, cancelled


def refusal(error: str) -> Frame:
    return json_frame(MsgType.ERROR, ErrorBody(kind="not_found", code=error, message="no"), stream=1)


def test_a_refusal_ends_the_session_alone() -> None:
    owner = Owner()
    edge = owner.lose()
    assert code(feed(edge, refusal("unknown_session"))) == "unknown_session"
    assert owner.session.state is EdgeState.CLOSED
    assert not edge.is_closed


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_cancel_waits_for_the_new_epoch(how: str) -> None:
    owner = Owner()
    edge = owner.lose()
    getattr(owner.session, how)()
    assert owner.session.state is EdgeState.CLOSING
    assert not edge.has_data
    assert resumed(edge, 1, 4, "ok") == []
    (frame,) = sent(edge)
    assert (frame.type, frame.epoch) == (MsgType.CANCEL, 2)
    assert feed(edge, json_frame(MsgType.CLOSED, Closed(), stream=1, epoch=2)) == [SessionClosed(1, Closed())]


def test_a_cancel_under_way_ends_with_refusal_or_loss() -> None:
    owner = Owner()
    edge = owner.lose()
    owner.session.cancel()
    assert code(feed(edge, refusal("unknown_session"))) == "unknown_session"
    owner = Owner()
    edge = owner.lose()
    owner.session.cancel()
    assert isinstance(edge.lost()[0], SessionFailed)
    owner = Owner()
    edge = owner.lose()
    edge.close()
    assert owner.session.state is EdgeState.CLOSED

"""The cloud's end of a resume: sessions that outlive connections, and what RESUMED says."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.protocol.errors import ProtocolError, RejectedError
from isthmus.protocol.events import (
    CloudEvent,
    ConnectionFailed,
    SessionDetached,
    SessionFailed,
    StepReceived,
)
from isthmus.protocol.frames import Flag, MsgType, json_frame, parse_json
from isthmus.protocol.messages import Cancel, Credit, ErrorBody, ResultBody, Resumed, StreamBody
from isthmus.protocol.states import CloudState
from tests.protocol.cloud_side import feed, open_frame, sent, step
from tests.protocol.pairing import SESSION_ID, encoded
from tests.protocol.resume_cloud_side import TOKEN, Side, kinds, offloaded, resumed
from tests.protocol.transcript_lines import tensor, verify_frame

# ---- a connection ends


def endings() -> list[tuple[str, Any, bool]]:
    fatal = ErrorBody.from_error(ProtocolError("no"), fatal=True)
    return [
        ("lost", lambda c: c.lost(), True),
        ("left on purpose", lambda c: c.lost(clean=True), False),
        ("failed", lambda c: c.fail_connection(ProtocolError("x", code="edge_not_reading")), True),
        ("key revoked", lambda c: c.fail_connection(RejectedError("x", code="key_revoked")), False),
        ("silent", lambda c: c.on_tick(1e6), True),
        ("fatal error from the edge", lambda c: feed(c, json_frame(MsgType.ERROR, fatal)), True),
        ("garbage", lambda c: c.receive(b"garbage", 1.0), True),
    ]


@pytest.mark.parametrize(("name", "end", "kept"), endings(), ids=lambda v: v if isinstance(v, str) else "")
def test_which_ends_of_a_connection_a_session_outlives(name: str, end: Any, kept: bool) -> None:
    del name
    side = Side()
    first, last = end(side.cloud)
    assert isinstance(last, ConnectionFailed)
    assert side.cloud.sessions == {}
    if kept:
        assert first == SessionDetached(1, side.session)
        assert (side.session.state, side.usage.num_sessions) == (CloudState.DETACHED, 1)  # still charged
        side.session.evict()
        side.usage.release(side.session.kv_bytes)
        assert side.session.state == "evicted"
    else:
        assert first == SessionFailed(1, last.error)
        assert side.session.state is CloudState.CLOSED
    assert (side.usage.num_sessions, side.usage.kv_bytes) == (0, 0)


def test_only_sessions_that_can_be_resumed_are_kept() -> None:
    side = Side()
    cloud = side.cloud
    feed(cloud, open_frame(2))  # never opened
    feed(cloud, open_frame(3))
    cloud.opened(3, session_id=SESSION_ID)  # without a token
    feed(cloud, open_frame(4))
    cloud.opened(4, session_id=SESSION_ID, resume_token=TOKEN)
    feed(cloud, json_frame(MsgType.CANCEL, Cancel(), stream=4, epoch=1))
    events: list[CloudEvent] = cloud.lost()
    assert [type(event) for event in events] == [
        SessionDetached,
        SessionFailed,
        SessionFailed,
        SessionFailed,
        ConnectionFailed,
    ]
    assert side.usage.num_sessions == 1


# ---- RESUMED


def test_nothing_was_lost() -> None:
    side = Side()
    side.take(step(3, seq=1, pos=0))
    side.detach()
    cloud, (answer,) = side.resume(stream=7)
    assert (answer.stream, answer.epoch) == (7, 2)
    assert resumed(answer) == Resumed(
        epoch=2,
        seq=1,
        kv_len=3,
        rows=3,
        digest=side.session.digests.at(3),
        action="ok",
        credits=5,  # three rows are not computed yet
        chunk_rows=5,
        resume_token="fresh",
    )
    assert cloud.sessions == {7: side.session}
    assert side.session.state is CloudState.ACTIVE
    # Both count from 0 in this epoch.
    cloud.credit(7, 2)
    assert parse_json(sent(cloud)[0], Credit).rows == 7
    again = tensor(MsgType.STEP, encoded(1, 3), 1, seq=2, pos=3, flags=Flag.FINAL, stream=7)
    assert feed(cloud, again) == []  # of the older epoch
    (event,) = feed(cloud, again, epoch=2)
    assert isinstance(event, StepReceived)
    ahead = feed(cloud, again, epoch=3, seq=3)[0]
    assert isinstance(ahead, SessionFailed)
    assert ahead.error.code == "epoch_ahead"


def test_steps_were_lost() -> None:
    side = Side()
    side.take(step(3, seq=1, pos=0))
    side.detach()
    _, (answer,) = side.resume(last_seq=4, rows=9, digest="ab" * 16)
    body = resumed(answer)
    assert (body.action, body.seq, body.kv_len, body.rows) == ("replay", 1, 3, 3)


def test_a_result_is_sent_again_and_engine_work_of_the_meantime_is_kept() -> None:
    side = Side()
    side.take(step(4, seq=1, pos=0, flags=Flag.FINAL))
    side.detach()
    side.session.result_tokens([42], 4, None, None, None)
    cloud, (answer, result) = side.resume()
    assert (resumed(answer).action, resumed(answer).credits) == ("ok", 8)
    assert (result.type, result.epoch, result.seq, result.pos) == (MsgType.RESULT, 2, 1, 4)
    assert parse_json(result, ResultBody).tokens == (42,)
    # A step that is repeated gets it once more, in the new epoch.
    assert feed(cloud, step(4, seq=1, pos=0, flags=Flag.FINAL), epoch=2) == []
    assert sent(cloud) == [result]


def test_a_result_comes_after_resumed_where_the_engine_was_still_at_it() -> None:
    side = Side(shape="u", split=1)
    side.take(step(2, seq=1, pos=0, flags=Flag.FINAL))
    side.detach()
    cloud, (answer,) = side.resume()
    assert resumed(answer).action == "ok"
    cloud.result_rows(1, encoded(1), 1, kv_len=2)
    (result,) = sent(cloud)
    assert (result.type, result.epoch) == (MsgType.RESULT, 2)


def test_an_edge_without_the_result_names_the_rows_before_its_cut() -> None:
    side = Side()
    side.take(step(4, seq=1, pos=0, flags=Flag.FINAL))
    side.session.result_tokens([10], 4, None, None, None)
    side.take(verify_frame(encoded(3, 4), [10, 11, 12], seq=2, pos=4))
    uncut = side.session.digests.state
    side.detach()
    side.session.result_tokens([20], 5, None, None, None)
    assert len(side.session.digests) == 5
    _, (answer, result) = side.resume(rows=uncut[0], digest=uncut[1])
    assert (resumed(answer).action, resumed(answer).rows, resumed(answer).kv_len) == ("ok", 5, 5)
    assert result.pos == 5
    side.session.detach()
    _, frames = side.resume(next_index=2)  # now it has it
    assert resumed(frames[0]).action == "ok"


def test_other_rows_are_rebuilt() -> None:
    side = Side()
    side.take(step(4, seq=1, pos=0, flags=Flag.FINAL))
    side.session.result_tokens([10], 4, None, None, None)
    side.detach()
    cloud, (answer,) = side.resume(digest="ab" * 16)
    assert resumed(answer).action == "rebuild"
    again = tensor(MsgType.STEP, encoded(2, 9), 2, seq=2, pos=0, flags=Flag.TRUNCATE, stream=1)
    assert isinstance(feed(cloud, again, epoch=2)[0], StepReceived)


def test_a_stream_goes_on_at_the_first_token_that_did_not_arrive() -> None:
    side = offloaded(stream_window_tokens=2)
    side.cloud.result_tokens(1, [10], kv_len=4)
    side.cloud.stream_tokens(1, [11])
    feed(side.cloud, json_frame(MsgType.CREDIT, Credit(ack_index=1, window=0), stream=1, epoch=1))
    side.detach()
    side.session.stream_tokens([12, 13], None, None, None)
    side.session.stream_tokens([14], None, None, "stop")
    cloud, frames = side.resume(next_index=2)
    assert kinds(frames) == ["RESUMED", "RESULT", "STREAM"]  # the window is a fresh one
    body = parse_json(frames[2], StreamBody)
    assert (body.first_index, body.tokens, frames[2].pos, frames[2].epoch) == (2, (12, 13), 7, 2)
    feed(cloud, json_frame(MsgType.CREDIT, Credit(ack_index=4, window=3), stream=1, epoch=2))
    (last,) = sent(cloud)
    assert parse_json(last, StreamBody) == StreamBody(first_index=4, tokens=(14,), finish="stop")


def test_tokens_in_flight_are_sent_again_whole_and_none_is_acknowledged_before_it_was_sent() -> None:
    side = offloaded()
    side.cloud.result_tokens(1, [10], kv_len=4)
    side.cloud.stream_tokens(1, [11, 12])
    side.cloud.stream_tokens(1, [13])
    side.detach()
    _, frames = side.resume(next_index=2)
    assert [parse_json(f, StreamBody).tokens for f in frames[2:]] == [(11, 12), (13,)]
    side.session.detach()
    assert kinds(side.resume(next_index=7)[1]) == ["RESUMED", "RESULT"]
    side.session.stream_tokens([14], None, None, None)
    assert side.session.stream_room > 0

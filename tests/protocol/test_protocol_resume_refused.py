"""RESUMEs that the cloud refuses, and sessions that two connections want."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.protocol.errors import IsthmusError, NotFoundError, RejectedError, SequenceError
from isthmus.protocol.events import (
    ConnectionFailed,
)
from isthmus.protocol.frames import Flag, MsgType, json_frame, parse_json
from isthmus.protocol.messages import Cancel, ErrorBody
from isthmus.protocol.states import CloudState
from tests.protocol.cloud_side import feed, greeted, open_frame, sent, step
from tests.protocol.pairing import SESSION_ID, make_open, offer
from tests.protocol.resume_cloud_side import Side, offloaded, resume_frame, resumed

# ---- refusals


def refused(side: Side, **changes: Any) -> IsthmusError:
    cloud = side.connect()
    body = side.claim(**changes)
    feed(cloud, resume_frame(body))
    before = (side.session.state, side.session.epoch, side.session.attempt)
    with pytest.raises(IsthmusError) as caught:
        cloud.resumed(1, side.session, body, resume_token="")
    assert (side.session.state, side.session.epoch, side.session.attempt) == before
    cloud.refuse(1, caught.value)
    (answer,) = sent(cloud)
    assert (answer.type, answer.stream, answer.epoch) == (MsgType.ERROR, 1, 0)
    assert parse_json(answer, ErrorBody).code == caught.value.code
    cloud.refuse(1, caught.value)
    assert not cloud.has_data
    assert cloud.sessions == {}
    return caught.value


def test_a_stale_attempt_is_refused() -> None:
    side = Side()
    side.detach()
    cloud, _ = side.resume(attempt=3)
    cloud.release(1)
    for attempt in (1, 2, 3):
        error = refused(side, attempt=attempt)
        assert (type(error), error.code) == (SequenceError, "stale_attempt")
    assert resumed(side.resume(attempt=4)[1][0]).epoch == 3


def test_an_edge_that_never_sent_what_is_here_is_refused() -> None:
    side = Side()
    side.take(step(3, seq=1, pos=0))
    side.detach()
    assert refused(side, last_seq=0, rows=0, digest="").code == "resume_behind"


def test_output_of_other_rows_is_given_to_nobody() -> None:
    side = Side()
    side.take(step(4, seq=1, pos=0, flags=Flag.FINAL))
    side.detach()
    assert refused(side, digest="ab" * 16).code == "digest_mismatch"
    side = offloaded()
    side.cloud.result_tokens(1, [10], kv_len=4)
    side.detach()
    assert refused(side, rows=3).code == "digest_mismatch"


def test_a_session_that_is_ending_is_not_resumed() -> None:
    side = Side()
    feed(side.cloud, json_frame(MsgType.CANCEL, Cancel(), stream=1, epoch=1))
    error = refused(side)
    assert (type(error), error.code) == (NotFoundError, "unknown_session")


# ---- two connections


def test_a_newer_connection_fences_the_older() -> None:
    side = Side()
    old = side.cloud
    side.take(step(2, seq=1, pos=0))
    assert old.release(1, RejectedError("a newer one has it", code="superseded")) is side.session
    (farewell,) = sent(old)
    assert (farewell.stream, parse_json(farewell, ErrorBody).code) == (1, "superseded")
    cloud, _ = side.resume()
    assert feed(old, step(1, seq=2, pos=2)) == []  # neither executed nor acknowledged
    assert not old.has_data
    assert side.session.last_seq == 1
    (last,) = old.lost()
    assert isinstance(last, ConnectionFailed)
    assert side.usage.num_sessions == 1
    assert cloud.sessions == {1: side.session}


def test_a_resume_whose_connection_or_stream_is_gone_takes_nothing() -> None:
    side = Side()
    side.detach()
    body = side.claim()
    gone = side.connect()
    feed(gone, resume_frame(body))
    gone.lost()
    given_up = side.connect()
    feed(given_up, resume_frame(body))
    error = ErrorBody.from_error(SequenceError("no more"))
    assert feed(given_up, json_frame(MsgType.ERROR, error, stream=1)) == []
    for cloud in (gone, given_up):
        assert cloud.resumed(1, side.session, body, resume_token="") is False
        cloud.refuse(1, SequenceError("too late"))
        assert not cloud.has_data
    assert side.session.state is CloudState.DETACHED
    assert side.session.attempt == 0


def test_resume_uses_up_its_stream_and_is_heard_once() -> None:
    side = Side()
    side.detach()
    cloud = side.connect()
    body = side.claim()
    assert len(feed(cloud, resume_frame(body, 5))) == 1
    assert feed(cloud, resume_frame(body, 5)) == []  # repeated on its way
    assert feed(cloud, step(1, seq=1, pos=0, stream=5)) == []
    assert cloud.resumed(5, side.session, body, resume_token="")
    assert feed(cloud, resume_frame(body, 5)) == []
    cloud.data_to_send()
    assert feed(cloud, resume_frame(body, 4)) == []
    (answer,) = sent(cloud)
    assert (answer.stream, parse_json(answer, ErrorBody).code) == (4, "stream_reused")
    feed(cloud, open_frame(6))
    assert set(cloud.sessions) == {5, 6}


def test_a_malformed_resume_is_answered_on_its_stream() -> None:
    cloud = greeted()
    frame = json_frame(MsgType.RESUME, Cancel(), stream=5)
    assert feed(cloud, frame) == []
    (answer,) = sent(cloud)
    assert (answer.stream, parse_json(answer, ErrorBody).code) == (5, "bad_message")
    assert not cloud.is_closed


def test_a_resumed_session_ends_like_any_other() -> None:
    side = Side()
    side.detach()
    cloud, _ = side.resume()
    assert len(feed(cloud, json_frame(MsgType.CANCEL, Cancel(), stream=1, epoch=2))) == 1
    cloud.closed(1)
    assert cloud.sessions == {}
    assert (side.usage.num_sessions, side.usage.kv_bytes) == (0, 0)


def test_an_offer_starts_the_digests_where_the_upload_does() -> None:
    cloud = greeted()
    feed(cloud, json_frame(MsgType.OPEN, make_open(offer=offer(2, 3)), stream=1, epoch=1))
    cloud.opened(1, session_id=SESSION_ID, cached_rows=2)
    assert cloud.sessions[1].digests.stop == 2

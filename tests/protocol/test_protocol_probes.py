"""What the measurements of a link are made of: markers behind uploads, probes, and their bounds."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from isthmus.protocol.activations import RowCodec, RowFormat
from isthmus.protocol.cloud_connection import CloudConnection
from isthmus.protocol.connection import EventT
from isthmus.protocol.edge_connection import EdgeConnection
from isthmus.protocol.edge_session import EdgeSession
from isthmus.protocol.errors import FrameError, SequenceError
from isthmus.protocol.events import ChunkArrived, ConnectionFailed, ProbeDone, RttMeasured
from isthmus.protocol.frames import HEADER_BYTES, Dtype, Frame, MsgType, parse_json
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import ErrorBody
from isthmus.protocol.pings import MAX_PINGS
from tests.protocol.cloud_side import feed as feed_cloud
from tests.protocol.cloud_side import fresh, greeted
from tests.protocol.cloud_side import sent as sent_by_cloud
from tests.protocol.edge_side import feed, sent, started, welcomed
from tests.protocol.pairing import HELLO, HIDDEN, connected, make_open, parse

KIB = 1024
ROWS = 4 * KIB // (4 * HIDDEN)  # as many as make a chunk of 4 KiB in f32
CHUNK_BYTES = HEADER_BYTES + 4 * KIB


def uploading(prompt: int = 500) -> tuple[EdgeConnection, EdgeSession]:
    edge = welcomed()
    request = make_open(row_format="f32", prompt_tokens=prompt, max_context=512)
    return edge, started(edge, request)


def upload(session: EdgeSession, n: int = ROWS) -> None:
    codec = RowCodec(RowFormat.F32, HIDDEN, zstd=False)
    session.step_rows(codec.encode(np.zeros((n, HIDDEN), np.float32)), session.kv_len, n, final=False)


def leaving(edge: EdgeConnection, now: float) -> list[Frame]:
    return [parse(message) for message in edge.data_to_send(None, now)]


def pong(edge: EdgeConnection, seq: int, now: float) -> list[object]:
    return list(feed(edge, Frame(MsgType.PONG, seq=seq), now))


# ---- markers


def test_a_ping_follows_each_chunk_and_tells_when_it_arrived() -> None:
    edge, session = uploading()
    upload(session)
    assert [(f.type, f.seq) for f in leaving(edge, 1.0)] == [(MsgType.STEP, 1), (MsgType.PING, 1)]
    assert not edge.is_link_free
    (arrived,) = pong(edge, 1, 1.25)
    assert arrived == ChunkArrived(CHUNK_BYTES, 0.25, CHUNK_BYTES, float("inf"))
    assert edge.is_link_free


def test_chunks_on_each_others_heels_are_timed_from_one_to_the_next() -> None:
    edge, session = uploading()
    for _ in range(2):
        upload(session)
    frames = leaving(edge, 1.0)
    assert [f.type for f in frames] == [MsgType.STEP, MsgType.PING] * 2
    pong(edge, 1, 1.5)
    assert not edge.is_link_free
    (arrived,) = pong(edge, 2, 1.75)
    # Between the two markers: the first ping and the second chunk.
    assert arrived == ChunkArrived(CHUNK_BYTES, 0.75, HEADER_BYTES + CHUNK_BYTES, 0.25)


def test_one_pong_for_two_chunks_measures_them_together() -> None:
    edge, session = uploading()
    for now in (1.0, 1.5):
        upload(session)
        leaving(edge, now)
    (arrived,) = pong(edge, 2, 2.0)
    both = 2 * CHUNK_BYTES + HEADER_BYTES
    assert arrived == ChunkArrived(both, 1.0, both, float("inf"))
    assert pong(edge, 1, 2.0) == []


def test_a_round_trip_beside_an_upload_or_a_probe_measures_nothing() -> None:
    edge, session = uploading()
    upload(session)
    leaving(edge, 0.0)
    edge.ping(0.1)
    leaving(edge, 0.1)
    assert pong(edge, 2, 0.3) == []  # and the marker before it came too late to tell
    assert edge.is_link_free
    edge.probe(1, 0, 0.4)
    edge.ping(0.5)
    assert pong(edge, 3, 0.6) == []
    upload(session)
    leaving(edge, 1.0)
    (arrived,) = pong(edge, 4, 1.25)
    assert isinstance(arrived, ChunkArrived)
    assert (arrived.num_bytes, arrived.since_sent_s, arrived.since_previous_s) == (CHUNK_BYTES, 0.25, 0.95)


def test_a_row_a_small_chunk_and_a_probe_have_no_marker() -> None:
    edge, session = uploading()
    upload(session, ROWS - 2)
    edge.probe(64 * KIB, 0, 0.0)
    assert {f.type for f in leaving(edge, 0.0)} == {MsgType.STEP, MsgType.PROBE}
    wide = welcomed(hello=HELLO)
    frame = Frame(MsgType.STEP, 1, 1, 1, 0, 1, dtype=Dtype.F32, raw_len=8 * KIB, body=bytes(8 * KIB))
    wide._send(frame)  # a single row of 2,048 channels
    assert [f.type for f in leaving(wide, 0.0)] == [MsgType.STEP]


def test_without_a_time_and_before_welcome_nothing_is_marked() -> None:
    edge, session = uploading()
    upload(session)
    assert [f.type for f in sent(edge)] == [MsgType.STEP]
    young = EdgeConnection(HELLO.model_copy(update={"client": "x" * 256}))
    young.start(0.0)
    assert [f.type for f in leaving(young, 0.0)] == [MsgType.HELLO]


# ---- probes


def exchange(up_bytes: int, down_bytes: int) -> tuple[Frame, Frame, list[object]]:
    pair = connected()
    seq = pair.edge.probe(up_bytes, down_bytes, 1.0)
    pair.now = 1.5
    events = pair.pump()
    (probe,), (reply,) = pair.sent_up, pair.sent_down
    assert probe.seq == reply.seq == seq
    return probe, reply, list(events)


@pytest.mark.parametrize(("up_bytes", "down_bytes"), [(0, 0), (256 * KIB, 0), (0, 256 * KIB), (7, 9)])
def test_a_probe_carries_what_it_says_and_is_timed(up_bytes: int, down_bytes: int) -> None:
    probe, reply, events = exchange(up_bytes, down_bytes)
    assert (len(probe.body), len(reply.body)) == (up_bytes, down_bytes)
    assert events == [ProbeDone(1, up_bytes, down_bytes, 0.5)]


def test_padding_does_not_shrink() -> None:
    _, reply, _ = exchange(0, 256 * KIB)
    assert len(zlib.compress(reply.body, 9)) > len(reply.body)


@pytest.mark.parametrize("sizes", [(256 * KIB + 1, 0), (0, 256 * KIB + 1), (-1, 0), (0, -1)])
def test_a_probe_out_of_bounds_is_not_sent(sizes: tuple[int, int]) -> None:
    edge = welcomed()
    with pytest.raises(FrameError, match="allowed are 262144 each way") as caught:
        edge.probe(*sizes, 0.0)
    assert caught.value.code == "probe_too_large"
    assert not edge.has_data
    assert edge.is_link_free


def test_the_smaller_bound_of_the_two_ends_counts() -> None:
    assert welcomed(Limits(max_probe_bytes=9)).max_probe_bytes == 9
    edge = welcomed()
    edge.limits = Limits(max_probe_bytes=10)
    assert edge.max_probe_bytes == 10
    assert edge.probe(10, 10, 0.0) == 1


def test_no_probe_before_welcome() -> None:
    with pytest.raises(SequenceError, match="not open"):
        EdgeConnection(HELLO).probe(0, 0, 0.0)


def failed(events: list[EventT]) -> str:
    event = events[-1]
    assert isinstance(event, ConnectionFailed)
    return event.error.code


@pytest.mark.parametrize(("size", "pos"), [(10, 0), (0, 10), (0, 2**32 - 1)])
def test_the_cloud_refuses_a_probe_out_of_bounds(size: int, pos: int) -> None:
    cloud = greeted(Limits(max_probe_bytes=9))
    probe = Frame(MsgType.PROBE, seq=1, pos=pos, dtype=Dtype.PADDING, raw_len=size, body=bytes(size))
    assert failed(feed_cloud(cloud, probe)) == "probe_too_large"
    assert parse_json(sent_by_cloud(cloud)[-1], ErrorBody).code == "probe_too_large"


def test_a_probe_before_hello_is_refused() -> None:
    assert failed(feed_cloud(fresh(), Frame(MsgType.PROBE, dtype=Dtype.PADDING))) == "wrong_state"


def asked(cloud: CloudConnection, size: int, now: float, seq: int = 1) -> None:
    assert feed_cloud(cloud, Frame(MsgType.PROBE, seq=seq, pos=size, dtype=Dtype.PADDING), now) == []


def test_who_asks_for_too_much_gets_no_padding_and_keeps_the_connection() -> None:
    cloud = greeted(Limits(probe_reply_bytes_per_s=1000, probe_reply_burst_bytes=3000))
    sizes = []
    for now in (0.0, 0.0, 0.0, 1.0, 1.0):
        asked(cloud, 1500, now)
        sizes += [len(frame.body) for frame in sent_by_cloud(cloud)]
    assert sizes == [1500, 1500, 0, 0, 0]
    asked(cloud, 1500, 1.5)
    assert [len(frame.body) for frame in sent_by_cloud(cloud)] == [1500]
    assert not cloud.is_closed


def test_a_flood_of_probes_does_not_fill_the_outbox() -> None:
    cloud = greeted()
    for seq in range(10_000):
        asked(cloud, 256 * KIB, 0.0, seq)
    assert cloud._outbox.nbytes < Limits().probe_reply_burst_bytes + 20 * HEADER_BYTES
    replies = sent_by_cloud(cloud)
    assert [len(frame.body) for frame in replies] == [0] + [256 * KIB] * 8
    assert replies[0].seq == 9_999


def test_a_reply_of_another_size_ends_the_connection() -> None:
    edge = welcomed()
    edge.probe(0, 9, 0.0)
    reply = Frame(MsgType.PROBE_REPLY, seq=1, dtype=Dtype.PADDING, raw_len=8, body=bytes(8))
    assert failed(feed(edge, reply)) == "bad_probe_reply"


def test_a_reply_to_no_probe_or_to_one_given_up_is_dropped() -> None:
    edge = welcomed()
    reply = Frame(MsgType.PROBE_REPLY, dtype=Dtype.PADDING)
    assert feed(edge, reply, seq=1) == []
    for _ in range(MAX_PINGS + 1):
        edge.probe(0, 0, 0.0)
    assert feed(edge, reply, seq=1) == []
    assert feed(edge, reply, 2.0, seq=2) == [ProbeDone(2, 0, 0, 2.0)]
    assert feed(edge, reply, 2.0, seq=2) == []


def test_probe_messages_of_the_other_side_are_unexpected() -> None:
    assert failed(feed(welcomed(), Frame(MsgType.PROBE, dtype=Dtype.PADDING))) == "unexpected_message"
    reply = Frame(MsgType.PROBE_REPLY, dtype=Dtype.PADDING)
    assert failed(feed_cloud(greeted(), reply)) == "unexpected_message"


def test_a_ping_alone_is_a_round_trip() -> None:
    edge = welcomed()
    edge.ping(1.0)
    assert pong(edge, 1, 1.5) == [RttMeasured(0.5)]

"""What was lost with a connection, and so is to be sent again: the edge's reading of RESUMED."""

from __future__ import annotations

from dataclasses import replace

from isthmus.protocol.events import (
    Replay,
    ResultRows,
    ResultTokens,
)
from isthmus.protocol.frames import MsgType
from tests.protocol.edge_side import feed, result, sent, welcomed
from tests.protocol.pairing import encoded, offer
from tests.protocol.resume_side import Owner, again, code, replay, resumed, send, started
from tests.protocol.transcript_lines import tensor

# ---- RESUMED: steps were lost


def test_a_lost_row_is_replayed_with_its_output() -> None:
    owner = Owner()
    owner.send(1, 4, final=True)
    edge = owner.lose()
    assert replay(resumed(edge, 1, 4, "replay")) == Replay(4, 5, final=True, last_rows=1)
    assert (owner.session.kv_len, owner.session.awaiting_result) == (4, False)
    owner.send(1, 4, final=True)
    frame = sent(edge)[0]
    assert (frame.seq, frame.epoch) == (2, 2)
    assert feed(edge, replace(result(1, 7, seq=2, pos=5), epoch=2)) == [ResultTokens(1, 2, 5, 1, (7,))]


def test_a_lost_prefill_is_replayed_from_the_first_lost_chunk() -> None:
    edge = welcomed()
    session = started(edge, prompt_tokens=12)
    for pos in (0, 3, 6):
        send(session, 3, pos)
    edge.lost()
    edge, _ = again(session)
    assert replay(resumed(edge, 1, 3, "replay")) == Replay(3, 9)
    send(session, 6, 3)
    send(session, 3, 9, final=True)
    assert [frame.seq for frame in sent(edge)] == [2, 3]


def test_a_lost_draft_chain_is_replayed_as_one() -> None:
    owner = Owner()
    owner.send(3, 4, drafts=(9, 10, 11))
    edge = owner.lose()
    assert replay(resumed(edge, 1, 4, "replay")) == Replay(4, 7, drafts=(9, 10, 11), last_rows=3)
    assert owner.session.digests.stop == 4


def test_a_lost_draft_chain_of_the_u_shape_keeps_its_ids() -> None:
    owner = Owner("u")
    owner.send(2, 4, drafts=(9, 10))
    edge = owner.lose()
    assert replay(resumed(edge, 1, 4, "replay")).drafts == (9, 10)
    owner.send(2, 4, drafts=(9, 10))
    assert sent(edge)[0].body[:8] == bytes(8)  # and they stay here


def test_a_lost_step_for_all_rows_says_how_many() -> None:
    owner = Owner("u")
    owner.send(2, 4)
    owner.send(3, 6, final=True, all_rows=True)
    edge = owner.lose()
    wanted = Replay(4, 9, final=True, all_rows=True, last_rows=3)
    assert replay(resumed(edge, 1, 4, "replay")) == wanted
    owner.send(2, 4)
    owner.send(3, 6, final=True, all_rows=True)
    sent(edge)
    (event,) = feed(edge, replace(tensor(MsgType.RESULT, encoded(3), 3, seq=3, pos=9), epoch=2))
    assert isinstance(event, ResultRows)


def test_a_lost_rewind_is_replayed_as_one() -> None:
    owner = Owner("u")
    owner.send(2, 4)
    owner.send(3, 2, final=True, truncate=True)
    edge = owner.lose()
    assert replay(resumed(edge, 2, 6, "replay")) == Replay(2, 5, True, final=True, last_rows=1)
    # Lost again before anything was sent: what the cloud said of itself still holds.
    edge = owner.lose()
    assert replay(resumed(edge, 2, 6, "ok", epoch=3)) == Replay(2, 5, True, final=True, last_rows=1)
    edge = owner.lose()
    assert code(resumed(edge, 2, 6, "ok", epoch=4, digest="ab" * 16)) == "bad_digest"


def test_a_rewind_may_be_behind_rows_lost_too() -> None:
    owner = Owner("u")
    owner.send(4, 4)
    owner.send(2, 6, final=True, truncate=True)
    edge = owner.lose()
    assert replay(resumed(edge, 1, 4, "replay")) == Replay(4, 8, final=True, last_rows=1)


def test_a_loss_within_a_replay_leaves_the_rest_of_it() -> None:
    owner = Owner()
    for pos in (4, 5):
        owner.send(1, pos)
    owner.send(1, 6, final=True)
    edge = owner.lose()
    assert replay(resumed(edge, 1, 4, "replay")) == Replay(4, 7, final=True, last_rows=1)
    owner.send(2, 4)
    sent(edge)
    edge = owner.lose()  # it had arrived
    rest = Replay(6, 7, final=True, last_rows=1)
    assert replay(resumed(edge, 2, 6, "ok", epoch=3)) == rest
    edge = owner.lose()
    assert replay(resumed(edge, 2, 6, "ok", epoch=4)) == rest
    owner.send(1, 6, final=True)
    edge = owner.lose()
    assert replay(resumed(edge, 2, 6, "replay", epoch=5)) == rest


def test_a_step_elsewhere_gives_a_replay_up() -> None:
    owner = Owner("u")
    owner.send(4, 4)
    edge = owner.lose()
    assert replay(resumed(edge, 1, 4, "replay")) == Replay(4, 8)
    owner.send(1, 2, truncate=True)
    edge = owner.lose()
    assert replay(resumed(edge, 1, 4, "replay", epoch=3)) == Replay(2, 3, True)


def test_an_offer_leaves_out_rows_that_a_replay_was_to_overwrite() -> None:
    owner = Owner("u")
    owner.send(2, 2, truncate=True)
    edge = owner.lose()
    assert replay(resumed(edge, 1, 4, "replay")) == Replay(2, 4, True)
    owner.session.close(offer(2, 4))
    (frame,) = sent(edge)
    assert f'"entries":[[2,"{2:032x}"]]' in frame.body.decode()


# ---- rebuild


def test_rebuild_sends_everything_again() -> None:
    owner = Owner()
    owner.send(1, 4, final=True)
    edge = owner.lose()
    wanted = Replay(0, 5, True, final=True, last_rows=1)
    assert replay(resumed(edge, 2, 5, "rebuild", digest="ab" * 16), "rebuild") == wanted
    owner.send(3, 0, truncate=True)
    assert owner.session.kv_len == 3


def test_the_edge_finds_other_rows_by_itself() -> None:
    owner = Owner()
    owner.send(1, 4, final=True)
    edge = owner.lose()
    wanted = Replay(0, 5, True, final=True, last_rows=1)
    assert replay(resumed(edge, 1, 4, "replay", digest="ab" * 16), "rebuild") == wanted
    owner = Owner()
    owner.send(1, 4)
    edge = owner.lose()
    assert replay(resumed(edge, 1, 4, "replay", rows=9), "rebuild") == Replay(0, 5, True)

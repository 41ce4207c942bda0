"""The list of bad inputs against the tables: every item has a case, every case an item."""

from __future__ import annotations

import pytest

from isthmus.protocol.cloud_connection import CloudConnection
from isthmus.protocol.edge_connection import EdgeConnection
from isthmus.protocol.events import HelloAccepted, RttMeasured
from isthmus.protocol.frames import Frame, MsgType, encode_frame
from isthmus.protocol.limits import Limits
from tests.attacks import test_attacks_list as here
from tests.attacks import test_attacks_packs, test_attacks_resume
from tests.attacks.bad_inputs import FRAMING, MODEL_FILES, SESSION, TENSOR, ZSTD
from tests.attacks.corpus import ATTACKS
from tests.attacks.corpus_edge import EDGE_ATTACKS
from tests.attacks.corpus_files import FILE_ATTACKS
from tests.attacks.corpus_packs import PACK_ATTACKS, TEMPLATE_ATTACKS
from tests.attacks.hostile_cloud import HELLO, welcome
from tests.attacks.peers import PEERS
from tests.attacks.resumes import RESUMES
from tests.attacks.sansio import IDENTITY, INFO, hello_message

ITEMS = (*FRAMING, *TENSOR, *ZSTD, *SESSION, *MODEL_FILES)
# Items that take a test of their own, with the test.
OWN_TESTS = {
    "SIGKILL between KV append and RESULT": (
        test_attacks_resume,
        "test_a_cloud_killed_between_append_and_result_repeats_nothing",
    ),
    "key revoked in mid-stream": (
        test_attacks_resume,
        "test_a_key_revoked_in_mid_stream_ends_its_tenant_only",
    ),
    "RESUME by another tenant, expired, tampered": (
        test_attacks_resume,
        "test_an_expired_token_is_refused",
    ),
    "disk full while building": (
        test_attacks_packs,
        "test_a_disk_that_is_full_while_building_is_named_and_nothing_is_left",
    ),
    "two builds at once": (test_attacks_packs, "test_two_builds_at_once_make_one_whole_pack"),
    "clock jump": (here, "test_a_clock_that_jumps_ends_no_connection"),
}
TABLES = (ATTACKS, EDGE_ATTACKS, PEERS, RESUMES, FILE_ATTACKS, PACK_ATTACKS, TEMPLATE_ATTACKS)
NAMES = [(case.item, str(case)) for table in TABLES for case in table]


@pytest.mark.parametrize("item", ITEMS)
def test_every_item_has_a_case(item: str) -> None:
    assert item in OWN_TESTS or any(item == of for of, _ in NAMES)


def test_every_case_belongs_to_an_item_and_has_a_name_of_its_own() -> None:
    assert {of for of, _ in NAMES} | OWN_TESTS.keys() == set(ITEMS)
    assert len(set(ITEMS)) == len(ITEMS)
    for table in TABLES:
        names = [str(case) for case in table]
        assert len(set(names)) == len(names)


def test_tests_that_stand_for_an_item_are_there() -> None:
    assert all(callable(getattr(module, name)) for module, name in OWN_TESTS.values())


@pytest.mark.parametrize("jump_s", [20.0, 3600.0, 1e9])
def test_a_clock_that_jumps_ends_no_connection(jump_s: float) -> None:
    """item: clock jump. A machine that slept heard nothing meanwhile, which proves nothing against the peer;
    one that is silent from then on is found dead as ever. (The clock is monotonic: it never jumps back, and
    the wall clock is asked for nothing.)"""
    start = 2e9
    limits = Limits()
    cloud = CloudConnection(INFO, limits, tenant="tenant", now=start)
    assert isinstance(cloud.receive(hello_message(IDENTITY), start)[0], HelloAccepted)
    edge = EdgeConnection(HELLO, limits)
    edge.start(start)
    edge.receive(welcome(), start)
    now = start
    for end in (cloud, edge):
        assert end.on_tick(start + 0.1) == end.on_tick(start + 0.2) == []
        now = start + 0.2 + jump_s
        assert end.on_tick(now) == []
        assert not end.is_closed
    ping, pong = (encode_frame(Frame(kind, seq=1)) for kind in (MsgType.PING, MsgType.PONG))
    assert cloud.receive(ping, now) == []
    assert [type(event) for event in edge.receive(pong, now)] == [RttMeasured]
    for tenths in range(1, 400):
        for end in (cloud, edge):
            end.on_tick(now + tenths / 10)
    assert cloud.is_closed
    assert edge.is_closed

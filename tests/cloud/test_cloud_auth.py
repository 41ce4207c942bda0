"""Keys, tenants and the addresses that may be bound."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from isthmus.cloud.auth import LOCAL_TENANT, KeyFile, KeyRing, check_bind, is_loopback, load_keys, parse_keys
from isthmus.protocol.errors import ConfigError


def test_a_key_gives_its_label() -> None:
    ring = parse_keys(["# team", "", "alice: k-alice ", "bob:with:colon"], source="keys")
    assert len(ring) == 2
    assert ring.authenticate("Bearer k-alice") == "alice"
    assert ring.authenticate("bearer   with:colon") == "bob"


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer k-alicE", "Basic k-alice", "k-alice", "Bearer " + "x" * 5000],
)
def test_anything_else_is_refused(header: str | None) -> None:
    assert KeyRing({"alice": "k-alice"}).authenticate(header) is None


def test_a_ring_without_keys_is_open_to_the_local_tenant() -> None:
    assert KeyRing().authenticate(None) == LOCAL_TENANT
    assert KeyRing().open


def test_no_key_shows_in_its_representation() -> None:
    assert "s3cret" not in repr(KeyRing({"alice": "s3cret"}))


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (["nocolon"], "f:1"),
        (["a:1", ":2"], "f:2"),
        (["a:"], "label:key"),
        (["a:1", "a:2"], "twice"),
        (["a:1", "b:1"], "another label"),
        (["# only comments"], "no key"),
    ],
)
def test_a_malformed_file_is_refused_by_line(lines: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part) as caught:
        parse_keys(lines, source="f")
    assert caught.value.code == "bad_key_file"


def test_an_unreadable_or_huge_file_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent"):
        load_keys(tmp_path / "absent")
    huge = tmp_path / "huge"
    huge.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="1048577"):
        load_keys(huge)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="binary"):
        load_keys(binary)


def test_a_changed_file_is_read_again_and_shows_a_revocation(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alice:one\nbob:two\n")
    keys = KeyFile(path)
    before = keys.ring
    assert keys.refresh() is None
    path.write_text("alice:one\n")
    os.utime(path, ns=(1, 1))
    after = keys.refresh()
    assert after is not None
    assert before.holds("alice", after)
    assert not before.holds("bob", after)
    assert after.authenticate("Bearer two") is None


def test_a_broken_rewrite_keeps_the_old_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alice:one\n")
    keys = KeyFile(path)
    path.write_text("alice")
    os.utime(path, ns=(1, 1))
    with pytest.raises(ConfigError):
        keys.refresh()
    assert keys.refresh() is None
    assert keys.ring.authenticate("Bearer one") == "alice"


def test_without_a_file_there_is_nothing_to_refresh() -> None:
    keys = KeyFile(None)
    assert keys.refresh() is None
    assert keys.ring.open


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("[::1]", True), ("localhost", True), ("127.8.8.8", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("host", "keys", "tls", "insecure", "allowed"),
    [
        ("127.0.0.1", False, False, False, True),
        ("0.0.0.0", False, False, False, False),
        ("0.0.0.0", True, False, False, False),
        ("0.0.0.0", False, True, False, False),
        ("0.0.0.0", True, True, False, True),
        ("0.0.0.0", False, False, True, True),
    ],
)
def test_what_may_be_bound(host: str, keys: bool, tls: bool, insecure: bool, allowed: bool) -> None:
    if allowed:
        check_bind(host, keys=keys, tls=tls, insecure=insecure)
    else:
        with pytest.raises(ConfigError, match=r"0\.0\.0\.0") as caught:
            check_bind(host, keys=keys, tls=tls, insecure=insecure)
        assert caught.value.code == "insecure_bind"

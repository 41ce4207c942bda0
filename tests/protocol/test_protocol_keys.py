"""Keys, tenants and the addresses that may be bound."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from isthmus.protocol.addresses import check_bind, is_loopback
from isthmus.protocol.errors import ConfigError
from isthmus.protocol.keys import (
    LOCAL_TENANT,
    KeyFile,
    KeyRing,
    add_key,
    hashed_line,
    load_keys,
    make_key,
    parse_keys,
)

LONG = "a-key-of-more-than-16-characters"


def test_a_key_gives_its_label() -> None:
    ring = parse_keys(["# team", "", "alice: k-alice ", "bob:with:colon"], source="keys")
    assert len(ring) == 2
    assert ring.labels == {"alice", "bob"}
    assert ring.authenticate("Bearer k-alice") == "alice"
    assert ring.authenticate("bearer   with:colon") == "bob"


def test_a_hashed_key_gives_its_label_and_its_hash_does_not() -> None:
    key = make_key()
    line = hashed_line("alice", key)
    assert key not in line
    ring = parse_keys([line, "bob: SECRET"], source="keys")
    assert ring.authenticate(f"Bearer {key}") == "alice"
    for stored in (line, line.partition(":")[2], line.rpartition(":")[2]):
        assert ring.authenticate(f"Bearer {stored}") is None


def test_a_hash_made_by_other_tools_is_understood() -> None:
    hexed = hashlib.sha256(LONG.encode()).hexdigest()
    assert parse_keys([f"alice:sha256:{hexed.upper()}"], source="f").authenticate(f"Bearer {LONG}") == "alice"


def test_keys_are_random_and_long() -> None:
    assert len({make_key() for _ in range(100)}) == 100
    assert len(make_key()) == 64


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
    ring = KeyRing({"alice": "s3cret"})
    assert "s3cret" not in repr(ring) + repr(vars(ring))


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (["nocolon"], "f:1"),
        (["a:1", ":2"], "f:2"),
        (["a:"], "label:key"),
        (["a:1", "a:2"], "twice"),
        (["a:1", "b:1"], "another label"),
        ([f"a:{LONG}", hashed_line("b", LONG)], "another label"),
        (["a:sha256:"], "64 hex"),
        (["a:sha256:" + "0" * 63], "64 hex"),
        (["a:sha256:" + "0" * 66], "64 hex"),
        (["a:sha256:" + "g" * 64], "64 hex"),
        (["# only comments"], "no key"),
    ],
)
def test_a_malformed_file_is_refused_by_line(lines: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part) as caught:
        parse_keys(lines, source="f")
    assert caught.value.code == "bad_key_file"
    assert LONG not in str(caught.value)


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


# ---- the file in use -------------------------------------------------------------------------------


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


def test_hashing_a_key_in_its_file_revokes_nothing(tmp_path: Path) -> None:
    before, after = KeyRing({"alice": LONG}), parse_keys([hashed_line("alice", LONG)], source="f")
    assert before.holds("alice", after)


@pytest.mark.parametrize("broken", ["alice", None])
def test_a_broken_rewrite_keeps_the_old_keys(tmp_path: Path, broken: str | None) -> None:
    path = tmp_path / "keys"
    path.write_text("alice:one\n")
    keys = KeyFile(path)
    if broken is None:
        path.unlink()
    else:
        path.write_text(broken)
        os.utime(path, ns=(1, 1))
    with pytest.raises(ConfigError):
        keys.refresh()
    assert keys.refresh() is None
    assert keys.ring.authenticate("Bearer one") == "alice"


def test_without_a_file_there_is_nothing_to_refresh() -> None:
    keys = KeyFile(None)
    assert keys.refresh() is None
    assert keys.remarks() == []
    assert keys.ring.open


def test_what_the_owner_should_know_is_said_without_keys_or_labels(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"alice:short\nbob:{LONG}\n{hashed_line('carol', make_key())}\n")
    path.chmod(0o640)
    mode, plain, short = KeyFile(path).remarks()
    assert "(mode 640)" in mode
    assert plain.startswith("2 of 3 keys stand unhashed")
    assert short.startswith("1 of 3 keys have fewer than 16")
    assert not any(word in plain + short for word in ("alice", "bob", "short\n", LONG))


def test_a_good_file_needs_no_remark(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    add_key(path, "alice", make_key())
    assert KeyFile(path).remarks() == []


# ---- making keys -----------------------------------------------------------------------------------


def test_an_added_key_is_let_in_and_its_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    keys = {label: make_key() for label in ("alice", "bob")}
    for label, key in keys.items():
        add_key(path, label, key)
    assert path.stat().st_mode & 0o777 == 0o600
    ring = load_keys(path)
    assert {label: ring.authenticate(f"Bearer {key}") for label, key in keys.items()} == {
        "alice": "alice",
        "bob": "bob",
    }
    assert not any(key in path.read_text() for key in keys.values())


@pytest.mark.parametrize("text", ["", "# mine\n", "bob:k", "bob:k\n"])
def test_what_stood_in_the_file_stays(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    add_key(path, "alice", LONG)
    assert path.read_text().startswith(text)
    assert load_keys(path).authenticate(f"Bearer {LONG}") == "alice"
    assert load_keys(path).labels == ({"alice", "bob"} if "bob" in text else {"alice"})


@pytest.mark.parametrize("label", ["", "#x", "a:b", " a", "a\nb", "\x00"])
def test_a_label_that_no_line_can_carry_is_refused(tmp_path: Path, label: str) -> None:
    with pytest.raises(ConfigError) as caught:
        add_key(tmp_path / "keys", label, LONG)
    assert caught.value.code == "bad_label"
    assert not (tmp_path / "keys").exists()


def test_a_label_is_given_once(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    add_key(path, "alice", make_key())
    before = path.read_text()
    with pytest.raises(ConfigError, match="alice") as caught:
        add_key(path, "alice", make_key())
    assert caught.value.code == "label_taken"
    assert path.read_text() == before


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none") as caught:
        add_key(tmp_path / "none" / "keys", "alice", LONG)
    assert caught.value.code == "bad_key_file"


# ---- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("[::1]", True), ("localhost", True), ("127.8.8.8", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("example.org", False), ("", False),
     ("localhost.example.org", False)],
)  # fmt: skip
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("host", "keys", "tls", "missing"),
    [
        ("127.0.0.1", False, False, []),
        ("0.0.0.0", False, False, ["--api-key-file", "--tls-cert"]),
        ("0.0.0.0", True, False, ["--tls-cert"]),
        ("0.0.0.0", False, True, ["--api-key-file"]),
        ("0.0.0.0", True, True, []),
    ],
)
def test_what_may_be_bound(host: str, keys: bool, tls: bool, missing: list[str]) -> None:
    if not missing:
        assert check_bind(host, keys=keys, tls=tls, insecure=False) == ""
        assert "changes nothing" in check_bind(host, keys=keys, tls=tls, insecure=True)
        return
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0") as caught:
        check_bind(host, keys=keys, tls=tls, insecure=False)
    assert caught.value.code == "insecure_bind"
    warning = check_bind(host, keys=keys, tls=tls, insecure=True)
    for option in ("--api-key-file", "--tls-cert"):
        assert (option in caught.value.message) is (option in missing)
        assert (option in warning) is (option in missing)
    assert ("may use it" in warning) is not keys
    assert ("read and change" in warning) is not tls


def test_the_option_that_gives_keys_is_named() -> None:
    with pytest.raises(ConfigError, match="--serve-key-file"):
        check_bind("::", keys=False, tls=True, insecure=False, key_option="--serve-key-file")

"""Downloads against a real server that cuts, refuses, lies and resumes."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.protocol.errors import ConfigError, IsthmusError, ModelFileError, NotFoundError
from isthmus.splitter.download import RetryPolicy, download
from tests.splitter.file_server import Behaviour, serving

DATA = bytes(range(256)) * 6000  # 1.5 MB
SHA = hashlib.sha256(DATA).hexdigest()
QUICK = RetryPolicy(attempts=3, first_wait_s=0.001, timeout_s=5.0)


@pytest.fixture
def behaviour() -> Behaviour:
    return Behaviour(files={"/model.bin": DATA})


@pytest.fixture
def url(behaviour: Behaviour) -> Iterator[str]:
    with serving(behaviour) as base:
        yield base + "/model.bin"


def test_a_plain_download(url: str, behaviour: Behaviour, tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    target = tmp_path / "deep" / "model.bin"
    result = download(
        url, target, sha256=SHA, size=len(DATA), label="fetching", progress=lambda *step: seen.append(step)
    )
    assert result == target
    assert target.read_bytes() == DATA
    assert [path.name for path in target.parent.iterdir()] == ["model.bin"]
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert (shares[-1], {label for label, _ in seen}) == (1.0, {"fetching"})
    assert behaviour.requests == [("GET", "/model.bin", None)]


def test_a_cut_connection_goes_on_where_it_stopped(url: str, behaviour: Behaviour, tmp_path: Path) -> None:
    behaviour.cut_after = [400_000, 1, 700_000]
    download(url, tmp_path / "m", sha256=SHA, retry=QUICK)
    assert (tmp_path / "m").read_bytes() == DATA
    assert [wanted for _, _, wanted in behaviour.requests] == [
        None,
        "bytes=400000-",
        "bytes=400001-",
        "bytes=1100001-",
    ]


def test_the_next_call_goes_on_where_this_one_gave_up(url: str, behaviour: Behaviour, tmp_path: Path) -> None:
    behaviour.cut_after = [500_000, 0, 0, 0]
    with pytest.raises(ModelFileError, match="500000 bytes are kept") as caught:
        download(url, tmp_path / "m", sha256=SHA, retry=QUICK)
    assert caught.value.code == "download_failed"
    assert not (tmp_path / "m").exists()
    assert (tmp_path / "m.part").stat().st_size == 500_000
    behaviour.requests.clear()
    download(url, tmp_path / "m", sha256=SHA, retry=QUICK)
    assert (tmp_path / "m").read_bytes() == DATA
    assert behaviour.requests == [("GET", "/model.bin", "bytes=500000-")]


def test_progress_resets_the_patience(url: str, behaviour: Behaviour, tmp_path: Path) -> None:
    behaviour.cut_after = [1000, 0, 0, 1000, 0, 0, 1000]
    download(url, tmp_path / "m", sha256=SHA, retry=QUICK)
    assert (tmp_path / "m").read_bytes() == DATA


def test_a_server_without_ranges_sends_it_all_again(url: str, behaviour: Behaviour, tmp_path: Path) -> None:
    behaviour.ranges = False
    behaviour.cut_after = [800_000]
    download(url, tmp_path / "m", sha256=SHA, retry=QUICK)
    assert (tmp_path / "m").read_bytes() == DATA


def test_a_server_that_names_no_length(url: str, behaviour: Behaviour, tmp_path: Path) -> None:
    behaviour.send_length = False
    download(url, tmp_path / "m", sha256=SHA, retry=QUICK)
    assert (tmp_path / "m").read_bytes() == DATA


def test_a_part_that_is_already_whole(url: str, behaviour: Behaviour, tmp_path: Path) -> None:
    for size in (None, len(DATA)):
        (tmp_path / "m.part").write_bytes(DATA)
        download(url, tmp_path / "m", sha256=SHA, size=size, retry=QUICK)
        assert (tmp_path / "m").read_bytes() == DATA
    assert behaviour.requests == [("GET", "/model.bin", f"bytes={len(DATA)}-")]


@pytest.mark.parametrize("leftover", [b"another version " * 100, DATA + b"and more"])
@pytest.mark.parametrize("size", [None, len(DATA)])
def test_a_foreign_part_is_thrown_away(leftover: bytes, size: int | None, url: str, tmp_path: Path) -> None:
    (tmp_path / "m.part").write_bytes(leftover)
    download(url, tmp_path / "m", sha256=SHA, size=size, retry=QUICK)
    assert (tmp_path / "m").read_bytes() == DATA


def test_a_wrong_checksum_leaves_nothing(url: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=SHA) as caught:
        download(url, tmp_path / "m", sha256="0" * 64, retry=QUICK)
    assert caught.value.code == "checksum_mismatch"
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_size_is_noticed_before_the_transfer(url: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=f"{len(DATA)} bytes, expected 7"):
        download(url, tmp_path / "m", sha256=SHA, size=7, retry=QUICK)


def test_busy_servers_are_asked_again(url: str, behaviour: Behaviour, tmp_path: Path) -> None:
    behaviour.statuses = [503, 429]
    download(url, tmp_path / "m", sha256=SHA, retry=QUICK)
    assert len(behaviour.requests) == 3


@pytest.mark.parametrize(
    ("status", "error", "code"),
    [
        (404, NotFoundError, "not_found"),
        (410, NotFoundError, "not_found"),
        (403, ModelFileError, "download_failed"),
    ],
)
def test_refusals_are_final(
    status: int, error: type[IsthmusError], code: str, url: str, behaviour: Behaviour, tmp_path: Path
) -> None:
    behaviour.statuses = [status]
    with pytest.raises(error, match=str(status)) as caught:
        download(url, tmp_path / "m", sha256=SHA, retry=QUICK)
    assert caught.value.code == code
    assert len(behaviour.requests) == 1


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ModelFileError, match="cannot download") as caught:
        download(f"http://127.0.0.1:{port}/x", tmp_path / "m", sha256=SHA, retry=QUICK)
    assert caught.value.code == "download_failed"
    assert caught.value.hint


def test_a_server_that_never_answers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ModelFileError, match="timed out"):
            download(
                f"http://127.0.0.1:{port}/x",
                tmp_path / "m",
                sha256=SHA,
                retry=RetryPolicy(attempts=1, first_wait_s=0.0, timeout_s=0.1),
            )


@pytest.mark.parametrize("address", ["file:///etc/hostname", "ftp://127.0.0.1/x", "nonsense"])
def test_other_schemes_are_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="only http"):
        download(address, tmp_path / "m", sha256=SHA, retry=QUICK)


def test_errors_show_no_credentials(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        download("ftp://user:secret@127.0.0.1/x?signature=hidden", tmp_path / "m", sha256=SHA, retry=QUICK)
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_no_permission(url: str, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):  # root may write anywhere
        pytest.skip("this user ignores permissions")
    with pytest.raises(ConfigError, match="permission") as caught:
        download(url, locked / "m", sha256=SHA, retry=QUICK)
    assert caught.value.code == "no_write_permission"


def test_a_target_that_cannot_be_written(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ModelFileError) as caught:
        download(url, tmp_path / "file" / "m", sha256=SHA, retry=QUICK)
    assert caught.value.code == "io_error"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(url: str, tmp_path: Path) -> None:
    (tmp_path / "m.part").symlink_to("/dev/full")
    with pytest.raises(ModelFileError, match="full") as caught:
        download(url, tmp_path / "m", sha256=SHA, retry=QUICK)
    assert caught.value.code == "disk_full"

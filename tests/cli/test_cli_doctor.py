"""`isthmus doctor` on machines and clouds with something wrong: it is found, named, and has a way out."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from isthmus.cli import app
from isthmus.cloud.tls import server_context
from isthmus.protocol.errors import ConfigError
from isthmus.protocol.keys import KeyFile, add_key, make_key
from isthmus.splitter.pack import Pack
from tests.certificates import Authority, make_authority
from tests.cloud.cloud_edges import RunningCloud, prepare_cloud, running_cloud
from tests.packs import tiny_pack
from tests.processes import run

Checks = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _nothing_is_set(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ISTHMUS_")]:
        monkeypatch.delenv(name)
    for name in ("CONFIG", "CACHE", "STATE"):
        monkeypatch.setenv(f"ISTHMUS_{name}", str(home / name.lower()))


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return tiny_pack(tmp_path_factory.mktemp("pack"))


@pytest.fixture(scope="module")
def port() -> list[str]:
    """Arguments that choose a port which is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return ["--port", str(free.getsockname()[1])]


@pytest.fixture
def chosen(pack: Pack, port: list[str]) -> list[str]:
    """Arguments that choose the tiny pack and a port that is free."""
    return ["--model", str(pack.path), *port]


def examine(*options: str, env: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """The checks of `doctor --json`; the exit code is as they say, and every trouble has a way out."""
    done = CliRunner().invoke(app, ["doctor", *options, "--json"], env=env, catch_exceptions=False)
    answer = json.loads(done.stdout)
    assert answer.keys() == {"ok", "checks"}
    assert answer["ok"] is all(check["status"] != "fail" for check in answer["checks"])
    assert done.exit_code == (0 if answer["ok"] else 1)
    checks: list[dict[str, Any]] = answer["checks"]
    for check in checks:
        assert check["status"] == "ok" or check["hint"], check
    return checks


def by_name(checks: list[dict[str, Any]], cloud: str | None = None) -> Checks:
    """Those of this machine, or of one cloud."""
    return {check["name"]: check for check in checks if check["cloud"] == cloud}


def failures(checks: Checks) -> list[str]:
    return [name for name, check in checks.items() if check["status"] == "fail"]


# ---- this machine -------------------------------------------------------------------------------------


def test_a_machine_without_fault(chosen: list[str]) -> None:
    checks = by_name(examine(*chosen))
    assert failures(checks) == []
    assert list(checks) == [
        "python", "packages", "config", "provider", "model", "cache", "key_files", "energy", "port",
    ]  # fmt: skip
    assert "onnxruntime" in checks["packages"]["detail"]
    assert "cpu computes" in checks["provider"]["detail"]
    assert "4 layers" in checks["model"]["detail"]


def test_a_machine_with_many_faults(pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    keys = tmp_path / "keys"
    add_key(keys, "me", make_key())
    keys.chmod(0o644)
    wrong = {
        "ISTHMUS_CACHE": str(tmp_path / "file" / "cache"),
        "ISTHMUS_CLOUDS": "ws://127.0.0.1:1",
        "ISTHMUS_IDLE_WATTS": "3",
    }
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        options = ["--model", str(pack.path.parent / "source"), "--provider", "abacus", "--port", port]
        checks = by_name(examine(*options, "--serve-key-file", str(keys), env=wrong))
    assert failures(checks) == ["provider", "cache", "energy"]
    assert "unknown provider 'abacus'" in checks["provider"]["detail"]
    assert "ISTHMUS_CACHE" in checks["cache"]["hint"]
    assert "isthmus build" in checks["model"]["hint"]
    warned = {name for name, check in checks.items() if check["status"] == "warn"}
    assert warned == {"config", "model", "key_files", "port"}
    assert "ISTHMUS_CLOUDS" in checks["config"]["detail"]
    assert "mode 644" in checks["key_files"]["detail"]
    assert port in checks["port"]["detail"]


def test_a_config_file_that_cannot_be_read_hides_nothing_else(chosen: list[str], tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("colour = 3\n")
    checks = by_name(examine(*chosen, env={"ISTHMUS_CONFIG": str(config)}))
    assert failures(checks) == ["config"]
    assert "colour" in checks["config"]["detail"]
    assert checks["model"]["status"] == "ok"


def test_a_pack_that_was_altered(pack: Pack, port: list[str], tmp_path: Path) -> None:
    altered = tmp_path / "pack"
    shutil.copytree(pack.path, altered)
    weights = altered / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert failures(by_name(examine("--model", str(altered), *port))) == ["model"]


def test_a_flag_that_is_wrong_is_wrong_usage() -> None:
    with pytest.raises(ConfigError, match="auto, 4, 8, 32"):
        examine("--bits", "5")


# ---- clouds -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The cloud's key file, and the edge's with one key of it."""
    folder, key = tmp_path_factory.mktemp("keys"), make_key()
    add_key(folder / "cloud", "me", key)
    (folder / "edge").write_text(key + "\n")
    (folder / "edge").chmod(0o600)
    return folder / "cloud", folder / "edge"


@pytest.fixture(scope="module")
def cloud(pack: Pack, own: Authority, keys: tuple[Path, Path]) -> Iterator[RunningCloud]:
    """A cloud with a key, and a certificate for 127.0.0.1 that ends in a few days."""
    files = own.issue("127.0.0.1", not_after=datetime.now(UTC) + timedelta(days=5, hours=1))
    prepared = prepare_cloud(pack.path.parent / "source", threads=1, kv_mb=64, keys=KeyFile(keys[0]))
    with running_cloud(prepared, ssl_context=server_context(files.cert, files.key)) as running:
        yield running


@pytest.fixture
def trusted(own: Authority, keys: tuple[Path, Path]) -> list[str]:
    """The options with which the cloud lets us in."""
    return ["--api-key-file", str(keys[1]), "--tls-ca", str(own.ca)]


def test_a_cloud_without_fault_and_one_that_is_down(
    cloud: RunningCloud, chosen: list[str], trusted: list[str]
) -> None:
    checks = examine(*chosen, *trusted, "--cloud", cloud.url, "--cloud", "ws://127.0.0.1:1")
    up, down = by_name(checks, cloud.url), by_name(checks, "ws://127.0.0.1:1")
    assert list(up) == [
        "cloud_url", "cloud_name", "cloud_tcp", "cloud_tls", "cloud_key", "cloud_version", "cloud_model",
        "cloud_link",
    ]  # fmt: skip
    assert failures(up) == []
    assert up["cloud_tls"]["status"] == "warn"
    assert "valid for 5 days" in up["cloud_tls"]["detail"]
    assert "fp32 there, made from the same weights" in up["cloud_model"]["detail"]
    assert "Mbit/s up" in up["cloud_link"]["detail"]
    assert failures(down) == ["cloud_tcp"]
    assert "Connection refused" in down["cloud_tcp"]["detail"]
    assert "serve cloud" in down["cloud_tcp"]["hint"]


@pytest.mark.processes
def test_a_person_reads_it(
    cloud: RunningCloud, chosen: list[str], trusted: list[str], keys: tuple[Path, Path]
) -> None:
    """The wrong name in the certificate, as printed."""
    named = cloud.url.replace("127.0.0.1", "localhost")
    done = run("doctor", *chosen, *trusted, "--cloud", named)
    assert done.returncode == 1
    assert f"\n{named}\n" in done.stdout
    assert "✗ tls " in done.stdout
    assert "→ call the cloud by a name that its certificate holds" in done.stdout
    assert keys[1].read_text().strip() not in done.stdout + done.stderr


def test_the_wrong_key(cloud: RunningCloud, chosen: list[str], own: Authority, tmp_path: Path) -> None:
    wrong = tmp_path / "key"
    wrong.write_text("not the key\n")
    wrong.chmod(0o644)
    options = ["--tls-ca", str(own.ca), "--cloud", cloud.url, "--api-key-file", str(wrong)]
    checks = examine(*chosen, *options)
    assert failures(by_name(checks, cloud.url)) == ["cloud_key"]
    assert "ISTHMUS_API_KEY" in by_name(checks, cloud.url)["cloud_key"]["hint"]
    assert "mode 644" in by_name(checks)["key_files"]["detail"]


def test_another_model(cloud: RunningCloud, port: list[str], trusted: list[str], tmp_path: Path) -> None:
    other = tiny_pack(tmp_path, num_hidden_layers=2)
    options = ["--model", str(other.path), *port, *trusted, "--cloud", cloud.url]
    checks = by_name(examine(*options), cloud.url)
    assert failures(checks) == ["cloud_model"]
    assert checks["cloud_key"]["status"] == checks["cloud_version"]["status"] == "ok"
    assert "num_layers" in checks["cloud_model"]["detail"]


def test_a_cloud_is_looked_at_as_far_as_that_goes_without_a_pack(
    cloud: RunningCloud, pack: Pack, port: list[str], trusted: list[str]
) -> None:
    source = str(pack.path.parent / "source")
    checks = by_name(examine("--model", source, *port, *trusted, "--cloud", cloud.url), cloud.url)
    assert failures(checks) == []
    assert list(checks)[-2:] == ["cloud_tls", "cloud_model"]
    assert "isthmus build" in checks["cloud_model"]["hint"]


def test_urls_that_cannot_be_meant(chosen: list[str]) -> None:
    urls = ["wss://alice:secret@127.0.0.1:1", "ws://[::1", "https://127.0.0.1", "wss://127.0.0.1:99999"]
    checks = examine(*chosen, *(part for url in urls for part in ("--cloud", url)))
    found = [check for check in checks if check["cloud"]]
    assert [(check["name"], check["status"]) for check in found] == [("cloud_url", "fail")] * 4
    assert "secret" not in json.dumps(found)

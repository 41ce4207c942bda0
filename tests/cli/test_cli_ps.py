"""`isthmus ps`: what serves here is listed with what it says of itself; what has ended is not."""

from __future__ import annotations

import json
import os
import platform
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from isthmus.cli import app
from isthmus.commands.ps import Seen, duration, loaded, table
from isthmus.commands.running import ServedProcess, noted, served_processes
from isthmus.protocol.keys import add_key, make_key
from tests.certificates import make_authority
from tests.processes import Service, serve


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of this test's own; the folder of its run files."""
    monkeypatch.setenv("ISTHMUS_STATE", str(tmp_path))
    return tmp_path / "run"


def ps(*options: str, env: dict[str, str]) -> str:
    """What `isthmus ps` prints."""
    done = CliRunner().invoke(app, ["ps", *options], env=env, catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def processes(*options: str, env: dict[str, str]) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads(ps("--json", *options, env=env))["processes"]
    return listed


# ---- real servers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(
    model: str, env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, Service, dict[str, str], Path]]:
    """A cloud, an edge with a key and TLS that has answered by both, the environment, the CA."""
    folder = tmp_path_factory.mktemp("ps")
    here = {**env, "ISTHMUS_STATE": str(folder / "state")}
    own = make_authority(folder)
    files = own.issue("some-name.example")  # not what it is called on this machine
    key = make_key()
    add_key(folder / "keys", "me", key)
    with ExitStack() as stack:
        cloud = stack.enter_context(
            serve("cloud", "--model", model, "--precision", "fp32", "--port", "0", env=here)
        )
        secured = ["--serve-key-file", str(folder / "keys"), "--tls-cert", str(files.cert)]
        edge = stack.enter_context(
            serve(
                "edge", "--model", model, "--bits", "8", "--port", "0", "--profile", "none",
                "--cloud", cloud.url, *secured, "--tls-key", str(files.key), env=here,
            )
        )  # fmt: skip
        trusting = ssl.create_default_context(cafile=own.ca)
        trusting.check_hostname = False
        for route in ("local", "offload"):
            body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
            httpx.post(
                f"{edge.url}/v1/chat/completions",
                json={**body, "isthmus": {"route": route}},
                headers={"authorization": f"Bearer {key}"},
                verify=trusting,
                timeout=60,
            ).raise_for_status()
        yield cloud, edge, {"ISTHMUS_STATE": here["ISTHMUS_STATE"], "ISTHMUS_API_KEY": key}, own.ca


@pytest.mark.processes
def test_an_edge_and_a_cloud(served: tuple[Service, Service, dict[str, str], Path]) -> None:
    cloud, edge, env, ca = served
    of_cloud, of_edge = processes("--tls-ca", str(ca), env=env)
    assert (of_cloud["kind"], of_cloud["url"], of_cloud["pid"]) == ("cloud", cloud.url, cloud.process.pid)
    assert of_cloud["model"] == "tiny"
    assert of_cloud["stats"]["sessions"] == 0
    assert (of_edge["kind"], of_edge["url"], of_edge["pid"]) == ("edge", edge.url, edge.process.pid)
    assert of_edge["stats"]["routes"] == {"local": 1, "offload": 1}
    assert of_edge["error"] is None
    for one in (of_cloud, of_edge):
        assert one["rss_bytes"] > 20 << 20
        assert 0 < one["uptime_s"] < 600
    said = ps("--tls-ca", str(ca), env=env)
    assert "0–3 + head of 4, on cpu" in said
    assert "1 local, 1 offload" in said
    assert f"{cloud.url} up" in said
    assert "all, in fp32" in said


@pytest.mark.processes
def test_who_does_not_answer_is_listed_with_the_reason(
    served: tuple[Service, Service, dict[str, str], Path],
) -> None:
    _, edge, env, ca = served
    error = processes(env=env)[1]["error"]
    assert error["code"] == "tls_untrusted"
    assert "--tls-ca" in error["hint"]
    without = {**env, "ISTHMUS_API_KEY": ""}
    error = processes("--tls-ca", str(ca), env=without)[1]["error"]
    assert error["code"] == "unauthorized"
    assert edge.url in ps("--tls-ca", str(ca), env=without)


def test_nothing_is_served(tmp_path: Path) -> None:
    alone = {"ISTHMUS_STATE": str(tmp_path)}
    assert processes(env=alone) == []
    assert "isthmus serve edge" in ps(env=alone)


# ---- run files ----------------------------------------------------------------------------------------


def note(state: Path, **changes: Any) -> Path:
    """A run file as this process writes it, with `changes`."""
    told: list[str] = []
    noted("edge", "tiny", told.append)("http://127.0.0.1:8077")
    assert told == ["http://127.0.0.1:8077"]
    file = state / f"{os.getpid()}.json"
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return file


def test_a_process_that_runs_is_found(state: Path) -> None:
    note(state)
    (found,) = served_processes()
    assert (found.kind, found.pid, found.model) == ("edge", os.getpid(), "tiny")


def test_a_process_that_was_killed_is_not(state: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    began_s = psutil.Process(process.pid).create_time() - psutil.boot_time()
    file = note(state, pid=process.pid, since_boot_s=began_s)
    assert len(served_processes()) == 1
    process.kill()
    process.communicate()
    assert served_processes() == []
    assert not file.exists()


def test_a_number_that_another_process_has_now_does_not_count(state: Path) -> None:
    file = note(state, since_boot_s=1.0)
    assert served_processes() == []
    assert not file.exists()


def test_other_machines_files_are_left_alone(state: Path) -> None:
    file = note(state, host=f"not-{platform.node()}", pid=1)
    assert served_processes() == []
    assert file.exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pid": "x"}', "\xff"])
def test_what_is_no_run_file_is_removed(state: Path, content: str) -> None:
    file = note(state)
    file.write_text(content, encoding="latin-1")
    assert served_processes() == []
    assert not file.exists()


def test_a_note_that_cannot_be_written_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ISTHMUS_STATE", str(tmp_path / "file" / "state"))
    told: list[str] = []
    noted("edge", "tiny", told.append)("http://127.0.0.1:8077")
    assert told == ["http://127.0.0.1:8077"]
    assert served_processes() == []


# ---- words --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "weights", "said"),
    [
        ([], 0, "none loaded yet of 4"),
        ([0, 1, 2, 3], 5 + 4 * 10 + 7, "0–3 + head of 4"),
        ([0, 1, 3], 5 + 3 * 10, "0–1, 3 of 4"),
    ],
)
def test_which_layers_are_loaded(layers: list[int], weights: int, said: str) -> None:
    model = {"num_layers": 4, "bytes_per_block": [5, 10, 10, 10, 10, 7]}
    assert loaded({"loaded_layers": layers, "weights_bytes": weights, "model": model}) == said


def test_durations() -> None:
    assert [duration(s) for s in (3, 65, 3600, 93784)] == ["3 s", "1 min 5 s", "1 h 0 min", "1 d 2 h"]


def test_figures_of_another_version_are_no_reason_to_fall_over() -> None:
    process = ServedProcess("edge", "http://127.0.0.1:1", 1, "tiny", 0.0, "here", 0.0)
    cells = table([Seen(process, 1.0, None, {"layers": 3}, None)]).columns[1].cells
    assert "another version" in " ".join(str(cell) for cell in cells)

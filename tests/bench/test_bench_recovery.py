"""`bench recovery` on a tiny model: what it measures is what it says; how fast is no matter here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from isthmus.bench.recovery import CASES
from isthmus.bench.recovery_clouds import CloudProcess, cloud_arguments
from isthmus.bench.recovery_round import Unbroken
from isthmus.cli import app
from isthmus.protocol.errors import ConfigError, IsthmusError
from tests.tiny import make_tiny

PARTS = {
    "restart": {"detection_s", "process_s", "connect_s", "replay_s"},
    "second_cloud": {"detection_s", "connect_s", "replay_s"},
    "local": {"detection_s", "load_s", "compute_s"},
    "resume": {"detection_s", "connect_s", "answer_s"},
    "silent": {"detection_s", "connect_s", "answer_s"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("llama", tmp_path_factory.mktemp("recovery") / "tiny"))


@pytest.mark.processes
def test_every_case_recovers_and_stands_beside_its_bound(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    options = ["--model", folder, "--rtt-ms", "0", "--rounds", "1", "--json"]
    done = CliRunner().invoke(app, ["bench", "recovery", *options], catch_exceptions=False)
    result = json.loads(done.stdout)
    assert result["bench"] == "recovery"
    figures = result["figures"]
    assert figures.keys() == {f"{case}_{what}" for case in CASES for what in ("s", "bound_s")}
    rows = {row["what"].removesuffix("_s"): row for row in result["rows"]}
    for case, parts in PARTS.items():
        row = rows[case]
        assert parts <= row.keys()
        assert all(row[part] >= 0 for part in parts)
        assert row["bound_s"] == pytest.approx(sum(row[part] for part in parts), rel=1e-2)
        assert figures[f"{case}_s"] >= figures[f"{case}_bound_s"] * 0.8
    assert figures["restart_s"] > rows["restart"]["process_s"] > 0.1
    assert 2.0 < figures["silent_s"] < 3.0 + 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--split", "0"], "--split 0"), (["--split", "4"], "--split 4"), (["--rtt-ms", "x"], "--rtt-ms 'x'")],
)
def test_what_can_not_be_measured_is_refused(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    done = CliRunner().invoke(app, ["bench", "recovery", "--model", folder, *options])
    assert isinstance(done.exception, ConfigError)
    assert message in done.exception.message


def test_tokens_are_held_against_the_unbroken_run() -> None:
    run = Unbroken((5, 6, 7), (1.0, 1e-4, 1.0))
    assert run.near_tie((5, 6, 7)) is None
    assert run.near_tie((5, 9, 8)) == 1
    for ids in ((5, 6, 8), (4, 6, 7), (5, 6), (5, 6, 7, 7)):
        with pytest.raises(IsthmusError) as caught:
            run.near_tie(ids)
        assert caught.value.code == "unequal_tokens"


def test_a_cloud_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(IsthmusError, match="did not start") as caught,
        CloudProcess(*cloud_arguments(str(tmp_path / "missing"))),
    ):
        pass
    assert "missing" in caught.value.message


@pytest.mark.processes
def test_a_supervised_cloud_comes_back_on_its_port(folder: str) -> None:
    with CloudProcess(*cloud_arguments(folder)) as cloud:
        url, pid = cloud.url, cloud.pid
        cloud.restart_when_it_ends()
        cloud.kill()
        cloud.restarted()
        assert cloud.url == url
        assert cloud.pid != pid
        assert cloud.exit_codes == [-9]
        assert cloud.num_starts == 2
        assert not cloud.restarting

"""`isthmus profile` through a real process: the object, the file for elsewhere, the table, the errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isthmus.protocol.profiles import FIGURES, DeviceProfile
from isthmus.splitter.profile_store import load_profile
from tests.processes import run

pytestmark = pytest.mark.processes


def test_profile_as_json_and_as_a_file(model: str, env: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "device.json"
    done = run("profile", "--model", model, "--bits", "8", "--quick", "--out", str(out), "--json", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    printed = DeviceProfile.from_json(done.stdout, name="stdout")
    assert (printed.side, printed.num_layers, printed.labels["decode"]) == ("edge", 4, "measured")
    assert load_profile(out) == printed
    kept = list(Path(env["ISTHMUS_CACHE"], "profiles").glob("*.json"))
    assert printed in [load_profile(path) for path in kept]


def test_profile_as_a_table(model: str, env: dict[str, str]) -> None:
    watts = ("--idle-watts", "2.5", "--active-watts", "11")
    done = run("profile", "--model", model, "--bits", "8", "--quick", *watts, env=env)
    assert done.returncode == 0, done.stderr
    for name in FIGURES:
        assert name in done.stdout
    assert "measured" in done.stdout
    assert "2.5 / 11 W" in done.stdout or "power:" in done.stdout  # of a sensor
    assert "kept in" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--idle-watts", "3"), "bad_watts", "--active-watts"),
        (("--idle-watts", "9", "--active-watts", "3"), "bad_watts", "9 W idle and 3 W active"),
    ],
)
def test_watts_that_cannot_be(
    arguments: tuple[str, ...], code: str, said: str, model: str, env: dict[str, str]
) -> None:
    done = run("profile", "--model", model, *arguments, "--json", env=env)
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["code"] == code
    assert said in error["message"]


def test_a_file_that_cannot_be_written(model: str, env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    out = str(tmp_path / "file" / "p.json")
    done = run("profile", "--model", model, "--bits", "8", "--quick", "--out", out, "--json", env=env)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "io_error"

"""What is built and shipped: wheel and sdist hold the one package, whole, and the edge needs no torch."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("protocol", "quant", "splitter", "edge", "cloud")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both distributions, built by the real build front end (the sdist first, the wheel from the sdist)."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def expected_files() -> set[str]:
    names = {f"isthmus/{f.relative_to(ROOT / 'src/isthmus')}" for f in (ROOT / "src/isthmus").glob("*.py")}
    for folder in ("commands", "bench", "relay"):
        files = (ROOT / "src/isthmus" / folder).rglob("*.py")
        names |= {f"isthmus/{f.relative_to(ROOT / 'src/isthmus')}" for f in files}
    for floor in FLOORS:
        names |= {f"isthmus/{f.relative_to(ROOT)}" for f in (ROOT / floor).rglob("*.py")}
    return names


def test_wheel_holds_every_module_under_one_package(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    python = {name for name in names if name.endswith(".py")}
    assert python == expected_files()
    assert "isthmus/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {
        "isthmus",
        next(n for n in names if "dist-info" in n).partition("/")[0],
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_metadata_keeps_torch_out_of_the_edge(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        metadata = Parser().parsestr(
            wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
        )
        entry_points = wheel.read(
            next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))
        ).decode()
    requires = metadata.get_all("Requires-Dist") or []
    core = [line for line in requires if "extra ==" not in line]
    assert core
    assert not [line for line in core if line.startswith(("torch", "transformers", "optimum", "accelerate"))]
    assert [line for line in requires if line.startswith("torch") and "extra == 'cloud'" in line]
    assert "isthmus = isthmus.cli:main" in entry_points
    assert metadata["License-Expression"] == "Apache-2.0"


def test_the_installed_wheel_runs(dist: Path, tmp_path: Path) -> None:
    """Installed away from the checkout, the package is whole: its command answers from there."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*pip, str(next(dist.glob("*.whl")))], check=True, capture_output=True)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import isthmus, isthmus.cli, isthmus.edge.agent, isthmus.protocol.frames\n"
        f"assert isthmus.__file__.startswith({str(tmp_path)!r}), isthmus.__file__\n"
        "sys.argv = ['isthmus', '--version']; isthmus.cli.main()"
    )
    # -P and another folder: the checkout must not be what answers
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.startswith("isthmus 0."), done.stderr


def test_sdist_builds_the_same_tree(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for floor in FLOORS:
        assert f"{floor}/__init__.py" in names
    assert {"LICENSE", "README.md", "Makefile", "pyproject.toml"} <= names


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / ".ci/constraints.txt").read_text().splitlines()
        if "==" in line
    }
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["cloud"] + extras["dev"]
    names = {line.partition(">")[0].partition("[")[0].lower().replace("_", "-") for line in wanted} - {
        "isthmus"
    }
    assert names - pinned == set()
    assert "torch==2.13.0" in (ROOT / ".ci/constraints.txt").read_text()

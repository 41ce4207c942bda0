"""`make demo` as a newcomer without a terminal has it: three routes, three times Paris, an answer that
outlives its cloud, exit code 0."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "demos" / "demo.py"


@pytest.mark.model
@pytest.mark.processes
def test_the_demo_answers_by_every_route_and_outlives_its_cloud(smollm_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(DEMO)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows if row.split("│")[1].strip()] == [
        "local",
        "split",
        "offload",
    ]
    assert " ".join(row.split("│")[3].strip() for row in rows).count("Paris") == 3
    assert "; it took " in done.stdout, "the router says why"
    assert "✂ SIGKILL" in done.stdout
    assert "to route local, no token lost" in done.stdout
    assert "the web chat is at http://127.0.0.1:" in done.stdout

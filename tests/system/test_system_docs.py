"""Every `sh` block of the README, of getting-started and of routing runs as it stands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/getting-started.md", "docs/routing.md")
COMMANDS = [
    pytest.param(line, id=f"{page}: {line}")
    for page in PAGES
    for block in re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def test_there_are_commands_to_run() -> None:
    assert len(COMMANDS) >= 4


@pytest.mark.model
@pytest.mark.parametrize("line", COMMANDS)
def test_documented_commands_run(line: str) -> None:
    words = shlex.split(line)
    assert words[0] == ".venv/bin/isthmus"
    done = subprocess.run(
        [sys.executable, "-m", "isthmus", *words[1:]],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if "capital of France" in line:
        assert "Paris" in done.stdout


@pytest.mark.parametrize(
    "page", sorted(str(p.relative_to(ROOT)) for p in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md")))
def test_files_named_in_the_docs_exist(page: str) -> None:
    """`edge/link.py` and the like, written in backticks, are files of this project."""
    folders = "protocol|quant|splitter|edge|cloud|demos|tests|src"
    for named in re.findall(rf"`((?:{folders})/[\w./-]+\.py)`", (ROOT / page).read_text()):
        assert (ROOT / named).exists(), named

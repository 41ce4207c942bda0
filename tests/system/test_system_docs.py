"""Every command of the pages for beginners runs as it stands; links lead somewhere; files named exist."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.system.documents import ROOT, blocks_not_run, commands, reader

PAGES = (
    "README.md",
    "docs/getting-started.md",
    "docs/two-machines.md",
    "docs/routing.md",
    "docs/choosing-a-split.md",
)


@pytest.mark.model
@pytest.mark.parametrize("page", PAGES)
def test_documented_commands_run(page: str, tmp_path: Path) -> None:
    lines = commands(page)
    assert lines
    if any(line.startswith("openssl") for line in lines) and not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    with reader(tmp_path) as someone:
        for line in lines:
            said = someone.type(line)
            if "capital of France" in line:
                assert "Paris" in said, line


@pytest.mark.parametrize("page", PAGES)
def test_no_command_escapes_the_test(page: str) -> None:
    assert blocks_not_run(page) == []


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

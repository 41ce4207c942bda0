"""Packs as input, hostile templates, and builds that meet a full disk or each other."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from time import monotonic

import pytest

from isthmus.edge.chat import ChatTemplate
from isthmus.protocol.errors import IsthmusError, ModelFileError, RequestError
from isthmus.splitter.pack import Pack
from isthmus.splitter.tokenizer import Tokenizer
from tests.attacks.corpus_packs import (
    HASHED_FILES,
    PACK_ATTACKS,
    TEMPLATE_ATTACKS,
    PackAttack,
    TemplateAttack,
)
from tests.splitter.packs import tiny_pack, tiny_source
from tests.tiny import tiny_tokenizer_json


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pack(), tmp_path / "pack"))


@pytest.mark.parametrize("attack", PACK_ATTACKS, ids=str)
def test_a_bad_pack_is_refused(attack: PackAttack, copy: Path) -> None:
    attack.change(copy)
    with pytest.raises(ModelFileError) as caught:
        Pack.open(copy, verify=True)
    assert caught.value.code == attack.code


def test_no_file_of_a_pack_is_left_out() -> None:
    pack = tiny_pack()
    files = {str(path.relative_to(pack)) for path in pack.rglob("*") if path.is_file()}
    assert files == {*HASHED_FILES, "manifest.json", "build.json"}


def test_a_flipped_byte_anywhere_in_the_manifest_is_named_or_changes_no_weight(copy: Path) -> None:
    manifest = copy / "manifest.json"
    good = manifest.read_bytes()
    opened = 0
    for at in range(0, len(good), 37):
        manifest.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        try:
            pack = Pack.open(copy, verify=True)
        except IsthmusError:
            continue
        opened += 1  # a name, a version or a measured figure: nothing that is computed with
        assert pack.spec.tensor_shapes() == Pack.open(tiny_pack()).spec.tensor_shapes()
    assert opened < len(good) / 37 / 2


@pytest.mark.parametrize("attack", TEMPLATE_ATTACKS, ids=str)
def test_a_hostile_template_gets_nowhere(attack: TemplateAttack) -> None:
    tokenizer = Tokenizer(tiny_tokenizer_json(), bos_id=0, eos_ids=(2,))
    template = ChatTemplate(attack.source, tokenizer)
    since = monotonic()
    if attack.text is None:
        with pytest.raises(RequestError) as caught:
            template.render([{"role": "user", "content": "x"}])
        assert caught.value.code == "bad_messages"
    else:
        assert template.render([{"role": "user", "content": "x"}]) == attack.text
    assert monotonic() - since < 5


# ---- builds, as processes

DISK_BYTES = 100_000


def _build(out: Path) -> list[str]:
    model = str(tiny_source())
    return [sys.executable, "-m", "isthmus", "build", model, "--bits", "32", "--out", str(out), "--json"]


@pytest.mark.processes
def test_a_disk_that_is_full_while_building_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    """item: disk full while building. No file may grow beyond 100 kB, which a build meets in mid-file."""
    out = tmp_path / "packs" / "tiny"
    done = subprocess.run(
        _build(out),
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (DISK_BYTES, DISK_BYTES)),
    )
    assert done.returncode == 1, done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "io_error"
    assert str(out) in error["message"]
    assert [path.name for path in out.parent.iterdir() if not path.name.endswith(".lock")] == []


@pytest.mark.processes
def test_two_builds_at_once_make_one_whole_pack(tmp_path: Path) -> None:
    """item: two builds at once"""
    out = tmp_path / "packs" / "tiny"
    builds = [subprocess.Popen(_build(out), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [json.loads(build.communicate(timeout=120)[0]) for build in builds]
    assert [build.returncode for build in builds] == [0, 0]
    assert {answer["pack"] for answer in answers} == {str(out)}
    assert Pack.open(out, verify=True).bits == 32
    assert [path.name for path in out.parent.iterdir() if not path.name.endswith(".lock")] == ["tiny"]

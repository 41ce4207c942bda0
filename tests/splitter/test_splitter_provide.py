"""`ensure_pack`: builds once, notices changed sources and damaged packs, opens packs as they are."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from isthmus.protocol.errors import ConfigError, NotFoundError, UsageError
from isthmus.splitter.pack import Pack
from isthmus.splitter.provide import build_model, describe, ensure_pack
from isthmus.splitter.store import pack_path
from tests.splitter.packs import tiny_pack, tiny_source


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny checkpoint of its own, and a cache of its own."""
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    return str(shutil.copytree(tiny_source(), tmp_path / "tiny"))


def built_at(pack: Pack) -> int:
    return (pack.path / "manifest.json").stat().st_mtime_ns


def test_it_builds_once(model: str) -> None:
    told: list[str] = []
    first = ensure_pack(model, 8, progress=lambda what, _share: told.append(what))
    assert first.path == pack_path(model, 8)
    assert "writing weights as q8-affine" in told
    before, count = built_at(first), len(told)
    again = ensure_pack(model, 8, progress=lambda what, _share: told.append(what))
    assert built_at(again) == before
    assert len(told) == count


def test_other_bits_are_another_pack(model: str) -> None:
    assert ensure_pack(model, 8).path != ensure_pack(model, 32).path


def test_a_changed_source_is_built_anew(model: str) -> None:
    before = ensure_pack(model, 8)
    weights = Path(model) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # the sign of one weight
    weights.write_bytes(data)
    after = ensure_pack(model, 8)
    assert after.manifest.source_hash != before.manifest.source_hash


def test_a_touched_source_is_not_built_anew_but_checked(model: str) -> None:
    before = built_at(ensure_pack(model, 8))
    os.utime(Path(model) / "config.json", ns=(1, 1))
    told: list[str] = []
    assert built_at(ensure_pack(model, 8, progress=lambda what, _share: told.append(what))) == before
    assert "looking for an existing pack" in told
    told.clear()
    ensure_pack(model, 8, progress=lambda what, _share: told.append(what))
    assert told == []  # the new time of change was remembered


def test_a_truncated_pack_is_repaired(model: str) -> None:
    pack = ensure_pack(model, 8)
    pack.weights_path.write_bytes(b"short")
    Pack.open(ensure_pack(model, 8).path, verify=True)


def test_a_pack_is_opened_as_it_is() -> None:
    path = str(tiny_pack(8))
    assert ensure_pack(path).path == Path(path).resolve()
    assert ensure_pack(path, 8).bits == 8
    with pytest.raises(ConfigError, match="8 bits, 4 were asked for"):
        ensure_pack(path, 4)
    with pytest.raises(UsageError, match="is a pack already"):
        build_model(path)


def test_an_unknown_model_is_not_found() -> None:
    with pytest.raises(NotFoundError):
        ensure_pack("no-such-model")


def test_show_tells_what_is_there(model: str) -> None:
    bare = describe(model)
    assert bare["spec"]["num_layers"] == 4
    assert bare["packs"] == []
    build_model(model, 8)
    shown = json.loads(json.dumps(describe(model)))
    assert shown["kind"] == "dir"
    assert [pack["scheme"] for pack in shown["packs"]] == ["q8-affine"]
    assert shown["packs"][0]["kl_to_source"] <= 1e-2
    assert describe(str(tiny_pack(8)))["packs"][0]["bits"] == 8


def test_show_does_not_fetch(model: str) -> None:
    assert describe("smollm2-135m")["spec"] is None

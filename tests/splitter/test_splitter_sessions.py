"""Sessions as the runner opens them: one thread pool, the provider asked for, weights from the pack alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.protocol.errors import ConfigError, ModelFileError
from isthmus.splitter.pack import Pack
from isthmus.splitter.providers import PROVIDERS, available_providers, choose_provider, provider_used
from isthmus.splitter.runner import BlockRunner, configure_threads
from isthmus.splitter.sessions import _quota, default_threads, open_session
from tests.packs import tiny_pack


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return tiny_pack(tmp_path_factory.mktemp("sessions"))


def test_the_thread_pool_is_made_once() -> None:
    size = configure_threads()
    assert configure_threads(size) == size
    with pytest.raises(ConfigError, match=rf"{size + 1} .* {size}") as caught:
        configure_threads(size + 1)
    assert caught.value.code == "threads_fixed"
    with pytest.raises(ConfigError) as caught:
        configure_threads(0)
    assert caught.value.code == "bad_threads"
    assert default_threads() >= 1


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000\n", 16), ("400000 100000\n", 4), ("150000 100000\n", 1), ("50000 100000\n", 1), ("?", 16)],
)
def test_a_containers_quota_limits_the_threads(text: str, cores: int, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert _quota(16, tmp_path / "cpu.max") == cores
    assert _quota(16, tmp_path / "absent") == 16


def test_absent_providers_are_refused_by_name(pack: Pack) -> None:
    with pytest.raises(ConfigError, match="'gpu'") as caught:
        choose_provider("gpu")
    assert caught.value.code == "unknown_provider"
    assert all(name in caught.value.hint for name in PROVIDERS)
    absent = next(name for name in PROVIDERS if name not in available_providers())
    with pytest.raises(ConfigError, match=absent) as caught:
        BlockRunner(pack, provider=absent)
    assert caught.value.code == "provider_unavailable"
    assert "cpu" in caught.value.hint


def test_the_provider_really_used_is_told(pack: Pack) -> None:
    runner = BlockRunner(pack)
    assert runner.provider_used == "cpu"  # nothing open yet: what was asked for
    runner.load(range(1))
    assert runner.provider_used == "cpu"
    assert provider_used(["CUDAExecutionProvider", "CPUExecutionProvider"]) == "cuda"
    assert provider_used(["SomethingNew"]) == "SomethingNew"


# --- hostile graphs


@pytest.mark.parametrize("location", [b"../outside!", b"/etc/passwd", b"nothing.bin"])
def test_weights_outside_the_pack_are_refused(pack: Pack, location: bytes, tmp_path: Path) -> None:
    inside = tmp_path / "pack"
    inside.mkdir()
    for file in (inside / "weights.bin", tmp_path / "outside!"):
        file.write_bytes(pack.weights_path.read_bytes())
    graph = pack.graph_bytes("layer.0")
    open_session(graph, inside, choose_provider("cpu"), "block 'layer.0'")
    assert len(location) == len(b"weights.bin")  # the message's lengths stay right
    with pytest.raises(ModelFileError, match=r"layer\.0") as caught:
        open_session(
            graph.replace(b"weights.bin", location), inside, choose_provider("cpu"), "block 'layer.0'"
        )
    assert caught.value.code == "bad_graph"


def test_a_graph_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        open_session(b"\x08\x0a not a model", tmp_path, choose_provider("cpu"), "block 'head'")
    assert caught.value.code == "bad_graph"

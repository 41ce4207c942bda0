"""An edge without any model files: it pulls what a split needs from the cloud, and then works with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from isthmus.cloud.tls import server_context
from isthmus.commands.pull_from_cloud import pack_url, pull_pack
from isthmus.commands.serve_cloud import offered_pack
from isthmus.commands.setup import provide_pack
from isthmus.config import Settings
from isthmus.protocol.errors import ConfigError, IsthmusError
from isthmus.protocol.keys import KeyFile
from isthmus.splitter.store import list_models
from tests.certificates import make_authority
from tests.cloud.cloud_edges import RunningCloud, prepare_cloud, running_cloud
from tests.processes import serve
from tests.tiny import make_tiny

pytestmark = pytest.mark.processes


@dataclass(frozen=True)
class World:
    """A cloud with TLS and keys that offers the pack of its model; what an edge needs to talk to it."""

    cloud: RunningCloud
    ca: Path
    key_file: Path

    def flags(self, **more: object) -> dict[str, object]:
        """Settings of an edge."""
        own = {"cloud": [self.cloud.url], "tls_ca": str(self.ca), "api_key_file": str(self.key_file)}
        return {**own, "pull_from_cloud": "on", **more}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("pull")
    source = make_tiny("llama", root / "tiny", seed=9)
    authority = make_authority(root)
    issued = authority.issue("127.0.0.1")
    (root / "keys").write_text("laptop:secret\n")
    (root / "key").write_text("secret\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISTHMUS_CACHE", str(root / "cloud-cache"))
        offers = {
            when: Settings({"model": str(source), "offer_pack": when}) for when in ("auto", "on", "off")
        }
        assert offered_pack(offers["auto"]) is None  # nothing was built yet
        pack = offered_pack(offers["on"])
        assert pack is not None
        again = offered_pack(offers["auto"])
        assert again is not None
        assert again.path == pack.path
        assert offered_pack(offers["off"]) is None
        prepared = prepare_cloud(source, keys=KeyFile(root / "keys"), threads=1, kv_mb=64)
    context = server_context(issued.cert, issued.key)
    with running_cloud(prepared, pack=pack, ssl_context=context) as cloud:
        yield World(cloud, authority.ca, root / "key")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ISTHMUS_CONFIG", str(tmp_path / "config.toml"))
    return tmp_path / "cache"


def refused(settings: Settings, code: str) -> IsthmusError:
    with pytest.raises(IsthmusError) as caught:
        provide_pack(settings)
    assert caught.value.code == code, caught.value
    return caught.value


def test_an_edge_with_an_empty_cache_answers_by_split(world: World, cache: Path) -> None:
    arguments = ["--cloud", world.cloud.url, "--pull-from-cloud", "--route", "split", "--split", "2"]
    security = ["--tls-ca", str(world.ca), "--api-key-file", str(world.key_file)]
    with serve("edge", *arguments, *security, "--port", "0", env=dict(os.environ)) as edge:
        (pulled,) = list_models()
        assert pulled.path.is_relative_to(cache)

        def ask(**how: Any) -> httpx.Response:
            message = {"role": "user", "content": "hello"}
            body = {"messages": [message], "max_tokens": 5, "temperature": 0, **how}
            return httpx.post(f"{edge.url}/v1/chat/completions", json=body, timeout=60)

        answer = ask()
        assert answer.status_code == 200, answer.text
        assert (answer.json()["model"], answer.json()["isthmus"]["split"]) == ("tiny", 2)
        local = ask(isthmus={"route": "local"})
        assert local.status_code == 400
        assert local.json()["error"]["code"] == "route_infeasible"
        assert "needs layers 2..3, this device has 0..1" in local.json()["error"]["message"]
        assert ask(isthmus={"route": "offload"}).json()["usage"] == answer.json()["usage"]
    # A later start at a deeper cut takes the same folder further.
    deeper = provide_pack(Settings(world.flags(split=3, shape="u")))
    assert (deeper.path, deeper.layers_here, deeper.has("head")) == (pulled.path, 3, True)
    assert provide_pack(Settings(world.flags())).is_whole


def test_whom_it_does_not_pull_from(world: World, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("guess\n")
    refused(Settings(world.flags(api_key_file=str(tmp_path / "wrong"))), "unauthorized")
    stranger = make_authority(tmp_path, "stranger")
    refused(Settings(world.flags(tls_ca=str(stranger.ca))), "tls_untrusted")
    error = refused(Settings(world.flags(model="smollm2-135m")), "other_model")
    assert "'tiny'" in error.message
    with pytest.raises(ConfigError) as caught:
        pull_pack(Settings({}), None, None)
    assert caught.value.code == "no_cloud"
    assert list_models() == []


@pytest.mark.parametrize(
    ("cloud", "pack"),
    [
        ("ws://127.0.0.1:8078", "http://127.0.0.1:8078/v1/pack/"),
        ("wss://cloud.example/v1/session/", "https://cloud.example/v1/pack/"),
        ("wss://[::1]:8078/gpu1/v1/session", "https://[::1]:8078/gpu1/v1/pack/"),
    ],
)
def test_the_pack_lies_beside_the_sessions(cloud: str, pack: str) -> None:
    assert pack_url(cloud, "key") == pack


def test_a_key_does_not_travel_in_the_clear() -> None:
    with pytest.raises(ConfigError) as caught:
        pack_url("ws://cloud.example", "key")
    assert caught.value.code == "key_in_clear"

"""Settings resolve flag > environment > file > default, say where from, and refuse what they don't know."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.commands.generate import asked_way
from isthmus.commands.setup import agent_options
from isthmus.config import BY_NAME, Settings, config_path, read_file, write_setting
from isthmus.protocol.errors import ConfigError
from tests.certificates import make_authority


def settings(tmp_path: Path, text: str = "", flags: dict[str, object] | None = None, **env: str) -> Settings:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return Settings(flags, {"ISTHMUS_CONFIG": str(path), **env})


def test_each_origin_wins_over_the_next(tmp_path: Path) -> None:
    text = "parallel = 3"
    flagged = settings(tmp_path, text, {"parallel": 5}, ISTHMUS_PARALLEL="4").resolve("parallel")
    from_env = settings(tmp_path, text, ISTHMUS_PARALLEL="4").resolve("parallel")
    from_file = settings(tmp_path, text).resolve("parallel")
    default = settings(tmp_path).resolve("parallel")
    assert [r.value for r in (flagged, from_env, from_file, default)] == [5, 4, 3, 1]
    assert [r.origin for r in (flagged, from_env, default)] == ["flag", "ISTHMUS_PARALLEL", "default"]
    assert from_file.origin.endswith("config.toml")


def test_several_clouds_come_from_each_origin(tmp_path: Path) -> None:
    assert settings(tmp_path, 'cloud = ["ws://a:1", "ws://b:2"]').texts("cloud") == ["ws://a:1", "ws://b:2"]
    assert settings(tmp_path, ISTHMUS_CLOUD="ws://a:1, ws://b:2").texts("cloud") == ["ws://a:1", "ws://b:2"]
    assert settings(tmp_path, flags={"cloud": ["ws://c:3"]}).texts("cloud") == ["ws://c:3"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("paralel = 3", "paralel"),
        ("parallel = 'x'", "parallel"),
        ("parallel = true", "parallel"),
        ("route = 'fast'", "route"),
        ("cloud = [1]", "cloud"),
        ("parallel = 0", "at least 1"),
        ("reconnect_s = -0.5", "at least 0"),
        ("reconnect_s = nan", "reconnect_s"),
        ("detached_s = inf", "detached_s"),
        ("fallback = 'local'", "any, cloud, none"),
        ("parallel = ", "config.toml"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        settings(tmp_path, text)


def test_the_path_follows_xdg(tmp_path: Path) -> None:
    assert config_path({"XDG_CONFIG_HOME": "/x"}) == Path("/x/isthmus/config.toml")
    assert config_path({"HOME": "/home/u"}) == Path("/home/u/.config/isthmus/config.toml")
    assert config_path({"ISTHMUS_CONFIG": "/c.toml", "HOME": "/h"}) == Path("/c.toml")


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    shown = settings(tmp_path, ISTHMUS_API_KEY="hunter2").show()
    assert shown["api_key"] == {"value": "(set)", "origin": "ISTHMUS_API_KEY"}
    assert set(shown) == set(BY_NAME)


@given(st.text(max_size=40))
def test_what_is_set_is_read_back(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("config") / "config.toml"
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    write_setting(path, "parallel", "7")
    write_setting(path, "model", text)
    assert read_file(path) == {"parallel": 7, "model": text}


def test_what_happens_to_a_request_whose_cloud_is_lost_is_a_setting(tmp_path: Path) -> None:
    text = 'fallback = "cloud"\nreconnect_s = 2.5'
    of_file = settings(tmp_path, text, ISTHMUS_HISTORY_MB="7")
    options = agent_options(of_file)
    assert (options["recovery"].budget_s, options["history_mb"]) == (2.5, 7)
    assert asked_way(of_file).fallback == "cloud"
    flagged = settings(tmp_path, text, {"fallback": "none", "reconnect_s": 0.0, "history_mb": 0})
    options = agent_options(flagged)
    assert (options["recovery"].budget_s, options["history_mb"]) == (0.0, 0)
    assert asked_way(flagged).fallback == "none"


def test_certificates_for_clouds_are_settings(tmp_path: Path) -> None:
    own = make_authority(tmp_path)
    assert agent_options(settings(tmp_path))["ssl_context"] is None
    trusted = agent_options(settings(tmp_path, ISTHMUS_TLS_CA=str(own.ca)))["ssl_context"].get_ca_certs()
    assert len(trusted) == 1
    with pytest.raises(ConfigError, match="go together"):
        agent_options(settings(tmp_path, flags={"tls_client_cert": str(own.ca)}))

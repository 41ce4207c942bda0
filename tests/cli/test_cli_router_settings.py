"""What the router weighs and predicts from, as settings: defaults, origins, refusals, profiles."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from isthmus.commands.generate import asked_way, make_request
from isthmus.commands.options import ROUTER, WAY, Flags, with_flags
from isthmus.commands.setup import edge_profile, routing_options
from isthmus.config import BY_NAME, Settings
from isthmus.edge.policy import DeviceState, Policy
from isthmus.edge.radio import radio
from isthmus.edge.requests import Slo
from isthmus.protocol.errors import ConfigError, IsthmusError
from isthmus.protocol.profiles import Prices
from isthmus.splitter.pack import Pack
from isthmus.splitter.profile_store import example
from isthmus.splitter.situation import Radio
from tests.packs import tiny_pack

CLOUD = 'cloud = ["ws://127.0.0.1:1"]\n'
LAPTOP = "laptop-8-core-smollm2-135m"


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return tiny_pack(tmp_path_factory.mktemp("tiny"), max_position_embeddings=512)


def settings(tmp_path: Path, text: str = "", flags: dict[str, object] | None = None, **env: str) -> Settings:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return Settings(flags, {"ISTHMUS_CONFIG": str(path), **env})


# ---- weights, prices, radio --------------------------------------------------------------------------


def test_nothing_set_is_the_routers_own_defaults(tmp_path: Path, pack: Pack) -> None:
    options = routing_options(pack, settings(tmp_path))
    for name in ("usd_per_s", "usd_per_j", "slo_miss_usd", "usd_per_nat", "hysteresis"):
        assert getattr(options.policy, name) == pytest.approx(getattr(Policy(), name))
    assert (options.profile, options.prices, options.radio) == (None, None, Radio())
    assert (options.budget_usd, options.decision_log) == (None, None)
    assert isinstance(options.device_state(), DeviceState)


def test_what_is_set_reaches_the_router(tmp_path: Path, pack: Pack) -> None:
    text = """
    value_of_time_usd_per_h = 36
    usd_per_kj_low_battery = 2
    slo_miss_usd = 0
    quality_usd_per_nat = 0.5
    hysteresis = 0.2
    price_output_per_mtok = 0.6
    prices_dated = "2026-01-31"
    radio = "lte"
    data_usd_per_gb = 4
    """
    flags: dict[str, object] = {"budget_usd": 1.5, "decision_log": str(tmp_path / "log.jsonl")}
    options = routing_options(pack, settings(tmp_path, text, flags))
    assert options.policy == Policy(0.01, 0.002, 0.0, 0.5, 0.2)
    assert options.prices == Prices(output_usd_per_mtok=0.6, dated="2026-01-31")
    assert options.radio == radio("lte", usd_per_gb=4.0)
    assert options.radio.usd_per_byte == 4e-9
    assert options.budget_usd == 1.5
    assert options.decision_log is not None
    assert options.decision_log.path == tmp_path / "log.jsonl"


def test_settings_of_the_router_have_origins(tmp_path: Path) -> None:
    shown = settings(tmp_path, "hysteresis = 0.1", {"budget_usd": 2.0}, ISTHMUS_SLO_TTFT_S="0.5").show()
    assert shown["budget_usd"] == {"value": 2.0, "origin": "flag"}
    assert shown["slo_ttft_s"] == {"value": 0.5, "origin": "ISTHMUS_SLO_TTFT_S"}
    assert shown["hysteresis"] == {"value": 0.1, "origin": str(tmp_path / "config.toml")}
    assert shown["profile"] == {"value": "auto", "origin": "default"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("slo_ttft_s = 0", "at least 0.001"),
        ("slo_tokens_per_s = -1", "at least 0.001"),
        ("max_cost_usd = -0.01", "at least 0"),
        ("budget_usd = nan", "budget_usd"),
        ("value_of_time_usd_per_h = inf", "value_of_time_usd_per_h"),
        ("hysteresis = -1", "at least 0"),
        ("radio = 'smoke'", "none, wifi, lte"),
        ("idle_watts = -1", "at least 0"),
    ],
)
def test_a_bad_weight_is_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        settings(tmp_path, text)


def test_radios_differ_and_a_cable_is_free() -> None:
    assert radio("none") == Radio()
    up = [radio(kind).up_j for kind in ("none", "wifi", "lte")]
    assert up == sorted(up)
    assert radio("lte").up_j == pytest.approx(3.5e-6, rel=0.01)  # joules a byte: 438 mW per Mbit/s
    assert radio("lte").awake_w > radio("wifi").awake_w > 0
    assert all(radio(kind).down_j < radio(kind).up_j for kind in ("wifi", "lte"))


# ---- wishes of a request -----------------------------------------------------------------------------


def test_flags_go_before_what_is_set(tmp_path: Path, pack: Pack) -> None:
    text = "slo_ttft_s = 2\nslo_tokens_per_s = 10\nmax_cost_usd = 1"
    flagged = settings(tmp_path, text, {"slo_ttft_s": 0.5, "max_cost_usd": 0.0})
    assert asked_way(flagged).expected() == Slo(0.5, 10.0)
    request = make_request(pack, flagged, [1, 2, 3], seed=1)
    assert (request.slo, request.max_cost_usd) == (Slo(0.5, 10.0), 0.0)
    request = make_request(pack, settings(tmp_path), [1, 2, 3], seed=1)
    assert (request.slo, request.max_cost_usd) == (Slo(), None)


def test_shared_flags_become_settings_of_their_names(tmp_path: Path) -> None:
    got: list[tuple[Flags, str]] = []
    app = typer.Typer()

    @app.command()
    @with_flags(WAY, ROUTER)
    def ask(flags: Flags, word: Annotated[str, typer.Argument()], own: bool = False) -> None:
        """Asks."""
        got.append((flags, f"{word} {own}"))

    def called(*arguments: str) -> Any:
        return CliRunner().invoke(app, arguments)

    assert called("hello", "--split", "3", "--slo-ttft", "0.5", "--own").exit_code == 0
    flags, own = got.pop()
    assert {name: value for name, value in flags.items() if value is not None} == {
        "split": 3, "slo_ttft_s": 0.5
    }  # fmt: skip
    assert set(flags) == {*WAY, *ROUTER} <= set(BY_NAME)
    assert own == "hello True"
    assert called("hello", "--split", "soon").exit_code == 2
    assert called("hello", "--slo-ttft-s", "0.5").exit_code == 0
    assert "Asks." in called("--help").output
    with pytest.raises(ConfigError, match="--slo-ttft-s"):
        settings(tmp_path, flags={"slo_ttft_s": float("nan")})


def test_the_program_starts_without_what_only_some_commands_need() -> None:
    script = "import sys, isthmus.cli; print(sorted({'pydantic', 'numpy', 'starlette'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- what this device can do -------------------------------------------------------------------------


def of_layers(layers: int) -> str:
    """A profile file's text, for a model of so many layers."""
    update = {"num_layers": layers, "layer_share": (1.0,) * layers, "idle_w": None, "active_w": None}
    profile = example(LAPTOP)
    labels = {**profile.labels, "power": "unavailable"}
    return profile.model_copy(update={**update, "labels": labels}).to_json()


def test_without_a_cloud_or_a_wish_nothing_is_predicted(tmp_path: Path, pack: Pack) -> None:
    assert edge_profile(pack, settings(tmp_path, f"profile = '{LAPTOP}'")) is None
    assert edge_profile(pack, settings(tmp_path, CLOUD + "profile = 'none'")) is None


def test_a_file_is_taken_with_the_watts_declared(tmp_path: Path, pack: Pack) -> None:
    file = tmp_path / "profile.json"
    file.write_text(of_layers(pack.spec.num_layers))
    asked = f"{CLOUD}profile = '{file}'\n"
    profile = edge_profile(pack, settings(tmp_path, asked))
    assert profile is not None
    assert (profile.idle_w, profile.active_w) == (None, None)
    profile = edge_profile(pack, settings(tmp_path, asked + "idle_watts = 3\nactive_watts = 15"))
    assert profile is not None
    assert (profile.idle_w, profile.active_w, profile.labels["power"]) == (3.0, 15.0, "modelled")


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (None, "no_profile", "cannot read the profile"),
        ("{", "bad_profile", "is no device profile"),
        (of_layers(7), "bad_profile", "7 layers on the edge side, the model here has 4"),
        (example("h100-sxm-smollm2-135m").to_json(), "bad_profile", "30 layers on the cloud side"),
    ],
    ids=["missing", "torn", "other model", "other side"],
)
def test_a_profile_that_is_none_of_this_model_here(
    tmp_path: Path, pack: Pack, content: str | None, code: str, said: str
) -> None:
    file = tmp_path / "profile.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(IsthmusError, match=said) as caught:
        edge_profile(pack, settings(tmp_path, f"{CLOUD}profile = '{file}'"))
    assert caught.value.code == code


def test_an_example_is_known_by_its_name(tmp_path: Path, pack: Pack) -> None:
    with pytest.raises(ConfigError, match=rf"{LAPTOP} is of 30 layers .* has 4 on the edge"):
        edge_profile(pack, settings(tmp_path, f"{CLOUD}profile = '{LAPTOP}'"))


def test_half_a_declaration_of_watts(tmp_path: Path, pack: Pack) -> None:
    with pytest.raises(ConfigError, match="go together"):
        edge_profile(pack, settings(tmp_path, CLOUD + "idle_watts = 3"))


def test_auto_measures_once_and_says_so(
    tmp_path: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    first = edge_profile(pack, settings(tmp_path, CLOUD))
    assert capfd.readouterr().err
    assert first is not None
    assert first.num_layers == pack.spec.num_layers
    assert edge_profile(pack, settings(tmp_path, CLOUD)) == first
    assert capfd.readouterr() == ("", "")

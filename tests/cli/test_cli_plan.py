"""`isthmus plan`: from files, from this machine, with a cloud that answers; the picture; what is refused."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from isthmus.cli import app
from isthmus.protocol.errors import IsthmusError
from isthmus.protocol.profiles import Prices
from isthmus.splitter.profile_store import save_profile
from tests.edge.edge_world import make_model
from tests.edge.real_cloud import real_cloud
from tests.splitter.worlds import cloud_profile, edge_profile

EXAMPLES = (
    "--edge-profile", "jetson-orin-nano-smollm2-135m", "--cloud-profile", "h100-sxm-smollm2-135m",
    "--rtt-ms", "20", "--up-mbps", "10", "--down-mbps", "50",
)  # fmt: skip
FIELDS = {
    "route", "split", "feasible", "violated", "ttft_s", "tokens_per_s", "total_s", "energy_j", "cost_usd",
    "bytes_up", "bytes_down",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_settings(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def json_of(*arguments: str) -> dict[str, Any]:
    done = plan(*arguments, "--json")
    assert done.exit_code == 0, done.exception
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # before it a cloud here may log
    return answer


def error_of(*arguments: str) -> IsthmusError:
    error = plan(*arguments).exception
    assert isinstance(error, IsthmusError)
    assert error.hint
    return error


# ---- from files --------------------------------------------------------------------------------------


def test_examples_need_no_model_and_give_every_candidate() -> None:
    assert plan(*EXAMPLES, "--json").stdout.count("\n") == 1
    answer = json_of(*EXAMPLES)
    assert [way["split"] for way in answer["candidates"]] == [30, 0, *range(1, 30)]
    assert all(way.keys() >= FIELDS for way in answer["candidates"])
    best = answer["best"]
    assert best == min(answer["candidates"], key=lambda way: way["total_s"])
    assert sum(best["terms"].values()) == pytest.approx(best["total_s"])
    assert answer["link"]["rtt_s"]["value"] == 0.02
    assert answer["link"]["up_bytes_per_s"]["value"] == 1.25e6
    assert answer["edge"]["labels"]["decode"] == "modelled"


def test_a_bandwidth_without_limit_is_null_and_json_stays_json() -> None:
    answer = json_of(*EXAMPLES[:6])
    assert answer["link"]["up_bytes_per_s"] is None
    assert answer["link"]["rtt_s"]["source"] == "given"


def test_memory_refuses_local_naming_both_numbers() -> None:
    answer = json_of(*EXAMPLES, "--edge-memory-mb", "130", "--min-depth", "1")
    local = answer["candidates"][0]
    assert (local["feasible"], local["violated"]) == (False, "memory")
    assert local["detail"].endswith("the limit is 130.0 MB")
    assert local["memory_bytes"] > 130 * 2**20 >= answer["best"]["memory_bytes"] > 0
    assert answer["best"]["route"] == "split"
    longer = json_of(*EXAMPLES, "--edge-memory-mb", "130", "--min-depth", "1", "--context", "2000")
    assert sum(way["feasible"] for way in longer["candidates"]) < sum(
        way["feasible"] for way in answer["candidates"]
    )


def test_objectives_prices_and_power_from_flags() -> None:
    paid = json_of(*EXAMPLES, "--objective", "money", "--price-output-per-mtok", "100")
    assert paid["best"]["route"] == "local"
    assert paid["candidates"][1]["cost_usd"] == pytest.approx(128 * 100 / 1e6)
    assert paid["prices"]["output_usd_per_mtok"] == 100
    watts = ("--idle-watts", "1", "--active-watts", "40")
    usual, hungry = (json_of(*EXAMPLES, *flags)["candidates"][0]["energy_j"] for flags in ((), watts))
    assert hungry == pytest.approx(usual * 40 / 15)
    radio = json_of(*EXAMPLES, "--radio", "lte")["candidates"][2]
    assert radio["energy_j"] > json_of(*EXAMPLES)["candidates"][2]["energy_j"]


def test_slo_and_shape() -> None:
    answer = json_of(*EXAMPLES, "--slo-ttft-ms", "50", "--slo-tokens-per-s", "40", "--shape", "u")
    broken = {way["split"]: way["violated"] for way in answer["candidates"]}
    assert broken[0] is None
    assert broken[1] == "slo_ttft"
    assert answer["candidates"][2]["shape"] == "u"


def test_a_profile_that_tells_no_kv_takes_the_models(tmp_path: Path, model: str) -> None:
    edge, cloud = tmp_path / "edge.json", tmp_path / "cloud.json"
    save_profile(edge, edge_profile(hidden=64))
    save_profile(cloud, cloud_profile(hidden=64))
    files = ("--edge-profile", str(edge), "--cloud-profile", str(cloud), "--rtt-ms", "5")
    answer = json_of(*files, "--model", model, "--bits", "8")
    assert answer["candidates"][0]["memory_bytes"] == 47 * 2**20 + 4 * 256 * (2 * 2 * 16 * 4)
    save_profile(edge, edge_profile())
    assert error_of(*files, "--model", model, "--bits", "8").code == "profile_mismatch"


def test_a_person_reads_a_table() -> None:
    said = plan(*EXAMPLES, "--edge-memory-mb", "130", "--min-depth", "4")
    assert said.exit_code == 0
    lines = said.stdout.splitlines()
    assert any("▶ 4" in line and "split" in line for line in lines)
    assert any("1 … 3" in line and "depth" in line for line in lines)
    assert any("… 29" in line and "memory" in line for line in lines)
    assert "the limit is 130.0 MB" in said.stdout
    assert "20 ms" in said.stdout


# ---- this machine, and a cloud -----------------------------------------------------------------------


def test_without_a_cloud_only_local_remains(model: str) -> None:
    answer = json_of("--model", model, "--bits", "8", "--prompt-tokens", "16", "--output-tokens", "4")
    assert answer["best"]["route"] == "local"
    assert {way["violated"] for way in answer["candidates"][1:]} == {"cloud"}
    assert answer["edge"]["labels"]["decode"] == "measured"
    assert answer["cloud"] is None
    error = error_of("--model", model, "--bits", "8", "--prompt-tokens", "5000")
    assert (error.code, "4096" in error.message) == ("context_overflow", True)


def test_a_live_cloud_tells_its_profile_and_the_link_is_measured(tmp_path: Path) -> None:
    tiny = make_model(tmp_path)
    asked = ("--model", str(tiny.pack.path), "--prompt-tokens", "16", "--output-tokens", "4")
    told = cloud_profile(hidden=64)
    with real_cloud(tiny, profile=told, prices=Prices(output_usd_per_mtok=7)) as cloud:
        answer = json_of("--cloud", cloud.url, *asked)
        assert answer["cloud"]["device"] == "fast"
        assert answer["prices"]["output_usd_per_mtok"] == 7
        assert answer["link"]["rtt_s"]["source"] != "given"
        assert 0 < answer["link"]["rtt_s"]["value"] < 0.5
        assert answer["link"]["up_bytes_per_s"]["value"] > 0
        own = json_of("--cloud", cloud.url, *asked, "--price-output-per-mtok", "3")
        assert own["prices"]["output_usd_per_mtok"] == 3
        far = json_of("--cloud", cloud.url, *asked, "--context", "500", "--prompt-tokens", "12")
        assert far["candidates"][1]["violated"] is None
    with real_cloud(tiny) as silent:
        assert error_of("--cloud", silent.url, *asked).code == "no_cloud_profile"
    assert error_of("--cloud", silent.url, *asked).code == "cloud_unreachable"


# ---- the picture -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_picture_is_drawn_and_the_same_twice(tmp_path: Path, kind: str) -> None:
    files = [tmp_path / f"{name}.{kind}" for name in ("one", "two")]
    for file in files:
        json_of(*EXAMPLES, "--edge-memory-mb", "130", "--min-depth", "4", "--plot", str(file))
    one, two = (file.read_bytes() for file in files)
    assert one == two
    if kind == "png":
        assert one.startswith(b"\x89PNG")
        return
    words = one.decode()
    for text in (
        "Best for latency: split at K = 4", "RTT 20 ms, 10 Mbit/s up, 50 Mbit/s down", "limit 130 MB",
        "answer, link", "ruled out", "memory limit", "minimum depth", "offload", "local",
    ):  # fmt: skip
        assert text in words


@pytest.mark.parametrize(
    ("objective", "unit"),
    [("throughput", "ms per token,"), ("energy", "J on"), ("money", "$ per"), ("weighted", "weighted $,")],
)
def test_the_picture_shows_the_objective(tmp_path: Path, objective: str, unit: str) -> None:
    file = tmp_path / "plan.svg"
    json_of(*EXAMPLES, "--objective", objective, "--plot", str(file))
    words = file.read_text()
    assert f"Best for {'the weighted sum' if objective == 'weighted' else objective}" in words
    assert unit in words


def test_the_picture_of_a_lonely_edge(tmp_path: Path) -> None:
    file = tmp_path / "plan.svg"
    json_of("--edge-profile", "jetson-orin-nano-llama-3.2-1b", "--plot", str(file))
    assert "no cloud" in file.read_text()


def test_without_matplotlib_the_way_to_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    error = error_of(*EXAMPLES, "--plot", str(tmp_path / "plan.png"))
    assert (error.code, error.hint) == ("no_matplotlib", "pip install 'isthmus[plot]'")
    assert json_of(*EXAMPLES)["best"]


# ---- refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((*EXAMPLES, "--cloud", "ws://127.0.0.1:1"), "bad_setting", "--cloud-profile"),
        (("--cloud", "ws://127.0.0.1:1", "--rtt-ms", "5"), "bad_setting", "--rtt-ms"),
        (EXAMPLES[:4], "bad_setting", "--rtt-ms"),
        ((*EXAMPLES, "--objective", "beauty"), "bad_setting", "beauty"),
        ((*EXAMPLES, "--slo-ttft-ms", "0"), "bad_slo", "--slo-ttft-ms 0"),
        ((*EXAMPLES, "--slo-tokens-per-s", "nan"), "bad_slo", "nan"),
        ((*EXAMPLES, "--up-mbps", "inf"), "bad_setting", "--up-mbps inf"),
        ((*EXAMPLES, "--plot", "plan.gif"), "bad_plot", "plan.gif"),
        ((*EXAMPLES, "--plot", "/nowhere/plan.png"), "bad_plot", "/nowhere"),
        ((*EXAMPLES, "--edge-memory-mb", "20", "--min-depth", "1"), "no_feasible_plan", "20.0 MB"),
        ((*EXAMPLES[2:], "--edge-profile", "no-such"), "no_profile", "no-such"),
        ((*EXAMPLES[2:], "--edge-profile", "h100-sxm-smollm2-135m"), "profile_mismatch", "cloud side"),
        (
            (*EXAMPLES[2:], "--edge-profile", "jetson-orin-nano-llama-3.2-1b"),
            "profile_mismatch",
            "16 layers",
        ),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else str(value),
)
def test_what_can_not_be_planned(arguments: tuple[str, ...], code: str, said: str) -> None:
    error = error_of(*arguments)
    assert error.code == code
    assert said in error.message
    assert error.exit_code == (1 if code in ("no_feasible_plan", "no_profile") else 2)

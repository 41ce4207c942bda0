"""`bench plan` and the throttle on a tiny model: what is measured is what it says; no matter how fast."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from isthmus.bench import throttle
from isthmus.bench.plan import Setting
from isthmus.bench.throttle import ThrottledAgent, ThrottledRunner, throttled
from isthmus.cli import app
from isthmus.protocol.errors import ConfigError
from isthmus.splitter.pack import Pack
from isthmus.splitter.profile_memory import model_memory
from isthmus.splitter.provide import ensure_pack
from isthmus.splitter.runner import BlockRunner
from tests.packs import tiny_pack
from tests.splitter.worlds import edge_profile
from tests.tiny import make_tiny

SMALL = ("--rounds", "1", "--quick", "--prompt-tokens", "8", "--output-tokens", "3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("llama", tmp_path_factory.mktemp("plan") / "tiny", max_position_embeddings=4096))


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return tiny_pack(tmp_path_factory.mktemp("throttle") / "tiny", num_hidden_layers=1)


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path_factory.getbasetemp() / "plan-cache"))


def bench(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["bench", "plan", *arguments, "--json"], catch_exceptions=False)
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["bench"] == "plan"
    return result


# ---- the throttle ------------------------------------------------------------------------------------


class Clock:
    """Time that passes by `ticks`, one a call, and by sleeping, which takes a little longer than asked."""

    def __init__(self, *ticks: float) -> None:
        self.now = 0.0
        self.ticks = iter(ticks)
        self.slept: list[float] = []

    def perf_counter(self) -> float:
        self.now += next(self.ticks, 0.0)
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds + 0.001


def test_blocks_take_factor_times_as_long(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = BlockRunner(pack)
    runner = ThrottledRunner(pack, factor=4.0)
    for one in (plain, runner):
        one.load(range(1), embed=True, head=True)
    clock = Clock(0.0, 0.01, 0.0, 0.0, 0.02, 0.0, 0.0, 0.01, 0.0)
    monkeypatch.setattr(throttle, "time", clock)
    cache = runner.new_cache(range(1))
    logits = runner.head(runner.forward(cache, runner.embed([5, 6])))
    # Thrice what each took, less what the sleep before it was too long.
    assert clock.slept == pytest.approx([0.03, 0.06 - 0.001, 0.03 - 0.001])
    usual = plain.new_cache(range(1))
    assert (logits == plain.head(plain.forward(usual, plain.embed([5, 6])))).all()
    runner.factor = 1.0
    runner.embed([5])
    assert len(clock.slept) == 3


def test_what_is_too_short_to_sleep_is_owed(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ThrottledRunner(pack, factor=2.0)
    runner.load(range(0), embed=True)
    clock = Clock(0.0, 0.00015, 0.0, 0.00015)
    monkeypatch.setattr(throttle, "time", clock)
    runner.embed([5])
    assert clock.slept == []
    runner.embed([5])
    assert clock.slept == pytest.approx([0.0003])


async def test_an_agent_is_throttled_while_it_runs(pack: Pack) -> None:
    agent = ThrottledAgent(pack, factor=3.0)
    await agent.start()
    try:
        runner = agent._runner
        assert isinstance(runner, ThrottledRunner)
        assert runner.factor == agent.factor == 3.0
        agent.factor = 5.0
        assert runner.factor == 5.0
    finally:
        await agent.aclose()


@pytest.mark.parametrize("factor", [0.5, float("nan"), float("inf")])
def test_nothing_is_made_faster(factor: float, pack: Pack) -> None:
    with pytest.raises(ConfigError, match="throttle"):
        throttled(edge_profile(), factor)
    with pytest.raises(ConfigError, match="throttle"):
        ThrottledAgent(pack, factor=factor)


def test_a_throttled_profile_stretches_blocks_only() -> None:
    before, after = edge_profile(prefill_context_s=1e-6), throttled(edge_profile(prefill_context_s=1e-6), 3)
    for name in ("prefill", "decode"):
        for (x, slow), (same, s) in zip(getattr(after, name), getattr(before, name), strict=True):
            assert (x, slow) == (same, pytest.approx(3 * s))
    for name in ("step_s", "embed_row_s", "head_s", "prefill_context_s"):
        assert getattr(after, name) == pytest.approx(3 * getattr(before, name))
    for name in ("codec_row_s", "load_s", "layer_bytes", "active_w", "layer_share"):
        assert getattr(after, name) == getattr(before, name)
    assert "emulated" in after.note


# ---- the bench ---------------------------------------------------------------------------------------


@pytest.mark.processes
def test_every_k_is_run_and_the_planned_one_stands_among_them(folder: str, cache: None) -> None:
    result = bench("--model", folder, "--setting", "2:0:0:2", "--splits", "0,2,4", *SMALL)
    figures = result["figures"]
    name = "rtt_2_up_0_down_0_edge_2"
    ratios = ("planned_over_best", "planned_split_over_best_split")
    own = {f"{what}_{name}" for what in (*ratios, "planned_k", "best_k")}
    assert figures.keys() == {"worst_planned_over_best", *own}
    assert figures[f"planned_over_best_{name}"] >= 1
    assert figures[f"planned_split_over_best_split_{name}"] == 1  # only one is measured
    link, *rows = result["rows"]
    assert link["rtt_ms"] > 1.5
    assert {row["k"]: row["what"] for row in rows} == {0: "offload", 2: "split", 4: "local"}
    assert [row["k"] for row in rows if row["planned"]] == [figures[f"planned_k_{name}"]]
    by_k = {row["k"]: row for row in rows}
    assert by_k[2]["median"] > 3 * 0.002  # a round trip for each of its tokens
    assert by_k[2]["predicted_s"] > 3 * 0.0015
    for row in rows:
        assert row["predicted_over_measured"] == pytest.approx(row["predicted_s"] / row["median"], rel=0.01)
    planned, best = (by_k[figures[f"{what}_{name}"]]["final_median"] for what in ("planned_k", "best_k"))
    assert figures[f"planned_over_best_{name}"] == pytest.approx(planned / best, rel=0.01)


@pytest.mark.processes
def test_what_fits_by_plan_fits(folder: str, cache: None) -> None:
    size = model_memory(ensure_pack(folder))
    limit = (size.embed_bytes + 2.5 * size.layer_bytes + size.scratch_bytes) / 2**20
    result = bench("--model", folder, "--edge-memory-mb", f"{limit:.3f}", "--min-depth", "1", *SMALL[2:])
    figures = result["figures"]
    assert figures["local_fits"] == 0
    assert any(f"the limit is {limit:.1f} MB" in note for note in result["notes"])
    assert 1 <= figures["planned_split"] <= figures["deepest_split"] == 2
    assert figures["deepest_predicted_mb"] <= limit
    for row in result["rows"]:
        assert row["idle_mb"] > 10
        assert row["above_idle_mb"] > 0
        assert row["after_above_idle_mb"] <= row["above_idle_mb"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--setting", "5:20:50"], "RTT:UP:DOWN:THROTTLE"),
        (["--setting", "5:20:50:0.5"], "5:20:50:0.5"),
        (["--setting", "nan:20:50:2"], "nan"),
        (["--splits", "5"], "K = 0 … 4"),
        (["--splits", "1.5"], "--splits 1.5"),
        (["--min-depth", "2"], "--min-depth"),
        (["--edge-memory-mb", "100", "--rounds", "2"], "--rounds"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_not_be_measured_is_refused(
    folder: str, cache: None, options: list[str], message: str
) -> None:
    done = CliRunner().invoke(app, ["bench", "plan", "--model", folder, *options])
    assert isinstance(done.exception, ConfigError)
    assert message in done.exception.message


def test_a_setting_has_a_name_for_its_figures() -> None:
    assert Setting.parse("5:20:0:1.5").name == "rtt_5_up_20_down_0_edge_1.5"

"""A decision for people: every way has its line, figures and reasons are there, at any width."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from isthmus.commands.explain import explanation, figure
from isthmus.edge.digest import best_of_routes, folded
from isthmus.edge.policy import DeviceState
from isthmus.edge.requests import Decision, Privacy, Slo
from isthmus.edge.router import MIB, RouterInputs, decide
from isthmus.protocol.profiles import DeviceProfile, Prices
from isthmus.splitter.links import Estimate, LinkView
from isthmus.splitter.profile_store import example
from isthmus.splitter.situation import CloudState, Factors, Wire, Work, World

EDGE: DeviceProfile = example("jetson-orin-nano-smollm2-135m")
CLOUD: DeviceProfile = example("h100-sxm-smollm2-135m")
LINK = LinkView(Estimate(0.02, 0.003, 4.2, 17, "passive"), Estimate(2e6, 1e5, 9.0, 3, "probe"), None)
WORLD = World(
    EDGE,
    CLOUD,
    LINK,
    Wire.of(EDGE.hidden, "int8o"),
    1024,
    cloud_state=CloudState(sessions=2.0, queue_s=0.1, age_s=3.0),
    prices=Prices(output_usd_per_mtok=0.4),
    factors=Factors(local_decode=1.2),
)
INPUTS = RouterInputs(
    num_layers=30,
    layer_bytes=(3 * MIB,) * 30,
    embed_bytes=28 * MIB,
    head_bytes=0,
    kv_bytes=1024,
    tokens=556,
    memory_bytes=110 * MIB,
    cloud_state="up",
    world=WORLD,
    work=Work(300, 120.0, 256),
    slo=Slo(ttft_s=0.3),
    device=DeviceState(0.4, plugged=False),
)


def printed(decision: Decision, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(explanation(decision))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def line_of(text: str, name: str) -> list[str]:
    """The cells of the first line that begins with this way."""
    line = next(line for line in text.splitlines() if re.match(rf"[▸ ] {re.escape(name)} ", line))
    return line.removeprefix("▸").split(name, 1)[1].split()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("memory_mb", [None, 110])
def test_every_figure_is_there_and_whole(width: int, memory_mb: int | None) -> None:
    decision = decide(replace(INPUTS, memory_bytes=memory_mb and memory_mb * MIB))
    text = printed(decision, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in re.sub(r"\d…\d", "", text)  # a cell that was cut ends so
    for one in best_of_routes(decision):
        name = f"split {one.split}" if one.route == "split" else one.route
        *cells, verdict = line_of(text, name)
        figures = (one.total_s, one.ttft_s, one.tokens_per_s, one.energy_j, one.cost_usd)
        assert cells[:5] == [figure(value) for value in figures]
        assert verdict == (figure(one.score) if one.feasible else one.violated)
    chosen = [line for line in text.splitlines() if line.startswith("▸")]
    assert len(chosen) == 2  # once with its figures, once with its score's parts
    assert all(line.startswith(f"▸ {decision.route}") for line in chosen)


def test_what_is_not_possible_says_why_with_both_numbers() -> None:
    text = printed(decide(INPUTS), 80)
    local = next(c for c in decide(INPUTS).candidates if c.route == "local")
    assert not local.feasible
    assert f"✗ local: memory: {local.detail}" in text
    assert re.search(r"✗ split \d+…29: memory: needs [\d.]+ MB, the limit is 110\.0 MB", text)


def test_where_the_time_goes_adds_up() -> None:
    decision = decide(INPUTS)
    text = printed(decision, 80)
    assert decision.chosen is not None
    bars = re.findall(r"^  (\w+(?: \w+)?) +([\d.]+) s .*[▏▎▍▌▋▊▉█]", text, re.MULTILINE)
    named = {f"{name.replace(' ', '_')}_s" for name, _ in bars}
    terms = decision.chosen.terms
    assert terms is not None
    assert named == {name for name, seconds in terms.items() if seconds > 0}
    assert sum(float(seconds) for _, seconds in bars) == pytest.approx(decision.chosen.total_s, rel=0.01)


def test_what_it_rests_on_and_how_old_that_is() -> None:
    decision = decide(INPUTS)
    assert decision.margin is not None
    text = " ".join(printed(decision, 120).split())
    assert f"the best of another route scores {figure(decision.margin)} $ more; 120 tokens expected" in text
    assert f"edge: {EDGE.device}; profile of {EDGE.dated}, modelled (kl unavailable)" in text
    assert "2 other sessions, queue 0.1 s, told 3 s ago" in text
    assert "round trip 20 ± 3 ms (passive, 17 samples, 4.2 s ago)" in text
    assert "up 16 ± 0.8 Mbit/s (probe, 3 samples, 9 s ago); down assumed" in text
    assert "learnt: local decode × 1.20" in text
    kept = replace(decision, margin=-0.25)
    assert "the best of another route scores 0.25 $ less" in " ".join(printed(kept, 120).split())


def test_without_a_profile_the_constraints_are_what_there_is_to_tell() -> None:
    text = printed(decide(replace(INPUTS, world=None, work=None)), 100)
    assert "offload costs one round trip per request" in text
    assert re.search(r"split .* 1 … \d+ .* yes", text)
    assert "memory: needs 134.3 MB" in text
    assert "$" not in text


def test_a_cloud_that_tells_nothing_of_itself_has_no_figures() -> None:
    text = printed(decide(replace(INPUTS, world=replace(WORLD, cloud=None), memory_bytes=None)), 80)
    assert set(line_of(text, "offload")) == {"–"}
    assert set(line_of(text, "split 1…29")) == {"–"}
    assert line_of(text, "local")[0] != "–"


def test_a_clouds_words_do_not_steer_the_terminal() -> None:
    cloud = CLOUD.model_copy(update={"device": "GPU\x1b[2J\x9b1m[red]"})
    text = printed(decide(replace(INPUTS, world=replace(WORLD, cloud=cloud))), 120)
    assert "GPU [2J 1m[red]" in text
    assert "\x1b" not in text
    assert "\x9b" not in text


@pytest.mark.parametrize(
    ("memory_mb", "privacy"),
    [(20, "any"), (60, "any"), (None, "any"), (150, "activations-only"), (None, "activations-only")],
)
@pytest.mark.parametrize("known", [True, False])
def test_each_candidate_is_on_exactly_one_line(memory_mb: int | None, privacy: Privacy, known: bool) -> None:
    inputs = replace(INPUTS, memory_bytes=memory_mb and memory_mb * MIB, min_depth=3, privacy=privacy)
    decision = decide(inputs if known else replace(inputs, world=None, work=None))
    rows = folded(decision)
    covered = [(row.candidate.route, k) for row in rows for k in range(row.first, row.last + 1)]
    assert covered == [(one.route, one.split) for one in decision.candidates]
    alone = [row for row in rows if row.candidate is decision.chosen]
    assert [(row.first, row.best) for row in alone] == [(decision.split, True)]
    for row in rows:
        among = [
            c for c in decision.candidates
            if c.route == row.candidate.route and row.first <= c.split <= row.last
        ]  # fmt: skip
        assert {(c.feasible, c.violated) for c in among} == {(row.candidate.feasible, row.candidate.violated)}
        if row.candidate.score is not None and row.candidate.feasible:
            assert row.candidate.score == min(c.score for c in among if c.score is not None)


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "–"), (0.0, "0"), (0.04631, "0.0463"), (45.25, "45.2"), (12_345.6, "12,346"), (2e-7, "2e-07")],
)
def test_figures_have_three_digits(value: float | None, said: str) -> None:
    assert figure(value) == said

"""`bench cloud` on tiny models: what it measures is what it says; how fast is no matter here."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from isthmus.bench.cloud import CloudBench, bench_cloud, parse_precisions, parse_sessions
from isthmus.bench.cloud_fleet import CloudRig, EdgeInputs, equal_work, spread
from isthmus.bench.cloud_precision import alternate
from isthmus.bench.cloud_subject import NUM_TEXTS, edge_inputs
from isthmus.bench.matmul_floor import MatmulFloor
from isthmus.bench.random_weights import SHAPES, RandomCheckpoint
from isthmus.cli import app
from isthmus.cloud.engine_session import Tokens
from isthmus.cloud.kv import BlockTable, PagePool
from isthmus.cloud.kv_store import StepSequence
from isthmus.cloud.linear import Precision
from isthmus.cloud.model import CloudModel, model_logits
from isthmus.cloud.precision import MAX_KL, num_weights
from isthmus.protocol.errors import ConfigError, IsthmusError
from isthmus.splitter.checkpoint import open_checkpoint
from tests.tiny import make_tiny

LAYERS, PROMPT, OUTPUT = 6, 20, 4
QUICK: dict[str, Any] = {"prompt_tokens": PROMPT, "output_tokens": OUTPUT, "rounds": 1, "threads": 1}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What start-up measures goes to a cache of these tests' own, under one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISTHMUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny"
    return str(make_tiny("llama", path, num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def model(folder: str) -> CloudModel:
    with open_checkpoint(folder) as checkpoint:
        return CloudModel.load(checkpoint, precision="fp32")


@pytest.fixture(scope="module")
def inputs(model: CloudModel) -> EdgeInputs:
    rng = np.random.default_rng(0)
    return edge_inputs(model, [rng.integers(3, 320, PROMPT + OUTPUT) for _ in range(2)])


@pytest.fixture
def rig(model: CloudModel, inputs: EdgeInputs) -> CloudRig:
    return CloudRig(model, inputs, prompt_tokens=PROMPT, output_tokens=OUTPUT, max_whole_sessions=8)


@pytest.fixture(scope="module")
def report(folder: str) -> dict[str, Any]:
    """Of a whole run with every precision and with transformers."""
    return bench_cloud(CloudBench(model=folder, sessions=(1, 3, 8), **QUICK)).to_dict()


# ---- the report ------------------------------------------------------------------------------------


def rows_of(report: dict[str, Any], what: str, **wanted: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = report["rows"]
    return [row for row in rows if row["what"] == what and wanted.items() <= row.items()]


def test_every_figure_is_there_and_finite(report: dict[str, Any]) -> None:
    assert report.keys() == {"bench", "machine", "figures", "rows", "notes"}
    figures = report["figures"]
    assert set(figures) >= {
        "decode_tokens_per_s_1", "decode_tokens_per_s_3", "decode_tokens_per_s_8", "scaling_8_over_1",
        "over_matmul_floor_1", "over_matmul_floor_8", "over_transformers_1", "over_transformers_8",
        "mixed_over_uniform", "roofline_share_8", "kl_to_fp32",
    }  # fmt: skip
    assert all(math.isfinite(value) and value >= 0 for value in figures.values())


def test_all_figures_are_of_the_one_precision_that_the_notes_name(report: dict[str, Any]) -> None:
    at_eight = rows_of(report, "decode_tokens_per_s", how="spread", sessions=8)
    speeds = {row["precision"]: row["median"] for row in at_eight}
    kls = {row["precision"]: row["median"] for row in rows_of(report, "kl_to_fp32")}
    assert speeds.keys() == set(Precision)
    assert kls.keys() == {*Precision, "transformers bf16"}
    assert kls["fp32"] == 0
    best = max((p for p in speeds if kls[p] <= MAX_KL), key=lambda p: speeds[p])
    assert report["notes"][0].startswith(f"all figures are {best}'s")
    figures = report["figures"]
    assert figures["decode_tokens_per_s_8"] == speeds[best]
    assert figures["kl_to_fp32"] == kls[best]
    for name, what in (
        ("over_transformers_8", "over_transformers"),
        ("over_matmul_floor_8", "over_matmul_floor"),
    ):
        (row,) = rows_of(report, what, precision=best, sessions=8)
        assert figures[name] == row["median"]
    (mixed,) = rows_of(report, "mixed_over_uniform", precision=best, how="u-shape")
    assert figures["mixed_over_uniform"] == mixed["median"]
    one, eight = figures["decode_tokens_per_s_1"], figures["decode_tokens_per_s_8"]
    assert figures["scaling_8_over_1"] == pytest.approx(eight / one, rel=1e-3)


def test_kv_bytes_are_printed_for_every_load(report: dict[str, Any]) -> None:
    rows = rows_of(report, "kv_bytes")
    assert len(rows) == 3 * len(Precision)
    columns = math.ceil((PROMPT + OUTPUT) / 16)
    for row in rows:
        pages = sum(LAYERS - k for k in spread(row["sessions"], LAYERS)) * columns
        assert row["pages"] == row["expected_pages"] == pages
        page_bytes = 16 * 2 * 2 * 16 * (4 if row["precision"] == "fp32" else 2)
        assert row["bytes"] == row["expected_bytes"] == pages * page_bytes


def test_transformers_runs_the_same_weights(report: dict[str, Any]) -> None:
    """Its KL to our fp32 model is bf16's rounding, not another model's."""
    kls = {row["precision"]: row["median"] for row in rows_of(report, "kl_to_fp32")}
    assert 0 < kls["transformers bf16"] < 1e-2


def test_without_transformers_there_is_a_note_and_no_figure(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    what = CloudBench(model=folder, sessions=(2,), precisions=(Precision.BF16,), **QUICK)
    result = bench_cloud(what).to_dict()
    assert "over_transformers_8" not in result["figures"]
    assert any("transformers" in note and "not installed" in note for note in result["notes"])
    assert not [row for row in result["rows"] if "transformers" in str(row)]


def test_prompt_and_output_must_fit_the_context(folder: str) -> None:
    with pytest.raises(ConfigError, match="513 tokens, the model's context is 512"):
        bench_cloud(CloudBench(model=folder, prompt_tokens=500, output_tokens=12))


# ---- fleets ----------------------------------------------------------------------------------------


def test_a_round_gives_one_token_per_session_and_step_however_often_repeated(rig: CloudRig) -> None:
    splits = spread(5, LAYERS)
    with rig.fleet(splits) as fleet:
        for _ in range(3):
            before = rig.engine.stats()
            decode = fleet.decode()
            after = rig.engine.stats()
            assert after.tokens_sampled_total - before.tokens_sampled_total == len(splits) * OUTPUT
            assert after.steps_total - before.steps_total == OUTPUT
            assert decode.row_layers == (sum(LAYERS - k for k in splits) * OUTPUT,)
    assert rig.engine.stats().pages_used == rig.engine.stats().sessions == 0


def test_one_at_a_time_steps_hold_one_session_each(rig: CloudRig) -> None:
    with rig.fleet((0, 2, 5), together=False) as fleet:
        decode = fleet.decode(3)
        assert decode.row_layers == (LAYERS * 3, (LAYERS - 2) * 3, (LAYERS - 5) * 3)
        assert len(decode.seconds) == 3


def test_the_rows_fed_are_those_of_the_text(rig: CloudRig, model: CloudModel, inputs: EdgeInputs) -> None:
    """Whatever layer a session enters at, the model's tokens for its text come out."""
    with rig.fleet((0, 0, 3, 3)) as fleet:
        for index in range(OUTPUT):
            for number, session in enumerate(fleet.sessions[2:]):
                row = session.row(PROMPT + index)
                rig.engine.add_rows(session.number, row, output="last")
                (tokens,) = [output for output in rig.step() if isinstance(output, Tokens)]
                ids = inputs.ids[number][: PROMPT + index + 1].tolist()
                assert tokens.sampled[0].token == int(model_logits(model, ids)[-1].argmax())


@pytest.mark.parametrize("shape", ["prefix", "u"])
def test_kv_pages_are_those_of_layers_and_tokens(rig: CloudRig, shape: Any) -> None:
    with rig.fleet((0, 1, 5), shape=shape) as fleet:
        assert rig.check_kv().pages == (6 + 5 + 1) * 2
        fleet.decode()
        with rig.fleet((4,), shape=shape):
            account = rig.check_kv()
            assert account.pages == account.expected_pages == (6 + 5 + 1 + 2) * 2
            assert account.to_row()["bytes"] == account.pages * rig.model.page_bytes


def test_a_page_too_many_is_found(rig: CloudRig) -> None:
    with rig.fleet((0, 3)) as fleet:
        rig.engine.pool.alloc(1)
        with pytest.raises(IsthmusError, match=r"^19 KV pages .* need 18 ") as caught:
            fleet.decode()
        assert caught.value.code == "kv_accounting"


def test_a_session_that_stays_behind_is_found(rig: CloudRig) -> None:
    with rig.fleet((0, 3, 3)) as fleet:
        rig.engine.cancel(fleet.sessions[1].number)
        with pytest.raises(IsthmusError, match="answered 2 of 3") as caught:
            fleet.decode()
        assert caught.value.code == "bench_uneven"


# ---- loads and floor -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [2, 3, 6, 30, 32])
@pytest.mark.parametrize("count", [2, 3, 16, 64])
def test_mixed_sessions_run_as_many_row_layers_as_uniform_ones(num_layers: int, count: int) -> None:
    splits = equal_work(count, num_layers)
    assert sum(num_layers - k for k in splits) == count * num_layers
    assert splits[0] == 0
    assert list(splits) == sorted(splits)
    assert splits[-1] < num_layers
    if count > num_layers:
        assert set(splits) == set(range(num_layers))


@pytest.mark.parametrize("num_layers", [2, 6, 30])
def test_the_spread_has_both_ends_and_the_same_mean_for_any_number(num_layers: int) -> None:
    for count in (2, 4, 8, 32, 128):
        splits = spread(count, num_layers)
        assert (splits[0], splits[-1], len(splits)) == (0, num_layers - 1, count)
        assert np.mean(splits) == pytest.approx((num_layers - 1) / 2, abs=0.5)
    assert spread(1, num_layers) == (0,)


def test_the_floor_runs_the_rows_that_each_layer_of_a_step_runs(model: CloudModel) -> None:
    splits = spread(9, LAYERS)
    store = model.new_store(200)
    pool = PagePool(200, on_alloc=store.zero_pages)
    tables = [BlockTable(pool, first_layer=k, num_layers=LAYERS) for k in splits]
    for table in tables:
        table.ensure(1)
    batch = model.prepare(store, [StepSequence(table, 1) for table in tables])
    floor = MatmulFloor(model, splits)
    assert floor.rows == [batch.rows_at(layer) for layer in range(LAYERS)]
    assert floor.row_layers == sum(floor.rows)


@pytest.mark.parametrize("splits", [(0,), (2,), spread(8, LAYERS), (0, 0, 0)])
def test_the_floor_multiplies_what_a_decode_step_multiplies(rig: CloudRig, splits: tuple[int, ...]) -> None:
    """Counted in torch's own dispatcher; attention's batched products are apart."""
    with rig.fleet(splits) as fleet:
        counter = FlopCounterMode(display=False)
        with counter:
            fleet.decode(1)
        engine = dict(counter.get_flop_counts()["Global"])
        floor = FlopCounterMode(display=False)
        with floor:
            MatmulFloor(rig.model, splits).seconds(1)
        bare = dict(floor.get_flop_counts()["Global"])
    assert bare == {op: count for op, count in engine.items() if op in bare}
    assert sum(bare.values()) > 0


def test_rounds_alternate_and_nothing_timed_is_a_first_time() -> None:
    order: list[str] = []

    def run(name: str) -> str:
        order.append(name)
        return name

    pairs = alternate(3, lambda: run("a"), lambda: run("b"), warm=lambda: run("warm"))
    assert pairs == [("a", "b")] * 3
    assert order == ["warm", "a", "b", "b", "a", "a", "b"]


# ---- random weights --------------------------------------------------------------------------------


def test_shapes_are_those_of_the_models_they_are_named_after() -> None:
    assert num_weights(SHAPES["llama-3.2-1b"]) == 1_235_814_400
    assert num_weights(SHAPES["llama-3.1-8b"]) == 8_030_261_248


@pytest.mark.parametrize("precision", list(Precision))
def test_random_weights_load_at_every_precision(precision: Precision) -> None:
    model = CloudModel.load(RandomCheckpoint(SHAPES["tiny"]), precision=precision.value)
    logits = model_logits(model, range(40))
    assert np.isfinite(logits).all()
    assert logits.std() > 0


# ---- the command -----------------------------------------------------------------------------------

TINY = ["bench", "cloud", "--random-weights", "tiny", "--prompt-tokens", "20", "--output-tokens", "2"]


def test_the_command_prints_one_object() -> None:
    options = ["--sessions", "1,2", "--precision", "bf16,int8", "--rounds", "1", "--threads", "1", "--json"]
    done = CliRunner().invoke(app, [*TINY, *options], catch_exceptions=False)
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert result["bench"] == "cloud"
    assert result["machine"].keys() == {"cpu", "cores", "gpu"}
    assert {"decode_tokens_per_s_1", "scaling_2_over_1", "mixed_over_uniform"} <= result["figures"].keys()
    assert {row["precision"] for row in result["rows"]} == {"bf16", "int8"}
    assert any("random weights" in note for note in result["notes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sessions", "1,two"], "--sessions '1,two'"),
        (["--sessions", "0,8"], "--sessions '0,8'"),
        (["--sessions", "513"], "--sessions '513'"),
        (["--precision", "int5"], "precision 'int5'"),
        (["--device", "tpu"], "device 'tpu'"),
        (["--random-weights", "gpt-5"], "--random-weights 'gpt-5'"),
        (["--no-peer"], "--peer: no meaning with --random-weights"),
        (["--seed", "3"], "--seed: no meaning without --simulate"),
        (["--simulate", "trace.csv"], "--output-tokens, --prompt-tokens, --random-weights: no meaning"),
    ],
)
def test_what_can_not_be_honoured_is_refused(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, [*TINY, *options])
    assert isinstance(done.exception, ConfigError)
    assert message in done.exception.message


def test_a_trace_is_given_to_the_simulator(tmp_path: Path) -> None:
    """It is the simulator that misses the file."""
    missing = tmp_path / "missing.csv"
    done = CliRunner().invoke(app, ["bench", "cloud", "--simulate", str(missing), "--loads", "0.5"])
    assert isinstance(done.exception, IsthmusError)
    assert "missing.csv" in done.exception.message


def test_lists_are_parsed() -> None:
    assert parse_sessions("8,1,8") == (1, 8)
    assert parse_precisions("all") == tuple(Precision)
    assert parse_precisions("int8, bf16") == (Precision.INT8, Precision.BF16)
    assert NUM_TEXTS > 1

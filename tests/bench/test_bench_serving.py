"""`bench cloud --simulate`: the probe on a real engine, the table and its figures from one tiny run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.bench.report import Report
from isthmus.bench.serving import BASELINE, METRICS, SERVINGS, bench_serving, compare
from isthmus.bench.simulator import Cloud
from isthmus.bench.step_model import OUTPUT_KNOTS, ROW_KNOTS, StepModel, StepSpan
from isthmus.bench.step_probe import StepProbe
from isthmus.bench.workload import Clients, TraceRequest, draw_workload
from isthmus.cloud.engine import Engine
from isthmus.cloud.forward import MixedForward
from isthmus.cloud.kv import PagePool
from isthmus.cloud.model import CloudModel
from isthmus.cloud.scheduler import Scheduler, SchedulerConfig
from isthmus.protocol.errors import ConfigError, IsthmusError
from isthmus.splitter.checkpoint import open_checkpoint
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    lines = [
        f"2024-05-01 10:{i // 60:02}:{i % 60:02}.5,{rng.integers(5, 300)},{rng.integers(2, 60)}"
        for i in range(80)
    ]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    return path


def engine_of(path: Path, *, num_pages: int, config: SchedulerConfig) -> Engine:
    with open_checkpoint(path) as checkpoint:
        model = CloudModel.load(checkpoint, device="cpu", precision="fp32")
    store = model.new_store(num_pages)
    pool = PagePool(num_pages, on_alloc=store.zero_pages)
    return Engine(MixedForward(model, store), Scheduler(pool, store.copy_pages, config))


def test_the_probe_times_the_steps_it_was_asked_for(tiny: Path) -> None:
    config = SchedulerConfig(max_rows=4096, max_chunk_rows=4096, reservation="none")
    engine = engine_of(tiny, num_pages=400, config=config)
    probe = StepProbe(engine, seed=0)
    mix = [StepSpan(0, 33, 1), StepSpan(2, 100, 1), StepSpan(1, 16, 50)]
    too_large = StepSpan(0, 0, 6400)
    (step,) = probe.measure([[*mix, too_large]])
    assert step.spans == tuple(mix)  # what does not fit the pool is left out
    assert step.num_outputs == 3
    assert step.seconds > 0
    assert engine.pool.num_free == 400
    assert not engine.core.sessions


def test_the_probe_does_not_time_part_of_a_step(tiny: Path) -> None:
    engine = engine_of(tiny, num_pages=400, config=SchedulerConfig(max_rows=16, max_chunk_rows=16))
    with pytest.raises(IsthmusError, match="computed 16 rows, 50 were to be timed"):
        StepProbe(engine, seed=0).measure([[StepSpan(1, 16, 50)]])


def test_the_mixes_are_seeded_and_lie_in_the_models_context(tiny: Path) -> None:
    engine = engine_of(tiny, num_pages=400, config=SchedulerConfig())
    first, second = (StepProbe(engine, seed=3).mixes(30) for _ in range(2))
    assert first == second
    spans = [span for mix in [*first, *StepProbe(engine, seed=3).grid()] for span in mix]
    assert all(span.start + span.num_rows <= 512 and span.first_layer < 4 for span in spans)
    assert max(span.num_rows for span in spans) == 512


def report_of(loads: tuple[float, ...] = (0.7, 0.9), *, max_tokens: int = 60) -> Report:
    rng = np.random.default_rng(1)
    lines = [
        TraceRequest(i + rng.random(), int(rng.integers(5, 200)), int(rng.integers(2, 60))) for i in range(60)
    ]
    clients = Clients()
    workload = draw_workload(
        lines, seed=0, num_layers=4, max_context=300, max_tokens=max_tokens, row_bytes=128, clients=clients
    )
    coefficients = np.full(1 + len(ROW_KNOTS) + len(OUTPUT_KNOTS) + 3, 1e-3)
    coefficients[-3:] = 1e-6
    return compare(
        workload, Cloud(4, 300, 300, max_tokens), StepModel(coefficients, num_layers=4), loads=loads
    )


def test_the_table_has_every_way_of_serving_at_every_load() -> None:
    report = report_of()
    table = [(row["load"], row["serving"]) for row in report.rows]
    assert table == [("all at once", BASELINE)] + [(f"{x:g}", s.name) for x in (0.7, 0.9) for s in SERVINGS]
    rows = {(row["load"], row["serving"]): row for row in report.rows}
    capacity = 60 / rows["all at once", BASELINE]["makespan_s"]
    assert report.figures["capacity_requests_per_s"] == capacity
    for load in ("0.7", "0.9"):
        # Fewer come than could be served, so the last ones are done soon after the last arrival.
        assert rows[load, BASELINE]["makespan_s"] > 59 / (float(load) * capacity)
    ratio = rows["0.9", "mlfq"]["ttft_p95_s"] / rows["0.9", BASELINE]["ttft_p95_s"]
    assert report.figures["ttft_p95_mlfq_over_fcfs_90"] == ratio


def test_the_notes_say_where_each_wins_and_loses() -> None:
    report = report_of((0.9,))
    rows = {row["serving"]: row for row in report.rows if row["load"] == "0.9"}
    others = [serving.name for serving in SERVINGS if serving.name != BASELINE]
    assert len(report.notes) == len(others)
    for name, note in zip(others, report.notes, strict=True):
        assert note.startswith(f"load 0.9, {name} over {BASELINE}, ")
        worse = note.partition("worse: ")[2].partition(";")[0]
        better = note.partition("better: ")[2].partition(";")[0]
        for metric in METRICS:
            ratio = rows[name][metric] / rows[BASELINE][metric]
            told = f"{metric.removesuffix('_s')} {ratio:.2f}"
            assert (told in worse) == (ratio > 1.01)
            assert (told in better) == (ratio < 0.99)


def test_single_tokens_are_nothing_to_compare() -> None:
    with pytest.raises(ConfigError, match="every output is one token"):
        report_of(max_tokens=1)


def test_the_same_workload_and_step_times_give_the_same_report() -> None:
    assert report_of().to_dict() == report_of().to_dict()


def test_the_bench_measures_a_real_engine(tiny: Path, trace: Path) -> None:
    report = bench_serving(
        str(tiny), trace, requests=50, seed=2, precision="fp32", loads=(0.8,), max_tokens=64, kv_pages=200
    ).to_dict()
    assert len(report["rows"]) == 1 + len(SERVINGS)
    figures = report["figures"]
    assert figures["capacity_requests_per_s"] > 0
    assert 0.2 < figures["step_model_total_over_measured"] < 5
    assert math.isfinite(figures["step_model_p95_error"])
    assert any("200 KV pages" in note for note in report["notes"])
    assert any("fp32 on cpu" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loads": ()}, "loads"),
        ({"loads": (0.9, 0.0)}, "loads"),
        ({"uplink_mbps": 0.0}, "clients out of range"),
        ({"requests": 81}, "81 requests asked, the trace has 80"),
        ({"offload_share": 1.5}, "clients out of range"),
    ],
)
def test_options_out_of_range_are_refused_before_the_model_is_loaded(
    trace: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_serving("no-such-model", trace, **options)

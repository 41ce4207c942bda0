"""The serving simulator: hand-computed timelines, conservation, static batches, and that all finish."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.bench import simulator
from isthmus.bench.simulator import Cloud, Outcome, Serving, simulate
from isthmus.bench.step_model import StepSpan
from isthmus.bench.workload import Request
from isthmus.cloud.batch_window import BatchWindow
from isthmus.cloud.scheduler import Plan, Scheduler, SchedulerConfig
from isthmus.protocol.errors import ConfigError, IsthmusError

LAYERS = 4
CLOUD = Cloud(num_layers=LAYERS, num_pages=1000, max_context=256, max_tokens=64, chunk_rows=5)
FCFS = Serving("fcfs", SchedulerConfig())
STATIC = Serving("static", SchedulerConfig(reservation="none"), static_batches=True)
SERVINGS = [
    STATIC,
    *(
        Serving(f"{policy}-{chunked}-{reservation}", config)
        for policy in ("fcfs", "mlfq")
        for chunked in (True, False)
        for reservation in ("predicted", "worst-case", "none")
        for config in [
            SchedulerConfig(
                max_rows=16, max_chunk_rows=8, policy=policy, chunked=chunked, reservation=reservation
            )
        ]
    ),
]


def one_second(spans: Sequence[StepSpan], num_outputs: int) -> float:
    return 1.0


def row_layers(spans: Sequence[StepSpan], num_outputs: int) -> float:
    """1/64 s a row and layer (exact in binary), 1/4 s an output."""
    return sum((LAYERS - span.first_layer) * span.num_rows for span in spans) / 64 + num_outputs / 4


def check(outcome: Outcome, requests: Sequence[Request]) -> None:
    """Every token was made, and every row computed once, besides those computed again. (`simulate` itself
    checks that no page is left over.)"""
    assert outcome.num_tokens.tolist() == [request.output_tokens for request in requests]
    rows = sum(request.prompt_rows + request.output_tokens - 1 for request in requests)
    assert outcome.num_rows - outcome.recomputed_rows == rows
    assert (outcome.ttft_s > 0).all()
    assert (outcome.completion_s >= outcome.ttft_s).all()
    assert 0 < outcome.kv_mean <= outcome.kv_peak <= 1


def test_two_offloaded_requests_share_steps() -> None:
    requests = [Request(0.0, 0, 10, 3), Request(0.5, 0, 4, 2)]
    outcome = simulate(requests, FCFS, CLOUD, one_second)
    # 0-1: the first one's prompt; 1-2: its second token beside the other's prompt; 2-3: the last of both.
    assert outcome.ttft_s.tolist() == [1.0, 1.5]
    assert outcome.completion_s.tolist() == [3.0, 2.5]
    assert outcome.tpot_s.tolist() == [1.0, 1.0]
    assert (outcome.num_steps, outcome.makespan_s) == (3, 3.0)
    check(outcome, requests)


def test_the_rows_of_a_split_arrive_over_the_link() -> None:
    # Chunks of 5 rows at 0.5 and 1 s; each token's row a quarter of a second after it.
    requests = [Request(0.0, 1, 10, 3, turnaround_s=0.25, rows_per_s=10.0)]
    outcome = simulate(requests, FCFS, CLOUD, one_second)
    # 0.5-1.5: the first chunk; 1.5-2.5: the second, while which nothing arrives; 2.75-3.75; 4-5.
    assert outcome.ttft_s.tolist() == [2.5]
    assert outcome.tpot_s.tolist() == [1.25]
    assert outcome.itl_s.tolist() == [1.25, 1.25]
    assert outcome.completion_s.tolist() == [5.0]
    check(outcome, requests)


def test_steps_take_what_their_rows_and_outputs_take() -> None:
    requests = [Request(1.0, 0, 6, 2), Request(1.0, 2, 8, 2, turnaround_s=0.125, rows_per_s=math.inf)]
    outcome = simulate(requests, FCFS, CLOUD, row_layers)
    # At 1 s both prompts: (4 * 6 + 2 * 8) / 64 + 2 / 4 = 1.125 s. Then the first's last row: 4 / 64 + 1 / 4.
    # Meanwhile the other's has come: 2 / 64 + 1 / 4.
    assert outcome.ttft_s.tolist() == [1.125, 1.125]
    assert outcome.completion_s.tolist() == [1.4375, 1.71875]
    assert outcome.itl_s.tolist() == [0.3125, 0.59375]
    assert outcome.makespan_s == 1.71875


def test_one_token_has_no_time_per_output_token() -> None:
    outcome = simulate([Request(0.0, 0, 3, 1)], FCFS, CLOUD, one_second)
    assert np.isnan(outcome.tpot_s).tolist() == [True]
    assert outcome.completion_s.tolist() == outcome.ttft_s.tolist() == [1.0]


def test_kv_use_is_the_share_of_pages_over_time() -> None:
    # 16 rows take one page a layer for 1 s; with the 17th, two pages a layer for another.
    cloud = replace(CLOUD, num_pages=2 * LAYERS * 16)
    outcome = simulate([Request(0.0, 0, 16, 2)], FCFS, cloud, one_second)
    assert (outcome.kv_peak, outcome.kv_mean) == (2 / 32, 1.5 / 32)


def test_a_static_batch_waits_until_the_one_before_is_through() -> None:
    requests = [Request(0.0, 0, 10, 3), Request(0.5, 0, 4, 2), Request(2.5, 1, 4, 1, rows_per_s=math.inf)]
    outcome = simulate(requests, STATIC, CLOUD, one_second)
    # The first runs alone until 3 s; the two that came meanwhile start together.
    assert outcome.ttft_s.tolist() == [1.0, 3.5, 1.5]
    assert outcome.completion_s.tolist() == [3.0, 4.5, 1.5]
    check(outcome, requests)


def test_a_static_batch_is_as_large_as_fits_in_the_worst_case() -> None:
    # 8 + 64 rows may take 5 pages a layer: two of three fit 10, whatever they really take.
    requests = [Request(0.0, 0, 8, 2)] * 3
    cloud = replace(CLOUD, num_pages=10 * LAYERS)
    outcome = simulate(requests, STATIC, cloud, one_second)
    assert outcome.ttft_s.tolist() == [1.0, 1.0, 3.0]
    assert outcome.num_preemptions == 0


def test_preempted_rows_are_counted_as_computed_again() -> None:
    # Each grows to three pages a layer; four in all make the younger one give way, and start over.
    requests = [Request(0.0, 0, 16, 24), Request(0.5, 0, 16, 24)]
    cloud = replace(CLOUD, num_pages=4 * LAYERS, max_tokens=24)
    serving = Serving("unreserved", SchedulerConfig(reservation="none"))
    outcome = simulate(requests, serving, cloud, one_second)
    assert outcome.num_preemptions >= 1
    assert outcome.recomputed_rows >= 16
    check(outcome, requests)


def test_the_same_inputs_give_the_same_figures() -> None:
    rng = np.random.default_rng(5)
    requests = [
        Request(float(when), int(k), int(prompt), int(output), 0.3 * bool(k), 40.0 if k else math.inf)
        for when, k, prompt, output in zip(
            np.sort(rng.random(40) * 20),
            rng.integers(0, LAYERS, 40),
            rng.integers(1, 100, 40),
            rng.integers(1, 60, 40),
            strict=True,
        )
    ]
    for serving in SERVINGS:
        first, second = (
            simulate(requests, serving, replace(CLOUD, num_pages=200), row_layers) for _ in range(2)
        )
        assert first.completion_s.tolist() == second.completion_s.tolist()
        assert first.ttft_s.tolist() == second.ttft_s.tolist()
        assert first.kv_mean == second.kv_mean
        check(first, requests)


def test_a_request_larger_than_the_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match="may take 20 KV pages, the pool has 19") as caught:
        simulate([Request(0.0, 0, 8, 2)], FCFS, replace(CLOUD, num_pages=19), one_second)
    assert caught.value.code == "kv_capacity"


def test_the_batch_window_holds_steps_back(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    requests = [Request(0.0, 1, 4, 40, 0.02 * (0.5 + rng.random()), 1e9) for _ in range(4)]
    held = simulate(requests, FCFS, CLOUD, lambda spans, num_outputs: 0.01)
    monkeypatch.setattr(simulator, "BatchWindow", partial(BatchWindow, max_wait_s=0.0))
    at_once = simulate(requests, FCFS, CLOUD, lambda spans, num_outputs: 0.01)
    assert held.num_steps < 0.9 * at_once.num_steps
    check(held, requests)


def test_a_scheduler_that_forgets_a_session_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "plan", lambda self, *, now: Plan())
    with pytest.raises(IsthmusError, match="1 requests are not finished") as caught:
        simulate([Request(0.0, 0, 8, 2)], FCFS, CLOUD, one_second)
    assert caught.value.code == "simulation_stalled"


@st.composite
def workloads(draw: st.DrawFn) -> list[Request]:
    requests = draw(
        st.lists(
            st.builds(
                Request,
                arrival_s=st.floats(0, 20),
                split=st.integers(0, LAYERS - 1),
                prompt_rows=st.integers(1, 60),
                output_tokens=st.integers(1, 30),
                turnaround_s=st.floats(0, 2),
                rows_per_s=st.floats(1, 1000),
            ),
            min_size=1,
            max_size=12,
        )
    )
    return sorted(requests, key=lambda request: request.arrival_s)


@settings(deadline=None, max_examples=60)
@given(workloads(), st.sampled_from(SERVINGS), st.integers(0, 60))
def test_all_finish_under_every_way_of_serving(
    requests: list[Request], serving: Serving, num_spare_pages: int
) -> None:
    """Pools that hold little more than the largest request: the preempted start over, none starves."""
    cloud = replace(CLOUD, max_tokens=30)
    largest = max(cloud.most_pages(request) for request in requests)
    outcome = simulate(requests, serving, replace(cloud, num_pages=largest + num_spare_pages), row_layers)
    check(outcome, requests)

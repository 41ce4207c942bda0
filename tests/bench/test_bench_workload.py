"""Traces are read or refused by line and column; the drawn workload is seeded and keeps the trace's gaps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.bench.workload import (
    Clients,
    Request,
    TraceRequest,
    Workload,
    draw_window,
    draw_workload,
    read_trace,
)
from isthmus.protocol.errors import ConfigError

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
FIRST = "2023-11-16 18:15:46.6805900,374,44\n"


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "trace.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def drawn(seed: int = 0, *, max_context: int = 100, num: int = 40) -> Workload:
    trace = [TraceRequest(0.5 * i * i, 1 + 3 * i, 1 + i) for i in range(60)]
    return draw_workload(
        draw_window(trace, num, seed=seed),
        seed=seed,
        num_layers=6,
        max_context=max_context,
        max_tokens=50,
        row_bytes=128,
        clients=Clients(offload_share=0.5, turnaround_s=0.02, uplink_bytes_per_s=64000.0),
    )


def test_a_trace_is_read_in_seconds_since_its_first_line(tmp_path: Path) -> None:
    text = HEADER + FIRST + "2023-11-16 18:15:50.9951690,396,109\n"
    assert read_trace(written(tmp_path, text.replace("\n", "\r\n"))) == [
        TraceRequest(0.0, 374, 44),
        TraceRequest(4.314579, 396, 109),
    ]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "line 1: header 'an empty file'"),
        ("when,in,out\n" + FIRST, "line 1: header 'when,in,out'"),
        (HEADER + FIRST + "2023-11-16 18:15:47,12\n", "line 3: 2 fields, 3 expected"),
        (HEADER + FIRST + "\n", "line 3: 0 fields"),
        (HEADER + "yesterday,1,2\n", "line 2, column TIMESTAMP: 'yesterday'"),
        (HEADER + "2023-11-16 18:15:46+01:00,1,2\n", "line 2, column TIMESTAMP"),
        (HEADER + FIRST + "2023-11-16 18:15:45,1,2\n", "line 3, column TIMESTAMP: '2023-11-16 18:15:45'"),
        (HEADER + FIRST + "2023-11-16 18:15:47,0,2\n", "line 3, column ContextTokens: '0'"),
        (HEADER + FIRST + "2023-11-16 18:15:47,-5,2\n", "line 3, column ContextTokens: '-5'"),
        (HEADER + FIRST + "2023-11-16 18:15:47,7,2.5\n", "line 3, column GeneratedTokens: '2.5'"),
        (HEADER + FIRST + "2023-11-16 18:15:47,7,²\n", "line 3, column GeneratedTokens: '²'"),
        (HEADER + FIRST + "2023-11-16 18:15:47,7," + "9" * 5000 + "\n", "line 3, column GeneratedTokens"),
        (b"\xff\xfe\x00", "cannot read the trace"),
    ],
)
def test_a_malformed_trace_is_refused_by_line_and_column(
    tmp_path: Path, text: str | bytes, named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_trace(written(tmp_path, text))
    assert named in caught.value.message
    assert caught.value.code == "bad_trace"


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the trace"):
        read_trace(tmp_path / "none.csv")


def test_a_workload_is_a_window_of_the_trace_and_seeded() -> None:
    workload = drawn()
    assert workload == drawn()
    assert workload != drawn(seed=1)
    assert len(workload.requests) == 40
    assert workload.requests[0].arrival_s == 0.0
    outputs = [request.output_tokens for request in workload.requests]
    assert outputs == [min(50, outputs[0] + i) for i in range(40)]
    for request in workload.requests:
        assert 0 <= request.split < 6
        assert request.rows_per_s == (math.inf if request.offload else 500.0)
        assert request.offload or 0.01 <= request.turnaround_s <= 0.03
    assert {request.split for request in workload.requests} == set(range(6))


def test_prompts_are_cut_to_leave_room_for_the_bound_and_counted() -> None:
    workload = drawn(num=60)
    # Lines 17 on have more than 50 tokens in, lines 50 on more than 50 out: 43 of the 60 lines.
    assert workload.num_clipped == 43
    assert max(request.prompt_rows for request in workload.requests) == 50
    assert max(request.output_tokens for request in workload.requests) == 50


def test_arrivals_are_scaled_to_a_rate() -> None:
    scaled = drawn().at_rate(4.0).requests
    assert scaled[-1].arrival_s == pytest.approx(39 / 4)
    original = drawn().requests
    assert scaled[7].arrival_s / scaled[-1].arrival_s == pytest.approx(
        original[7].arrival_s / original[-1].arrival_s
    )
    assert {request.arrival_s for request in drawn().at_rate(math.inf).requests} == {0.0}


def test_a_split_prompt_arrives_in_chunks_at_the_uplinks_rate() -> None:
    request = Request(2.0, 3, 300, 1, 0.02, rows_per_s=64.0)
    assert request.prompt_arrivals(128) == [(4.0, 128), (6.0, 128), (6.6875, 44)]
    assert Request(2.0, 0, 300, 1).prompt_arrivals(128) == [(2.0, 300)]
    assert replace(request, prompt_rows=128).prompt_arrivals(128) == [(4.0, 128)]


def test_more_requests_than_the_trace_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="61 requests asked, the trace has 60"):
        drawn(num=61)


def test_a_bound_that_leaves_no_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="output bound of 50 tokens"):
        drawn(max_context=50)

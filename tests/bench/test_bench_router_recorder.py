"""Recording a real edge and a real cloud for `bench router`, with a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.bench.router_recorder import Effort, record, recordings_path
from isthmus.bench.router_recordings import Recordings, Tables
from isthmus.bench.router_sim import SimOptions, bench_router_sim
from isthmus.splitter.provide import ensure_pack
from tests.bench.router_recorded import LINK, csv_of, requests
from tests.tiny import make_tiny

EFFORT = Effort(
    contexts=(0, 48), edge_rows=(1, 16), cloud_rows=(1, 16), sessions=(1, 2), rounds=2, chunks=1, steps=2
)


def test_both_halves_are_recorded_kept_and_served_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    model = str(make_tiny("llama", tmp_path / "llama"))
    pack = ensure_pack(model, 32)
    recorded = record(pack, model, effort=EFFORT)
    num = pack.spec.num_layers
    assert recorded.num_layers == num
    assert {c.layers for c in recorded.edge_chunks} >= {1, num}
    assert {(c.rows, c.context) for c in recorded.cloud_chunks} == {
        (rows, context) for rows in (1, 16) for context in (0, 48)
    }
    assert all(len(cell.seconds) == 4 for cell in (*recorded.edge_steps, *recorded.cloud_steps))
    assert len(recorded.load_s) == num
    assert [crowd.sessions for crowd in recorded.crowds] == [1, 2]
    assert 0 < Tables(recorded).row_bytes[1] <= 4 * pack.spec.hidden + 8
    path = recordings_path(model, pack.scheme)
    recorded.save(path)
    assert Recordings.load(path) == recorded
    (tmp_path / "requests.csv").write_text(csv_of(requests(20)))
    for name, times in (("up", LINK.up), ("down", LINK.down)):
        (tmp_path / f"link.{name}").write_text("\n".join(map(str, times)) + "\n")
    report = bench_router_sim(
        SimOptions(
            tmp_path / "requests.csv",
            tmp_path / "link",
            model,
            bits="32",
            scenarios=("laptop_plugged",),
            max_tokens=32,
        )
    )
    assert report.figures["infeasible_picks"] == 0
    assert report.rows[0]["num_requests"] == 20

"""The soak itself: a short one passes, and what it is there to find it does find."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from isthmus.edge.requests import GenerateRequest, Token
from isthmus.splitter.pack import Pack
from tests.chaos.soak import Soak, count_errors, provide
from tests.chaos.soak_report import Memory, SoakReport
from tests.chaos.soak_requests import Case

CASE = Case("3: offload", GenerateRequest(prompt_ids=(1, 2), max_tokens=4), (10, 11, 12, 13))


@pytest.fixture(scope="module")
def provided(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pack, str]:
    return provide("tiny", tmp_path_factory.mktemp("soak"))


@pytest.mark.processes
def test_a_short_soak_loses_nothing(provided: tuple[Pack, str], tmp_path: Path) -> None:
    pack, source = provided
    report = SoakReport(minutes=0.2, seed=12, model="tiny")
    log_path = tmp_path / "clouds.log"
    with log_path.open("w") as log:
        asyncio.run(Soak(pack, source, report, log, num_each=1).run())
    assert count_errors(log_path) == 0
    assert report.problems == [], report.to_text()
    assert sum(report.faults.values()) >= 1
    assert report.finished > 10
    assert report.finished + report.cancelled == report.requests


@pytest.mark.parametrize(
    ("indexes", "ids", "found"),
    [
        ((0, 1, 2, 3), (10, 11, 12, 13), {}),
        ((0, 1, 3), (10, 11, 13), {"lost": 1}),
        ((0, 1, 1, 2, 3), (10, 11, 11, 12, 13), {"duplicated": 1}),
        ((0, 1, 2, 3), (10, 99, 12, 13), {"wrong": 1}),
        ((0, 1, 2, 3, 4), (10, 11, 12, 13, 14), {"wrong": 1}),
    ],
)
def test_what_is_lost_doubled_or_wrong_is_counted(
    provided: tuple[Pack, str], indexes: tuple[int, ...], ids: tuple[int, ...], found: dict[str, int]
) -> None:
    report = SoakReport(minutes=1, seed=0, model="tiny")
    soak = Soak(*provided, report, log=None)
    num_seen = 0
    for index, token in zip(indexes, ids, strict=True):
        num_seen = soak.judge(CASE, Token(index, token, ""), num_seen)
    counts = {name: getattr(report, name) for name in ("lost", "duplicated", "wrong")}
    assert {name: count for name, count in counts.items() if count} == found
    assert len(report.problems) == len(found)


def test_whatever_is_left_or_failed_is_a_problem() -> None:
    report = SoakReport(minutes=1, seed=0, model="tiny")
    assert report.problems == []
    assert "PASSED" in report.to_text()
    report.left = {"cloud A": {"sessions": 0, "pages_used": 3}}
    report.failures["cloud_lost"] += 1
    report.notes.append("cloud A ended with exit code 1")
    assert len(report.problems) == 3
    assert "cloud A: pages_used 3 left" in report.to_dict()["problems"]
    assert "FAILED" in report.to_text()


def test_the_slope_is_that_of_the_memory_behind_the_warm_up() -> None:
    memory = Memory()
    for second in range(100):
        warming = 50.0 * max(0, 20 - second)
        memory.add(second, int((200 + warming + second * 2 / 3600) * 1e6))
    slope: Any = memory.mb_per_hour(since_s=20)
    assert slope == pytest.approx(2.0, rel=1e-3)
    assert memory.mb_per_hour(since_s=95) is None

"""`bench router --replay`: every decision of a log, decided again from its inputs and compared."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from isthmus.bench.report import Report
from isthmus.edge.decision_log import Entry, read_log
from isthmus.edge.router import decide
from isthmus.protocol.errors import RouteInfeasibleError


def bench_router_replay(path: Path) -> Report:
    """Figures `decisions`, `identical`, `different`; a row for each that differs. ConfigError `bad_log`."""
    report = Report("router")
    identical = 0
    for entry in read_log(path):
        where = differs(entry)
        if where is None:
            identical += 1
        else:
            when = datetime.fromtimestamp(entry.when, UTC).isoformat(timespec="milliseconds")
            report.rows.append({"request_id": entry.request_id, "when": when, "differs": where})
    different = len(report.rows)
    report.figures = {"decisions": identical + different, "identical": identical, "different": different}
    report.notes.append(f"replayed {path}: every field of each decision is compared, exactly")
    return report


def differs(entry: Entry) -> str | None:
    """The first place where deciding again comes out otherwise, with both values; None: nowhere."""
    try:
        again = decide(entry.inputs).to_dict()
    except RouteInfeasibleError as error:
        return f"no route now: {error.message}"
    return _first_difference(entry.decision, json.loads(json.dumps(again)), "decision")


def _first_difference(logged: Any, again: Any, at: str) -> str | None:
    if isinstance(logged, dict) and isinstance(again, dict):
        for name in [*logged, *(name for name in again if name not in logged)]:
            if name not in logged or name not in again:
                return f"{at}.{name}: only {'now' if name in again else 'in the log'}"
            found = _first_difference(logged[name], again[name], f"{at}.{name}")
            if found is not None:
                return found
        return None
    if isinstance(logged, list) and isinstance(again, list):
        if len(logged) != len(again):
            return f"{at}: {len(logged)} in the log, {len(again)} now"
        pairs = enumerate(zip(logged, again, strict=True))
        return next(
            (f for i, (a, b) in pairs if (f := _first_difference(a, b, f"{at}[{i}]")) is not None), None
        )
    both_nan = logged != logged and again != again
    return None if logged == again or both_nan else f"{at}: {logged!r} in the log, {again!r} now"

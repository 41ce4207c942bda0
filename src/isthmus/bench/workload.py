"""What a serving simulation is fed: a window of a request trace, with routes and links drawn. Pure."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final

import numpy as np

from isthmus.protocol.errors import ConfigError

COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One line of a trace: seconds since the first line, tokens in and out."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a simulation.

    It enters the model at layer `split`. At 0 (offload) its prompt is there at `arrival_s` and the cloud goes
    on by itself. Otherwise prompt rows arrive at `rows_per_s` in chunks, and the row of each drawn token
    `turnaround_s` after the token: the network both ways and the edge's layers.
    """

    arrival_s: float
    split: int
    prompt_rows: int
    output_tokens: int
    turnaround_s: float = 0.0
    rows_per_s: float = math.inf

    @property
    def offload(self) -> bool:
        return self.split == 0

    def prompt_arrivals(self, chunk_rows: int) -> list[tuple[float, int]]:
        """(when, how many rows) of each part of the prompt."""
        if self.offload:
            return [(self.arrival_s, self.prompt_rows)]
        stops = [*range(chunk_rows, self.prompt_rows, chunk_rows), self.prompt_rows]
        starts = [0, *stops[:-1]]
        return [
            (self.arrival_s + stop / self.rows_per_s, stop - start)
            for start, stop in zip(starts, stops, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Clients:
    """How requests come to the cloud: the share that is offloaded, and of the others the mean turnaround
    (each session's is drawn evenly from half of it to one and a half) and the uplink in bytes per second."""

    offload_share: float = 0.5
    turnaround_s: float = 0.020
    uplink_bytes_per_s: float = 2.5e6

    def __post_init__(self) -> None:
        if not (
            0 <= self.offload_share <= 1 and 0 <= self.turnaround_s < math.inf and self.uplink_bytes_per_s > 0
        ):
            raise ConfigError(f"clients out of range: {self}", hint="share 0..1, times and rates positive")


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival; `num_clipped` of them were cut to the model's context or the bound on
    the output."""

    requests: tuple[Request, ...]
    num_clipped: int
    max_tokens: int

    def at_rate(self, requests_per_s: float) -> Workload:
        """The same requests, their gaps scaled so that `requests_per_s` arrive on average; inf: all at 0."""
        first, last = self.requests[0].arrival_s, self.requests[-1].arrival_s
        mean_gap_s = (last - first) / max(1, len(self.requests) - 1)
        if math.isinf(requests_per_s) or mean_gap_s == 0:
            factor = 0.0
        else:
            factor = 1 / (requests_per_s * mean_gap_s)
        return replace(
            self, requests=tuple(replace(r, arrival_s=(r.arrival_s - first) * factor) for r in self.requests)
        )


def read_trace(path: Path) -> list[TraceRequest]:
    """A CSV file with the columns of `COLUMNS`, in order of time (the Azure LLM inference traces).

    Raises:
        ConfigError (`bad_trace`): it can't be read, or is malformed; names the line and the column.
    """
    hint = f"a CSV file with the columns {','.join(COLUMNS)}, sorted by time"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}", code="bad_trace", hint=hint) from error
    if not lines or tuple(lines[0]) != COLUMNS:
        found = ",".join(lines[0]) if lines else "an empty file"
        raise ConfigError(f"{path} line 1: header {found!r}", code="bad_trace", hint=hint)
    parsed: list[TraceRequest] = []
    origin = before = None
    for number, fields in enumerate(lines[1:], start=2):
        where = f"{path} line {number}"
        if len(fields) != len(COLUMNS):
            raise ConfigError(
                f"{where}: {len(fields)} fields, {len(COLUMNS)} expected", code="bad_trace", hint=hint
            )
        try:
            when = datetime.fromisoformat(fields[0])
            if when.tzinfo is not None:
                raise ValueError("a time zone")
        except ValueError:
            raise _bad_field(where, 0, fields[0], "a date and time without zone", hint) from None
        if before is not None and when < before:
            raise _bad_field(where, 0, fields[0], "a time not before the last line's", hint)
        origin, before = origin or when, when
        parsed.append(
            TraceRequest((when - origin).total_seconds(), *(_count(where, fields, i, hint) for i in (1, 2)))
        )
    return parsed


def _count(where: str, fields: Sequence[str], column: int, hint: str) -> int:
    text = fields[column].strip()
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < 1:
        raise _bad_field(where, column, fields[column], "a whole number from 1 to 999999999", hint)
    return int(text)


def _bad_field(where: str, column: int, value: str, expected: str, hint: str) -> ConfigError:
    return ConfigError(
        f"{where}, column {COLUMNS[column]}: {value!r} is not {expected}", code="bad_trace", hint=hint
    )


def draw_window(trace: Sequence[TraceRequest], num_requests: int, *, seed: int) -> Sequence[TraceRequest]:
    """`num_requests` consecutive lines from a seeded start.

    Raises:
        ConfigError (`bad_trace`): the trace is shorter than that.
    """
    if not 1 <= num_requests <= len(trace):
        raise ConfigError(
            f"{num_requests} requests asked, the trace has {len(trace)}",
            code="bad_trace",
            hint="ask for fewer requests, at least 1",
        )
    first = int(np.random.default_rng((seed, 0)).integers(0, len(trace) - num_requests + 1))
    return trace[first : first + num_requests]


def draw_workload(
    window: Sequence[TraceRequest],
    *,
    seed: int,
    num_layers: int,
    max_context: int,
    max_tokens: int,
    row_bytes: int,
    clients: Clients,
) -> Workload:
    """Each line with a seeded route: offload, or a split at a K drawn evenly from 1 to `num_layers` - 1.

    `max_tokens` bounds every output (the trace does not say what was asked for), and prompts are cut so that
    prompt and bound fit `max_context`. A row takes `row_bytes` on the link.

    Raises:
        ConfigError: the bound on the output leaves no room for a prompt.
    """
    if not 1 <= max_tokens < max_context:
        raise ConfigError(
            f"an output bound of {max_tokens} tokens leaves no prompt in a context of {max_context}",
            hint="choose a smaller bound, at least 1",
        )
    rng, num = np.random.default_rng((seed, 1)), len(window)
    offload = rng.random(num) < clients.offload_share
    splits = rng.integers(1, num_layers, num) if num_layers > 1 else np.zeros(num, int)
    turnarounds = clients.turnaround_s * (0.5 + rng.random(num))
    rows_per_s = clients.uplink_bytes_per_s / row_bytes
    requests = []
    num_clipped = 0
    for line, offloaded, split, turnaround_s in zip(window, offload, splits, turnarounds, strict=True):
        prompt = min(line.prompt_tokens, max_context - max_tokens)
        output = min(line.output_tokens, max_tokens)
        num_clipped += (prompt, output) != (line.prompt_tokens, line.output_tokens)
        arrival_s = line.arrival_s - window[0].arrival_s
        if offloaded or split == 0:
            requests.append(Request(arrival_s, 0, prompt, output))
        else:
            requests.append(Request(arrival_s, int(split), prompt, output, float(turnaround_s), rows_per_s))
    return Workload(tuple(requests), num_clipped, max_tokens)

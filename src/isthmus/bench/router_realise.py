"""What happens to requests if they are served in each way: the heart of the simulated world.

`realise` plays every cut of every request through edge, link and cloud at once, in arrays [requests, cuts]:
cut 0 is the offload, cut N the local run, the ones between are splits. It knows nothing of the router's cost
model: a split's chunks queue at each stage one by one, and each of its tokens meets the link as that is at
that moment.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.bench.router_link import Line
from isthmus.bench.router_recordings import Indices, Tables, Vector

CHUNK_ROWS: Final = 128
CLOUD_CHUNK_ROWS: Final = 256
FRAME_BYTES: Final = 48
OPEN_BYTES: Final = 700
ID_BYTES: Final = 4
TOKEN_BYTES: Final = 150


@dataclass(frozen=True, slots=True)
class Asked:
    """Requests, arrays [n]. `kept`: rows of the prompt that the caches of the side that computes them, and of
    the cloud, hold already. `u_shape`: the edge draws the tokens of a split."""

    prompt: Vector
    output: Vector
    kept: Vector
    u_shape: NDArray[np.bool_]
    start_s: Vector

    def __len__(self) -> int:
        return len(self.prompt)

    def only(self, which: Indices) -> Asked:
        return Asked(*(getattr(self, field.name)[which] for field in fields(self)))


class Ranks(NamedTuple):
    """Which of the recorded samples each request meets, in [0, 1): arrays [n], of chunks [n, most chunks]."""

    edge_chunks: Vector
    cloud_chunks: Vector
    edge_steps: Vector
    cloud_steps: Vector
    head: Vector


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the requests meet, arrays [n]. The first four multiply recorded times. `ranks` None: the means."""

    edge_prefill: Vector
    edge_decode: Vector
    cloud_prefill: Vector
    cloud_decode: Vector
    queue_s: Vector
    sessions: Vector
    rtt_s: Vector
    up: Line
    down: Line
    ranks: Ranks | None = None

    def only(self, which: Indices) -> Conditions:
        """For some of the requests."""
        arrays = {field.name: getattr(self, field.name)[which] for field in fields(self)[:7]}
        ranks = None if self.ranks is None else Ranks(*(rank[which] for rank in self.ranks))
        return Conditions(**arrays, up=self.up.only(which), down=self.down.only(which), ranks=ranks)


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Arrays [n, cuts]; seconds and bytes, for warm blocks and a standing link. `prefill_edge_s`: the edge's
    computing before the first token, `decode_*`: sums over the steps; `first_cloud_s`: an offloaded prompt's
    in the cloud, wait included; `cloud_busy_s`: what the cloud computes
    for this request alone, `rows`: the prompt rows that it computes."""

    ttft_s: Vector
    decode_s: Vector
    prefill_edge_s: Vector
    decode_edge_s: Vector
    decode_cloud_s: Vector
    first_cloud_s: Vector
    cloud_busy_s: Vector
    rows: Vector
    bytes_up: Vector
    bytes_down: Vector
    upload_bytes: Vector
    upload_s: Vector
    """How long the uplink was busy with the prompt's `upload_bytes`."""


class _Prefill(NamedTuple):
    ttft_s: Vector
    edge_s: Vector
    first_cloud_s: Vector
    busy_s: Vector
    bytes_up: Vector
    upload_s: Vector


def realise(tables: Tables, asked: Asked, conditions: Conditions, *, hidden: int) -> Outcomes:
    """How every way turns out for every request."""
    num = tables.num_layers
    prefill = _prefill(tables, asked, conditions, hidden)
    steps = np.maximum(asked.output - 1.0, 0.0)[:, None]
    crowd = _crowd(tables, conditions)[:, None]
    edge, cloud, head = _steps(tables, asked, conditions)
    draws = np.zeros(edge.shape, bool)
    draws[:, num] = True
    draws[:, 1:num] = asked.u_shape[:, None]
    edge = edge + np.where(draws, head[:, None], 0.0)
    down_bytes = np.where(draws, FRAME_BYTES + 2.0 * hidden, float(TOKEN_BYTES))
    decode = np.empty_like(edge)
    decode[:, num] = (steps * edge[:, [num]])[:, 0]
    sent_s = asked.start_s + prefill.ttft_s[:, 0] + steps[:, 0] * (cloud * crowd)[:, 0]
    decode[:, 0] = _stream_s(asked, conditions, sent_s) - asked.start_s - prefill.ttft_s[:, 0]
    if num > 1:
        up_bytes = FRAME_BYTES + hidden + 20.0
        inner = slice(1, num)
        decode[:, inner] = _round_trips(
            conditions,
            asked.start_s[:, None] + prefill.ttft_s[:, inner],
            edge[:, inner],
            (cloud * crowd)[:, inner],
            steps,
            up_bytes,
            down_bytes[:, inner],
        )
    up_step = np.zeros(num + 1)
    up_step[1:num] = FRAME_BYTES + hidden + 20.0
    travels = np.ones(num + 1)
    travels[num] = 0.0
    return Outcomes(
        ttft_s=prefill.ttft_s,
        decode_s=decode,
        prefill_edge_s=prefill.edge_s,
        decode_edge_s=steps * edge,
        decode_cloud_s=steps * cloud * crowd,
        first_cloud_s=prefill.first_cloud_s,
        cloud_busy_s=prefill.busy_s + steps * cloud,
        rows=np.maximum(asked.prompt - asked.kept, 1.0)[:, None] * travels,
        bytes_up=prefill.bytes_up + steps * up_step,
        bytes_down=(OPEN_BYTES + down_bytes * (1.0 + steps)) * travels,
        upload_bytes=prefill.bytes_up,
        upload_s=prefill.upload_s,
    )


def _crowd(tables: Tables, conditions: Conditions) -> Vector:
    return tables.crowding(conditions.sessions)


def _steps(tables: Tables, asked: Asked, conditions: Conditions) -> tuple[Vector, Vector, Vector]:
    """Mean seconds of a step on the edge and on the cloud [n, cuts], and of the edge's head [n]."""
    ranks = conditions.ranks
    one = np.ones(len(asked))
    parts = []
    for table, rank, factor in (
        (tables.edge_steps, ranks and ranks.edge_steps, conditions.edge_decode),
        (tables.cloud_steps, ranks and ranks.cloud_steps, conditions.cloud_decode),
    ):
        # Simpson's rule over the contexts of the answer.
        seconds = sum(
            weight / 6 * table.draw(one, asked.prompt + share * asked.output, rank if ranks else None)
            for weight, share in ((1, 0.0), (4, 0.5), (1, 1.0))
        )
        parts.append(seconds * factor[:, None])
    head = tables.head_s(ranks.head if ranks else None, len(asked)) * conditions.edge_decode
    return parts[0], parts[1], head


def _prefill(tables: Tables, asked: Asked, conditions: Conditions, hidden: int) -> _Prefill:
    """The prompt: in chunks through the edge, over the link, through the cloud."""
    num, n = tables.num_layers, len(asked)
    shape = (n, num + 1)
    crowd = _crowd(tables, conditions)
    half_s = conditions.rtt_s / 2
    sent_rows = np.maximum(asked.prompt - asked.kept, 1.0)
    inner = np.arange(1, num)
    edge_free = np.zeros(shape)  # seconds since the start
    cloud_free = np.broadcast_to(conditions.queue_s[:, None], shape).copy()
    behind = np.zeros(shape)
    last_up, upload, edge_s, busy_s, first_cloud = (np.zeros(shape) for _ in range(5))
    bytes_up = np.zeros(shape)
    lanes = np.broadcast_to(np.arange(n)[:, None], shape)
    for number in range(int(np.ceil(sent_rows.max() / CHUNK_ROWS))):
        some = np.flatnonzero(sent_rows > number * CHUNK_ROWS)
        rows = np.minimum(sent_rows[some] - number * CHUNK_ROWS, CHUNK_ROWS)
        context = asked.prompt[some] - sent_rows[some] + number * CHUNK_ROWS
        ranks = conditions.ranks
        here = tables.edge_chunks.draw(rows, context, ranks.edge_chunks[some, number] if ranks else None)
        here *= conditions.edge_prefill[some, None]
        here[:, inner] += rows[:, None] * tables.codec_row_s[inner] * conditions.edge_prefill[some, None]
        there = tables.cloud_chunks.draw(rows, context, ranks.cloud_chunks[some, number] if ranks else None)
        there *= conditions.cloud_prefill[some, None]
        edge_free[some] += here
        edge_s[some] += here
        if num == 1:
            continue
        ready = edge_free[some][:, inner]
        if number == 0:  # an offer of cached rows is answered before the first chunk goes
            ready = np.where(
                asked.kept[some, None] > 0, np.maximum(ready, conditions.rtt_s[some, None]), ready
            )
        size = rows[:, None] * tables.row_bytes[inner] + FRAME_BYTES + (OPEN_BYTES if number == 0 else 0)
        start = asked.start_s[some, None]
        place = np.ix_(some, inner)
        done, behind[place] = conditions.up.pass_on(lanes[place], start + ready, size, behind[place])
        upload[place] += done - start - np.maximum(ready, last_up[place])
        last_up[place] = done - start
        arrived = done - start + half_s[some, None]
        cloud_free[place] = np.maximum(cloud_free[place], arrived) + there[:, inner] * crowd[some, None]
        busy_s[place] += there[:, inner]
        bytes_up[place] += size
    cloud = _whole(tables, asked, conditions, sent_rows)
    head = tables.head_s(conditions.ranks.head if conditions.ranks else None, n) * conditions.edge_decode
    ttft = np.zeros(shape)
    ttft[:, num] = edge_free[:, num] + head
    edge_s[:, num] += head
    ids = OPEN_BYTES + FRAME_BYTES + ID_BYTES * sent_rows
    zero = np.zeros(n)
    up, _ = conditions.up.pass_on(lanes[:, 0], asked.start_s, ids, zero)
    first_cloud[:, 0] = conditions.queue_s + cloud * crowd
    at = up + half_s + np.where(asked.kept > 0, conditions.rtt_s, 0.0) + first_cloud[:, 0]
    down, _ = conditions.down.pass_on(lanes[:, 0], at, zero + OPEN_BYTES + TOKEN_BYTES, zero)
    ttft[:, 0] = down + half_s - asked.start_s
    edge_s[:, 0] = 0.0
    busy_s[:, 0] = cloud
    bytes_up[:, 0] = ids
    upload[:, 0] = up - asked.start_s
    if num > 1:
        size = np.where(asked.u_shape, FRAME_BYTES + 2.0 * hidden, float(TOKEN_BYTES)) + OPEN_BYTES
        at_s = asked.start_s[:, None] + cloud_free[:, inner]
        wide = np.broadcast_to(size[:, None], at_s.shape)
        down_s, _ = conditions.down.pass_on(lanes[:, inner], at_s, wide, np.zeros(at_s.shape))
        drawn = np.where(asked.u_shape, head, 0.0)[:, None]
        ttft[:, inner] = down_s - asked.start_s[:, None] + half_s[:, None] + drawn
        edge_s[:, inner] += drawn
    return _Prefill(ttft, edge_s, first_cloud, busy_s, bytes_up, upload)


def _whole(tables: Tables, asked: Asked, conditions: Conditions, rows: Vector) -> Vector:
    """Seconds [n] in which a cloud by itself computes an offloaded prompt, in its own larger chunks."""
    total = np.zeros(len(asked))
    ranks = conditions.ranks
    for number in range(int(np.ceil(rows.max() / CLOUD_CHUNK_ROWS))):
        some = np.flatnonzero(rows > number * CLOUD_CHUNK_ROWS)
        part = np.minimum(rows[some] - number * CLOUD_CHUNK_ROWS, CLOUD_CHUNK_ROWS)
        context = asked.prompt[some] - rows[some] + number * CLOUD_CHUNK_ROWS
        rank = ranks.cloud_chunks[some, number] if ranks else None
        total[some] += tables.cloud_chunks.draw(part, context, rank)[:, 0]
    return total * conditions.cloud_prefill


def _stream_s(asked: Asked, conditions: Conditions, sent_s: Vector) -> Vector:
    """When the last token of an offload is here; one that has but one came with the first."""
    lanes = np.arange(len(asked))
    size = np.full(len(asked), float(TOKEN_BYTES))
    here = conditions.down.step(lanes, sent_s - conditions.rtt_s / 2, size) + conditions.rtt_s / 2
    return np.where(asked.output > 1, np.maximum(here, sent_s), sent_s)


def _round_trips(
    conditions: Conditions,
    start_s: Vector,
    edge_s: Vector,
    cloud_s: Vector,
    steps: Vector,
    up_bytes: float,
    down_bytes: Vector,
) -> Vector:
    """Seconds of the decode of splits [n, cuts]: edge, a row up, cloud, its answer down, token by token."""
    n, cuts = start_s.shape
    counts = np.broadcast_to(steps, start_s.shape).ravel()
    lanes = np.broadcast_to(np.arange(n)[:, None], start_s.shape).ravel()
    half_s = (conditions.rtt_s / 2)[lanes]
    edge, cloud, begun, size = (a.ravel() for a in (edge_s, cloud_s, start_s, down_bytes))
    if conditions.up.steady and conditions.down.steady:
        zero = np.zeros(len(lanes))
        link = conditions.up.step(lanes, zero, zero + up_bytes) + conditions.down.step(lanes, zero, size)
        each = edge + cloud + 2 * half_s + link
        return np.asarray((counts * each).reshape(n, cuts))
    order = np.argsort(-counts, kind="stable")
    half_s, edge, cloud, size = (a[order] for a in (half_s, edge, cloud, size))
    lanes = lanes[order]
    now, counts = begun[order], counts[order]
    to_cloud, rows = half_s + cloud, np.full(len(lanes), up_bytes)
    most = int(counts[0]) if len(counts) else 0
    active = np.searchsorted(-counts, -np.arange(most), side="left")  # counts > step
    for last in active:
        part = slice(0, last)
        at = conditions.up.step(lanes[part], now[part] + edge[part], rows[part])
        at += to_cloud[part]
        now[part] = conditions.down.step(lanes[part], at, size[part]) + half_s[part]
    taken = np.empty_like(now)
    taken[order] = now
    return np.asarray((taken - begun).reshape(n, cuts))

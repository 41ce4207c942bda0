"""`isthmus profile`: how long each part of a pack takes on this device, timed as the agent runs it.

What varies (layers, context, rows) is measured in alternation and told by medians. A key/value cache of a
given length is zeros: attention over them takes as long as over anything else.

Public: measure_edge DISTURBED.
"""

from __future__ import annotations

import datetime
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from isthmus.protocol.activations import RowCodec, RowFormat
from isthmus.protocol.profiles import FIGURES, DeviceProfile, Label
from isthmus.protocol.sampling import SamplingParams, sample
from isthmus.splitter.machine import cpu_name
from isthmus.splitter.pack import Pack
from isthmus.splitter.power import EnergyMeter, check_watts, find_meter, measure_watts
from isthmus.splitter.profile_fit import fit_steps, layer_groups, never_falling, rounded, shares
from isthmus.splitter.profile_memory import CHUNK_ROWS, Footprint, measure_memory, model_memory

if TYPE_CHECKING:
    from isthmus.splitter.cache import F32, KVCache
    from isthmus.splitter.runner import BlockRunner

Progress = Callable[[str, float], None]
Work = Callable[[], object]

_KV_ITEM_BYTES: Final = 4
_BEHIND: Final = 1024  # tokens before the chunk that tells what context costs
_SPARE: Final = 0.8  # share of the free memory that measuring may take
_GREEDY: Final = SamplingParams(temperature=0.0)
_SERIAL: Final = ((1.0, 1.0), (64.0, 64.0))  # the agent's one worker computes sessions one after the other


DISTURBED: Final = "measured while other work ran"
"""Stands in the `note` of a profile whose times are too long."""
# Threads of the pool spin while there is work: they take all their time unless others take some of it.
_UNDISTURBED: Final = 0.85


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured. `row_layers`: rows × layers of one prefill sample; fewer layers run where the
    rows are many. `power_s`: how long the power is looked at, idle and active; longer for a
    sensor that needs it."""

    contexts: tuple[int, ...]
    rows: tuple[int, ...]
    decode_rounds: int
    prefill_rounds: int
    row_layers: int
    power_s: float


FULL: Final = Effort((16, 256, 1024, 4096), (1, 8, 32, 64, 128, 256, 512), 15, 5, 1 << 30, 2.0)
QUICK: Final = Effort((16, 256, 1024), (1, 8, 32, 64, 128, 256), 5, 3, 1024, 0.2)


def measure_edge(
    pack: Pack,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    watts: tuple[float, float] | None = None,
    quick: bool = False,
    memory_mb: float | None = None,
    progress: Progress | None = None,
) -> DeviceProfile:
    """This device's profile for `pack`. `watts`: declared (idle, active), for a device without a sensor.

    `quick`: fewer samples, and the memory modelled. Where the model does not fit `memory_mb` MiB (default:
    most of what is free), groups of layers are loaded one after the other. The page cache is left as it is,
    so a load may be one from memory. Raises ConfigError for declared watts, a provider or a number of
    threads that can't be, ModelFileError for a damaged pack.
    """
    from isthmus.splitter.runner import BlockRunner

    check_watts(watts)
    tell = progress or (lambda what, share: None)
    effort = QUICK if quick else FULL
    fresh = Pack.open(pack.path)  # nothing of it is checked yet: a load hashes, as a first one does
    runner = BlockRunner(fresh, provider=provider, threads=threads)
    groups = _groups(fresh, effort, memory_mb)
    meter = find_meter()
    if meter is not None and quick and meter.settle_s > effort.power_s:
        meter = None
    idle = _watts(meter, effort, lambda: time.sleep(0.02))
    try:
        seen = _time_groups(runner, effort, groups, meter, tell)
    finally:
        runner.unload(range(fresh.spec.num_layers), embed=True, head=True)
    times, layer_s = seen.times, seen.layer_s
    memory: Footprint | None = None
    if not quick and seen.provider == "cpu":
        tell("measuring the memory", 0.0)
        memory = measure_memory(fresh, threads=runner.threads, num_layers=len(groups[0]))
        tell("measuring the memory", 1.0)
    size = memory or model_memory(fresh)
    power, power_label = _power(idle, seen.active_w, watts)
    kl = fresh.kl_to_source
    kl = kl if kl is not None and math.isfinite(kl) and kl >= 0 else None
    # The curves are those of the first group; the others' layers may be slower or faster.
    scale = statistics.fmean(layer_s) / statistics.fmean(layer_s[: len(groups[0])])
    labels: dict[str, Label] = dict.fromkeys(FIGURES, "measured")
    labels |= {"batch": "modelled", "power": power_label}
    if memory is None:
        labels["memory"] = "modelled"
    if kl is None:
        labels["kl"] = "unavailable"
    return DeviceProfile(
        side="edge",
        device=f"{cpu_name()}, {runner.threads} threads"[:256],
        provider=seen.provider,
        threads=runner.threads,
        model=(fresh.spec.base_name or "unnamed")[:256],
        precision=fresh.scheme,
        num_layers=fresh.spec.num_layers,
        hidden=fresh.spec.hidden,
        dated=datetime.datetime.now(datetime.UTC).date().isoformat(),
        note="; ".join(_notes(seen, meter if power_label == "measured" else None)),
        prefill=tuple((float(rows), rounded(s * scale)) for rows, s in times.prefill),
        prefill_context_s=rounded(times.prefill_context_s * scale),
        decode=tuple((float(context), rounded(s * scale)) for context, s in times.decode),
        layer_share=shares(layer_s, fresh.bytes_per_block[1:-1]),
        step_s=rounded(times.step_s),
        embed_row_s=rounded(times.embed_row_s),
        head_s=rounded(times.head_s),
        codec_row_s=rounded(times.codec_row_s),
        batch=_SERIAL,
        load_s=rounded(statistics.fmean(seen.load_s)),
        layer_bytes=size.layer_bytes,
        embed_bytes=size.embed_bytes,
        head_bytes=size.head_bytes,
        scratch_bytes=size.scratch_bytes,
        kv_bytes=fresh.spec.kv_bytes_per_token_layer(_KV_ITEM_BYTES),
        idle_w=None if power is None else rounded(power[0]),
        active_w=None if power is None else rounded(power[1]),
        kl=kl,
        labels=labels,
    )


def _notes(seen: _Seen, meter: EnergyMeter | None) -> Iterator[str]:
    if seen.provider == "cpu" and seen.cpu_share < _UNDISTURBED:
        yield f"{DISTURBED}: its threads got {seen.cpu_share:.0%} of their time"
    if meter is not None:
        yield f"power: {meter.source}"


def _watts(meter: EnergyMeter | None, effort: Effort, work: Work) -> float | None:
    return None if meter is None else measure_watts(meter, work, max(effort.power_s, meter.settle_s))


def _power(
    idle: float | None, active: float | None, declared: tuple[float, float] | None
) -> tuple[tuple[float, float] | None, Label]:
    if idle is not None and active:  # a device that computes at 0 W has a sensor that stands still
        return (idle, active), "measured"
    return declared, "modelled" if declared is not None else "unavailable"


@dataclass(frozen=True, slots=True)
class _Seen:
    """What all groups together gave: `load_s` and `layer_s` by layer, `active_w` where there is a meter,
    `cpu_share`: of their time in which the threads ran."""

    provider: str
    times: _Times
    load_s: list[float]
    layer_s: list[float]
    active_w: float | None
    cpu_share: float


def _time_groups(
    runner: BlockRunner, effort: Effort, groups: Sequence[range], meter: EnergyMeter | None, tell: Progress
) -> _Seen:
    """Load, time and unload one group of layers after the other."""
    bench = _Bench(runner, effort)
    load_s: list[float] = []
    layer_s: list[float] = []
    active: float | None = None
    runner.load(range(0), embed=True, head=True)
    for number, group in enumerate(groups):
        tell("timing the layers", number / len(groups))
        load_s += [_seconds(partial(runner.load, range(i, i + 1))) for i in group]
        if number == 0:
            times = bench.times(group)
            active = _watts(meter, effort, bench.token_work(group))
        layer_s += bench.each_layer(group)
        runner.unload(group)
    tell("timing the layers", 1.0)
    cpu_share = bench.cpu_s / (bench.wall_s * runner.threads)
    return _Seen(runner.provider_used, times, load_s, layer_s, active, cpu_share)


def _groups(pack: Pack, effort: Effort, memory_mb: float | None) -> list[range]:
    """The layers in groups that fit the memory, the KV of the longest context included."""
    import psutil

    budget = memory_mb * 2**20 if memory_mb is not None else _SPARE * psutil.virtual_memory().available
    spec, size = pack.spec, model_memory(pack)
    kv_row = 2 * spec.num_kv_heads * spec.head_dim * _KV_ITEM_BYTES
    # At most: the longest cache of a decode, or all those of the prefills side by side.
    rows = min(spec.context_length, effort.contexts[-1]) + sum(effort.rows) + _BEHIND
    fixed = size.embed_bytes + size.head_bytes + size.scratch_bytes
    return layer_groups(spec.num_layers, size.layer_bytes + rows * kv_row, fixed, budget)


@dataclass(frozen=True, slots=True)
class _Times:
    """In seconds; `prefill` and `decode` as in DeviceProfile."""

    step_s: float
    decode: list[tuple[int, float]]
    prefill: list[tuple[int, float]]
    prefill_context_s: float
    embed_row_s: float
    head_s: float
    codec_row_s: float


@dataclass
class _Bench:
    """Times the loaded blocks of `runner`. `wall_s`, `cpu_s`: how long layers ran, and the processor time of
    all threads meanwhile."""

    runner: BlockRunner
    effort: Effort
    wall_s: float = 0.0
    cpu_s: float = 0.0
    ids: list[int] = field(init=False)
    contexts: tuple[int, ...] = field(init=False)
    rows: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        spec = self.runner.spec
        self.contexts = tuple(c for c in self.effort.contexts if c < spec.context_length) or (0,)
        self.rows = tuple(r for r in self.effort.rows if r <= spec.context_length)
        drawn = np.random.default_rng(7).integers(0, spec.vocab_size, max(self.rows[-1], CHUNK_ROWS))
        self.ids = [int(token) for token in drawn]

    def times(self, group: range) -> _Times:
        """Everything that is asked of a range of layers, here the first `group`; embedding and head, too."""
        overhead, layer = self._step(group)
        embed_call, embed_row, head = self._ends(group)
        prefill, context = self._prefill(group, overhead)
        return _Times(
            # The call to the embedding is part of every step, whatever its rows.
            step_s=overhead + embed_call,
            decode=self._decode(group, layer),
            prefill=prefill,
            prefill_context_s=context,
            embed_row_s=embed_row,
            head_s=head,
            codec_row_s=self._codec(group),
        )

    def token_work(self, group: range) -> Work:
        """One token of a local run over `group`: what the device does while it is active."""
        cache, runner = self._cache(group, self.contexts[0], 1), self.runner

        def token() -> object:
            hidden = self._forward(cache, self.contexts[0], runner.embed(self.ids[:1]))
            return sample(runner.head(hidden)[-1], _GREEDY, position=0)

        return token

    def each_layer(self, group: range) -> list[float]:
        """Seconds of each layer by itself, in the order and at the pace of a pass, so that the processor's
        caches are as cold as there."""
        context, row = self.contexts[0], self.runner.embed(self.ids[:1])
        caches = [self._cache(range(i, i + 1), context, 1) for i in group]
        work = [partial(self._forward, cache, context, row) for cache in caches]
        return self._timed(work, self.effort.decode_rounds)

    def _step(self, group: range) -> tuple[float, float]:
        """(seconds of a step whatever it runs, seconds of a layer) at the shortest context."""
        depths = sorted({max(1, round(len(group) * share)) for share in (0.01, 0.25, 0.5, 1.0)})
        context, row = self.contexts[0], self.runner.embed(self.ids[:1])
        caches = [self._cache(range(group.start, group.start + depth), context, 1) for depth in depths]
        work = [partial(self._forward, cache, context, row) for cache in caches]
        return fit_steps(depths, self._timed(work, self.effort.decode_rounds))

    def _decode(self, group: range, layer: float) -> list[tuple[int, float]]:
        """(context, seconds of a layer): `layer` at the shortest, and by how much a longer one is slower."""
        cache, row = self._cache(group, self.contexts[-1], 1), self.runner.embed(self.ids[:1])
        work = [partial(self._forward, cache, context, row) for context in self.contexts]
        medians = never_falling(self._timed(work, self.effort.decode_rounds))
        cache.close()
        return [
            (context, layer + (seconds - medians[0]) / len(group))
            for context, seconds in zip(self.contexts, medians, strict=True)
        ]

    def _prefill(self, group: range, overhead: float) -> tuple[list[tuple[int, float]], float]:
        """(rows, seconds of a layer) with nothing before, and seconds per layer, row and token before."""
        work: list[Work] = []
        layers: list[int] = []
        behind = min(CHUNK_ROWS, max(1, self.runner.spec.context_length // 2))
        before = min(_BEHIND, self.runner.spec.context_length - behind)
        for rows, context in [*((rows, 0) for rows in self.rows), (behind, 0), (behind, before)]:
            count = max(1, min(len(group), self.effort.row_layers // rows))
            cache = self._cache(range(group.start, group.start + count), context, rows)
            embedded = self.runner.embed(self.ids[:rows])
            work.append(partial(self._forward, cache, context, embedded))
            layers.append(count)
        *plain, alone, after = self._timed(work, self.effort.prefill_rounds)
        each = never_falling([max(0.0, s - overhead) / n for s, n in zip(plain, layers, strict=False)])
        context_s = max(0.0, after - alone) / (layers[-1] * behind * max(1, before))
        return list(zip(self.rows, each, strict=True)), context_s

    def _ends(self, group: range) -> tuple[float, float, float]:
        """Seconds of a call to the embedding, of a row in it, and of norm, head and draw: in a pass over
        `group`, for these have their weights evicted by the layers'."""
        runner, context = self.runner, self.contexts[0]
        cache, chunk = self._cache(group, context, 1), self.ids[:CHUNK_ROWS]
        hidden = runner.embed(self.ids[:1])

        def head() -> object:
            return sample(runner.head(hidden)[-1], _GREEDY, position=0)

        work: list[Work] = [
            partial(runner.embed, self.ids[:1]),
            partial(self._forward, cache, context, hidden),
            head,
            partial(runner.embed, chunk),
        ]
        one, _, head_s, many = _medians(work, self.effort.decode_rounds)
        row = max(0.0, many - one) / max(1, len(chunk) - 1)
        return max(0.0, one - row), row, head_s

    def _codec(self, group: range) -> float:
        """Seconds to put a row on the wire, in a chunk, in the pack's default format and compressed; the rows
        are real ones, of a boundary in mid-group, because compression depends on them."""
        runner = self.runner
        depth = max(1, len(group) // 2)
        rows = min(CHUNK_ROWS, runner.spec.context_length)
        cache = self._cache(range(group.start, group.start + depth), 0, rows)
        boundary = runner.forward(cache, runner.embed(self.ids[:rows]))
        plain = runner.pack.scheme == "f32"
        outliers = () if plain else runner.pack.outliers(group.start + depth)
        codec = RowCodec(RowFormat.F32 if plain else RowFormat.INT8, runner.spec.hidden, outliers)
        return _medians([partial(codec.encode, boundary)], self.effort.decode_rounds)[0] / rows

    def _timed(self, work: Sequence[Work], rounds: int) -> list[float]:
        """`_medians` of work that layers do."""
        wall, cpu = time.perf_counter(), time.process_time()
        medians = _medians(work, rounds)
        self.wall_s += time.perf_counter() - wall
        self.cpu_s += time.process_time() - cpu
        return medians

    def _cache(self, layers: range, length: int, room: int) -> KVCache:
        """A cache that holds `length` rows of zeros, with room for `room` more."""
        cache = self.runner.new_cache(layers, capacity=length + room)
        cache.reserve(length + room)
        for buffer in (*cache.keys, *cache.values):
            buffer[:, :, :length] = 0  # written, or all rows would lie in one and the same page of zeros
        cache.restore(length)
        return cache

    def _forward(self, cache: KVCache, context: int, rows: F32) -> F32:
        """`rows` behind the first `context` rows of the cache."""
        cache.truncate(0)
        cache.restore(context)
        return self.runner.forward(cache, rows)


def _seconds(work: Work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _medians(work: Sequence[Work], rounds: int) -> list[float]:
    """Median seconds of each piece of work, run in turn; the first turn binds and allocates: dropped."""
    samples = [[_seconds(piece) for piece in work] for _ in range(rounds + 1)][1:]
    return [statistics.median(column) for column in zip(*samples, strict=True)]

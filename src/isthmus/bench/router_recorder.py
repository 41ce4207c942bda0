"""Measures a real edge and a real cloud on this machine: the samples that simulated worlds draw from.

Rounds go through all cells in turn, so that what the machine does meanwhile hits all alike. Key/value caches
of a given length hold zeros: attention takes as long over them as over anything else.
"""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from isthmus.bench.report import machine
from isthmus.bench.router_recordings import Boundary, Cell, Crowd, Indices, Recordings
from isthmus.protocol.activations import RowCodec, RowFormat
from isthmus.protocol.errors import IsthmusError
from isthmus.protocol.sampling import SamplingParams, sample
from isthmus.splitter.pack_writer import Progress
from isthmus.splitter.store import cache_root

if TYPE_CHECKING:
    from isthmus.cloud.serve import Prepared
    from isthmus.cloud.step_timer import StepTimer
    from isthmus.protocol.profiles import DeviceProfile
    from isthmus.splitter.cache import KVCache
    from isthmus.splitter.pack import Pack
    from isthmus.splitter.runner import BlockRunner

KV_ITEM_BYTES: Final = 4
CHUNK_ROWS: Final = 128  # of the edge's prefill
_GREEDY: Final = SamplingParams(temperature=0.0)
_SEED: Final = 11


@dataclass(frozen=True, slots=True)
class Effort:
    """What is recorded: contexts, rows of a chunk on each side, sessions that decode at once, and how often.
    Steps are recorded in runs of `steps`, so that what slows neighbouring ones stays visible."""

    contexts: tuple[int, ...] = (0, 512, 2048, 6144)
    edge_rows: tuple[int, ...] = (1, 16, 64, 128)
    cloud_rows: tuple[int, ...] = (1, 16, 64, 256)
    sessions: tuple[int, ...] = (1, 2, 4, 8, 16)
    rounds: int = 3
    chunks: int = 2
    steps: int = 24


def recordings_path(model: str, scheme: str) -> Path:
    """Where the recordings of a model on this machine are kept."""
    key = f"{model} {scheme} {machine()}"
    return cache_root() / "recordings" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def record(
    pack: Pack,
    model: str,
    *,
    effort: Effort = Effort(),
    progress: Progress | None = None,
) -> Recordings:
    """Loads the edge's and then the cloud's half of `model` and times both; some two minutes for SmolLM2."""
    from isthmus.cloud.cpu_watch import CpuWatch

    tell = progress or (lambda what, share: None)
    edge = _Edge(pack, effort)
    watch = CpuWatch(edge.profile.threads)
    edge.run(tell)
    disturbed = watch.disturbed()
    cloud = _Cloud(_prepare(model), effort)
    watch = CpuWatch(cloud.profile.threads)
    cloud.run(tell)
    disturbed = disturbed or watch.disturbed()
    return Recordings(
        model=model,
        machine=f"{machine()['cpu']}, {machine()['cores']} cores",
        dated=datetime.datetime.now(datetime.UTC).date().isoformat(),
        disturbed=disturbed,
        context_length=min(pack.spec.context_length, cloud.context_length),
        kv_bytes=pack.spec.kv_bytes_per_token_layer(KV_ITEM_BYTES),
        edge=edge.profile,
        cloud=cloud.profile,
        edge_chunks=edge.cells(edge.chunks),
        edge_steps=edge.cells(edge.steps),
        cloud_chunks=cloud.cells(cloud.chunks),
        cloud_steps=cloud.cells(cloud.steps),
        crowds=tuple(Crowd(sessions=n, seconds=tuple(s)) for n, s in cloud.crowds.items()),
        boundaries=tuple(edge.boundaries),
        head_s=tuple(edge.head_s),
        load_s=tuple(edge.load_s),
    )


Point = tuple[int, int, int]
"""Layers, rows, context."""


class _Recorder:
    """The samples of one side so far."""

    def __init__(self, effort: Effort, rows: Sequence[int], layers: Sequence[int], longest: int) -> None:
        self.effort = effort
        contexts = sorted({min(context, longest - max(rows) - 1) for context in effort.contexts})
        self.chunks: dict[Point, list[float]] = {point: [] for point in product(layers, rows, contexts)}
        self.steps: dict[Point, list[float]] = {point: [] for point in product(layers, (1,), contexts)}

    @staticmethod
    def cells(samples: dict[Point, list[float]]) -> tuple[Cell, ...]:
        return tuple(
            Cell(layers=layers, rows=rows, context=context, seconds=tuple(seconds))
            for (layers, rows, context), seconds in samples.items()
        )

    def rounds(self, what: str, tell: Progress, timed: Callable[[Point, bool], float]) -> None:
        """All rounds; `timed(point, again)` runs one sample, `again` where the last one was of this point."""
        for number in range(self.effort.rounds):
            tell(f"recording the {what}", number / self.effort.rounds)
            for samples, count in ((self.chunks, self.effort.chunks), (self.steps, self.effort.steps)):
                for point, seconds in samples.items():
                    seconds += [timed(point, i > 0) for i in range(count)]
        tell(f"recording the {what}", 1.0)


class _Edge(_Recorder):
    """Times whole passes of `BlockRunner`, from the ids to the boundary, as the agent runs them."""

    def __init__(self, pack: Pack, effort: Effort) -> None:
        from isthmus.splitter.profiling import measure_edge

        num = pack.spec.num_layers
        super().__init__(
            effort, effort.edge_rows, _depths(num, (0.0, 0.25, 0.5, 0.75, 1.0)), pack.spec.context_length
        )
        self.pack = pack
        self.profile: DeviceProfile = measure_edge(pack)
        self.head_s: list[float] = []
        self.load_s: list[float] = []
        self.boundaries: list[Boundary] = []

    def run(self, tell: Progress) -> None:
        from isthmus.splitter.runner import BlockRunner

        runner = BlockRunner(self.pack)
        runner.load(range(0), embed=True, head=True)
        for layer in range(self.pack.spec.num_layers):
            begun = time.perf_counter()
            runner.load(range(layer, layer + 1))
            self.load_s.append(time.perf_counter() - begun)
        ids = np.random.default_rng(_SEED).integers(0, self.pack.spec.vocab_size, max(self.effort.edge_rows))
        most = max(context for *_, context in self.chunks) + len(ids) + 1
        caches: dict[int, KVCache] = {}

        def timed(point: Point, again: bool) -> float:
            layers, rows, context = point
            if layers not in caches:
                for other in caches.values():
                    other.close()
                caches.clear()
                caches[layers] = _zeros(runner, layers, most)
            cache = caches[layers]
            for _ in range(1 if again else 2):  # the first one binds its buffers
                cache.truncate(0)
                cache.restore(context)
                begun = time.perf_counter()
                out = runner.forward(cache, runner.embed(ids[:rows]))
                seconds = time.perf_counter() - begun
            if rows == 1 and layers == self.pack.spec.num_layers:
                begun = time.perf_counter()
                sample(runner.head(out)[-1], _GREEDY, position=0)
                self.head_s.append(time.perf_counter() - begun)
            return seconds

        self.rounds("edge", tell, timed)
        self._boundaries(runner, ids)
        runner.unload(range(self.pack.spec.num_layers), embed=True, head=True)

    def _boundaries(self, runner: BlockRunner, ids: Indices) -> None:
        """Real rows, since how they compress depends on them."""
        spec, plain = self.pack.spec, self.pack.scheme == "f32"
        for layers in sorted({point[0] for point in self.chunks} - {spec.num_layers}):
            cache = runner.new_cache(range(layers), capacity=len(ids))
            rows = runner.forward(cache, runner.embed(ids))
            outliers = () if plain else self.pack.outliers(layers)
            codec = RowCodec(RowFormat.F32 if plain else RowFormat.INT8, spec.hidden, outliers)
            seconds = []
            for _ in range(self.effort.rounds + 1):
                begun = time.perf_counter()
                encoded = codec.encode(rows)
                seconds.append((time.perf_counter() - begun) / len(ids))
            self.boundaries.append(
                Boundary(layers=layers, row_bytes=len(encoded.body) / len(ids), row_s=tuple(seconds[1:]))
            )
            cache.close()


class _Cloud(_Recorder):
    """Times single steps of the real engine."""

    def __init__(self, prepared: Prepared, effort: Effort) -> None:
        from isthmus.cloud.engine import Engine
        from isthmus.cloud.step_timer import WHOLE_STEPS, StepTimer

        num = prepared.info.num_layers
        self.context_length = prepared.info.context_length
        super().__init__(effort, effort.cloud_rows, _depths(num, (0.0, 0.5, 1.0)), self.context_length)
        if prepared.info.profile is None:
            raise IsthmusError("the cloud could not be profiled, see the log", code="not_profiled")
        self.profile: DeviceProfile = prepared.info.profile
        self.num_layers = num
        engine = Engine.over(prepared.model, prepared.num_pages, WHOLE_STEPS)
        self.timer: StepTimer = StepTimer(engine, seed=_SEED)
        self.crowds: dict[int, list[float]] = {sessions: [] for sessions in effort.sessions}

    def run(self, tell: Progress) -> None:
        def timed(point: Point, again: bool) -> float:
            layers, rows, context = point
            return self.timer.seconds([(self.num_layers - layers, context, rows)])

        self.rounds("cloud", tell, timed)
        for _ in range(self.effort.rounds):
            for sessions, seconds in self.crowds.items():
                mix = [(0, 256, 1)] * sessions
                seconds += [self.timer.seconds(mix) for _ in range(self.effort.chunks)]


def _zeros(runner: BlockRunner, layers: int, length: int) -> KVCache:
    """A cache that has held `length` rows of zeros."""
    cache = runner.new_cache(range(layers), capacity=length)
    cache.reserve(length)
    for buffer in (*cache.keys, *cache.values):
        buffer[:] = 0  # written, or all rows would lie in one and the same page of zeros
    return cache


def _depths(num_layers: int, shares: Sequence[float]) -> list[int]:
    return sorted({max(1, round(share * num_layers)) for share in shares})


def _prepare(model: str) -> Prepared:
    from isthmus.cloud.serve import CloudOptions, prepare
    from isthmus.logs import configure_log
    from isthmus.splitter.checkpoint import open_checkpoint
    from isthmus.splitter.sources import pull
    from isthmus.splitter.tokenizer import Tokenizer

    configure_log()  # to standard error: standard output is for the report
    pulled = pull(model)
    with open_checkpoint(pulled.path) as checkpoint:
        return prepare(checkpoint, Tokenizer.from_bytes(pulled.tokenizer_json), CloudOptions())

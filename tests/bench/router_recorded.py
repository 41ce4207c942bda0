"""Made-up recordings of a small model, for the tests of the simulated world: plausible, noisy, quick."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np

from isthmus.bench.router_recordings import Boundary, Cell, Crowd, Recordings
from isthmus.bench.router_requests import draw_requests
from isthmus.bench.router_scenarios import SCENARIOS, Scenario
from isthmus.bench.router_world import SimWorld
from isthmus.bench.workload import TraceRequest
from isthmus.protocol.profiles import FIGURES, DeviceProfile
from isthmus.relay.trace import Trace
from isthmus.splitter.sides import Side

NUM_LAYERS = 6
CONTEXTS = (0, 512, 2048)


def curve(times: float, *points: tuple[float, float]) -> tuple[tuple[float, float], ...]:
    return tuple((float(x), times * y) for x, y in points)


def profile(side: str, *, num_layers: int = NUM_LAYERS, times: float = 1.0) -> DeviceProfile:
    """A device on which a layer takes some tenths of a millisecond per row."""
    return DeviceProfile.model_validate(
        {
            "side": side, "device": "made up", "provider": "cpu", "threads": 1, "model": "small",
            "precision": "q8", "num_layers": num_layers, "hidden": 64, "dated": "2026-01-01",
            "prefill": curve(times, (1, 1e-3), (16, 2e-3), (64, 6e-3), (256, 24e-3)),
            "prefill_context_s": times * 2e-8,
            "decode": curve(times, (16, 1e-3), (1024, 1.6e-3), (4096, 3e-3)),
            "layer_share": (1.0,) * num_layers, "step_s": times * 2e-4, "embed_row_s": times * 1e-6,
            "head_s": times * 2e-3, "codec_row_s": times * 1e-6,
            "batch": curve(1.0, (1, 1.0), (4, 1.4), (16, 4.0)), "load_s": 0.01, "layer_bytes": 2_000_000,
            "embed_bytes": 4_000_000, "head_bytes": 4_000_000, "scratch_bytes": 1_000_000, "kl": 0.002,
            "labels": dict.fromkeys(FIGURES, "modelled"),
        }
    )  # fmt: skip


def recordings(
    edge: DeviceProfile | None = None,
    cloud: DeviceProfile | None = None,
    *,
    seed: int = 0,
    kv_bytes: int = 512,
) -> Recordings:
    """Samples about the profiles' times: each cell is off by some percent, each sample by some more."""
    edge, cloud = edge or profile("edge"), cloud or profile("cloud", times=0.8)
    rng = np.random.default_rng(seed)

    def noisy(seconds: float, num: int = 12) -> tuple[float, ...]:
        return tuple(seconds * np.exp(0.05 * rng.standard_normal() + 0.05 * rng.standard_normal(num)))

    def cells(side: Side, rows: tuple[int, ...], *, head: bool) -> tuple[Cell, ...]:
        num = side.num_layers
        found = []
        for layers in sorted({1, num // 2, num}):
            for count in rows:
                for context in CONTEXTS:
                    each = side.layer_s(context) if count == 1 else side.chunk_layer_s(count, context)
                    seconds = side.profile.step_s + layers * each + (side.profile.head_s if head else 0.0)
                    found.append(Cell(layers=layers, rows=count, context=context, seconds=noisy(seconds, 40)))
        return tuple(found)

    here, there = Side(edge), Side(cloud)
    return Recordings(
        model="small", machine="none", dated="2026-01-01", context_length=8192, kv_bytes=kv_bytes,
        edge=edge, cloud=cloud,
        edge_chunks=cells(here, (1, 16, 64, 128), head=False), edge_steps=cells(here, (1,), head=False),
        cloud_chunks=cells(there, (1, 16, 64, 256), head=True), cloud_steps=cells(there, (1,), head=True),
        crowds=tuple(Crowd(sessions=n, seconds=noisy(there.crowding(n))) for n in (1, 2, 4, 8, 16)),
        boundaries=tuple(
            Boundary(layers=k, row_bytes=0.8 * edge.hidden, row_s=noisy(edge.codec_row_s))
            for k in (1, max(1, edge.num_layers - 1))
        ),
        head_s=noisy(edge.head_s, 40), load_s=noisy(edge.load_s),
    )  # fmt: skip


def requests(num: int, *, seed: int = 0) -> list[TraceRequest]:
    """Of a made-up trace: short prompts have short answers."""
    rng = np.random.default_rng(seed)
    prompts = np.exp(rng.uniform(np.log(20), np.log(1500), num)).astype(int)
    outputs = 1 + rng.poisson(8 + prompts / 20)
    gaps = rng.exponential(1.0, num)
    return [
        TraceRequest(float(at), int(prompt), int(output))
        for at, prompt, output in zip(np.cumsum(gaps), prompts, outputs, strict=True)
    ]


def csv_of(trace: list[TraceRequest]) -> str:
    """The trace as a file holds it."""
    begin = datetime(2026, 1, 1, tzinfo=UTC).replace(tzinfo=None)
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    lines += [
        f"{(begin + timedelta(seconds=r.arrival_s)).isoformat(sep=' ')},{r.prompt_tokens},{r.output_tokens}"
        for r in trace
    ]
    return "\n".join(lines) + "\n"


def link(*, seed: int = 0) -> Trace:
    """Twenty seconds of a link of some 3 Mbit/s up and 6 down, which comes and goes."""
    rng = np.random.default_rng(seed)

    def times(mean_ms: float) -> tuple[int, ...]:
        at = np.cumsum(rng.exponential(mean_ms, int(20_000 / mean_ms)))
        return tuple(int(t) for t in np.append(at[at < 20_000], 20_000))

    return Trace(times(4.0), times(2.0))


RECORDINGS = recordings()
LINK = link()
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
MAX_TOKENS = 128


def world_of(scenario: Scenario | str = "laptop_plugged", *, num: int = 60, seed: int = 0) -> SimWorld:
    """A world of `num` requests."""
    chosen = BY_NAME[scenario] if isinstance(scenario, str) else scenario
    trace = requests(num, seed=seed)
    drawn, _ = draw_requests(trace, trace, chosen, max_context=4096, max_tokens=MAX_TOKENS, seed=seed)
    return SimWorld(chosen, RECORDINGS, drawn, LINK, max_tokens=MAX_TOKENS, seed=seed)

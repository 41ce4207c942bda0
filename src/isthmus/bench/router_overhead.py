"""`bench router --overhead`: what a decision costs, with its reasons and without them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from isthmus.bench.report import Report
from isthmus.edge.calibration import WINDOW, Residuals
from isthmus.edge.constraints import RouterInputs
from isthmus.edge.policy import DeviceState
from isthmus.edge.requests import Slo
from isthmus.edge.router import best, decide
from isthmus.protocol.profiles import FIGURES, DeviceProfile, Prices
from isthmus.splitter.links import Estimate, LinkView
from isthmus.splitter.situation import CloudState, EdgeState, Factors, Radio, Route, Wire, Work, World

NUM_LAYERS: Final = 33
"""32 splits, beside local and offload."""
NUM_DECISIONS: Final = 1000
_MB: Final = 1 << 20
_ROUTES: Final[tuple[Route, ...]] = ("local", "offload", "split")


def bench_router_overhead(*, num_decisions: int = NUM_DECISIONS, seed: int = 0) -> Report:
    """Figures in microseconds: `decision_us` and `decision_p99_us` of `decide`, `argmin_us` of `best`.

    Each decision is another request in another state of the world; both functions get each of them, in turns.
    Profiles are the same objects throughout, as they are for an agent.
    """
    several = list(_draw(num_decisions, np.random.default_rng(seed)))
    for inputs in several[: min(50, num_decisions)]:
        decide(inputs), best(inputs)
    with_reasons, bare = [], []
    routes: dict[str, int] = dict.fromkeys(_ROUTES, 0)
    for inputs in several:
        with_reasons.append(_us(decide, inputs))
        bare.append(_us(best, inputs))
        routes[best(inputs)[0]] += 1
    report = Report("router")
    report.figures = {
        "decision_us": float(np.median(with_reasons)),
        "decision_p99_us": float(np.quantile(with_reasons, 0.99)),
        "argmin_us": float(np.median(bare)),
        "argmin_p99_us": float(np.quantile(bare, 0.99)),
    }
    report.rows = [{"route": route, "decisions": num} for route, num in routes.items()]
    report.notes = [
        f"{NUM_LAYERS + 1} ways: local, offload, {NUM_LAYERS - 1} splits; {num_decisions} requests and "
        "worlds, with expectations, budget, battery, caches, and residuals of every route",
        "decision: `decide`, every candidate with its terms and the reason; argmin: `best`",
    ]
    return report


def _us(function: Callable[[RouterInputs], Any], inputs: RouterInputs) -> float:
    started = time.perf_counter_ns()
    function(inputs)
    return (time.perf_counter_ns() - started) / 1e3


def _profile(side: str, *, layer_s: float, step_s: float) -> DeviceProfile:
    """Curves of as many points as measured ones have; the figures do not matter here."""
    rows = (1, 8, 32, 64, 128, 256)
    contexts = (0, 64, 256, 512, 1024, 2048, 4096)
    return DeviceProfile(
        side="edge" if side == "edge" else "cloud", device=side, provider="cpu", threads=4, model="m",
        precision="q8", num_layers=NUM_LAYERS, hidden=2048, dated="2026-01-01",
        prefill=tuple((float(n), layer_s * (0.8 + 0.1 * n)) for n in rows), prefill_context_s=1e-8,
        decode=tuple((float(n), layer_s * (1 + n / 4000)) for n in contexts),
        layer_share=(1.0,) * NUM_LAYERS, step_s=step_s, embed_row_s=1e-5, head_s=4 * layer_s,
        codec_row_s=2e-5, batch=((1.0, 1.0), (4.0, 1.3), (16.0, 2.1), (64.0, 5.0)), load_s=0.05,
        layer_bytes=60 * _MB, embed_bytes=250 * _MB, head_bytes=0, scratch_bytes=20 * _MB,
        idle_w=3.0, active_w=12.0, kl=0.01,
        labels=dict.fromkeys(FIGURES, "modelled"),
    )  # fmt: skip


def _draw(num: int, rng: np.random.Generator) -> list[RouterInputs]:
    """Requests of mixed lengths in changing worlds; local, offload and split are all sometimes best."""
    edge = _profile("edge", layer_s=5e-4, step_s=5e-4)
    cloud = _profile("cloud", layer_s=2e-4, step_s=5e-3)
    wire = Wire.of(edge.hidden, "int8o")
    prices = Prices(input_usd_per_mtok=0.1, output_usd_per_mtok=0.4, egress_usd_per_gb=0.09)
    return [_inputs(rng, edge, cloud, wire, prices) for _ in range(num)]


def _inputs(
    rng: np.random.Generator, edge: DeviceProfile, cloud: DeviceProfile, wire: Wire, prices: Prices
) -> RouterInputs:
    prompt, output = int(rng.integers(16, 3000)), float(rng.integers(8, 500))
    rtt_s, up, down = float(rng.exponential(0.02)), *map(float, rng.uniform(1e5, 1e7, 2))
    link = LinkView(*(Estimate(value, value / 10, 1.0, 20, "passive") for value in (rtt_s, up, down)))
    known = tuple((route, tuple(np.sort(rng.normal(0, 0.2, WINDOW)).tolist())) for route in sorted(_ROUTES))
    world = World(
        edge, cloud, link, wire, kv_bytes=4096,
        edge_state=EdgeState(int(rng.integers(0, NUM_LAYERS + 1)), bool(rng.integers(2))),
        cloud_state=CloudState(True, True, float(rng.integers(0, 20)), float(rng.exponential(1.0))),
        prices=prices, radio=Radio(2e-7, 1e-7, 0.0),
        factors=Factors(*np.exp(rng.normal(0, 0.2, 8)).tolist()),
    )  # fmt: skip
    layer_bytes = (60 * _MB,) * NUM_LAYERS
    return RouterInputs(
        NUM_LAYERS, layer_bytes, 250 * _MB, 0, 4096, prompt + 512,
        memory_bytes=int(rng.integers(300, 6000)) * _MB, cloud_state="up", cloud_context=8192, world=world,
        work=Work(prompt, output, 512, {20: prompt // 2}, {0: prompt // 3, 20: prompt // 2}),
        slo=Slo(2.0, 8.0), max_cost_usd=0.01, budget_left_usd=float(rng.uniform(0.01, 0.1)),
        device=DeviceState(float(rng.uniform()), plugged=False), residuals=Residuals(known, known),
        pinned=("split", 20, "prefix"),
    )  # fmt: skip

"""Profiles with round numbers and worlds made of them, for the tests of cost model and planner."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from isthmus.protocol.profiles import FIGURES, DeviceProfile, Prices
from isthmus.splitter.links import Estimate, LinkView
from isthmus.splitter.situation import CloudState, EdgeState, Wire, World

NUM_LAYERS = 4
HIDDEN = 100
MB = 1 << 20
FAR = LinkView.given(rtt_s=0.05, up_bytes_per_s=1e6, down_bytes_per_s=2e6)
WIRE = Wire(row_bytes=100.0, step_row_bytes=120.0, hidden_row_bytes=200.0, chunk_rows=32)


def edge_profile(**changes: Any) -> DeviceProfile:
    """1 ms per row and layer of a prompt; 2 ms per layer of a step, and 1 µs for each token of context."""
    fields: dict[str, Any] = {
        "side": "edge", "device": "slow", "provider": "cpu", "threads": 1, "model": "tiny", "precision": "q8",
        "num_layers": NUM_LAYERS, "hidden": HIDDEN, "dated": "2026-01-01",
        "prefill": ((32.0, 0.032),), "prefill_context_s": 0.0,
        "decode": ((0.0, 0.002), (1000.0, 0.003)), "layer_share": (1.0,) * NUM_LAYERS,
        "step_s": 0.001, "embed_row_s": 0.0001, "head_s": 0.01, "codec_row_s": 0.0002,
        "load_s": 0.5, "layer_bytes": 10 * MB, "embed_bytes": 4 * MB, "head_bytes": 2 * MB,
        "scratch_bytes": MB, "idle_w": 2.0, "active_w": 10.0,
        "labels": dict.fromkeys(FIGURES, "modelled"),
    }  # fmt: skip
    return DeviceProfile(**{**fields, **changes})


def cloud_profile(**changes: Any) -> DeviceProfile:
    """Ten times as fast at prompts, four times at steps; two sessions at once take half as long again."""
    fields: dict[str, Any] = {
        "side": "cloud", "device": "fast", "prefill": ((32.0, 0.0032),), "decode": ((0.0, 0.0005),),
        "step_s": 0.0005, "embed_row_s": 0.00001, "head_s": 0.001, "codec_row_s": 0.00002,
        "batch": ((1.0, 1.0), (2.0, 1.5)), "idle_w": None, "active_w": None,
    }  # fmt: skip
    return edge_profile(**{**fields, **changes})


def make_world(**changes: Any) -> World:
    """Both profiles, 50 ms away."""
    fields: dict[str, Any] = {
        "edge": edge_profile(), "cloud": cloud_profile(), "link": FAR, "wire": WIRE, "kv_bytes": 1000,
    }  # fmt: skip
    return World(**{**fields, **changes})


# ---- for hypothesis --------------------------------------------------------------------------------

seconds = st.floats(0, 0.05, allow_nan=False)
EDGE = edge_profile()
ANOTHER_EDGE = edge_profile(
    prefill=((1.0, 0.004), (8.0, 0.006), (64.0, 0.03)),
    prefill_context_s=2e-7,
    layer_share=(0.5, 1.0, 1.0, 1.5),
    active_w=None,
    idle_w=None,
)
CLOUD = cloud_profile()
SLOW_CLOUD = cloud_profile(prefill=((1.0, 0.02), (64.0, 0.2)), decode=((16.0, 0.01), (512.0, 0.02)))

links = st.builds(
    LinkView,
    rtt=st.none() | st.builds(Estimate, value=st.floats(0, 1), deviation=st.floats(0, 0.1)),
    up=st.none() | st.builds(Estimate, value=st.floats(1e3, 1e9) | st.just(float("inf"))),
    down=st.none() | st.builds(Estimate, value=st.floats(1e3, 1e9) | st.just(float("inf"))),
)
all_prices = st.builds(
    Prices,
    input_usd_per_mtok=st.floats(0, 100),
    output_usd_per_mtok=st.floats(0, 100),
    gpu_usd_per_h=st.floats(0, 10),
    utilisation=st.floats(0.05, 1),
    egress_usd_per_gb=st.floats(0, 1),
)
worlds = st.builds(
    World,
    edge=st.sampled_from([EDGE, ANOTHER_EDGE]),
    cloud=st.sampled_from([CLOUD, SLOW_CLOUD]),
    link=links,
    wire=st.builds(replace, st.just(WIRE), chunk_rows=st.integers(1, 256)),
    kv_bytes=st.integers(0, 100_000),
    edge_state=st.builds(
        EdgeState,
        loaded_layers=st.none() | st.integers(0, NUM_LAYERS),
        head_loaded=st.booleans(),
        running=st.integers(0, 3),
    ),
    cloud_state=st.builds(
        CloudState,
        connected=st.booleans(),
        tls=st.booleans(),
        sessions=st.floats(0, 5),
        queue_s=st.floats(0, 5),
        canary=st.booleans(),
    ),
    prices=all_prices,
)
shapes = st.sampled_from(["prefix", "u"])

"""The six situations in which the router is judged. What is not measured on this machine is declared here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from isthmus.bench.router_hidden import CloudLoad
from isthmus.edge.policy import Policy
from isthmus.edge.requests import Slo
from isthmus.protocol.profiles import DeviceProfile, Prices
from isthmus.splitter.situation import Radio

CONTEXT: Final = 512
ROWS: Final = 128
WIFI: Final = Radio(up_j=2e-6, down_j=1e-6)


@dataclass(frozen=True, slots=True)
class Speed:
    """A device that runs the whole model: a decode step behind `CONTEXT` tokens, and a chunk of `ROWS` rows
    with nothing before it. Recorded times are stretched to these, so that a scenario is the same one on
    every machine that records."""

    step_s: float
    chunk_s: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """`edge`, `cloud`: how fast they are by themselves. `gap_s`: mean time between requests.
    `watts`: idle, active. `battery_j`: what is in it when full; None on mains, `battery`: its charge at the
    start. `memory`: the edge's limit over what the model with a middling request takes, None: none.
    `private`, `local_only`: shares of the requests that are activations-only and local-only. `budget`: over
    what all requests would cost if they were offloaded, None: none."""

    name: str
    about: str
    edge: Speed
    cloud: Speed
    rtt_s: float
    gap_s: float
    load: CloudLoad
    prices: Prices
    radio: Radio = WIFI
    watts: tuple[float, float] = (5.0, 20.0)
    battery_j: float | None = None
    battery: float = 1.0
    memory: float | None = None
    slo: Slo = Slo()
    private: float = 0.1
    local_only: float = 0.05
    budget: float | None = None
    min_depth: int = 2
    policy: Policy = field(default_factory=Policy)

    def row(self) -> dict[str, Any]:
        """As the report declares it."""
        return {
            "scenario": self.name,
            "about": self.about,
            "edge_step_ms": 1000 * self.edge.step_s,
            "edge_chunk_ms": 1000 * self.edge.chunk_s,
            "cloud_step_ms": 1000 * self.cloud.step_s,
            "cloud_chunk_ms": 1000 * self.cloud.chunk_s,
            "rtt_ms": 1000 * self.rtt_s,
            "gap_s": self.gap_s,
            "load_sessions": self.load.sessions,
            "load_sigma": self.load.sigma,
            "free_sessions": self.load.free_sessions,
            "wait_s": self.load.wait_s,
            "input_usd_per_mtok": self.prices.input_usd_per_mtok,
            "output_usd_per_mtok": self.prices.output_usd_per_mtok,
            "data_usd_per_gb": 1e9 * self.radio.usd_per_byte,
            "idle_w": self.watts[0],
            "active_w": self.watts[1],
            "battery": "none" if self.battery_j is None else f"{self.battery:g} of {self.battery_j:g} J",
            "memory": self.memory or "unlimited",
            "slo": f"{self.slo.ttft_s} s, {self.slo.tokens_per_s} tokens/s" if self.slo else "none",
            "private": self.private,
            "local_only": self.local_only,
            "budget": self.budget or "unlimited",
            "min_depth": self.min_depth,
        }


_PRICES: Final = Prices(input_usd_per_mtok=0.1, output_usd_per_mtok=0.4)
_SHARED: Final = CloudLoad(sessions=4.0, sigma=0.6, free_sessions=4.0, wait_s=0.15)
_BUSY: Final = CloudLoad(sessions=6.0, sigma=0.8, free_sessions=6.0, wait_s=0.2)

_LAPTOP: Final = Speed(step_s=0.009, chunk_s=0.085)

SCENARIOS: Final = (
    Scenario(
        "laptop_plugged",
        "a laptop on mains; a shared cloud that is twice as fast while it is idle",
        edge=_LAPTOP, cloud=Speed(0.0045, 0.036), rtt_s=0.04, gap_s=10.0, load=_SHARED, prices=_PRICES,
    ),
    Scenario(
        "laptop_battery",
        "the laptop on a battery that runs down",
        edge=_LAPTOP, cloud=Speed(0.006, 0.048), rtt_s=0.04, gap_s=10.0, load=_SHARED,
        prices=Prices(input_usd_per_mtok=0.5, output_usd_per_mtok=2.0), battery_j=180_000.0, battery=0.6,
    ),
    Scenario(
        "jetson_lte",
        "a small board on a battery and a mobile link, paying for data",
        edge=Speed(0.018, 0.17), cloud=Speed(0.01, 0.08), rtt_s=0.06, gap_s=12.0, load=_BUSY,
        prices=_PRICES, radio=Radio(up_j=8e-6, down_j=4e-6, usd_per_byte=5e-9), watts=(4.0, 12.0),
        battery_j=180_000.0, battery=0.8,
    ),
    Scenario(
        "edge_too_small",
        "an edge that does not hold the model; a small busy cloud near by that is paid by the token",
        edge=_LAPTOP, cloud=Speed(0.03, 0.24), rtt_s=0.01, gap_s=20.0, load=_BUSY,
        prices=Prices(input_usd_per_mtok=3.0, output_usd_per_mtok=15.0), memory=0.75, private=0.3,
        local_only=0.0, min_depth=4,
    ),
    Scenario(
        "tight_slo",
        "a first token within a second, then 40 a second",
        edge=_LAPTOP, cloud=Speed(0.004, 0.032), rtt_s=0.04, gap_s=10.0,
        load=CloudLoad(sessions=5.0, sigma=0.6, free_sessions=5.0, wait_s=0.25), prices=_PRICES,
        slo=Slo(1.0, 40.0),
    ),
    Scenario(
        "budget_nearly_spent",
        "money for two fifths of the requests",
        edge=Speed(0.012, 0.11), cloud=Speed(0.005, 0.04), rtt_s=0.04, gap_s=10.0, load=_BUSY,
        prices=_PRICES, budget=0.4,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stretch:
    """What recorded times are multiplied with."""

    prefill: float
    decode: float


def as_device(profile: DeviceProfile, stretch: Stretch, watts: tuple[float, float] | None) -> DeviceProfile:
    """The profile as it would have been measured on the stretched device."""
    names = ("step_s", "embed_row_s", "head_s", "codec_row_s", "load_s")
    scaled = {name: stretch.decode * getattr(profile, name) for name in names}
    scaled["prefill_context_s"] = stretch.prefill * profile.prefill_context_s
    curves = {
        "prefill": tuple((rows, stretch.prefill * s) for rows, s in profile.prefill),
        "decode": tuple((context, stretch.decode * s) for context, s in profile.decode),
    }
    power = {} if watts is None else {"idle_w": watts[0], "active_w": watts[1]}
    labels = profile.labels if watts is None else {**profile.labels, "power": "modelled"}
    return profile.model_copy(update={**scaled, **curves, **power, "labels": labels})

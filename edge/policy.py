"""What the router weighs: the worth of time, money, energy, a missed expectation and fidelity, in dollars."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from isthmus.protocol.errors import ConfigError
from isthmus.splitter.sides import finite


@dataclass(frozen=True, slots=True)
class Policy:
    """Prices of what has none. All are 0 or more (ConfigError).

    `usd_per_s`: a second of waiting for the answer. `usd_per_j`: a joule of an empty battery; a full one's is
    worth a tenth, and on mains nothing. `slo_miss_usd`: a missed expectation. `usd_per_nat`: a nat of KL
    divergence to the source weights, per token. `hysteresis`: by which share of its score the way taken last
    may be worse before it is left.
    """

    usd_per_s: float = 1e-3
    usd_per_j: float = 5e-5
    slo_miss_usd: float = 0.02
    usd_per_nat: float = 1e-4
    hysteresis: float = 0.05

    def __post_init__(self) -> None:
        for name in ("usd_per_s", "usd_per_j", "slo_miss_usd", "usd_per_nat", "hysteresis"):
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is {value}, it must be 0 or more", code="bad_policy")


@dataclass(frozen=True, slots=True)
class DeviceState:
    """`battery`: its charge, 0 … 1; `plugged`: on mains. None where there is no such sensor."""

    battery: float | None = None
    plugged: bool | None = None


def energy_weight(policy: Policy, device: DeviceState) -> float:
    """Dollars per joule: 0 on mains or without a battery, else rising as the battery falls."""
    charge = finite(device.battery)
    if device.plugged or charge is None:
        return 0.0
    return policy.usd_per_j * (0.1 + 0.9 * (1.0 - min(1.0, max(0.0, charge))))

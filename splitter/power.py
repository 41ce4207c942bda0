"""What this device draws: the kernel's energy counters and power sensors, and the battery's state.

Sources, best first: RAPL (Documentation/power/powercap in the Linux tree), the INA3221 of a Jetson, as
tegrastats reads it (Documentation/hwmon/ina3221), a discharging battery (Documentation/ABI/testing/
sysfs-class-power). A value that is missing, unreadable or absurd is None here and nowhere a number.

Public: EnergyMeter find_meter measure_watts check_watts BatteryState battery_state.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from isthmus.protocol.errors import ConfigError

SYS: Final = Path("/sys")
_MOST_WATTS: Final = 100_000.0  # beyond is no device but a broken sensor

# A Jetson's rails: one of these carries the whole module, the others are parts of it. Boards without such a
# one (AGX) divide the module into rails that are added up.
_WHOLE_MODULE: Final = ("VDD_IN", "POM_5V_IN", "5V_IN")


class EnergyMeter(Protocol):
    """Energy drawn since the meter was made, in joules; None once the sensor fails. `settle_s`: differences
    over less time than this mean nothing."""

    source: str
    settle_s: float

    def joules(self) -> float | None: ...


class RaplMeter:
    """The CPU packages' energy counters (with their memory where it is counted apart)."""

    source = "RAPL, CPU packages only"
    settle_s = 0.05  # the counters move every millisecond

    def __init__(self, zones: list[Path]) -> None:
        self._last: dict[Path, float | None] = dict.fromkeys(zones)
        self._joules = 0.0

    def joules(self) -> float | None:
        for zone, last in self._last.items():
            now = _number(zone / "energy_uj")
            if now is None:
                return None
            step = 0.0 if last is None else now - last
            if step < 0:  # the counter went round
                span = _number(zone / "max_energy_range_uj")
                if span is None or span < -step:
                    return None
                step += span
            self._last[zone] = now
            self._joules += step / 1e6
        return self._joules


class SampledMeter:
    """A power sensor, summed up by the trapezoid between calls: call `joules` often."""

    def __init__(
        self,
        source: str,
        settle_s: float,
        watts: Callable[[], float | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.source, self.settle_s = source, settle_s
        self._watts, self._clock = watts, clock
        self._last: tuple[float, float] | None = None
        self._joules = 0.0

    def joules(self) -> float | None:
        watts, now = self._watts(), self._clock()
        if watts is None:
            return None
        if self._last is not None:
            before, at = self._last
            self._joules += (watts + before) / 2 * (now - at)
        self._last = (watts, now)
        return self._joules


def find_meter(root: Path = SYS, clock: Callable[[], float] = time.monotonic) -> EnergyMeter | None:
    """The best meter under `root` that gives a reading now, or None."""
    meters: list[EnergyMeter] = []
    if zones := list(_rapl_zones(root)):
        meters.append(RaplMeter(zones))
    meters.append(SampledMeter("INA3221 of a Jetson", 0.2, lambda: jetson_watts(root), clock))
    # A battery's gauge averages over seconds.
    meters.append(SampledMeter("discharge of the battery", 10.0, lambda: battery_watts(root), clock))
    return next((meter for meter in meters if meter.joules() is not None), None)


def measure_watts(
    meter: EnergyMeter,
    work: Callable[[], object],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float | None:
    """Mean power in watts while `work` is called again and again for `seconds`; None if the sensor fails."""
    before, started = meter.joules(), clock()
    while True:
        work()
        now, elapsed = meter.joules(), clock() - started
        if before is None or now is None:
            return None
        if elapsed >= seconds:
            return _sane((now - before) / elapsed)


def check_watts(watts: tuple[float, float] | None) -> None:
    """ConfigError (`bad_watts`) for a declared (idle, active) that no device draws."""
    if watts is None:
        return
    idle, active = watts
    if _sane(idle) is None or _sane(active) is None or active < idle:
        raise ConfigError(
            f"{idle:g} W idle and {active:g} W active are no power of a device",
            code="bad_watts",
            hint="give both in watts, the active one not below the idle one",
        )


def jetson_watts(root: Path = SYS) -> float | None:
    """Power of the whole module by its INA3221 sensors, in watts. Driver of mainline (hwmon: mV and mA), or
    of JetPack 4 (iio: mW)."""
    rails: dict[str, float | None] = {}
    for sensor in sorted((root / "class/hwmon").glob("hwmon*")):
        if _text(sensor / "name") != "ina3221":
            continue
        for channel in (1, 2, 3):
            label = _text(sensor / f"in{channel}_label")
            if label and label != "NC":
                volts, amperes = (
                    _number(sensor / f"in{channel}_input"),
                    _number(sensor / f"curr{channel}_input"),
                )
                rails[label] = None if volts is None or amperes is None else _sane(volts * amperes / 1e6)
    for sensor in sorted((root / "bus/iio/devices").glob("iio:device*")):
        for channel in (0, 1, 2):
            if label := _text(sensor / f"rail_name_{channel}"):
                milliwatts = _number(sensor / f"in_power{channel}_input")
                rails[label] = None if milliwatts is None else _sane(milliwatts / 1e3)
    for label in _WHOLE_MODULE:
        if label in rails:
            return rails[label]
    parts = [watts for watts in rails.values() if watts is not None]
    return sum(parts) if parts and len(parts) == len(rails) else None


def battery_watts(root: Path = SYS) -> float | None:
    """What all batteries together give off, in watts; None unless one discharges and tells."""
    total = 0.0
    for battery in sorted((root / "class/power_supply").glob("BAT*")):
        if _text(battery / "status") != "Discharging":
            continue
        watts = _scaled(_number(battery / "power_now"), 1e-6)
        if watts is None:
            current, voltage = _number(battery / "current_now"), _number(battery / "voltage_now")
            watts = None if current is None or voltage is None else abs(current) * voltage * 1e-12
        # Some drivers count what flows out as negative.
        sane = None if watts is None else _sane(abs(watts))
        if sane is None:
            return None
        total += sane
    return total or None


@dataclass(frozen=True, slots=True)
class BatteryState:
    """`share` of a full charge, 0 … 1; `plugged`: mains are connected. None: unknown, or no battery."""

    share: float | None = None
    plugged: bool | None = None


def battery_state(sensor: Callable[[], Any] | None = None) -> BatteryState:
    """The battery now, by `sensor` (default: psutil.sensors_battery). A charge that can't be is None."""
    if sensor is None:
        import psutil

        sensor = getattr(psutil, "sensors_battery", None)  # absent on some systems
    try:
        battery = sensor() if sensor is not None else None
    except (OSError, RuntimeError, ValueError):  # a driver that half answers
        return BatteryState()
    if battery is None:
        return BatteryState()
    percent, plugged = battery.percent, battery.power_plugged
    known = isinstance(percent, int | float) and 0 <= percent <= 110  # worn gauges tell a little over 100
    return BatteryState(
        min(1.0, percent / 100) if known else None, plugged if isinstance(plugged, bool) else None
    )


def _rapl_zones(root: Path) -> Iterator[Path]:
    """Packages, and memory that they don't count. `psys` and the parts of a package would count twice."""
    for zone in sorted((root / "class/powercap").glob("intel-rapl:*")):
        name = _text(zone / "name")
        is_package = re.fullmatch(r"intel-rapl:\d+", zone.name) and name.startswith("package")
        if is_package or (re.fullmatch(r"intel-rapl:\d+:\d+", zone.name) and name == "dram"):
            yield zone


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    try:
        value = float(_text(path))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _sane(watts: float) -> float | None:
    return watts if 0 <= watts <= _MOST_WATTS else None  # NaN fails both

"""Power sensors on a made-up /sys: what counts, what wraps, what is missing, unreadable or nonsense."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from isthmus.protocol.errors import ConfigError
from isthmus.splitter.machine import cpu_name
from isthmus.splitter.power import (
    BatteryState,
    SampledMeter,
    battery_state,
    battery_watts,
    check_watts,
    find_meter,
    jetson_watts,
    measure_watts,
)


def write(root: Path, files: dict[str, object]) -> None:
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")


def rapl(zone: str, name: str, energy: object, span: int = 1_000_000_000) -> dict[str, object]:
    folder = f"class/powercap/{zone}"
    return {f"{folder}/name": name, f"{folder}/energy_uj": energy, f"{folder}/max_energy_range_uj": span}


def ina(channel: int, label: str, millivolts: object, milliamperes: object) -> dict[str, object]:
    folder = "class/hwmon/hwmon1"
    return {
        f"{folder}/name": "ina3221",
        f"{folder}/in{channel}_label": label,
        f"{folder}/in{channel}_input": millivolts,
        f"{folder}/curr{channel}_input": milliamperes,
    }


def battery(values: dict[str, object], name: str = "BAT0", status: str = "Discharging") -> dict[str, object]:
    folder = f"class/power_supply/{name}"
    return {f"{folder}/status": status, **{f"{folder}/{key}": value for key, value in values.items()}}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# --- RAPL


def test_packages_and_their_memory_count_once(tmp_path: Path) -> None:
    packages = [("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1")]
    parts = [("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "dram")]
    others = [("intel-rapl:2", "psys"), ("intel-rapl-mmio:0", "package-0")]
    zones = packages + parts + others
    for zone, name in zones:
        write(tmp_path, rapl(zone, name, 5_000_000))
    meter = find_meter(tmp_path)
    assert meter is not None
    assert meter.joules() == 0
    for zone, name in zones:
        write(tmp_path, rapl(zone, name, 7_000_000))
    assert meter.joules() == pytest.approx(6)  # two packages and one dram, 2 J each
    assert "RAPL" in meter.source


def test_a_counter_that_goes_round_goes_on(tmp_path: Path) -> None:
    write(tmp_path, rapl("intel-rapl:0", "package-0", 999_000_000))
    meter = find_meter(tmp_path)
    assert meter is not None
    write(tmp_path, rapl("intel-rapl:0", "package-0", 2_000_000))
    assert meter.joules() == pytest.approx(3)
    write(tmp_path, rapl("intel-rapl:0", "package-0", 4_000_000))
    assert meter.joules() == pytest.approx(5)
    write(tmp_path, rapl("intel-rapl:0", "package-0", 1_000, span=1_000))  # a range that can't be
    assert meter.joules() is None


@pytest.mark.parametrize("energy", ["", "nan", "inf", "no number"])
def test_a_counter_that_tells_nothing_is_no_meter(tmp_path: Path, energy: str) -> None:
    write(tmp_path, rapl("intel-rapl:0", "package-0", energy))
    assert find_meter(tmp_path) is None


def test_an_unreadable_counter_gives_way_to_the_next_source(tmp_path: Path) -> None:
    write(tmp_path, rapl("intel-rapl:0", "package-0", 1))
    (tmp_path / "class/powercap/intel-rapl:0/energy_uj").unlink()
    (tmp_path / "class/powercap/intel-rapl:0/energy_uj").mkdir()  # unreadable for root, too
    write(tmp_path, ina(1, "VDD_IN", 5000, 1000))
    meter = find_meter(tmp_path)
    assert meter is not None
    assert "INA3221" in meter.source


def test_nothing_there(tmp_path: Path) -> None:
    assert find_meter(tmp_path) is None
    assert find_meter(tmp_path / "absent") is None


# --- Jetson


def test_the_rail_of_the_whole_module_counts_alone(tmp_path: Path) -> None:
    write(tmp_path, ina(2, "VDD_CPU_GPU_CV", 5000, 900) | ina(1, "VDD_IN", 5000, 1200))
    assert jetson_watts(tmp_path) == pytest.approx(6)


def test_rails_that_are_parts_add_up(tmp_path: Path) -> None:
    write(tmp_path, ina(1, "VDD_GPU_SOC", 20000, 300) | ina(2, "VDD_CPU_CV", 20000, 200))
    write(tmp_path, ina(3, "NC", 0, 0))
    assert jetson_watts(tmp_path) == pytest.approx(10)
    write(tmp_path, ina(2, "VDD_CPU_CV", 20000, "nan"))  # the sum would be too small
    assert jetson_watts(tmp_path) is None


def test_the_older_driver(tmp_path: Path) -> None:
    folder = "bus/iio/devices/iio:device0"
    write(tmp_path, {f"{folder}/rail_name_0": "POM_5V_IN", f"{folder}/in_power0_input": 4200})
    write(tmp_path, {f"{folder}/rail_name_1": "POM_5V_GPU", f"{folder}/in_power1_input": 700})
    assert jetson_watts(tmp_path) == pytest.approx(4.2)


@pytest.mark.parametrize(("volts", "amperes"), [("nan", 1000), (5000, ""), (5000, -1000), (5000, 10**12)])
def test_a_rail_that_lies(tmp_path: Path, volts: object, amperes: object) -> None:
    write(tmp_path, ina(1, "VDD_IN", volts, amperes))
    assert jetson_watts(tmp_path) is None


def test_other_sensors_are_not_the_power(tmp_path: Path) -> None:
    write(tmp_path, ina(1, "VDD_IN", 5000, 1000) | {"class/hwmon/hwmon1/name": "coretemp"})
    assert jetson_watts(tmp_path) is None


# --- battery


@pytest.mark.parametrize(
    ("values", "watts"),
    [
        ({"power_now": 8_500_000}, 8.5),
        ({"power_now": -8_500_000}, 8.5),
        ({"current_now": 1_000_000, "voltage_now": 12_000_000}, 12),
        ({"current_now": -1_000_000, "voltage_now": 12_000_000}, 12),
        ({"power_now": "nan", "current_now": 2_000_000, "voltage_now": 5_000_000}, 10),
        ({"current_now": 1_000_000}, None),
        ({"power_now": 10**13}, None),
        ({"power_now": 0}, None),
        ({}, None),
    ],
)
def test_a_discharging_battery(tmp_path: Path, values: dict[str, object], watts: float | None) -> None:
    write(tmp_path, battery(values))
    found = battery_watts(tmp_path)
    assert found == (None if watts is None else pytest.approx(watts))


def test_batteries_add_up_and_only_while_they_discharge(tmp_path: Path) -> None:
    write(tmp_path, battery({"power_now": 3_000_000}) | battery({"power_now": 4_000_000}, "BAT1"))
    assert battery_watts(tmp_path) == pytest.approx(7)
    write(tmp_path, battery({"power_now": 4_000_000}, "BAT1", status="Charging"))
    assert battery_watts(tmp_path) == pytest.approx(3)
    write(tmp_path, battery({}, status="Full"))
    assert battery_watts(tmp_path) is None
    assert find_meter(tmp_path) is None


# --- energy and power


def test_sampled_power_becomes_energy_by_the_trapezoid(tmp_path: Path) -> None:
    clock = Clock()
    write(tmp_path, ina(1, "VDD_IN", 5000, 1000))
    meter = find_meter(tmp_path, clock)
    assert meter is not None
    write(tmp_path, ina(1, "VDD_IN", 5000, 3000))
    clock.now += 2
    assert meter.joules() == pytest.approx(20)  # from 5 W to 15 W in 2 s
    clock.now += 1
    assert meter.joules() == pytest.approx(35)


def steady(watts: float | None) -> tuple[SampledMeter, Clock]:
    clock = Clock()
    return SampledMeter("test", 0.0, lambda: watts, clock), clock


def test_measured_power_is_energy_over_time_while_working() -> None:
    meter, clock = steady(12.5)
    calls: list[float] = []

    def work() -> None:
        clock.now += 0.3
        calls.append(clock.now)

    assert measure_watts(meter, work, 1.0, clock) == pytest.approx(12.5)
    assert len(calls) == 4


def test_a_sensor_that_fails_gives_no_power() -> None:
    readings: list[float | None] = [5.0, None]
    clock = Clock()
    meter = SampledMeter("test", 0.0, lambda: readings.pop(0), clock)
    assert measure_watts(meter, lambda: None, 1.0, clock) is None
    broken, clock = steady(None)
    assert measure_watts(broken, lambda: None, 1.0, clock) is None


@pytest.mark.parametrize("watts", [(math.nan, 5.0), (1.0, math.inf), (-1.0, 5.0), (6.0, 5.0)])
def test_declared_watts_that_cannot_be(watts: tuple[float, float]) -> None:
    with pytest.raises(ConfigError) as error:
        check_watts(watts)
    assert error.value.code == "bad_watts"
    assert f"{watts[0]:g}" in error.value.message


def test_declared_watts_that_can() -> None:
    check_watts(None)
    check_watts((0.0, 0.0))
    check_watts((3.0, 15.0))


# --- the battery's state


def sensor(percent: object, plugged: object = False) -> Callable[[], Any]:
    return lambda: SimpleNamespace(percent=percent, power_plugged=plugged)


@pytest.mark.parametrize(
    ("read", "state"),
    [
        (sensor(40.0), BatteryState(0.4, False)),
        (sensor(100, True), BatteryState(1.0, True)),
        (sensor(103.0), BatteryState(1.0, False)),
        (sensor(0), BatteryState(0.0, False)),
        (sensor(math.nan), BatteryState(None, False)),
        (sensor(-5), BatteryState(None, False)),
        (sensor(6553.5), BatteryState(None, False)),
        (sensor(None, None), BatteryState(None, None)),
        (lambda: None, BatteryState(None, None)),
    ],
)
def test_battery_state(read: Callable[[], Any], state: BatteryState) -> None:
    assert battery_state(read) == state


def test_a_battery_driver_that_fails() -> None:
    def read() -> None:
        raise OSError("no such device")

    assert battery_state(read) == BatteryState()


def test_this_machines_battery_is_told_or_not() -> None:
    state = battery_state()
    assert state.share is None or 0 <= state.share <= 1


# --- the machine's name


def test_the_processor_by_name(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"cpuinfo": "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n", "device-tree/model": "Board\0"},
    )
    assert cpu_name(tmp_path) == "Some CPU @ 3 GHz"
    write(tmp_path, {"cpuinfo": "processor\t: 0\nBogoMIPS\t: 62.50\n"})
    assert cpu_name(tmp_path) == "Board"
    assert cpu_name(tmp_path / "absent")  # whatever Python knows

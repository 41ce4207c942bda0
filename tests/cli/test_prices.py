"""What a cloud charges, from flags, environment and file to what edges are told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from isthmus.commands.prices import PRICES, asked_prices
from isthmus.config import BY_NAME, Settings
from isthmus.protocol.errors import ConfigError
from isthmus.protocol.profiles import Prices


@pytest.fixture(autouse=True)
def no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CONFIG", str(tmp_path / "config.toml"))


def test_without_prices_nothing_is_told() -> None:
    assert asked_prices(Settings({})) is None
    assert asked_prices(Settings({"prices_dated": "2026-11-01"})) is None
    assert set(PRICES) <= set(BY_NAME)


def test_those_not_given_are_zero_and_zero_is_a_price() -> None:
    told = asked_prices(Settings({"price_output_per_mtok": 0.0, "prices_dated": "2026-11-01"}))
    assert told == Prices(dated="2026-11-01")
    told = asked_prices(Settings({"gpu_usd_per_h": 2.5, "utilisation": 0.5}))
    assert told is not None
    assert (told.gpu_usd_per_h, told.utilisation, told.input_usd_per_mtok) == (2.5, 0.5, 0.0)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", told.dated)


def test_the_environment_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_EGRESS_USD_PER_GB", "0.09")
    told = asked_prices(Settings({"price_input_per_mtok": 0.2}))
    assert told is not None
    assert (told.egress_usd_per_gb, told.input_usd_per_mtok) == (0.09, 0.2)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("price_input_per_mtok", -0.1, "bad_setting"),
        ("price_output_per_mtok", float("nan"), "bad_setting"),
        ("gpu_usd_per_h", float("inf"), "bad_setting"),
        ("egress_usd_per_gb", "free", "bad_setting"),
        ("utilisation", -1, "bad_setting"),
        ("utilisation", 0, "bad_price"),
        ("utilisation", 1.01, "bad_price"),
    ],
)
def test_what_is_no_price_is_refused_by_name(name: str, value: object, code: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        asked_prices(Settings({name: value}))
    assert caught.value.code == code
    assert caught.value.hint

"""Profiles and prices: what their form refuses, and that WELCOME holds the largest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from isthmus.protocol.errors import ConfigError
from isthmus.protocol.frames import MsgType, decode_frame, encode_frame, json_frame, parse_json
from isthmus.protocol.handshake import answer_hello
from isthmus.protocol.limits import Limits
from isthmus.protocol.messages import Load, Welcome
from isthmus.protocol.profiles import FIGURES, DeviceProfile, Prices
from tests.protocol.pairing import HELLO, INFO, LIMITS, make_profile


def test_a_profile_survives_its_file() -> None:
    profile = make_profile(idle_w=2.5, note="by hand")
    text = profile.to_json()
    assert text.endswith("}\n")
    assert DeviceProfile.from_json(text, name="p.json") == profile
    assert DeviceProfile.from_json(text.encode(), name="p.json") == profile


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefill": ((1.0, 0.1), (1.0, 0.2))}, "prefill: its points do not rise"),
        ({"decode": ((9.0, 0.1), (1.0, 0.2))}, "decode: its points do not rise"),
        ({"batch": ((2.0, 1.0), (1.0, 1.0))}, "batch: its points do not rise"),
        ({"layer_share": (1.0, 1.0)}, "layer_share has 2 entries for 4 layers"),
        ({"layer_share": (1.0, 1.0, 1.0, 1.1)}, "layer_share adds up to 4.1, not 4"),
        ({"labels": {"prefill": "measured"}}, "labels missing, or of no figure: batch, codec"),
        (
            {"labels": {**dict.fromkeys(FIGURES, "measured"), "taste": "modelled"}},
            "labels missing, or of no figure: taste",
        ),
        ({"labels": dict.fromkeys(FIGURES, "guessed")}, "Input should be 'measured'"),
        ({"prefill": ()}, "at least 1 item"),
        ({"step_s": float("nan")}, "finite number"),
        ({"step_s": -1.0}, "greater than or equal to 0"),
        ({"dated": "yesterday"}, "match pattern"),
        ({"format": 2}, "Input should be 1"),
    ],
)
def test_what_contradicts_itself_is_no_profile(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_profile(**changes)


@pytest.mark.parametrize("data", ["", "{}", "[]", b"\xff", '{"format":1,"side":"edge"}'])
def test_a_file_that_is_none_is_named(data: str | bytes) -> None:
    with pytest.raises(ConfigError, match=r"^p\.json is no device profile") as caught:
        DeviceProfile.from_json(data, name="p.json")
    assert caught.value.code == "bad_profile"
    assert "isthmus profile" in caught.value.hint
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    "changes",
    [
        {"input_usd_per_mtok": -1.0},
        {"gpu_usd_per_h": float("inf")},
        {"utilisation": 0.0},
        {"utilisation": 1.5},
    ],
)
def test_prices_are_amounts(changes: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Prices(**changes)  # type: ignore[arg-type]


def test_the_largest_profile_fits_into_welcome() -> None:
    layers = 1024
    points = tuple((i + 1 / 3, i / 7) for i in range(64))
    share = tuple(1 + (-1) ** i / 3 for i in range(layers))
    profile = make_profile(
        num_layers=layers, layer_share=share, prefill=points, decode=points, batch=points, note="x" * 4096
    )
    info = replace(INFO, num_layers=layers, profile=profile, prices=Prices(input_usd_per_mtok=0.5))
    welcome = answer_hello(HELLO, info, LIMITS, Load(), tuple(range(layers)))
    data = encode_frame(json_frame(MsgType.WELCOME, welcome))
    limits = Limits()
    assert len(data) < limits.max_control_bytes / 2
    frame = decode_frame(data, max_body=limits.max_message_bytes, max_control=limits.max_control_bytes)
    assert parse_json(frame, Welcome) == welcome

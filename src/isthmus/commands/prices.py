"""What a cloud charges: flags and settings of `isthmus serve cloud`, which tells its edges."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from isthmus.config import Settings
from isthmus.protocol.errors import ConfigError

if TYPE_CHECKING:
    from isthmus.protocol.profiles import Prices

_FIELDS: Final = {
    "price_input_per_mtok": "input_usd_per_mtok",
    "price_output_per_mtok": "output_usd_per_mtok",
    "gpu_usd_per_h": "gpu_usd_per_h",
    "utilisation": "utilisation",
    "egress_usd_per_gb": "egress_usd_per_gb",
}
"""By setting, the field of Prices."""


def _usd(flag: str, text: str) -> Any:
    return Annotated[float | None, typer.Option(flag, help=text, metavar="USD")]


PRICES: Final[Mapping[str, Any]] = {
    "price_input_per_mtok": _usd("--price-input-per-mtok", "Price of a million tokens in."),
    "price_output_per_mtok": _usd("--price-output-per-mtok", "Price of a million tokens out."),
    "gpu_usd_per_h": _usd("--gpu-usd-per-h", "What this machine costs in an hour."),
    "utilisation": Annotated[
        float | None,
        typer.Option("--utilisation", help="Share of that hour in which it computes.", metavar="0..1"),
    ],
    "egress_usd_per_gb": _usd("--egress-usd-per-gb", "Price of a gigabyte that leaves the cloud."),
    "prices_dated": Annotated[
        str | None, typer.Option("--prices-dated", help="Since when; today if not given.", metavar="DATE")
    ],
}
"""For `with_flags`."""


def asked_prices(settings: Settings) -> Prices | None:
    """The prices set, those left out being zero; None where none is. ConfigError `bad_price`."""
    from pydantic import ValidationError

    from isthmus.protocol.profiles import Prices

    given = {name: value for name in _FIELDS if (value := settings.real(name)) is not None}
    if not given:
        return None
    dated = settings.text("prices_dated") or datetime.now(UTC).date().isoformat()
    try:
        return Prices(**{_FIELDS[name]: value for name, value in given.items()}, dated=dated)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = str(first["loc"][0])
        name = next((name for name, one in _FIELDS.items() if one == field), "prices_dated")
        raise ConfigError(
            f"{name} = {given.get(name, dated)}: {first['msg']}",
            code="bad_price",
            hint="prices are in US dollars, zero at least; utilisation lies above 0, up to 1",
        ) from error

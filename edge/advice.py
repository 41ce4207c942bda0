"""Sampling parameters from what was asked and what the model's makers advise (generation.json)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from isthmus.protocol.errors import RequestError
from isthmus.protocol.sampling import SamplingParams

_ADVISED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def sampling_params(
    asked: Mapping[str, Any], advice: Mapping[str, Any], *, temperature: float, **fixed: Any
) -> SamplingParams:
    """The parameters of a request: what was asked (None: nothing), else the advice, else none of it.

    `temperature` is that of a request where neither says one; advice not to sample (`do_sample` false)
    means 0. `fixed` are the parameters that nobody advises. RequestError names a value out of range.
    """
    advised = {name: advice[name] for name in _ADVISED if advice.get(name) is not None}
    if advice.get("do_sample") is False:
        advised["temperature"] = 0.0
    chosen = {"temperature": temperature, **advised, **fixed}
    chosen |= {name: value for name, value in asked.items() if value is not None}
    # JSON writes 50.0 for an int and 1 for a float, as it likes.
    chosen = {name: _as_declared(name, value) for name, value in chosen.items()}
    try:
        return SamplingParams(**chosen)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        whose = "" if asked.get(name) is not None or name in fixed else " (from the model's generation.json)"
        raise RequestError(
            f"{name} is {first['input']!r}{whose}: {first['msg']}", code="bad_sampling"
        ) from error


def _as_declared(name: str, value: Any) -> Any:
    if (
        isinstance(value, float)
        and SamplingParams.model_fields[name].annotation is int
        and value.is_integer()
    ):
        return int(value)
    return value

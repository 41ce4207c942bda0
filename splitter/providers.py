"""Which ONNX Runtime execution provider to use: asked for by a short name, refused by name when absent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.protocol.errors import ConfigError

CPU = "CPUExecutionProvider"

PROVIDERS: dict[str, str] = {
    "cpu": CPU,
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "qnn": "QNNExecutionProvider",
}
"""Short name (`--provider`) -> ONNX Runtime's name."""


@dataclass(frozen=True, slots=True)
class ProviderChoice:
    """`name` as asked for; `chain` is what a session is opened with, the CPU always last."""

    name: str
    chain: tuple[str, ...]


def available_providers() -> list[str]:
    """Short names of the providers this installation of ONNX Runtime can open, in `PROVIDERS` order."""
    import onnxruntime

    here = set(onnxruntime.get_available_providers())
    return [name for name, full in PROVIDERS.items() if full in here]


def choose_provider(name: str) -> ProviderChoice:
    """The chain for `name`. Raises ConfigError (`unknown_provider`, `provider_unavailable`).

    Nothing is substituted silently: who asks for `cuda` on a machine without it gets the error.
    """
    full = PROVIDERS.get(name)
    if full is None:
        raise ConfigError(
            f"unknown provider {name!r}", code="unknown_provider", hint=f"one of: {', '.join(PROVIDERS)}"
        )
    here = available_providers()
    if name not in here:
        raise ConfigError(
            f"provider {name!r} is not available in this onnxruntime",
            code="provider_unavailable",
            hint=f"available here: {', '.join(here)}; other providers need another onnxruntime wheel",
        )
    return ProviderChoice(name, (full,) if full == CPU else (full, CPU))


def provider_used(session_providers: Sequence[str]) -> str:
    """Short name of the first provider a session reports after it was opened: the one that really runs.

    ONNX Runtime falls back to the CPU without an error when a provider's libraries fail to load, so what was
    asked for proves nothing.
    """
    first = session_providers[0]
    return next((name for name, full in PROVIDERS.items() if full == first), first)

"""Rotary position tables (cos, sin) in numpy, bit for bit the angles transformers uses.

Formulae: RoFormer (arXiv:2104.09864); linear scaling divides every frequency by `factor`; Llama 3
scaling divides long wavelengths only and blends in between (Llama 3.1 reference implementation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched. The last three fields are used by `llama3` only."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


def llama3_divisors(inv_freq: F32, scaling: RopeScaling) -> F32:
    """What Llama 3 scaling divides each frequency by, f32[head_dim/2]; GGUF stores exactly these numbers."""
    return (inv_freq / _scaled(inv_freq, scaling)).astype(np.float32)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> F32:
    """Radians per position of each rotated pair, f32[head_dim/2].

    Rounded to f32 before use, as every reference implementation does: at position 8192 the rounding
    moves an angle by up to 2e-4, so a table computed in f64 throughout would *not* agree with theirs.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    inv_freq = np.float32(1.0) / powers
    return inv_freq if scaling is None else _scaled(inv_freq, scaling)


def _scaled(inv_freq: F32, scaling: RopeScaling) -> F32:
    factor = np.float32(scaling.factor)
    if scaling.kind == "linear":
        return inv_freq / factor
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    original = np.float32(scaling.original_context)
    wavelength = np.float32(2 * np.pi) / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    blended = (np.float32(1) - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = np.where(wavelength > original / low, inv_freq / factor, blended)
    return np.where(wavelength < original / high, inv_freq, scaled).astype(np.float32)


def rope_tables(length: int, head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[F32, F32]:
    """(cos, sin), each f32[length, head_dim/2], for positions 0..length-1."""
    inv_freq = inverse_frequencies(head_dim, theta, scaling)
    # The product is rounded to f32 (as the references do); only its cosine is taken in f64.
    angles = (np.arange(length, dtype=np.float32)[:, None] * inv_freq[None, :]).astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

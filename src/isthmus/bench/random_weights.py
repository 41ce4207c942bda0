"""Models without a checkpoint: the shapes of real ones, with random weights made tensor by tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from isthmus.protocol.errors import ConfigError
from isthmus.quant.gguf_blocks import GGUFBlocks
from isthmus.splitter.checkpoint import F32, U8, Checkpoint, TensorInfo
from isthmus.splitter.spec import ModelSpec, RopeScaling

_LLAMA_1B: Final = ModelSpec(
    family="llama",
    num_layers=16,
    hidden=2048,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    intermediate=8192,
    vocab_size=128_256,
    context_length=131_072,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling("llama3", 32.0),
    norm_eps=1e-5,
    qk_norm=False,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    tied_embedding=True,
    sliding_window=None,
    bos_id=128_000,
    eos_ids=(128_009,),
    base_name="llama-3.2-1b",
)
_LLAMA_8B: Final = replace(
    _LLAMA_1B,
    num_layers=32,
    hidden=4096,
    head_dim=128,
    intermediate=14_336,
    rope_scaling=RopeScaling("llama3", 8.0),
    tied_embedding=False,
    base_name="llama-3.1-8b",
)
# For trying the bench out where neither memory nor time is there for the others.
_TINY: Final = replace(
    _LLAMA_1B,
    num_layers=6,
    hidden=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate=128,
    vocab_size=512,
    context_length=4096,
    bos_id=0,
    eos_ids=(1,),
    base_name="tiny",
)
SHAPES: Final = {spec.base_name: spec for spec in (_LLAMA_1B, _LLAMA_8B, _TINY)}
_PUBLIC: Final = (_LLAMA_1B.base_name, _LLAMA_8B.base_name)


def shape_named(name: str) -> ModelSpec:
    """The spec of a known shape; ConfigError names the choices."""
    try:
        return SHAPES[name]
    except KeyError:
        choices = ", ".join(_PUBLIC)
        raise ConfigError(f"--random-weights {name!r} is none of {choices}", hint=f"use {choices}") from None


class RandomCheckpoint(Checkpoint):
    """Random weights in the place of a file. A tensor exists only while it is read, so that a model of 8 B
    weights never lies in memory as f32. Values repeat every few million: speed does not depend on them."""

    _num_values = 4_194_301  # prime: no two rows of a matrix begin at the same value
    _spread = 0.02  # as models are initialised: the residual stream stays finite through all layers

    def __init__(self, spec: ModelSpec, *, seed: int = 0) -> None:
        infos = {
            name: TensorInfo(shape, "F32", 4 * int(np.prod(shape)))
            for name, shape in spec.tensor_shapes().items()
        }
        super().__init__(Path(f"random-{spec.base_name}"), spec, infos)
        noise = np.random.default_rng(seed).standard_normal(self._num_values, dtype=np.float32)
        self._noise: F32 = noise * np.float32(self._spread)

    def dense(self, name: str) -> F32:
        shape = self.info(name).shape
        if name.endswith("norm.weight"):
            return np.ones(shape, dtype=np.float32)
        return np.resize(self._noise, shape)

    def blocks(self, name: str) -> GGUFBlocks | None:
        self.info(name)
        return None

    def _raw(self, name: str) -> U8:
        return self.dense(name).reshape(-1).view(np.uint8)

    def close(self) -> None:
        """Nothing is open."""

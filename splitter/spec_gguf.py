"""Reads GGUF metadata into a `ModelSpec`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from isthmus.protocol.errors import ModelFileError, UnsupportedModelError
from isthmus.splitter.rope import F32, inverse_frequencies, llama3_divisors
from isthmus.splitter.spec import FAMILIES, ModelSpec, RopeScaling, canonical_base_name


def _short(value: float) -> float:
    """The shortest decimal with the same 32 bits: GGUF keeps 1e-5 as 9.99999974e-06."""
    return float(str(np.float32(value)))


class _Keys:
    """Typed access to `<architecture>.*` keys with errors that name the key."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._metadata, self._prefix = metadata, architecture + "."

    def raw(self, key: str) -> Any:
        return self._metadata.get(self._prefix + key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.raw(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # one number per layer, all equal
        if value is None and default is not None:
            return default
        if value is None:
            raise ModelFileError(f"GGUF: key {self._prefix + key!r} is missing")
        if isinstance(value, list):
            raise UnsupportedModelError(
                f"GGUF: {self._prefix + key} differs between layers", hint="not supported"
            )
        if type(value) is not int:
            raise ModelFileError(f"GGUF: {self._prefix + key} = {value!r}, expected an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise ModelFileError(f"GGUF: key {self._prefix + key!r} is missing")
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ModelFileError(f"GGUF: {self._prefix + key} = {value!r}, expected a finite number")
        return _short(value)

    def refuse_unless(self, key: str, neutral: tuple[Any, ...]) -> None:
        value = self.raw(key)
        if value is not None and value not in neutral:
            raise UnsupportedModelError(
                f"GGUF: {self._prefix + key} = {value!r} is not supported",
                hint="supported: absent or " + ", ".join(map(str, neutral)),
            )


def _scaling(keys: _Keys, divisors: F32 | None, head_dim: int, theta: float) -> RopeScaling | None:
    kind = keys.raw("rope.scaling.type")
    if kind not in (None, "none", "linear"):
        raise UnsupportedModelError(
            f"GGUF: rope.scaling.type = {kind!r} is not supported", hint="supported: none, linear, Llama 3"
        )
    if divisors is not None:
        return _llama3_from_divisors(divisors, head_dim, theta)
    # `rope.scale_linear` is the name older files use.
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if factor < 1:
        raise ModelFileError(f"GGUF: rope.scaling.factor = {factor}, expected at least 1")
    return RopeScaling("linear", factor) if kind != "none" and factor != 1 else None


def _llama3_from_divisors(divisors: F32, head_dim: int, theta: float) -> RopeScaling | None:
    """GGUF keeps only what each frequency is divided by; find the parameters that give those numbers."""
    plain = inverse_frequencies(head_dim, theta, None)
    if divisors.shape != plain.shape or not np.all(np.isfinite(divisors) & (divisors > 0)):
        raise ModelFileError(
            f"GGUF: rope_freqs.weight has shape {divisors.shape} or bad values, expected {plain.shape} of > 0"
        )
    factor = _short(float(divisors.max()))
    if factor == 1:
        return None
    for original in (8192, 4096, 2048, 16384, 32768):
        candidate = RopeScaling("llama3", factor, 1.0, 4.0, original)
        if np.allclose(llama3_divisors(plain, candidate), divisors, rtol=1e-4):
            return candidate
    raise UnsupportedModelError(
        "GGUF: rope_freqs.weight is not Llama 3 scaling with factors 1 and 4",
        hint="use the safetensors checkpoint",
    )


def spec_from_gguf(
    metadata: Mapping[str, Any], tensor_names: Collection[str], rope_divisors: F32 | None
) -> ModelSpec:
    """See `ModelSpec.from_gguf`."""
    family = metadata.get("general.architecture")
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"GGUF: general.architecture = {family!r} is not supported",
            hint=f"supported: {', '.join(FAMILIES)}",
        )
    keys = _Keys(metadata, family)
    for key, neutral in {
        "expert_count": (0,),
        "attention.causal": (True,),
        "logit_scale": (0.0, 1.0),
        "attention.scale": (0.0,),
        "attention.clamp_kqv": (0.0,),
        "attn_logit_softcapping": (0.0,),
        "final_logit_softcapping": (0.0,),
    }.items():
        keys.refuse_unless(key, neutral)
    hidden, num_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    if num_heads < 1:
        raise ModelFileError(f"GGUF: attention.head_count = {num_heads}")
    head_dim = keys.integer("attention.key_length", hidden // num_heads)
    keys.refuse_unless("attention.value_length", (head_dim,))
    keys.refuse_unless("rope.dimension_count", (head_dim,))
    theta = keys.number("rope.freq_base", 10000.0)
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab_size = keys.integer("vocab_size", len(tokens) if isinstance(tokens, list) else None)
    names = set(tensor_names)
    basename = str(metadata.get("general.basename") or "")
    size_label = str(metadata.get("general.size_label") or "")
    name = (
        f"{basename}-{size_label}" if basename and size_label else str(metadata.get("general.name") or family)
    )
    window = keys.integer("attention.sliding_window", 0)
    return ModelSpec(
        family=family,
        num_layers=keys.integer("block_count"),
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=keys.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        intermediate=keys.integer("feed_forward_length"),
        vocab_size=vocab_size,
        context_length=keys.integer("context_length"),
        rope_theta=theta,
        rope_scaling=_scaling(keys, rope_divisors, head_dim, theta),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        qk_norm="blk.0.attn_q_norm.weight" in names or (family == "qwen3" and not names),
        qkv_bias="blk.0.attn_q.bias" in names or (family == "qwen2" and not names),
        o_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_down.bias" in names,
        tied_embedding="output.weight" not in names,
        sliding_window=window or None,
        bos_id=_token_id(metadata, "bos_token_id"),
        eos_ids=_end_ids(metadata),
        base_name=canonical_base_name(name),
    )


def _token_id(metadata: Mapping[str, Any], key: str) -> int | None:
    value = metadata.get("tokenizer.ggml." + key)
    if value is not None and type(value) is not int:
        raise ModelFileError(f"GGUF: tokenizer.ggml.{key} = {value!r}, expected an integer")
    return value


def _end_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """End of text, of turn, of message: any of them ends a reply."""
    ids = (_token_id(metadata, key) for key in ("eos_token_id", "eot_token_id", "eom_token_id"))
    return tuple(dict.fromkeys(token for token in ids if token is not None))

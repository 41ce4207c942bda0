"""Reads a Hugging Face `config.json` into a `ModelSpec`, with transformers' own defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from isthmus.protocol.errors import ModelFileError, UnsupportedModelError
from isthmus.splitter.spec import FAMILIES, ModelSpec, RopeScaling, canonical_base_name

# Fields that change the computation, with the values that leave it as we compute it. Anything else
# in such a field is refused; unknown fields outside this list are bookkeeping in every config seen.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "rope_interleaved": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1, 1.0),
    "clip_qkv": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "no_rope_layers": (None, []),
    "attention_chunk_size": (None,),
    "use_mrope": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def refuse(what: str, value: object, supported: str) -> UnsupportedModelError:
    """The error for a model that is well formed but asks for something we don't compute."""
    return UnsupportedModelError(
        f"model config: {what} = {value!r} is not supported", hint=f"supported: {supported}"
    )


def _int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        if default is None:
            raise ModelFileError(f"config.json: field {key!r} is missing")
        return default
    if type(value) is not int:
        raise ModelFileError(f"config.json: {key} = {value!r}, expected an integer")
    return value


def _float(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key)
    if value is None:
        if default is None:
            raise ModelFileError(f"config.json: field {key!r} is missing")
        return default
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ModelFileError(f"config.json: {key} = {value!r}, expected a finite number")
    return float(value)


def _bool(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if type(value) is not bool:
        raise ModelFileError(f"config.json: {key} = {value!r}, expected true or false")
    return value


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    # transformers 5 writes `rope_parameters` with theta inside; older files `rope_theta` + `rope_scaling`.
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(field) or {}
    if not isinstance(rope, Mapping):
        raise ModelFileError(f"config.json: {field} = {rope!r}, expected an object")
    theta = _float(rope, "rope_theta", _float(config, "rope_theta", 10000.0))
    if rope.get("partial_rotary_factor") not in _NEUTRAL["partial_rotary_factor"]:
        raise refuse(f"{field}.partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", None):
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", _factor(rope, field))
    if kind != "llama3":
        raise refuse(f"{field}.rope_type", kind, "default, linear, llama3")
    scaling = RopeScaling(
        "llama3",
        _factor(rope, field),
        _float(rope, "low_freq_factor"),
        _float(rope, "high_freq_factor"),
        _int(rope, "original_max_position_embeddings", _int(config, "max_position_embeddings")),
    )
    if not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
        raise ModelFileError(
            f"config.json: {field} low_freq_factor {scaling.low_freq_factor} must be below "
            f"high_freq_factor {scaling.high_freq_factor}"
        )
    return theta, scaling


def _factor(rope: Mapping[str, Any], field: str) -> float:
    factor = _float(rope, "factor")
    if factor < 1:
        raise ModelFileError(f"config.json: {field}.factor = {factor}, expected at least 1")
    return factor


def _sliding_window(config: Mapping[str, Any], family: str, num_layers: int) -> int | None:
    """The window all layers share, or None. Models that mix both kinds of layer are refused."""
    if family == "llama":
        if config.get("sliding_window") is not None:
            raise refuse("sliding_window", config["sliding_window"], "null for the llama family")
        return None
    # An absent field means 4096 in MistralConfig; Mistral 7B v0.2 and later write null.
    window = config.get("sliding_window", 4096)
    if family != "mistral" and not _bool(config, "use_sliding_window"):
        return None
    if window is None:
        return None
    if type(window) is not int or window < 1:
        raise ModelFileError(f"config.json: sliding_window = {window!r}, expected a positive integer")
    if family == "mistral":
        return window
    kinds = config.get("layer_types")
    if kinds is None:
        first = _int(config, "max_window_layers", 28)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    if set(kinds) == {"full_attention"}:
        return None
    if set(kinds) == {"sliding_attention"}:
        return window
    raise refuse("use_sliding_window", "some layers only", "all layers or none")


def _end_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    ids: list[int] = []
    for source in (generation, config):
        value = source.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if token is None or token in ids:
                continue
            if type(token) is not int:
                raise ModelFileError(f"config.json: eos_token_id = {value!r}, expected integers")
            ids.append(token)
    return tuple(ids)


def spec_from_hf(config: Mapping[str, Any], generation: Mapping[str, Any], *, base_name: str) -> ModelSpec:
    """See `ModelSpec.from_hf`."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise refuse("model_type", family, ", ".join(FAMILIES))
    for architecture in config.get("architectures") or ():
        if architecture != _ARCHITECTURES[family]:
            raise refuse("architectures", architecture, _ARCHITECTURES[family])
    for key, neutral in _NEUTRAL.items():
        value = config.get(key, neutral[0])
        # bool is an int in Python: `True in (None, 1)` must not pass as the neutral 1.
        if not any(type(value) is type(ok) and value == ok for ok in neutral):
            raise refuse(key, value, " or ".join(repr(ok) for ok in neutral))
    num_layers, num_heads = _int(config, "num_hidden_layers"), _int(config, "num_attention_heads")
    hidden = _int(config, "hidden_size")
    if num_heads < 1:
        raise ModelFileError(f"config.json: num_attention_heads = {num_heads}")
    if config.get("head_dim") is None and family != "qwen3" and hidden % num_heads:
        raise ModelFileError(
            f"config.json: hidden_size {hidden} is not a multiple of {num_heads} attention heads"
        )
    theta, scaling = _rope(config)
    attention_bias = family in ("llama", "qwen3") and _bool(config, "attention_bias")
    bos = config.get("bos_token_id")
    if isinstance(bos, list):
        raise refuse("bos_token_id", bos, "one integer or null")
    return ModelSpec(
        family=family,
        num_layers=num_layers,
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=_int(config, "num_key_value_heads", num_heads if family == "llama" else None),
        head_dim=_int(config, "head_dim", 128 if family == "qwen3" else hidden // num_heads),
        intermediate=_int(config, "intermediate_size"),
        vocab_size=_int(config, "vocab_size"),
        context_length=_int(config, "max_position_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_float(config, "rms_norm_eps", 1e-6),
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family == "llama" and _bool(config, "mlp_bias"),
        tied_embedding=_bool(config, "tie_word_embeddings"),
        sliding_window=_sliding_window(config, family, num_layers),
        bos_id=None if bos is None else _int(config, "bos_token_id"),
        eos_ids=_end_ids(config, generation),
        base_name=canonical_base_name(str(base_name or config.get("_name_or_path") or family)),
    )

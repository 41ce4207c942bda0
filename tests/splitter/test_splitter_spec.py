"""ModelSpec: read as transformers reads it, refused by name where it can't be honoured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.protocol.errors import ModelFileError, UnsupportedModelError
from isthmus.splitter.checkpoint import open_checkpoint
from isthmus.splitter.rope import inverse_frequencies, llama3_divisors, rope_tables
from isthmus.splitter.spec import ModelSpec, RopeScaling, canonical_base_name
from tests.tiny import LLAMA3_ROPE, make_tiny, make_tiny_gguf

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "general.basename": "tiny",
    "general.size_label": "1M",
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.rope.freq_base": 10000.0,
    "llama.vocab_size": 320,
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 2,
}
LLAMA_32 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_hf_config_gives_the_dimensions_of_the_model_transformers_builds(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = make_tiny(family, tmp_path / family, tied=family != "llama")
    spec = ModelSpec.from_hf(json.loads((path / "config.json").read_text()))
    model = AutoModelForCausalLM.from_pretrained(path)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert spec.family == family
    assert (spec.num_layers, spec.hidden) == (4, 64)
    assert attention.q_proj.weight.shape == (spec.q_size, spec.hidden)
    assert attention.v_proj.weight.shape == (spec.kv_size, spec.hidden)
    assert mlp.down_proj.weight.shape == (spec.hidden, spec.intermediate)
    assert (attention.q_proj.bias is not None) == spec.qkv_bias == (family == "qwen2")
    assert (attention.o_proj.bias is not None) == spec.o_bias
    assert hasattr(attention, "q_norm") == spec.qk_norm == (family == "qwen3")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == spec.tied_embedding
    assert spec.kv_bytes_per_token_layer(2) == 2 * spec.kv_size * 2


@pytest.mark.parametrize(
    ("theta", "scaling", "head_dim"),
    [
        (10000.0, None, 64),
        (100000.0, None, 64),
        (1000000.0, None, 128),
        (10000.0, {"rope_type": "linear", "factor": 4.0}, 64),
        (500000.0, LLAMA_32, 64),
        (500000.0, {**LLAMA_32, "factor": 8.0}, 128),
    ],
)
def test_rope_tables_match_transformers(theta: float, scaling: dict[str, Any] | None, head_dim: int) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    length = 9000
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": theta},
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None])
    spec = ModelSpec.from_hf(
        {
            **LLAMA,
            "rope_theta": theta,
            "rope_scaling": scaling,
            "head_dim": head_dim,
            "max_position_embeddings": 131072,
        }
    )
    ours = spec.rope_tables(length)
    half = head_dim // 2
    assert ours[0].shape == ours[1].shape == (length, half)
    assert ours[0].dtype == np.float32
    # Frequencies agree to the last bit or one ulp, angles too; only the cosine itself is rounded differently.
    assert np.abs(ours[0] - cos[0, :, :half].numpy()).max() < 1e-6
    assert np.abs(ours[1] - sin[0, :, :half].numpy()).max() < 1e-6


def test_old_and_new_spelling_of_rope_parameters_mean_the_same() -> None:
    old = ModelSpec.from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": {**LLAMA_32, "type": "llama3"}})
    fields = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    new = ModelSpec.from_hf({**fields, "rope_parameters": {**LLAMA_32, "rope_theta": 5e5}})
    assert old == new
    assert old.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gemma2"),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("hidden_act", "gelu"),
        ("quantization_config", {"bits": 4}),
        ("partial_rotary_factor", 0.5),
        ("rope_interleaved", True),
        ("attn_logit_softcapping", 50.0),
        ("num_experts", 8),
        ("sliding_window", 4096),
        ("residual_multiplier", True),
    ],
)
def test_fields_that_change_the_computation_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UnsupportedModelError, match=field):
        ModelSpec.from_hf({**LLAMA, field: value})


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "invented"])
def test_unknown_rope_scaling_is_refused(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"rope_type = '{kind}'"):
        ModelSpec.from_hf({**LLAMA, "rope_scaling": {"rope_type": kind, "factor": 4.0}})


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("hidden_size", None, "hidden_size"),
        ("hidden_size", "64", "hidden_size"),
        ("hidden_size", 66, "66"),
        ("num_attention_heads", 0, "num_attention_heads"),
        ("num_key_value_heads", 3, "4 attention heads"),
        ("num_hidden_layers", 2**40, "num_layers"),
        ("vocab_size", -1, "vocab_size"),
        ("vocab_size", True, "vocab_size"),
        ("head_dim", 15, "odd"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps"),
        ("rope_theta", -1.0, "rope_theta"),
        ("eos_token_id", 320, "320"),
        ("eos_token_id", ["2"], "eos_token_id"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings"),
        ("rope_scaling", [1], "rope_scaling"),
        ("rope_scaling", {"rope_type": "linear", "factor": 0.5}, "factor"),
        ("rope_scaling", {**LLAMA_32, "low_freq_factor": 4.0}, "low_freq_factor"),
    ],
)
def test_nonsense_in_the_config_is_a_typed_error(field: str, value: object, match: str) -> None:
    with pytest.raises(ModelFileError, match=match):
        ModelSpec.from_hf({**LLAMA, field: value})


def test_end_ids_of_generation_config_come_first() -> None:
    spec = ModelSpec.from_hf(LLAMA, {"eos_token_id": [7, 2, 9]})
    assert spec.eos_ids == (7, 2, 9)


@pytest.mark.parametrize(
    ("family", "fields", "window"),
    [
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 128}, 128),
        ("qwen2", {"sliding_window": 128}, None),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 2}, None),
        ("qwen3", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 0}, 128),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 4096),
    ],
)
def test_sliding_window(family: str, fields: dict[str, Any], window: int | None) -> None:
    config = {**LLAMA, "model_type": family, "architectures": None, **fields}
    assert ModelSpec.from_hf(config).sliding_window == window


def test_a_window_in_some_layers_only_is_refused() -> None:
    config = {**LLAMA, "model_type": "qwen2", "architectures": None, "use_sliding_window": True}
    with pytest.raises(UnsupportedModelError, match="use_sliding_window"):
        ModelSpec.from_hf({**config, "max_window_layers": 1})


def test_json_round_trip() -> None:
    spec = ModelSpec.from_hf({**LLAMA, "rope_scaling": LLAMA_32, "eos_token_id": [2, 3]})
    data = json.loads(json.dumps(spec.to_json()))
    assert ModelSpec.from_json(data) == spec
    assert ModelSpec.from_json(ModelSpec.from_hf(LLAMA).to_json()) == ModelSpec.from_hf(LLAMA)


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": "2"},
        {"num_layers": True},
        {"surprise": 1},
        {"rope_scaling": {"kind": "linear"}},
        {"rope_scaling": {"kind": "linear", "factor": 2.0, "x": 1}},
        {"eos_ids": ["a"]},
        {"hidden": 0},
    ],
)
def test_damaged_json_is_a_typed_error(change: dict[str, Any]) -> None:
    data = ModelSpec.from_hf(LLAMA).to_json() | change
    with pytest.raises(ModelFileError):
        ModelSpec.from_json(data)
    with pytest.raises(ModelFileError, match="norm_eps"):
        ModelSpec.from_json({key: value for key, value in data.items() if key != "norm_eps"})


def test_identity_is_that_of_the_computation() -> None:
    hf, gguf = ModelSpec.from_hf(LLAMA), ModelSpec.from_gguf(GGUF)
    assert hf.norm_eps == gguf.norm_eps == 1e-5
    assert hf.identity_fields() == gguf.identity_fields()
    assert hf.identity_fields() == dataclasses.replace(hf, context_length=64, eos_ids=()).identity_fields()
    others = [
        dataclasses.replace(hf, num_layers=3),
        dataclasses.replace(hf, rope_theta=5e5),
        dataclasses.replace(hf, norm_eps=1e-6),
        dataclasses.replace(hf, sliding_window=64),
        dataclasses.replace(hf, rope_scaling=RopeScaling("linear", 2.0)),
        dataclasses.replace(hf, rope_scaling=RopeScaling("linear", 4.0)),
        dataclasses.replace(hf, rope_scaling=RopeScaling("llama3", 4.0)),
    ]
    keys = {json.dumps(spec.identity_fields(), sort_keys=True) for spec in (hf, *others)}
    assert len(keys) == len(others) + 1


@pytest.mark.parametrize(
    "rope", [None, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, LLAMA3_ROPE]
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gguf_of_a_checkpoint_describes_the_same_model(
    family: str, rope: dict[str, Any] | None, tmp_path: Path
) -> None:
    overrides: dict[str, Any] = {"rope_parameters": rope} if rope else {}
    if rope is LLAMA3_ROPE:
        overrides["rope_parameters"] = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}
    source = make_tiny(family, tmp_path / family, tied=True, **overrides)
    with open_checkpoint(source) as hf, open_checkpoint(make_tiny_gguf(source, tmp_path / "m.gguf")) as gguf:
        assert dataclasses.replace(gguf.spec, base_name=hf.spec.base_name) == hf.spec


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_the_divisors_gguf_keeps(factor: float) -> None:
    scaling = RopeScaling("llama3", factor, 1.0, 4.0, 8192)
    divisors = llama3_divisors(inverse_frequencies(128, 5e5, None), scaling)
    metadata = {**GGUF, "llama.rope.freq_base": 5e5, "llama.attention.key_length": 128}
    assert ModelSpec.from_gguf(metadata, (), divisors).rope_scaling == scaling
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        ModelSpec.from_gguf(metadata, (), (divisors * np.linspace(1, 2, 64)).astype(np.float32))
    with pytest.raises(ModelFileError, match="rope_freqs"):
        ModelSpec.from_gguf(metadata, (), divisors[:-1])


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("general.architecture", "mamba", UnsupportedModelError),
        ("llama.expert_count", 8, UnsupportedModelError),
        ("llama.rope.scaling.type", "yarn", UnsupportedModelError),
        ("llama.rope.dimension_count", 8, UnsupportedModelError),
        ("llama.attention.value_length", 8, UnsupportedModelError),
        ("llama.attention.head_count_kv", [2, 1], UnsupportedModelError),
        ("llama.block_count", "2", ModelFileError),
        ("llama.block_count", None, ModelFileError),
        ("llama.attention.head_count", 0, ModelFileError),
        ("llama.attention.layer_norm_rms_epsilon", float("inf"), ModelFileError),
        ("llama.rope.scaling.factor", 0.5, ModelFileError),
        ("tokenizer.ggml.eos_token_id", "2", ModelFileError),
        ("general.architecture", None, UnsupportedModelError),
    ],
)
def test_gguf_keys_that_cannot_be_honoured(key: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=key.rpartition(".")[2].removesuffix("_id").split("_")[0]):
        ModelSpec.from_gguf({**GGUF, key: value})


def test_gguf_details() -> None:
    spec = ModelSpec.from_gguf(
        {**GGUF, "llama.attention.head_count_kv": [2, 2], "tokenizer.ggml.eot_token_id": 5}
    )
    assert (spec.num_kv_heads, spec.eos_ids, spec.base_name) == (2, (2, 5), "tiny-1m")
    assert ModelSpec.from_gguf({**GGUF, "llama.attention.sliding_window": 64}).sliding_window == 64
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    assert ModelSpec.from_gguf({**GGUF, **linear}).rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
        ("SmolLM2-135M", "smollm2-135m"),
        ("/models/Qwen2.5-0.5B-Instruct-GGUF/", "qwen2.5-0.5b"),
        ("Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("Llama-3.2-1B.Q4_K_M", "llama-3.2-1b"),
    ],
)
def test_base_names_of_one_model_agree(name: str, expected: str) -> None:
    assert canonical_base_name(name) == expected


def test_rope_tables_begin_at_position_zero() -> None:
    cos, sin = rope_tables(2, 4, 10000.0, None)
    np.testing.assert_allclose(cos, [[1, 1], [np.cos(1), np.cos(0.01)]], rtol=1e-6)
    np.testing.assert_allclose(sin, [[0, 0], [np.sin(1), np.sin(0.01)]], rtol=1e-6)

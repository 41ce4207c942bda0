"""Tiny random checkpoints of every supported family, made by transformers itself (the oracle)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

# Small but not degenerate: 4 layers, grouped key/value heads, head_dim * heads != hidden for Qwen3.
TINY_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 320,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
FAMILY_EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_tiny(family: str, path: Path, *, tied: bool = False, seed: int = 0, **overrides: Any) -> Path:
    """Writes config.json, generation_config.json, model.safetensors (f32) and tokenizer.json into `path`.

    `overrides` are fields of the transformers config (`num_hidden_layers=2`, `attention_bias=True`,
    `rope_parameters=LLAMA3_ROPE`, …). Weights are normal with a spread that makes logits lively;
    biases are random too and norms near 1, because zeros and ones would hide a missing term.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**TINY_SIZES, **FAMILY_EXTRAS[family], "tie_word_embeddings": tied, **overrides}
    config = AutoConfig.for_model(family, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(noise * (0.1 if parameter.ndim == 2 else 0.05))
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    write_tokenizer(path)
    return path


@cache
def tiny_tokenizer_json() -> str:
    """A byte-level BPE with three control tokens (0 `<|endoftext|>`, 1 `<|im_start|>`, 2 `<|im_end|>`)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t"), ("Ġt", "he"), ("Ã", "©")]
    tokens = [*controls, *letters, *("".join(pair) for pair in merges)]
    bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in controls])
    text: str = tokenizer.to_str()
    return text


TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(path: Path) -> None:
    """tokenizer.json and tokenizer_config.json (with a chat template) beside the weights."""
    (path / "tokenizer.json").write_text(tiny_tokenizer_json(), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "chat_template": TINY_CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def make_tiny_gguf(source: Path, out: Path, *, quantisation: str = "Q8_0") -> Path:
    """Converts a folder from `make_tiny` to a GGUF file the way llama.cpp's converter does.

    Matrices get `quantisation` (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0), norms and biases F32;
    q and k rows are interleaved for the llama architecture; Llama 3 scaling becomes `rope_freqs.weight`.
    """
    import gguf

    from isthmus.splitter.checkpoint import open_checkpoint
    from isthmus.splitter.rope import inverse_frequencies, llama3_divisors

    kind = gguf.GGMLQuantizationType[quantisation]
    with open_checkpoint(source) as checkpoint:
        spec = checkpoint.spec
        arch = spec.family
        writer = gguf.GGUFWriter(str(out), "llama" if arch == "mistral" else arch)
        writer.add_name(f"Tiny {arch}")
        writer.add_block_count(spec.num_layers)
        writer.add_context_length(spec.context_length)
        writer.add_embedding_length(spec.hidden)
        writer.add_feed_forward_length(spec.intermediate)
        writer.add_head_count(spec.num_heads)
        writer.add_head_count_kv(spec.num_kv_heads)
        writer.add_key_length(spec.head_dim)
        writer.add_value_length(spec.head_dim)
        writer.add_rope_dimension_count(spec.head_dim)
        writer.add_rope_freq_base(spec.rope_theta)
        writer.add_layer_norm_rms_eps(spec.norm_eps)
        writer.add_vocab_size(spec.vocab_size)
        if spec.rope_scaling is not None and spec.rope_scaling.kind == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(spec.rope_scaling.factor)
        elif spec.rope_scaling is not None:
            plain = inverse_frequencies(spec.head_dim, spec.rope_theta, None)
            writer.add_tensor("rope_freqs.weight", llama3_divisors(plain, spec.rope_scaling))
        _add_gguf_tokenizer(writer, spec.vocab_size)
        for name in checkpoint.names():
            values = checkpoint.dense(name)
            if arch in ("llama", "mistral") and name.split(".")[-2] in ("q", "k"):
                heads = values.shape[0] // spec.head_dim
                split = values.reshape(heads, 2, spec.head_dim // 2, *values.shape[1:])
                values = np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)
            if values.ndim == 1 or quantisation == "F32":
                writer.add_tensor(_gguf_name(name), values)
            else:
                data = gguf.quants.quantize(values, kind)
                writer.add_tensor(_gguf_name(name), data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return out


def _add_gguf_tokenizer(writer: Any, vocab_size: int) -> None:
    data = json.loads(tiny_tokenizer_json())
    tokens = sorted(data["model"]["vocab"], key=data["model"]["vocab"].__getitem__)
    padding = [f"[PAD{i}]" for i in range(len(tokens), vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *padding])
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3), *[5] * len(padding)])
    writer.add_token_merges([" ".join(pair) for pair in data["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TINY_CHAT_TEMPLATE)


_GGUF_NAMES = {
    "embed": "token_embd", "final_norm": "output_norm", "head": "output", "mlp_norm": "ffn_norm",
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


def _gguf_name(canonical: str) -> str:
    *place, stem, kind = canonical.split(".")
    prefix = f"blk.{place[1]}." if place else ""
    return f"{prefix}{_GGUF_NAMES.get(stem, stem)}.{kind}"

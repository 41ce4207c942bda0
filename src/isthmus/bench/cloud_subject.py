"""What `bench cloud` measures: a checkpoint, what its edges send, and the fp32 reference for fidelity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from isthmus.bench.cloud_fleet import EdgeInputs
from isthmus.bench.cloud_peer import TransformersPeer
from isthmus.bench.random_weights import RandomCheckpoint, shape_named
from isthmus.cloud.forward import MixedForward
from isthmus.cloud.kv import BlockTable, columns_for
from isthmus.cloud.linear import Precision
from isthmus.cloud.model import CloudModel, model_logits
from isthmus.cloud.precision import MAX_MEASURED_WEIGHTS, num_weights, sample_ids
from isthmus.protocol.errors import ConfigError
from isthmus.quant.measure import kl_per_position
from isthmus.splitter.checkpoint import Checkpoint, open_checkpoint
from isthmus.splitter.sample_text import SAMPLE_TEXTS
from isthmus.splitter.sources import pull
from isthmus.splitter.tokenizer import Tokenizer

if TYPE_CHECKING:
    from isthmus.splitter.spec import ModelSpec

NUM_TEXTS = 8
"""Distinct texts; session i speaks text i modulo this."""

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Fidelity:
    """The fp32 model's logits over the built-in sample."""

    samples: Sequence[Sequence[int]]
    logits: Sequence[Logits]

    def kl(self, logits_of: Callable[[Sequence[int]], Logits]) -> float:
        """Mean KL in nats per token from fp32 to what `logits_of` says of the same ids."""
        pairs = zip(self.samples, self.logits, strict=True)
        return float(np.concatenate([kl_per_position(ref, logits_of(ids)) for ids, ref in pairs]).mean())


@dataclass(frozen=True)
class Subject:
    """One model's checkpoint and inputs of prompt + output tokens. Without `fidelity` (random weights, or
    too large for fp32 here) KL is unknown."""

    checkpoint: Checkpoint
    inputs: EdgeInputs
    fidelity: Fidelity | None
    peer: TransformersPeer | None
    notes: tuple[str, ...]

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec


def real_subject(model: str, *, num_tokens: int, device: str, peer: bool) -> Subject:
    """A model on disk (pulled if needed). The rows of the edges come from its fp32 form over real text.

    Raises:
        ConfigError: the model's context is too short. Whatever pulling and loading raises.
    """
    pulled = pull(model)
    tokenizer = Tokenizer.from_bytes(pulled.tokenizer_json)
    checkpoint = open_checkpoint(pulled.path)
    spec = checkpoint.spec
    _check_context(spec, num_tokens)
    fits = num_weights(spec) <= MAX_MEASURED_WEIGHTS
    form = Precision.FP32 if fits else Precision.BF16
    reference = CloudModel.load(checkpoint, device=device, precision=form.value)
    samples = sample_ids(tokenizer, spec)
    fidelity = Fidelity(samples, [model_logits(reference, ids) for ids in samples]) if fits else None
    inputs = edge_inputs(reference, _texts(tokenizer, spec, num_tokens))
    notes = [
        f"edge rows are pre-computed by the {form.value} model over real text and fed without network; "
        "split sessions are teacher-forced, offload sessions stream their own tokens"
    ]
    if not fits:
        notes.append("KL is not measured: the fp32 form is too large for that here")
    return Subject(
        checkpoint, inputs, fidelity, _peer(checkpoint, device, notes) if peer else None, (*notes,)
    )


def random_subject(shape: str, *, num_tokens: int) -> Subject:
    """Random weights in the shape of a known model, and random rows: speed alone.

    Raises:
        ConfigError: unknown shape, or its context is too short.
    """
    spec = shape_named(shape)
    _check_context(spec, num_tokens)
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((num_tokens, spec.hidden), dtype=np.float32)
    ids = rng.integers(0, spec.vocab_size, num_tokens)
    inputs = EdgeInputs([ids], [[rows] * spec.num_layers])
    notes = (
        f"random weights in the shape of {shape}: speed only, no fidelity; edge rows are random too and fed "
        "without network",
    )
    return Subject(RandomCheckpoint(spec), inputs, None, None, notes)


def edge_inputs(model: CloudModel, texts: Sequence[NDArray[np.int64]]) -> EdgeInputs:
    """The rows of each text at every boundary, computed by `model`."""
    num_layers = model.spec.num_layers
    pages = num_layers * columns_for(max(len(ids) for ids in texts))
    store, pool = model.new_pages(pages)
    forward = MixedForward(model, store)
    rows = []
    for ids in texts:
        table = BlockTable(pool, first_layer=0, num_layers=num_layers)
        table.ensure(len(ids))  # nothing is shared, so nothing to copy
        rows.append(forward.boundaries(ids, table)[:num_layers])
        table.free_all()
    return EdgeInputs(texts, rows)


def _texts(tokenizer: Tokenizer, spec: ModelSpec, num_tokens: int) -> list[NDArray[np.int64]]:
    """Windows of the built-in sample, each beginning elsewhere and going around."""
    ids = [i for i in tokenizer.encode("\n\n".join(SAMPLE_TEXTS), special=False) if i < spec.vocab_size]
    ring = np.array(ids, dtype=np.int64)
    return [np.resize(np.roll(ring, -i * len(ring) // NUM_TEXTS), num_tokens) for i in range(NUM_TEXTS)]


def _peer(checkpoint: Checkpoint, device: str, notes: list[str]) -> TransformersPeer | None:
    try:
        return TransformersPeer(checkpoint.path, device=device)
    except ImportError as error:
        notes.append(f"no comparison with transformers: {error.name or error} is not installed")
        return None


def _check_context(spec: ModelSpec, num_tokens: int) -> None:
    if num_tokens > spec.context_length:
        raise ConfigError(
            f"prompt and output take {num_tokens} tokens, the model's context is {spec.context_length}",
            hint="use fewer --prompt-tokens or --output-tokens",
        )

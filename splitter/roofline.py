"""A device's profile from its data sheet, where nobody could measure it: the roofline model.

A piece of work takes the longer of its bytes over the memory bandwidth and its operations over the peak
(Williams, Waterman, Patterson 2009, "Roofline: an insightful visual performance model"), each at a stated
efficiency, plus a fixed time for launching it. A step of one row streams all weights, so decode is
bandwidth-bound; a prefill of many rows is compute-bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from isthmus.protocol.profiles import FIGURES, DeviceProfile, Label
from isthmus.splitter.profile_fit import rounded

_CONTEXTS: Final = (16, 256, 1024, 4096)
_ROWS: Final = (1, 8, 32, 64, 128, 256, 512)
_SESSIONS: Final = (1, 2, 4, 8, 16, 32, 64)
_BATCH_CONTEXT: Final = 512
_CHUNK_ROWS: Final = 128


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A decoder's sizes in elements, as in ModelSpec; the MLP is gated (gate, up, down)."""

    name: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int

    @property
    def layer_weights(self) -> int:
        """Weights of one layer; norms and biases are too few to count."""
        attention = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden
        return attention + 3 * self.hidden * self.intermediate


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """What a data sheet and some assumptions tell of a device that runs weights of one precision.

    `bytes_per_weight` with its scales; `kv_item_bytes`: of one element of the KV. `memory_bytes_per_s` and
    `ops_per_s` (multiply and add count as two) are the vendor's peaks, of which shares of
    `memory_efficiency` and `compute_efficiency` are reached; `attention_ops_per_s`: the peak in the
    precision of the attention. `layer_overhead_s`, `step_overhead_s`: launching a layer, and a step.
    `load_bytes_per_s`: of the disk. `codec_bytes_per_s`: f32 bytes of boundary rows that are encoded or
    decoded. `copies`: bytes resident per byte of weights. `batches`: sessions are computed in common; else
    one after the other.
    """

    side: Literal["edge", "cloud"]
    name: str
    provider: str
    threads: int
    precision: str
    bytes_per_weight: float
    kv_item_bytes: int
    memory_bytes_per_s: float
    ops_per_s: float
    attention_ops_per_s: float
    memory_efficiency: float
    compute_efficiency: float
    layer_overhead_s: float
    step_overhead_s: float
    load_bytes_per_s: float
    codec_bytes_per_s: float
    copies: float
    batches: bool
    idle_w: float
    active_w: float

    def seconds(self, *, nbytes: float = 0.0, ops: float = 0.0, attention_ops: float = 0.0) -> float:
        """The roofline: the longer of moving and computing."""
        moving = nbytes / (self.memory_bytes_per_s * self.memory_efficiency)
        computing = ops / self.ops_per_s + attention_ops / self.attention_ops_per_s
        return max(moving, computing / self.compute_efficiency)


def modelled_profile(model: ModelSizes, device: DeviceSpec, *, dated: str, note: str) -> DeviceProfile:
    """The profile that `device` should have with `model`; every figure but the KL is modelled, and it is
    unavailable. `dated` is the day of the sources that `note` names."""
    weights, kv_row = model.layer_weights, 2 * model.num_kv_heads * model.head_dim * device.kv_item_bytes
    layer_bytes = weights * device.bytes_per_weight
    vocab_bytes = model.vocab_size * model.hidden * device.bytes_per_weight
    # Scores and their weighted sum: two multiply-adds per head, channel, row and token before it.
    pair_ops = 4 * model.num_heads * model.head_dim

    def layer_s(rows: int, context: int, sessions: int = 1) -> float:
        """`rows` rows of one session behind `context` tokens, or a row each of `sessions`."""
        total = rows * sessions
        pairs = total * (context + rows / 2)
        stream = layer_bytes + sessions * context * kv_row
        work = device.seconds(nbytes=stream, ops=2 * weights * total, attention_ops=pairs * pair_ops)
        return device.layer_overhead_s + work

    def step_s(sessions: int) -> float:
        layers = model.num_layers * layer_s(1, _BATCH_CONTEXT, sessions)
        return device.step_overhead_s + layers + head_s(sessions)

    def head_s(sessions: int) -> float:
        ops = 2 * model.vocab_size * model.hidden * sessions
        return device.layer_overhead_s + device.seconds(nbytes=vocab_bytes, ops=ops)

    if device.batches:
        batch = tuple((float(n), rounded(step_s(n) / step_s(1))) for n in _SESSIONS)
    else:
        batch = ((1.0, 1.0), (float(_SESSIONS[-1]), float(_SESSIONS[-1])))
    row_bytes = 4.0 * model.hidden
    buffers = 4 * _CHUNK_ROWS * (4 * model.hidden + 3 * model.intermediate)
    labels: dict[str, Label] = dict.fromkeys(FIGURES, "modelled")
    labels["kl"] = "unavailable"
    return DeviceProfile(
        side=device.side,
        device=device.name,
        provider=device.provider,
        threads=device.threads,
        model=model.name,
        precision=device.precision,
        num_layers=model.num_layers,
        hidden=model.hidden,
        dated=dated,
        note=note,
        prefill=tuple((float(rows), rounded(layer_s(rows, 0))) for rows in _ROWS),
        prefill_context_s=rounded(device.seconds(attention_ops=pair_ops)),
        decode=tuple((float(context), rounded(layer_s(1, context))) for context in _CONTEXTS),
        layer_share=(1.0,) * model.num_layers,
        step_s=device.step_overhead_s,
        embed_row_s=rounded(device.seconds(nbytes=row_bytes)),
        head_s=rounded(head_s(1)),
        codec_row_s=rounded(row_bytes / device.codec_bytes_per_s),
        batch=batch,
        load_s=rounded(layer_bytes / device.load_bytes_per_s),
        layer_bytes=round(layer_bytes * device.copies),
        embed_bytes=round(vocab_bytes),
        # An edge's head holds copies of its own, even of a tied embedding.
        head_bytes=round(vocab_bytes * device.copies) if device.side == "edge" else 0,
        kv_bytes=kv_row,
        scratch_bytes=buffers,
        idle_w=device.idle_w,
        active_w=device.active_w,
        labels=labels,
    )

"""The decoder in torch: runs any range of layers over the rows of several sequences at once.

The residual stream is f32 at every precision: it has channels two hundred times larger than the rest,
and adding to it in bf16 would lose more than the weights' rounding; matrices see the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.cloud.attention import AttentionBatch, apply_rope
from isthmus.cloud.graphs import RowGraphs
from isthmus.cloud.kv import PAGE_TOKENS, BlockTable, PagePool, columns_for
from isthmus.cloud.kv_store import KVStore, StepSequence
from isthmus.cloud.linear import DenseLinear, Linear, Precision, make_linear, parse_precision
from isthmus.cloud.linear_int4 import Source
from isthmus.protocol.errors import ConfigError
from isthmus.splitter.checkpoint import Checkpoint
from isthmus.splitter.spec import ModelSpec

F32 = npt.NDArray[np.float32]


@dataclass(slots=True)
class _Layer:
    attn_norm: Tensor  # times √hidden, like every norm over rows
    qkv: Linear
    qk_norm: Tensor | None  # [heads + kv_heads, head_dim]
    o: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def nbytes(self) -> int:
        norms = (self.attn_norm, self.mlp_norm, self.qk_norm)
        return sum(linear.nbytes for linear in self.linears) + sum(n.nbytes for n in norms if n is not None)


class CloudModel:
    """A whole dense decoder (llama, mistral, qwen2, qwen3 family) on one device at one precision.

    A step: `batch = prepare(store, sequences)`; `rows = run(batch, inputs)`; `head(rows[last rows])`.
    Rows are f32 residual-stream tensors [n, hidden] on the device. Not thread-safe: one engine thread.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        precision: Precision,
        device: torch.device,
        embedding: Tensor,
        layers: list[_Layer],
        final_norm: Tensor,
        lm_head: Linear,
        remarks: tuple[str, ...] = (),
    ) -> None:
        self.spec = spec
        self.precision = precision
        self.device = device
        self._embedding = embedding
        self._layers = layers
        self._final_norm = final_norm
        self._head = lm_head
        self.remarks = remarks
        """Where the weights are not kept in `precision`, and why."""
        self.graphs: RowGraphs | None = None
        """CUDA graphs of the layers' parts, where `tune_graphs` found that they pay."""
        self._norm_floor = torch.tensor(spec.hidden * spec.norm_eps, device=device)
        self._rope = _RopeCache(spec, device, precision.compute_dtype)
        shared = isinstance(lm_head, DenseLinear) and lm_head.weight is embedding
        self.embed_bytes = embedding.nbytes
        self.layers_bytes = sum(layer.nbytes for layer in layers)
        self.head_bytes = final_norm.nbytes + (0 if shared else lm_head.nbytes)
        """Of the final norm and of the output matrix, where that is not the embedding."""

    @property
    def weight_bytes(self) -> int:
        return self.embed_bytes + self.layers_bytes + self.head_bytes

    @classmethod
    def load(cls, checkpoint: Checkpoint, *, device: str = "cpu", precision: str = "fp32") -> CloudModel:
        """Reads every tensor once, one at a time.

        Raises:
            ConfigError: unknown precision, or a device torch does not have.
            ModelFileError: from the checkpoint.
        """
        kind, place, spec = parse_precision(precision), parse_device(device), checkpoint.spec

        def vector(name: str) -> Tensor:
            return torch.from_numpy(checkpoint.dense(name)).to(place)

        def norm(name: str) -> Tensor:
            return vector(name).mul_(spec.hidden**0.5)  # as `_norm` wants it

        remarks: dict[str, None] = {}  # ordered, each once: all layers say the same

        def source(name: str) -> Source:
            blocks = checkpoint.blocks(name) if kind is Precision.INT4 else None
            return checkpoint.dense(name) if blocks is None else blocks

        def linear(prefix: str, names: Sequence[str], *, biased: bool) -> Linear:
            bias = np.concatenate([checkpoint.dense(f"{prefix}.{n}.bias") for n in names]) if biased else None
            made, remark = make_linear([source(f"{prefix}.{n}.weight") for n in names], bias, kind, place)
            if remark is not None:
                remarks[f"{'+'.join(names)} is int8: {remark}"] = None
            return made

        def layer(prefix: str) -> _Layer:
            qk_norm = None
            if spec.qk_norm:
                q, k = vector(f"{prefix}.q_norm.weight"), vector(f"{prefix}.k_norm.weight")
                qk_norm = torch.cat([q.expand(spec.num_heads, -1), k.expand(spec.num_kv_heads, -1)])
            return _Layer(
                attn_norm=norm(f"{prefix}.attn_norm.weight"),
                qkv=linear(prefix, "qkv", biased=spec.qkv_bias),
                qk_norm=qk_norm,
                o=linear(prefix, "o", biased=spec.o_bias),
                mlp_norm=norm(f"{prefix}.mlp_norm.weight"),
                gate_up=linear(prefix, ("gate", "up"), biased=spec.mlp_bias),
                down=linear(prefix, ("down",), biased=spec.mlp_bias),
            )

        table = checkpoint.dense("embed.weight")
        embedding = torch.from_numpy(table).to(device=place, dtype=kind.compute_dtype)
        lm_head: Linear
        if spec.tied_embedding and not kind.is_integer:
            lm_head = DenseLinear(embedding, None)
        else:
            # A 4-bit output matrix alone costs a KL of 6e-2.
            head_kind = Precision.INT8 if kind is Precision.INT4 else kind
            output = table if spec.tied_embedding else checkpoint.dense("head.weight")
            lm_head, _ = make_linear([output], None, head_kind, place)
        return cls(
            spec,
            precision=kind,
            device=place,
            embedding=embedding,
            layers=[layer(f"layers.{index}") for index in range(spec.num_layers)],
            final_norm=norm("final_norm.weight"),
            lm_head=lm_head,
            remarks=tuple(remarks),
        )

    @property
    def linears(self) -> list[Linear]:
        """Every matrix that rows are multiplied with: the layers' and the output matrix."""
        return [*(linear for layer in self._layers for linear in layer.linears), self._head]

    def new_store(self, num_pages: int) -> KVStore:
        """Storage for `num_pages` pages in this model's compute dtype; see `new_pages`."""
        return KVStore(
            num_pages,
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_dim,
            dtype=self.precision.compute_dtype,
            device=self.device,
        )

    def new_pages(self, num_pages: int) -> tuple[KVStore, PagePool]:
        """`new_store`, and the pool that hands its pages out zeroed."""
        store = self.new_store(num_pages)
        return store, PagePool(num_pages, on_alloc=store.zero_pages)

    @property
    def page_bytes(self) -> int:
        """Bytes of one KV page (16 tokens of one layer)."""
        return PAGE_TOKENS * self.spec.kv_bytes_per_token_layer(self.precision.compute_dtype.itemsize)

    def prepare(self, store: KVStore, sequences: Sequence[StepSequence]) -> AttentionBatch:
        """Index tensors, masks and rotary angles of one step. Sequences sorted by entry layer, tables
        ensured up to length + num_rows and not yet advanced."""
        positions = np.concatenate(
            [np.arange(s.table.length, s.table.length + s.num_rows) for s in sequences]
        )
        cos, sin = self._rope.at(positions)
        return AttentionBatch(
            sequences,
            store=store,
            num_layers=self.spec.num_layers,
            num_heads=self.spec.num_heads,
            cos=cos,
            sin=sin,
            sliding_window=self.spec.sliding_window,
        )

    @torch.inference_mode()
    def embed(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> Tensor:
        """Token ids, each < vocab_size → rows f32[n, hidden]."""
        index = torch.as_tensor(np.asarray(ids, dtype=np.int64), device=self.device)
        return F.embedding(index, self._embedding).float()

    def rows(self, values: F32) -> Tensor:
        """Boundary rows f32[n, hidden] from the wire (read-only arrays are copied), on the device."""
        return torch.from_numpy(np.require(values, np.float32, ["C", "W"])).to(self.device)

    @torch.inference_mode()
    def layer(self, index: int, rows: Tensor, batch: AttentionBatch) -> Tensor:
        """One layer over rows f32[batch.rows_at(index), hidden] → the same shape; the KV is written."""
        count, heads = rows.shape[0], self.spec.num_heads
        qkv = self._by_rows(self._before_attention, index, rows, batch.cos[:count], batch.sin[:count])
        attended = batch.attend(index, qkv[:, :heads], qkv[:, heads:])
        return self._by_rows(self._after_attention, index, rows, attended.reshape(count, -1))

    def _by_rows(self, part: Callable[..., Tensor], index: int, *inputs: Tensor) -> Tensor:
        """A part of layer `index`, by its graph where there is one."""
        weights = self._layers[index]
        if self.graphs is None:
            return part(weights, *inputs)
        return self.graphs.run(part.__name__, index, partial(part, weights), *inputs)

    def _before_attention(self, weights: _Layer, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rows → queries, keys (rotated) and values, [n, heads + 2 * kv_heads, head_dim]."""
        spec = self.spec
        qkv = weights.qkv(self._norm(rows, weights.attn_norm)).view(rows.shape[0], -1, spec.head_dim)
        qk = qkv[:, : spec.num_heads + spec.num_kv_heads]
        if weights.qk_norm is not None:
            qk.copy_(F.rms_norm(qk.float(), (spec.head_dim,), None, spec.norm_eps).mul_(weights.qk_norm))
        apply_rope(qk, cos, sin)
        return qkv

    def _after_attention(self, weights: _Layer, rows: Tensor, attended: Tensor) -> Tensor:
        """The layer's rows from its input rows and attention's answer [n, heads * head_dim]."""
        rows = rows + weights.o(attended)
        gate, up = weights.gate_up(self._norm(rows, weights.mlp_norm)).chunk(2, dim=-1)
        return rows.add_(weights.down(F.silu(gate).mul_(up)))

    @torch.inference_mode()
    def run(
        self, batch: AttentionBatch, inputs: Sequence[Tensor], beat: Callable[[], None] = lambda: None
    ) -> Tensor:
        """All layers from the lowest entry layer on: the mixed-depth loop.

        inputs[i] is f32[num_rows_i, hidden], sequence i's rows at its own entry layer (embedded ids at 0).
        `beat` is called before each layer: it shows that the step moves.
        Returns the rows after the last layer, f32[num_rows, hidden], before the final norm.
        """
        rows = torch.empty((0, self.spec.hidden), device=self.device)
        entered = 0
        for index in range(batch.entry_layers[0], self.spec.num_layers):
            beat()
            fresh: list[Tensor] = []
            while entered < len(inputs) and batch.entry_layers[entered] == index:
                fresh.append(inputs[entered])
                entered += 1
            if fresh:
                rows = torch.cat([rows, *fresh])
            rows = self.layer(index, rows, batch)
        return rows if self.graphs is None else rows.clone()  # the next step writes over a graph's answer

    @torch.inference_mode()
    def head(self, rows: Tensor) -> Tensor:
        """Final norm and output matrix: rows f32[n, hidden] → logits [n, vocab_size] in the compute dtype."""
        return self._head(self._norm(rows, self._final_norm))

    def _norm(self, rows: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm into the compute dtype: x / sqrt(|x|^2 + n·eps) · (√n·w), `weight` being √n·w.

        Spelled out because `F.rms_norm` on CPU is itself composed of more kernels (13.5 against 9 µs a row).
        """
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        scale = torch.addcmul(self._norm_floor, length, length).rsqrt_()
        return (rows * scale).mul_(weight).to(self.precision.compute_dtype)


class _RopeCache:
    """Rotary tables on the device, grown by doubling: a 128k-token context need not be computed at start."""

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
        self._spec = spec
        self._device = device
        self._dtype = dtype
        self._grow(min(2048, spec.context_length))

    def at(self, positions: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [n, 1, head_dim], as `apply_rope` takes them."""
        last = int(positions.max())
        if last >= self._cos.shape[0]:
            self._grow(max(2 * self._cos.shape[0], last + 1))
        index = torch.from_numpy(positions).to(self._device)
        return self._cos.index_select(0, index), self._sin.index_select(0, index)

    def _grow(self, length: int) -> None:
        cos, sin = (torch.from_numpy(table) for table in self._spec.rope_tables(length))
        self._cos = torch.cat([cos, cos], dim=1).unsqueeze(1).to(device=self._device, dtype=self._dtype)
        self._sin = torch.cat([-sin, sin], dim=1).unsqueeze(1).to(device=self._device, dtype=self._dtype)


def parse_device(name: str) -> torch.device:
    """`cpu`, `cuda` or `cuda:N`; ConfigError if torch has no such device here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is neither cpu nor cuda", hint="use cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            f"device {name!r} asked, {count} CUDA devices are here",
            hint="use --device cpu, or check the driver",
        )
    return device


def model_logits(model: CloudModel, ids: Sequence[int]) -> F32:
    """Logits f32[n, vocab] of every position of one sequence, run from layer 0 in one chunk."""
    store, pool = model.new_pages(model.spec.num_layers * columns_for(len(ids)))
    table = BlockTable(pool, first_layer=0, num_layers=model.spec.num_layers)
    store.copy_pages(table.ensure(len(ids)))
    batch = model.prepare(store, [StepSequence(table, len(ids))])
    logits: F32 = model.head(model.run(batch, [model.embed(ids)])).float().cpu().numpy()
    return logits

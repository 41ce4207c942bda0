"""Emits the decoder as ONNX: one small graph per block, weights left outside in weights.bin.

The boundary between blocks is the residual stream, float32 [1, seq, hidden].

    embed      ids int64 [1, seq]                                        -> y
    layer.<i>  x, past_key, past_value float32 [1, kv_heads, capacity, head_dim],
               seqlens_k int32 [1] (total length - 1), total_len int32 [1], cos, sin [max, head_dim/2]
                                                                         -> y, present_key, present_value
    head       x                                                         -> logits float32 [1, seq, vocab]

`past_*` and `present_*` are meant to be bound to the same buffers; GroupQueryAttention then writes the new
rows at total_len - seq and reads rows below total_len only. Which operators a matrix needs is read off the
tensors stored for it (see blocks.py), so emitting needs no weights: `placements` says where they will lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from isthmus.protocol.errors import ModelFileError, UnsupportedModelError
from isthmus.splitter.blocks import (
    BLOCK,
    BlockPlan,
    Placement,
    block_names,
    block_needs,
    block_sources,
    key_shape,
    plan_block,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from isthmus.splitter.spec import ModelSpec

__all__ = [
    "BlockPlan",
    "Placement",
    "block_names",
    "block_needs",
    "block_sources",
    "emit_block",
    "emit_whole",
    "key_shape",
    "plan_block",
]

WEIGHTS_FILE = "weights.bin"
IR_VERSION = 10
OPSETS = {"": 20, "com.microsoft": 1}
MS = "com.microsoft"


def emit_block(spec: ModelSpec, block: str, placements: Mapping[str, Placement]) -> bytes:
    """The ONNX model of one block, its weights pointing into weights.bin.

    `placements` holds every stored tensor of the block, and of the blocks in `block_needs` (others may be
    there too). Equal arguments give equal bytes. Raises ModelFileError where a placement is missing.
    """
    block_sources(spec, block)  # an unknown block is refused here
    emitter = _Emitter(spec, placements)
    if block == "embed":
        ids = emitter.input("ids", "INT64", [1, "seq"])
        outputs = [emitter.embed(ids, "y")]
    elif block == "head":
        x = emitter.input("x", "FLOAT", [1, "seq", spec.hidden])
        outputs = [emitter.head(x, "logits")]
    else:
        x = emitter.input("x", "FLOAT", [1, "seq", spec.hidden])
        shared = emitter.shared_inputs()
        outputs = emitter.layer(int(block.removeprefix("layer.")), x, shared, "", "y")
    return emitter.model(block, outputs)


def emit_whole(spec: ModelSpec, placements: Mapping[str, Placement]) -> bytes:
    """The same blocks joined into one graph, for comparison with the block-wise runner.

    Inputs: ids, seqlens_k, total_len, cos, sin, and past_key.<i>, past_value.<i> for each layer; outputs:
    logits float32 [1, 1, vocab] of the last row only, present_key.<i>, present_value.<i>.
    """
    emitter = _Emitter(spec, placements)
    x = emitter.embed(emitter.input("ids", "INT64", [1, "seq"]), "x.0")
    shared = emitter.shared_inputs()
    presents: list[ir.Value] = []
    for i in range(spec.num_layers):
        x, key, value = emitter.layer(i, x, shared, f".{i}", f"x.{i + 1}")
        presents += [key, value]
    last = emitter.constant("last", [-1])
    x = emitter.op("Gather", [x, last], {"axis": 1}, name="x.last")
    return emitter.model("whole", [emitter.head(x, "logits"), *presents])


class _Emitter:
    """One graph under construction. Every value is named by hand, so that the bytes are reproducible."""

    def __init__(self, spec: ModelSpec, placements: Mapping[str, Placement]) -> None:
        import onnx_ir as ir

        self.ir = ir
        self.spec = spec
        self.placements = placements
        self.inputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}

    # --- graph primitives

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> ir.Value:
        value = self._value(name, dtype, shape)
        self.inputs.append(value)
        return value

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        name: str,
        domain: str = "",
        outputs: Sequence[str] | None = None,
    ) -> ir.Value:
        """Adds a node and returns its first output; `outputs` names them all where there are several."""
        node = self.ir.node(
            op_type,
            inputs,
            dict(attributes or {}),
            domain=domain,
            num_outputs=len(outputs or [name]),
            name=name,
        )
        for value, value_name in zip(node.outputs, outputs or [name], strict=True):
            value.name = value_name
        self.nodes.append(node)
        first: ir.Value = node.outputs[0]
        return first

    def constant(self, name: str, values: Sequence[int]) -> ir.Value:
        if name not in self.initializers:
            import numpy as np

            tensor = self.ir.Tensor(np.asarray(values, dtype=np.int64), name=name)
            self.initializers[name] = self.ir.Value(
                name=name,
                type=self.ir.TensorType(self.ir.DataType.INT64),
                shape=tensor.shape,
                const_value=tensor,
            )
        return self.initializers[name]

    def stored(self, name: str, shape: Sequence[int] | None = None, alias: str | None = None) -> ir.Value:
        """A weight of the pack as an initializer; `shape` views the same bytes in another shape (`alias`)."""
        where = self.placements.get(name)
        if where is None:
            raise ModelFileError(
                f"no placement for the stored tensor {name!r}",
                code="missing_tensor",
                hint="the pack's manifest is incomplete; rebuild the pack",
            )
        known = alias or name
        if known not in self.initializers:
            ir = self.ir
            dtype = {"float32": ir.DataType.FLOAT, "uint8": ir.DataType.UINT8}[where.dtype]
            dims = ir.Shape(tuple(shape or where.shape))
            tensor = ir.ExternalTensor(
                WEIGHTS_FILE, where.offset, where.length, dtype, shape=dims, name=known
            )
            self.initializers[known] = ir.Value(
                name=known, type=ir.TensorType(dtype), shape=dims, const_value=tensor
            )
        return self.initializers[known]

    def model(self, name: str, outputs: Sequence[ir.Value]) -> bytes:
        ir = self.ir
        graph = ir.Graph(
            self.inputs,
            outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports=OPSETS,
            name=name,
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="isthmus")
        # deterministic: protobuf keeps the order of repeated fields, and the graph holds no maps
        return bytes(ir.to_proto(model).SerializeToString(deterministic=True))

    def _value(self, name: str, dtype: str, shape: Sequence[int | str]) -> ir.Value:
        kind = self.ir.TensorType(self.ir.DataType[dtype])
        value: ir.Value = self.ir.Value(name=name, type=kind, shape=self.ir.Shape(tuple(shape)))
        return value

    def _typed(self, value: ir.Value, shape: Sequence[int | str]) -> ir.Value:
        value.type = self.ir.TensorType(self.ir.DataType.FLOAT)
        value.shape = self.ir.Shape(tuple(shape))
        return value

    # --- the decoder

    def embed(self, ids: ir.Value, name: str) -> ir.Value:
        spec = self.spec
        shape: list[int | str] = [1, "seq", spec.hidden]
        if "embed.W" in self.placements:
            return self._typed(self.op("Gather", [self.stored("embed.W"), ids], name=name), shape)
        if "embed.C" in self.placements:
            raise UnsupportedModelError(
                "an embedding in 4-bit blocks with a block-sum term can't be gathered",
                code="unsupported_scheme",
                hint="store the embedding in 8 bits",
            )
        # The table's bytes are those the tied head multiplies with, seen as rows instead of blocks.
        bits = self._bits("embed")
        table = self.stored("embed.B", (spec.vocab_size, spec.hidden * bits // 8), "embed.rows")
        inputs = [table, ids, self.stored("embed.scales", alias="embed.row_scales")]
        if "embed.zero_points" in self.placements:
            inputs.append(self.stored("embed.zero_points"))
        attributes = {"bits": bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        return self._typed(self.op("GatherBlockQuantized", inputs, attributes, name=name, domain=MS), shape)

    def head(self, x: ir.Value, name: str) -> ir.Value:
        normed = self._norm(x, "final_norm", name="head.normed")
        logits = self._matmul(normed, "embed" if self.spec.tied_embedding else "head", name)
        return self._typed(logits, [1, "seq", self.spec.vocab_size])

    def shared_inputs(self) -> list[ir.Value]:
        """What every layer reads besides its rows and its KV: lengths and the rotary tables."""
        half = self.spec.head_dim // 2
        return [
            self.input("seqlens_k", "INT32", [1]),
            self.input("total_len", "INT32", [1]),
            self.input("cos", "FLOAT", ["max_len", half]),
            self.input("sin", "FLOAT", ["max_len", half]),
        ]

    def layer(
        self, i: int, x: ir.Value, shared: Sequence[ir.Value], suffix: str, name: str
    ) -> list[ir.Value]:
        """One decoder layer; `suffix` goes on the names of its KV inputs and outputs."""
        spec = self.spec
        p = f"layers.{i}"
        kv_shape: list[int | str] = [1, spec.num_kv_heads, "capacity", spec.head_dim]
        past = [self.input(f"past_{part}{suffix}", "FLOAT", kv_shape) for part in ("key", "value")]
        presents = [f"present_{part}{suffix}" for part in ("key", "value")]

        normed = self._norm(x, f"{p}.attn_norm", name=f"{p}.normed")
        qkv = self._linear(normed, f"{p}.qkv", f"{p}.qkv.out")
        query: list[ir.Value | None] = [qkv, None, None]
        if spec.qk_norm:
            query = self._normed_heads(p, qkv)
        attributes: dict[str, Any] = {
            "num_heads": spec.num_heads,
            "kv_num_heads": spec.num_kv_heads,
            "do_rotary": 1,
            "rotary_interleaved": 0,
        }
        if spec.sliding_window is not None:
            attributes["local_window_size"] = spec.sliding_window
        attended = self.op(
            "GroupQueryAttention",
            [*query, *past, *shared],
            attributes,
            name=f"{p}.attended",
            domain=MS,
            outputs=[f"{p}.attended", *presents],
        )
        present_values = [self._typed(v, kv_shape) for v in self.nodes[-1].outputs[1:]]
        projected = self._linear(attended, f"{p}.o", f"{p}.o.out")
        normed = self.op(
            "SkipSimplifiedLayerNormalization",
            [x, projected, self.stored(f"{p}.mlp_norm")],
            {"epsilon": spec.norm_eps},
            name=f"{p}.mlp_in",
            domain=MS,
            outputs=[f"{p}.mlp_in", "", "", f"{p}.middle"],
        )
        middle = self.nodes[-1].outputs[3]
        gate_up = self._linear(normed, f"{p}.gate_up", f"{p}.gate_up.out")
        self.op(
            "Split",
            [gate_up],
            {"axis": -1, "num_outputs": 2},
            name=f"{p}.split",
            outputs=[f"{p}.gate.out", f"{p}.up.out"],
        )
        gate, up = self.nodes[-1].outputs
        # QuickGelu with alpha 1 is x * sigmoid(x), that is SiLU, in one pass over the memory.
        activated = self.op("QuickGelu", [gate], {"alpha": 1.0}, name=f"{p}.silu", domain=MS)
        product = self.op("Mul", [activated, up], name=f"{p}.product")
        down = self._linear(product, f"{p}.down", f"{p}.down.out")
        y = self._typed(self.op("Add", [middle, down], name=name), [1, "seq", spec.hidden])
        return [y, *present_values]

    def _normed_heads(self, p: str, qkv: ir.Value) -> list[ir.Value | None]:
        """Qwen3: RMS norm over each head of q and k before GroupQueryAttention rotates them."""
        spec = self.spec
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        sizes = self.constant("qkv_sizes", [q_size, kv_size, kv_size])
        names = [f"{p}.q", f"{p}.k", f"{p}.v"]
        self.op("Split", [qkv, sizes], {"axis": -1}, name=f"{p}.qkv.split", outputs=names)
        q, k, v = self.nodes[-1].outputs
        parts: list[ir.Value | None] = []
        for part, value, heads in (("q", q, spec.num_heads), ("k", k, spec.num_kv_heads)):
            heads_shape = self.constant(f"{part}_heads_shape", [0, 0, heads, spec.head_dim])
            rows_shape = self.constant(f"{part}_rows_shape", [0, 0, heads * spec.head_dim])
            split = self.op("Reshape", [value, heads_shape], name=f"{p}.{part}.heads")
            normed = self._norm(split, f"{p}.{part}_norm", name=f"{p}.{part}.normed")
            parts.append(self.op("Reshape", [normed, rows_shape], name=f"{p}.{part}.rows"))
        return [*parts, v]

    def _norm(self, x: ir.Value, key: str, *, name: str) -> ir.Value:
        attributes = {"axis": -1, "epsilon": self.spec.norm_eps, "stash_type": 1}
        return self.op("SimplifiedLayerNormalization", [x, self.stored(key)], attributes, name=name)

    def _linear(self, x: ir.Value, key: str, name: str) -> ir.Value:
        """x @ W.T, plus the bias where the model has one."""
        if f"{key}.bias" not in self.placements:
            return self._matmul(x, key, name)
        product = self._matmul(x, key, f"{name}.unbiased")
        return self.op("Add", [product, self.stored(f"{key}.bias")], name=name)

    def _matmul(self, x: ir.Value, key: str, name: str) -> ir.Value:
        if f"{key}.W" in self.placements:
            # transB: measured as fast as a transposed copy, and the table stays usable for Gather.
            return self.op("FusedMatMul", [x, self.stored(f"{key}.W")], {"transB": 1}, name=name, domain=MS)
        rows, cols = key_shape(self.spec, key)
        inputs: list[ir.Value | None] = [
            x,
            self.stored(f"{key}.B"),
            self.stored(f"{key}.scales", (rows * (cols // BLOCK),)),
        ]
        if f"{key}.zero_points" in self.placements:
            inputs.append(self.stored(f"{key}.zero_points"))
        attributes = {
            "K": cols,
            "N": rows,
            "bits": self._bits(key),
            "block_size": BLOCK,
            # int8 activations: level 0 is 180 times slower at 8 bits (docs: FACTS)
            "accuracy_level": 4,
        }
        if f"{key}.C" not in self.placements:
            return self.op("MatMulNBits", inputs, attributes, name=name, domain=MS)
        # w = d * (q - 8) + C: the constant of each block meets the sum of its 32 inputs.
        product = self.op("MatMulNBits", inputs, attributes, name=f"{name}.scaled", domain=MS)
        shape = self.constant(f"blocks_shape.{cols}", [0, 0, cols // BLOCK, BLOCK])
        blocks = self.op("Reshape", [x, shape], name=f"{name}.blocks")
        axes = self.constant("last_axis", [-1])
        sums = self.op("ReduceSum", [blocks, axes], {"keepdims": 0}, name=f"{name}.sums")
        offset = self.op("MatMul", [sums, self.stored(f"{key}.C")], name=f"{name}.offset")
        return self.op("Add", [product, offset], name=name)

    def _bits(self, key: str) -> int:
        where = self.placements.get(f"{key}.B")
        bits = where.shape[-1] * 8 // BLOCK if where else 0
        if bits not in (4, 8):
            raise ModelFileError(
                f"{key}.B holds {bits} bits per weight, expected 4 or 8",
                code="bad_tensor_shape",
                hint="the pack's manifest is damaged; rebuild the pack",
            )
        return bits

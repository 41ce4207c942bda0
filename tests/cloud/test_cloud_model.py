"""The torch decoder against transformers, and against itself under every way of cutting the work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isthmus.cloud.kv import BlockTable, PagePool
from isthmus.cloud.kv_store import KVStore, StepSequence
from isthmus.cloud.linear_integer import IntegerLinear
from isthmus.cloud.model import CloudModel, model_logits, parse_device
from isthmus.cloud.precision import MAX_KL, measure
from isthmus.protocol.errors import ConfigError
from isthmus.quant.measure import max_rel_logit_error
from isthmus.splitter.checkpoint import open_checkpoint
from tests.oracle import load_reference
from tests.tiny import LLAMA3_ROPE, make_tiny, make_tiny_gguf

F32 = npt.NDArray[np.float32]

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tied": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-no-gqa": ("llama", {"num_key_value_heads": 4}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 21}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tied": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tied": True}),
}
IDS = np.random.default_rng(7).integers(0, 320, 150).tolist()

# fp32 differences between ways of batching the same rows. They are not zero: torch's matrix products sum in
# an order that depends on the number of rows. Seen: up to 2e-6 of max|logit|, here and on SmolLM2-135M.
SAME = 1e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name of a variant → its folder, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            family, options = VARIANTS[name]
            made[name] = make_tiny(family, tmp_path_factory.mktemp("tiny") / name, **options)
        return made[name]

    return get


def load(path: Path, precision: str = "fp32") -> CloudModel:
    with open_checkpoint(path) as checkpoint:
        return CloudModel.load(checkpoint, precision=precision)


class Runner:
    """Sessions over one model and page pool, stepped together."""

    def __init__(self, model: CloudModel, num_pages: int = 400) -> None:
        self.model = model
        self.store: KVStore = model.new_store(num_pages)
        self.pool = PagePool(num_pages, on_alloc=self.store.zero_pages)

    def session(self, first_layer: int = 0) -> BlockTable:
        return BlockTable(self.pool, first_layer=first_layer, num_layers=self.model.spec.num_layers)

    def step(self, inputs: Sequence[tuple[BlockTable, torch.Tensor]]) -> list[F32]:
        """Each session's rows at its entry layer → logits of each."""
        for table, rows in inputs:
            self.store.copy_pages(table.ensure(table.length + len(rows)))
        batch = self.model.prepare(self.store, [StepSequence(table, len(rows)) for table, rows in inputs])
        out = self.model.run(batch, [rows for _, rows in inputs])
        for table, rows in inputs:
            table.advance(len(rows))
        logits = self.model.head(out).numpy()
        return np.split(logits, np.cumsum([len(rows) for _, rows in inputs])[:-1])

    def boundary(self, ids: Sequence[int], layer: int) -> torch.Tensor:
        """The rows that enter `layer`."""
        table = self.session()
        table.ensure(len(ids))
        batch = self.model.prepare(self.store, [StepSequence(table, len(ids))])
        rows = self.model.embed(ids)
        for index in range(layer):
            rows = self.model.layer(index, rows, batch)
        table.free_all()
        return rows


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name: str, tiny: Any) -> None:
    reference = load_reference(tiny(name))
    with torch.inference_mode():
        expected = reference(torch.tensor([IDS])).logits[0].numpy()
    assert max_rel_logit_error(expected, model_logits(load(tiny(name)), IDS)) < 5e-6


@pytest.mark.parametrize("name", ["llama3-rope", "mistral-window", "qwen3"])
def test_chunked_and_stepwise_equal_whole(name: str, tiny: Any) -> None:
    model = load(tiny(name))
    whole = model_logits(model, IDS)
    for sizes in ([17] * 9, [1] * 150, [100, 1, 1, 3, 45], [16, 134]):
        runner = Runner(model)
        table, parts, done = runner.session(), [], 0
        for size in sizes:
            ids = IDS[done : done + size]
            parts += runner.step([(table, model.embed(ids))]) if ids else []
            done += len(ids)
        assert max_rel_logit_error(whole, np.concatenate(parts)) < SAME


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "qwen3", "mistral-window"])
def test_sessions_at_every_depth_in_one_step_equal_each_alone(name: str, tiny: Any) -> None:
    model = load(tiny(name))
    runner = Runner(model)
    depth = model.spec.num_layers
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 320, n).tolist() for n in (3, 40, 17, 90, 1, 64, 33, 20)]
    wanted = [model_logits(model, [*ids, 5, 9, 13]) for ids in prompts]
    tables = [runner.session(number * depth // len(prompts)) for number in range(len(prompts))]
    rows = [runner.boundary([*ids, 5, 9, 13], t.first_layer) for ids, t in zip(prompts, tables, strict=True)]
    # All prompts in one step, then three steps of one row each.
    got = [
        [part]
        for part in runner.step([(t, r[: len(ids)]) for t, r, ids in zip(tables, rows, prompts, strict=True)])
    ]
    for extra in range(3):
        step = [
            (t, r[len(ids) + extra : len(ids) + extra + 1])
            for t, r, ids in zip(tables, rows, prompts, strict=True)
        ]
        for parts, part in zip(got, runner.step(step), strict=True):
            parts.append(part)
    for parts, expected in zip(got, wanted, strict=True):
        assert max_rel_logit_error(expected, np.concatenate(parts)) < SAME
    assert runner.pool.num_used == sum(
        (depth - t.first_layer) * -(-(len(ids) + 3) // 16) for t, ids in zip(tables, prompts, strict=True)
    )
    for table in tables:
        table.free_all()
    runner.pool.check()


def test_rows_after_a_cut_replace_the_old_ones(tiny: Any) -> None:
    model = load(tiny("llama"))
    runner = Runner(model)
    table = runner.session()
    runner.step([(table, model.embed(IDS[:50]))])
    table.truncate(21)
    again = [*IDS[:21], *IDS[90:110]]
    (got,) = runner.step([(table, model.embed(again[21:]))])
    assert max_rel_logit_error(model_logits(model, again)[21:], got) < SAME


def test_a_fork_continues_on_its_own(tiny: Any) -> None:
    model = load(tiny("llama"))
    runner = Runner(model)
    table = runner.session()
    runner.step([(table, model.embed(IDS[:20]))])
    twin = table.fork()
    left, right = runner.step([(table, model.embed([1, 2, 3])), (twin, model.embed([4, 5, 6]))])
    assert max_rel_logit_error(model_logits(model, [*IDS[:20], 1, 2, 3])[20:], left) < SAME
    assert max_rel_logit_error(model_logits(model, [*IDS[:20], 4, 5, 6])[20:], right) < SAME


def test_a_pool_full_of_nan_does_not_matter(tiny: Any) -> None:
    model = load(tiny("llama"))
    runner = Runner(model, num_pages=100)
    runner.store.data[: runner.store.num_pages] = float("nan")
    tables = [runner.session(), runner.session(2)]
    wanted = [runner.boundary(IDS[:50], 0), runner.boundary(IDS[50:60], 2)]
    got = runner.step(list(zip(tables, wanted, strict=True)))
    assert max_rel_logit_error(model_logits(model, IDS[:50]), got[0]) < SAME
    assert max_rel_logit_error(model_logits(model, IDS[50:60]), got[1]) < SAME


def test_precisions_lose_little_and_weigh_less(tiny: Any) -> None:
    with open_checkpoint(tiny("qwen3")) as checkpoint:
        names = ("fp32", "bf16", "int8", "int4")
        found = measure(checkpoint, names, [IDS[:40], IDS[40:]], device="cpu")
        assert found["fp32"].kl == 0
        assert 0 < found["bf16"].kl < 2e-3
        assert 0 < found["int8"].kl < 2e-2
        assert found["int8"].kl < found["int4"].kl < 1
        models = [CloudModel.load(checkpoint, precision=name) for name in names]
    sizes = [model.weight_bytes for model in models]
    assert sizes[0] == sum(int(np.prod(s)) * 4 for s in models[0].spec.tensor_shapes().values()) + (
        # q and k norms are kept once per head
        4 * models[0].spec.num_layers * (4 + 2 - 2) * 32
    )
    assert sizes[0] > 1.9 * sizes[1] > 3 * sizes[2]
    assert sizes[2] > sizes[3]  # the embedding stays bf16, the head is int8 in both
    assert [model.page_bytes for model in models] == [m.new_store(1).page_bytes for m in models]


@pytest.mark.parametrize("quantisation", ["Q4_0", "Q4_1"])
def test_int4_takes_a_four_bit_file_as_it_is(quantisation: str, tiny: Any, tmp_path: Path) -> None:
    """Its blocks lose little more than bf16 does; the same numbers as floats would be rounded once more."""
    path = make_tiny_gguf(tiny("llama"), tmp_path / "tiny.gguf", quantisation=quantisation)
    with open_checkpoint(path) as checkpoint:
        found = measure(checkpoint, ("bf16", "int4"), [IDS[:40]], device="cpu")
        model = CloudModel.load(checkpoint, precision="int4")
    assert found["int4"].kl < 4 * found["bf16"].kl
    assert model.remarks == ()


def test_int4_says_which_matrices_are_int8_instead(tmp_path: Path) -> None:
    with open_checkpoint(make_tiny("llama", tmp_path / "odd", intermediate_size=80)) as checkpoint:
        model = CloudModel.load(checkpoint, precision="int4")
        assert model.remarks == ("down is int8: 80 columns are no multiple of 32",)
        assert CloudModel.load(checkpoint, precision="int8").remarks == ()
    assert [linear.kind for linear in model.linears if isinstance(linear, IntegerLinear)] == (
        ["int4", "int4", "int4", "int8"] * model.spec.num_layers + ["int8"]
    )


def test_rope_tables_grow_past_their_first_size(tiny: Any) -> None:
    model = load(tiny("llama"))
    before = model_logits(model, IDS[:30])
    model._rope._grow(4)
    assert (model_logits(model, IDS[:30]) == before).all()


class NoMixing(TorchDispatchMode):
    """Fails on any operation over tensors of two devices, which a GPU would refuse."""

    num_ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's hook
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        assert len({tensor.device for tensor in tensors}) <= 1, func
        self.num_ops += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_a_step_keeps_to_its_device(precision: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, the meta device shows that a step moves every tensor (integers: the widened path)."""
    monkeypatch.setattr("isthmus.cloud.model.parse_device", torch.device)
    with open_checkpoint(tiny("qwen3")) as checkpoint:
        model = CloudModel.load(checkpoint, device="meta", precision=precision)
    runner = Runner(model)
    tables = [runner.session(), runner.session(), runner.session(2)]
    for counts in ((30, 5, 40), (1, 5, 20), (1, 1, 1)):
        for table, count in zip(tables, counts, strict=True):
            runner.store.copy_pages(table.ensure(table.length + count))
        steps = [StepSequence(table, count) for table, count in zip(tables, counts, strict=True)]
        boundary = np.zeros((counts[2], model.spec.hidden), dtype=np.float32)
        with NoMixing() as watch:
            batch = model.prepare(runner.store, steps)
            inputs = [model.embed([1] * counts[0]), model.embed([2] * counts[1]), model.rows(boundary)]
            logits = model.head(model.run(batch, inputs))
        assert logits.device.type == "meta"
        assert logits.shape == (sum(counts), model.spec.vocab_size)
        assert watch.num_ops > 100
        for table, count in zip(tables, counts, strict=True):
            table.advance(count)
    runner.store.copy_pages(tables[0].fork().ensure(tables[0].length + 1))


def test_rows_from_the_wire_may_be_read_only(tiny: Any) -> None:
    received = np.frombuffer(np.arange(128, dtype=np.float32).tobytes(), dtype=np.float32).reshape(2, 64)
    assert (load(tiny("llama")).rows(received).numpy() == received).all()


def test_devices_are_checked() -> None:
    assert parse_device("cpu").type == "cpu"
    for name in ("tpu", "mps", "no such"):
        with pytest.raises(ConfigError, match="neither cpu nor cuda"):
            parse_device(name)
    with pytest.raises(ConfigError, match="CUDA devices are here"):
        parse_device(f"cuda:{torch.cuda.device_count()}")


@pytest.mark.model
def test_smollm2_equals_transformers_and_integers_stay_close(
    smollm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))  # timings taken beside other tests are not to be kept
    ids = np.random.default_rng(3).integers(0, 49152, 60).tolist()
    ids[:11] = [504, 3575, 282, 4649, 314, 7042, 30, 657, 314, 253, 2620]
    reference = load_reference(smollm_dir)
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    with open_checkpoint(smollm_dir) as checkpoint:
        model = CloudModel.load(checkpoint)
        whole = model_logits(model, ids)
        assert max_rel_logit_error(expected, whole) < 1e-4
        runner = Runner(model, num_pages=600)
        tables = [runner.session(k) for k in (0, 8, 29)]
        got = runner.step([(table, runner.boundary(ids, table.first_layer)) for table in tables])
        for part in got:
            assert max_rel_logit_error(whole, part) < SAME
        found = measure(checkpoint, ["int8", "int4"], [ids[:11]], device="cpu")
        assert found["int8"].kl < 2e-2
        assert found["int4"].kl < MAX_KL  # its matrices are Q4_1, taken over as they are

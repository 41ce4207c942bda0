"""The block-wise runner: parity with transformers at every cut, and its promises on memory and failures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from isthmus.protocol.errors import IsthmusError, RequestError
from isthmus.quant.schemes import Packed, pack_q4_affine, pack_q8_affine
from isthmus.splitter.checkpoint import Checkpoint, open_checkpoint
from isthmus.splitter.pack import Pack
from isthmus.splitter.pack_writer import write_pack
from isthmus.splitter.runner import BlockRunner
from isthmus.splitter.single import build_single_session
from tests.packs import SideFiles, reference_logits, tiny_pack
from tests.tiny import LLAMA3_ROPE, tiny_tokenizer_json

F32 = npt.NDArray[np.float32]

LAYERS = 4
IDS = np.random.default_rng(7).integers(3, 260, 40).tolist()

# Every family, and each option a graph has to honour, at least once.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-llama3-rope": ("llama", {"tied": True, "rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "mistral": ("mistral", {"tied": True}),
    "mistral-window": ("mistral", {"sliding_window": 9}),
    "mistral-head-dim": ("mistral", {"head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tied": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tied": True}),
}


def loaded(pack: Pack, start: int = 0, stop: int = LAYERS, **options: Any) -> BlockRunner:
    """A runner holding layers [start, stop), the embedding if it starts the model, the head if it ends it."""
    runner = BlockRunner(pack, **options)
    runner.load(range(start, stop), embed=start == 0, head=stop == LAYERS)
    return runner


def run_all(runner: BlockRunner, ids: list[int]) -> F32:
    cache = runner.new_cache(range(LAYERS), capacity=8)
    return runner.head(runner.forward(cache, runner.embed(ids)))


def relative(found: F32, expected: F32) -> float:
    """max |difference| / max |expected|, the measure of the parity criterion."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return tiny_pack(tmp_path_factory.mktemp("runner"), "llama", tied=True)


@pytest.fixture(scope="module")
def runner(pack: Pack) -> BlockRunner:
    return loaded(pack)


# --- parity


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_and_every_cut_equals_transformers(variant: str, tmp_path: Path) -> None:
    family, options = VARIANTS[variant]
    pack = tiny_pack(tmp_path, family, seed=3, **options)
    expected = reference_logits(tmp_path / "source", IDS)
    for cut in range(LAYERS + 1):
        near, far = loaded(pack, 0, cut), loaded(pack, cut, LAYERS)
        boundary = near.forward(near.new_cache(range(cut)), near.embed(IDS))
        rows = far.forward(far.new_cache(range(cut, LAYERS)), boundary, start_layer=cut, stop_layer=LAYERS)
        found = (near if cut == LAYERS else far).head(rows)
        assert relative(found, expected) < 1e-4, f"{variant} cut at {cut}"
    single = build_single_session(pack, capacity=64)
    assert relative(single.prefill(IDS), expected[-1]) < 1e-4
    single.cache.truncate(30)
    assert relative(single.decode(IDS[30]), expected[30]) < 1e-4


class Dequantised:
    """A checkpoint whose matrices are what `packer` makes of them, as plain numbers."""

    def __init__(self, checkpoint: Checkpoint, packer: Callable[[F32], Packed]) -> None:
        self._checkpoint, self._packer = checkpoint, packer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def dense(self, name: str) -> F32:
        values = self._checkpoint.dense(name)
        packer = pack_q8_affine if name in ("embed.weight", "head.weight") else self._packer
        return values if values.ndim == 1 else packer(values).dequantize()


@pytest.mark.parametrize(("scheme", "packer"), [("q8-affine", pack_q8_affine), ("q4-affine", pack_q4_affine)])
@pytest.mark.parametrize("tied", [True, False])
def test_quantised_graphs_compute_with_the_stored_weights(
    scheme: str, packer: Callable[[F32], Packed], tied: bool, tmp_path: Path
) -> None:
    found = run_all(loaded(tiny_pack(tmp_path, "qwen2", scheme, tied=tied)), IDS)
    files = SideFiles(tiny_tokenizer_json().encode())
    (tmp_path / "numbers").mkdir()
    with open_checkpoint(tmp_path / "source") as checkpoint:
        write_pack(cast(Checkpoint, Dequantised(checkpoint, packer)), files, tmp_path / "numbers", "f32")
    expected = run_all(loaded(Pack.open(tmp_path / "numbers")), IDS)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    # the activations' rounding to int8 gives 3 % on noise this lively
    assert 1e-6 < error < 0.06


# --- one sequence, in any pieces


def test_chunked_prefill_equals_whole_prefill(pack: Pack, runner: BlockRunner) -> None:
    whole = run_all(runner, IDS)
    for chunk in (1, 7, 16, 39):
        assert relative(run_all(loaded(pack, max_chunk=chunk), IDS), whole) < 1e-5


def test_decoding_equals_prefill_while_the_cache_grows(runner: BlockRunner) -> None:
    whole = run_all(runner, IDS)
    cache = runner.new_cache(range(LAYERS), capacity=3)
    rows = [runner.forward(cache, runner.embed([token])) for token in IDS]
    assert cache.length == len(IDS)
    assert cache.capacity == 48
    assert relative(runner.head(np.concatenate(rows)), whole) < 1e-5


def test_truncate_then_continue_equals_never_having_been_there(runner: BlockRunner) -> None:
    cache = runner.new_cache(range(LAYERS))
    runner.forward(cache, runner.embed(IDS))
    cache.truncate(11)
    rows = runner.forward(cache, runner.embed(IDS[::-1]))
    fresh = runner.new_cache(range(LAYERS))
    expected = runner.forward(fresh, runner.embed(IDS[:11] + IDS[::-1]))[11:]
    assert relative(rows, expected) < 1e-5


def test_steps_of_changing_size_share_a_cache(runner: BlockRunner) -> None:
    """Drafts are verified in steps of 1..8 rows: bound steps are reused, and old ones dropped."""
    whole = run_all(runner, IDS)
    cache = runner.new_cache(range(LAYERS), capacity=64)
    rows: list[F32] = []
    for count in (1, 5, 1, 3, 2, 5, 7, 1, 4, 6, 1, 4):
        rows.append(runner.forward(cache, runner.embed(IDS[cache.length : cache.length + count])))
        assert len(cache.steps) <= 4
    assert cache.length == len(IDS)
    assert relative(runner.head(np.concatenate(rows)), whole) < 1e-5


def test_results_survive_the_next_step(runner: BlockRunner) -> None:
    """What a call returns is the caller's: bound buffers are reused by the next step."""
    cache = runner.new_cache(range(LAYERS))
    first = runner.forward(cache, runner.embed([5]))
    kept = first.copy()
    runner.forward(cache, runner.embed([9]))
    np.testing.assert_array_equal(first, kept)


def test_no_rows_at_all(runner: BlockRunner) -> None:
    cache = runner.new_cache(range(LAYERS))
    rows = runner.forward(cache, runner.embed([]))
    assert rows.shape == (0, runner.spec.hidden)
    assert runner.head(rows).shape == (0, runner.spec.vocab_size)
    assert cache.length == 0


def test_the_head_answers_each_row_alike_in_any_number(runner: BlockRunner) -> None:
    rows = np.random.default_rng(0).normal(size=(150, runner.spec.hidden)).astype(np.float32)
    whole = runner.head(rows)
    assert whole.shape == (150, runner.spec.vocab_size)
    for i in (0, 63, 64, 149):
        assert relative(runner.head(rows[i : i + 1])[0], whole[i]) < 1e-5


def test_caches_are_independent_across_threads(runner: BlockRunner) -> None:
    prompts = [[(token * k) % 250 + 3 for token in IDS] for k in range(1, 7)]
    alone = [run_all(runner, prompt) for prompt in prompts]

    def decode(prompt: list[int]) -> F32:
        cache = runner.new_cache(range(LAYERS), capacity=4)
        pieces = [prompt[:9], *[[token] for token in prompt[9:]]]
        return runner.head(np.concatenate([runner.forward(cache, runner.embed(p)) for p in pieces]))

    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(decode, prompts))
    for found, expected in zip(together, alone, strict=True):
        assert relative(found, expected) < 1e-5


# --- what is loaded


def test_only_what_is_asked_for_is_loaded(pack: Pack) -> None:
    runner = BlockRunner(pack)
    runner.load(range(1, 3))
    runner.load(range(1, 3))
    assert runner.loaded_layers == (1, 2)
    cache = runner.new_cache(range(1, 4))
    rows = np.ones((2, runner.spec.hidden), dtype=np.float32)
    with pytest.raises(IsthmusError, match=r"layer\.3") as caught:
        runner.forward(cache, rows)
    assert caught.value.code == "not_loaded"
    assert cache.length == 0
    with pytest.raises(IsthmusError, match="embed"):
        runner.embed([1])
    with pytest.raises(IsthmusError, match="head"):
        runner.head(rows)


def test_unloading_and_loading_again_continues_the_same_cache(pack: Pack) -> None:
    runner = loaded(pack)
    whole = run_all(runner, IDS)
    cache = runner.new_cache(range(LAYERS))
    for token in IDS[:20]:
        runner.forward(cache, runner.embed([token]))
    runner.unload(range(2, LAYERS), head=True)
    assert runner.loaded_layers == (0, 1)
    assert not cache.steps  # they would keep the weights in memory
    runner.load(range(LAYERS), head=True)
    rows = runner.forward(cache, runner.embed(IDS[20:]))
    assert relative(runner.head(rows), whole[20:]) < 1e-5


MEMORY = """
import json, sys, psutil
from isthmus.splitter.pack import Pack
from isthmus.splitter.runner import BlockRunner
resident = lambda: psutil.Process().memory_info().rss
runner = BlockRunner(Pack.open(sys.argv[1]))
runner.load(range(1))
seen = [resident()]
for stop in range(2, 7):
    runner.load(range(stop))
    seen.append(resident())
runner.unload(range(1, 6))
foreign = [name for name in ("onnx_ir", "onnx", "torch", "transformers") if name in sys.modules]
print(json.dumps({"seen": seen, "after": resident(), "foreign": foreign}))
"""


@pytest.mark.parametrize("scheme", ["f32", "q8-affine"])
def test_resident_memory_grows_with_the_layers_and_shrinks_again(scheme: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "head_dim": 64}
    pack = tiny_pack(tmp_path, "llama", scheme, num_attention_heads=8, num_key_value_heads=4, **sizes)
    layer = pack.bytes_per_block[1]
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, str(pack.path)], capture_output=True, text=True, check=True
    )
    told = json.loads(ran.stdout)
    steps = np.diff(told["seen"]) / layer
    assert np.all((steps > 0.7) & (steps < 1.6)), f"layers of {layer} bytes, memory grew by {steps} of that"
    assert told["after"] - told["seen"][0] < layer
    assert told["foreign"] == []  # building graphs costs 40 MB of imports that running does not need


# --- refused


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((2, 63), dtype=np.float32),
        np.zeros((2, 64), dtype=np.float64),
        np.zeros(64, dtype=np.float32),
        np.zeros((1, 2, 64), dtype=np.float32),
    ],
)
def test_rows_of_another_shape_are_refused(runner: BlockRunner, rows: Any) -> None:
    cache = runner.new_cache(range(LAYERS))
    with pytest.raises(RequestError) as caught:
        runner.forward(cache, rows)
    assert caught.value.code == "bad_rows"


@pytest.mark.parametrize("wrong", [-1, 320, 2**40])
def test_ids_outside_the_vocabulary_are_refused(runner: BlockRunner, wrong: int) -> None:
    with pytest.raises(RequestError, match=rf"{wrong} .* 320") as caught:
        runner.embed([1, wrong])
    assert caught.value.code == "bad_token_id"


def test_a_prompt_beyond_the_context_is_refused_before_any_work(runner: BlockRunner) -> None:
    cache = runner.new_cache(range(LAYERS))
    runner.forward(cache, runner.embed(IDS))
    with pytest.raises(RequestError) as caught:
        runner.forward(cache, runner.embed([1] * (runner.spec.context_length - len(IDS) + 1)))
    assert caught.value.code == "context_overflow"
    assert (cache.length, cache.capacity) == (len(IDS), 256)
    runner.forward(cache, runner.embed([1] * (runner.spec.context_length - len(IDS))))
    assert cache.length == runner.spec.context_length


def test_a_part_of_a_caches_layers_is_refused(runner: BlockRunner) -> None:
    cache = runner.new_cache(range(LAYERS))
    with pytest.raises(RequestError) as caught:
        runner.forward(cache, runner.embed([1]), start_layer=0, stop_layer=2)
    assert caught.value.code == "bad_layer_range"


def test_a_cache_of_another_runner_is_refused(pack: Pack, runner: BlockRunner) -> None:
    with pytest.raises(RequestError) as caught:
        runner.forward(loaded(pack).new_cache(range(LAYERS)), runner.embed([1]))
    assert caught.value.code == "foreign_cache"


def test_a_failure_in_mid_prefill_leaves_the_cache_as_it_was(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = loaded(pack, max_chunk=8)
    whole = run_all(runner, IDS)
    cache = runner.new_cache(range(LAYERS))
    runner.forward(cache, runner.embed(IDS[:10]))
    honest, calls = cache.advance, []

    def failing(rows: int) -> None:
        calls.append(rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        honest(rows)

    monkeypatch.setattr(cache, "advance", failing)
    with pytest.raises(KeyboardInterrupt):
        runner.forward(cache, runner.embed(IDS[10:]))
    monkeypatch.undo()
    assert cache.length == 10
    assert relative(runner.head(runner.forward(cache, runner.embed(IDS[10:]))), whole[10:]) < 1e-5


# --- the real model


@pytest.mark.model
def test_smollm2_in_fp32_equals_transformers(smollm_dir: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 49000, 64).tolist()
    (tmp_path / "pack").mkdir()
    with open_checkpoint(next(smollm_dir.glob("*.gguf"))) as checkpoint:
        write_pack(checkpoint, SideFiles(tiny_tokenizer_json().encode()), tmp_path / "pack", "f32")
    pack = Pack.open(tmp_path / "pack")
    runner = BlockRunner(pack)
    runner.load(range(pack.spec.num_layers), embed=True, head=True)
    cache = runner.new_cache(range(pack.spec.num_layers))
    found = runner.head(runner.forward(cache, runner.embed(ids)))
    assert relative(found, reference_logits(smollm_dir, ids)) < 1e-4

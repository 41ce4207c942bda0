"""The KV cache: growth keeps rows, truncation is free, limits hold, nothing of a text stays behind."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.protocol.errors import IsthmusError, RequestError
from isthmus.splitter.cache import KVCache, aligned_zeros
from isthmus.splitter.spec import ModelSpec
from tests.tiny import TINY_SIZES

SPEC = ModelSpec.from_hf(
    {
        **TINY_SIZES,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
)


def write(cache: KVCache, rows: int, seed: int) -> None:
    """Stands for a step: reserves, fills the new rows of every layer with random numbers, advances."""
    cache.reserve(cache.length + rows)
    noise = np.random.default_rng(seed)
    for buffer in (*cache.keys, *cache.values):
        new = buffer[:, :, cache.length : cache.length + rows]
        new[...] = noise.normal(size=new.shape)
    cache.advance(rows)


def contents(cache: KVCache) -> list[np.ndarray]:
    return [buffer[:, :, : cache.length].copy() for buffer in (*cache.keys, *cache.values)]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 40))
def test_growth_keeps_every_row(steps: list[int], capacity: int) -> None:
    grown = KVCache(SPEC, range(1, 3), capacity=capacity)
    roomy = KVCache(SPEC, range(1, 3), capacity=SPEC.context_length)
    for seed, rows in enumerate(steps):
        write(grown, rows, seed)
        write(roomy, rows, seed)
    assert grown.length == roomy.length == sum(steps)
    assert grown.length <= grown.capacity <= max(2 * grown.length, capacity)
    for a, b in zip(contents(grown), contents(roomy), strict=True):
        np.testing.assert_array_equal(a, b)


def test_growth_doubles_up_to_the_context() -> None:
    cache = KVCache(SPEC, range(4), capacity=100)
    seen = []
    for length in (100, 101, 250, SPEC.context_length):
        cache.reserve(length)
        seen.append(cache.capacity)
    assert seen == [100, 200, 400, SPEC.context_length]


def test_growth_drops_steps_bound_to_the_old_buffers() -> None:
    cache = KVCache(SPEC, range(1), capacity=4)
    cache.steps[1] = "bound to the first buffers"
    cache.reserve(4)
    assert cache.steps
    cache.reserve(5)
    assert not cache.steps


def test_buffers_start_on_cache_lines() -> None:
    cache = KVCache(SPEC, range(4), capacity=3)
    assert {buffer.ctypes.data % 64 for buffer in (*cache.keys, *cache.values)} == {0}
    assert not aligned_zeros((3, 5)).any()


def test_nbytes_counts_the_capacity_of_all_layers() -> None:
    cache = KVCache(SPEC, range(1, 4), capacity=10)
    assert cache.nbytes == 3 * 10 * SPEC.kv_bytes_per_token_layer(4)


def test_context_overflow_names_both_numbers_and_changes_nothing() -> None:
    cache = KVCache(SPEC, range(1), capacity=8)
    write(cache, 5, 0)
    with pytest.raises(RequestError, match=rf"{SPEC.context_length + 1} .* {SPEC.context_length}") as caught:
        cache.reserve(SPEC.context_length + 1)
    assert caught.value.code == "context_overflow"
    assert (cache.length, cache.capacity) == (5, 8)


def test_truncate_only_shortens() -> None:
    cache = KVCache(SPEC, range(1))
    write(cache, 9, 0)
    cache.truncate(9)
    cache.truncate(4)
    assert cache.length == 4
    for wrong in (5, -1):
        with pytest.raises(RequestError) as caught:
            cache.truncate(wrong)
        assert caught.value.code == "bad_truncate"
    assert cache.length == 4


def test_advance_beyond_the_reserved_rows_is_refused() -> None:
    cache = KVCache(SPEC, range(1), capacity=4)
    with pytest.raises(IsthmusError) as caught:
        cache.advance(5)
    assert caught.value.code == "cache_overflow"


def test_close_leaves_zeros_behind_even_in_truncated_rows() -> None:
    cache = KVCache(SPEC, range(2), capacity=8)
    write(cache, 8, 0)
    cache.truncate(2)
    buffers = [*cache.keys, *cache.values]
    cache.close()
    cache.close()
    assert not any(buffer.any() for buffer in buffers)
    assert cache.closed
    assert cache.nbytes == 0
    with pytest.raises(IsthmusError) as caught:
        cache.reserve(1)
    assert caught.value.code == "cache_closed"


def test_growth_leaves_zeros_behind() -> None:
    cache = KVCache(SPEC, range(1), capacity=4)
    write(cache, 4, 0)
    old = [*cache.keys, *cache.values]
    write(cache, 1, 1)
    assert not any(buffer.any() for buffer in old)


@pytest.mark.parametrize("layers", [range(3, 5), range(0, 4, 2), range(-1, 2), range(3, 1)])
def test_layers_outside_the_model_are_refused(layers: range) -> None:
    with pytest.raises(RequestError) as caught:
        KVCache(SPEC, layers)
    assert caught.value.code == "bad_layer_range"


def test_a_capacity_of_nothing_is_refused() -> None:
    with pytest.raises(RequestError) as caught:
        KVCache(SPEC, range(1), capacity=0)
    assert caught.value.code == "bad_capacity"

"""Model identity: which differences refuse, which ask for a canary, and that the canary can tell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from isthmus.protocol.errors import CodecError
from isthmus.protocol.identity import (
    Comparison,
    Match,
    ModelIdentity,
    Value,
    canary_error,
    canary_ids,
    canary_tolerance,
    compare,
)

F32 = NDArray[np.float32]
ARCHITECTURE: dict[str, Value] = {
    "family": "llama", "num_layers": 30, "norm_eps": 1e-5, "rope_theta": 1e5, "tied": True, "window": None,
}  # fmt: skip


def identity(
    *,
    tokenizer_hash: str = "t" * 64,
    base_name: str = "SmolLM2-135M",
    weights_hash: str = "w" * 64,
    **architecture: Value,
) -> ModelIdentity:
    return ModelIdentity(
        architecture=ARCHITECTURE | architecture,
        tokenizer_hash=tokenizer_hash,
        base_name=base_name,
        weights_hash=weights_hash,
    )


# -- key and comparison -----------------------------------------------------------------------------------


def test_key_is_pinned() -> None:
    content = {
        "architecture": {
            "family": "llama", "norm_eps": 1e-05, "num_layers": 30, "rope_theta": 100000, "tied": True,
            "window": None,
        },
        "base_name": "SmolLM2-135M",
        "tokenizer_hash": "t" * 64,
    }  # fmt: skip
    assert identity().key == hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
    assert identity().key == "e68a3aa7b9e32ea1cefd755464b3f475caea25198ab9d04592b9327aa103fd27"


def test_key_covers_everything_but_the_weights() -> None:
    base = identity()
    assert identity(weights_hash="other").key == base.key
    others = [
        identity(base_name="b"),
        identity(tokenizer_hash="x"),
        identity(num_layers=31),
        identity(extra=1),
    ]
    assert len({base.key, *(o.key for o in others)}) == 5


def test_floats_read_from_f32_metadata_equal_decimal_ones() -> None:
    eps, theta = float(np.float32(1e-5)), float(np.float32(1e5))
    assert eps != 1e-5
    from_gguf = identity(norm_eps=eps, rope_theta=theta)
    from_config = identity(norm_eps=1e-5, rope_theta=100000)
    assert from_gguf == from_config
    assert from_gguf.key == from_config.key
    assert identity(norm_eps=1.1e-5).key != from_config.key


names = st.text(min_size=1, max_size=9)
finite = st.floats(allow_nan=False, allow_infinity=False)
values = st.integers() | finite | st.text(max_size=9) | st.booleans() | st.none()


@given(st.dictionaries(names, values, min_size=1, max_size=9))
def test_key_survives_the_wire_and_any_order(architecture: dict[str, Value]) -> None:
    made = ModelIdentity(architecture=architecture, tokenizer_hash="t", base_name="b", weights_hash="w")
    turned = dict(reversed(architecture.items()))
    again = ModelIdentity(architecture=turned, tokenizer_hash="t", base_name="b", weights_hash="w")
    read = ModelIdentity.model_validate_json(made.model_dump_json())
    assert made.key == again.key == read.key
    assert compare(made, read) == Comparison(Match.EQUAL, ())


@pytest.mark.parametrize(
    ("cloud", "match", "differing"),
    [
        (identity(), Match.EQUAL, ()),
        (identity(weights_hash="other"), Match.CANARY, ("weights_hash",)),
        (identity(base_name="renamed"), Match.EQUAL, ("base_name",)),
        (identity(base_name="b", weights_hash="v"), Match.REFUSED, ("base_name", "weights_hash")),
        (identity(tokenizer_hash="x"), Match.REFUSED, ("tokenizer_hash",)),
        (identity(rope_theta=5e5), Match.REFUSED, ("architecture.rope_theta",)),
        (identity(tied=1), Match.REFUSED, ("architecture.tied",)),
        (identity(window=4096, extra=0), Match.REFUSED, ("architecture.extra", "architecture.window")),
        (
            identity(num_layers=32, weights_hash="v"),
            Match.REFUSED,
            ("architecture.num_layers", "weights_hash"),
        ),
    ],
)
def test_compare(cloud: ModelIdentity, match: Match, differing: tuple[str, ...]) -> None:
    assert compare(identity(), cloud) == Comparison(match, differing)
    assert compare(cloud, identity()) == Comparison(match, differing)


@pytest.mark.parametrize(
    "fields",
    [
        {"architecture": {}},
        {"architecture": {str(i): i for i in range(65)}},
        {"architecture": {"a": float("nan")}},
        {"architecture": {"a": float("inf")}},
        {"architecture": {"a": [1]}},
        {"architecture": {"a": "x" * 257}},
        {"architecture": {"": 1}},
        {"tokenizer_hash": ""},
        {"base_name": "x" * 257},
        {"weights_hash": 5},
        {"colour": "red"},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_bad_identity(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ModelIdentity.model_validate(identity().model_dump() | fields)


# -- canary -----------------------------------------------------------------------------------------------


def test_canary_ids_are_pinned() -> None:
    ids = [
        31557,
        30642,
        32028,
        26534,
        16943,
        44144,
        46078,
        8817,
        40615,
        43957,
        10629,
        28141,
        17236,
        24375,
        23062,
        7578,
    ]
    assert canary_ids(49152) == ids
    assert canary_ids(49152, 3) == ids[:3]


@given(st.integers(1, 10**6), st.integers(0, 40))
def test_canary_ids_are_in_the_vocabulary(vocab_size: int, n: int) -> None:
    ids = canary_ids(vocab_size, n)
    assert len(ids) == n
    assert all(0 <= i < vocab_size for i in ids)


def block_int8(weight: F32) -> F32:
    """Round to symmetric 8 bits, blocks of 32: an honest 8-bit copy."""
    blocks = weight.reshape(len(weight), -1, 32)
    scale = np.abs(blocks).max(axis=2, keepdims=True) / 127
    rounded: F32 = (np.rint(blocks / scale) * scale).reshape(weight.shape).astype(np.float32)
    return rounded


def residual_stream(change: Callable[[F32], F32], layers: int, seed: int = 3) -> Iterator[F32]:
    """The rows f32[16, 128] after each layer of a random pre-norm network with massive outlier channels."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((16, 128)).astype(np.float32)
    for layer in range(layers):
        up = change(rng.normal(scale=1 / 12, size=(256, 128)).astype(np.float32))
        down = change(rng.normal(scale=1 / 16, size=(128, 256)).astype(np.float32))
        normed = rows / np.sqrt((rows**2).mean(axis=1, keepdims=True))
        rows = (rows + np.maximum(normed @ up.T, 0) @ down.T).astype(np.float32)
        if layer == 0:
            rows[:, [7, 100]] += 3000  # as real models grow them, weights or no weights
        yield rows


def other(relative: float) -> Callable[[F32], F32]:
    rng = np.random.default_rng(99)

    def change(weight: F32) -> F32:
        noise = rng.standard_normal(weight.shape) * np.sqrt((weight**2).mean()) * relative
        changed: F32 = (weight + noise).astype(np.float32)
        return changed

    return change


def errors(change: Callable[[F32], F32], seed: int = 3) -> list[float]:
    exact = residual_stream(lambda weight: weight, 24)
    return [canary_error(a, b) for a, b in zip(residual_stream(change, 24, seed), exact, strict=True)]


def test_an_8_bit_copy_passes_at_every_depth() -> None:
    found = errors(block_int8)
    assert all(0 < error < canary_tolerance(k) / 2 for k, error in enumerate(found, 1))


@pytest.mark.parametrize("relative", [0.2, 0.5])
def test_weights_that_differ_fail_at_every_depth(relative: float) -> None:
    found = errors(other(relative))
    assert all(error > canary_tolerance(k) for k, error in enumerate(found, 1))


def test_weights_of_another_training_fail_by_far() -> None:
    found = errors(lambda weight: weight, seed=4)
    assert all(error > 5 * canary_tolerance(k) for k, error in enumerate(found, 1))


def test_outlier_channels_do_not_hide_a_difference() -> None:
    rng = np.random.default_rng(0)
    cloud, edge = rng.standard_normal((2, 16, 64)).astype(np.float32)
    cloud[:, 5] = edge[:, 5] = 20_000.0
    naive = np.median(np.linalg.norm(edge - cloud, axis=1) / np.linalg.norm(cloud, axis=1))
    assert naive < 0.001
    assert canary_error(edge, cloud) > 1


def test_one_wild_row_is_forgiven_most_are_not() -> None:
    cloud = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    edge = cloud.copy()
    edge[0] *= 5
    assert canary_error(edge, cloud) == 0
    edge[:9] *= 5
    assert canary_error(edge, cloud) == pytest.approx(4, rel=0.01)


def test_canary_error_edge_cases() -> None:
    zeros = np.zeros((2, 4), np.float32)  # fewer channels than would be left out
    assert canary_error(zeros, zeros) == 0
    assert canary_error(zeros + 1, zeros) > 1e30
    for wrong in (np.zeros((2, 5), np.float32), np.zeros((3, 4), np.float32), np.zeros(8, np.float32)):
        with pytest.raises(CodecError) as caught:
            canary_error(wrong, zeros)
        assert caught.value.code == "bad_shape"
    for empty in (np.zeros((0, 4), np.float32), np.zeros(4, np.float32)):
        with pytest.raises(CodecError):
            canary_error(empty, empty)
    for bad in (np.nan, np.inf):
        for a, b in ((zeros + bad, zeros), (zeros, zeros + bad)):
            with pytest.raises(CodecError) as caught:
                canary_error(a, b)
            assert caught.value.code == "bad_values"


def test_tolerance_grows_with_the_root_of_the_depth() -> None:
    assert canary_tolerance(1) == canary_tolerance(0) == 0.03
    assert canary_tolerance(16) == pytest.approx(4 * canary_tolerance(1))

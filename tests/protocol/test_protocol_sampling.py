"""The sampler against transformers' filters, a plain reference, published vectors and chi-square."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pydantic import ValidationError
from transformers.generation import logits_process as hf

from isthmus.protocol.errors import CodecError, RequestError
from isthmus.protocol.sampling import (
    MAX_LOGPROBS,
    Sampled,
    SamplingParams,
    TokenCounts,
    _draw,
    sample,
)

F32 = NDArray[np.float32]
GREEDY = SamplingParams(temperature=0.0)


def logits_of(*values: float) -> F32:
    return np.array(values, np.float32)


def random_logits(vocab: int, seed: int, sharpness: float = 4.0) -> F32:
    return (np.random.default_rng(seed).standard_normal(vocab) * sharpness).astype(np.float32)


def reference(scores: NDArray[Any], params: SamplingParams) -> tuple[list[int], list[float]]:
    """Ids that survive the filters, ranked, and their probabilities: the stated order, spelled out."""
    ranked = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    peak = float(scores[ranked[0]])
    weights = [math.exp((float(scores[i]) - peak) / params.temperature) for i in ranked]
    size = min(params.top_k or len(ranked), len(ranked))
    ranked, weights = ranked[:size], weights[:size]
    if params.top_p < 1:
        total, before, size = math.fsum(weights), 0.0, 0
        while size < len(weights) and before < params.top_p * total:
            before += weights[size]
            size += 1
        ranked, weights = ranked[:size], weights[:size]
    kept = [(i, w) for i, w in zip(ranked, weights, strict=True) if w >= params.min_p * weights[0]]
    total = math.fsum(w for _, w in kept)
    return [i for i, _ in kept], [w / total for _, w in kept]


def chi_square(counts: list[int], expected: list[float]) -> float:
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))


filters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.05, 0.3, 0.7, 1.0, 1.5, 5.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 40, 300, 10**6]),
    top_p=st.sampled_from([1.0, 1.0, 0.99, 0.9, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.0, 0.001, 0.05, 0.5, 1.0]),
)
distributions = st.builds(
    random_logits,
    st.sampled_from([1, 2, 7, 128, 129, 500, 5000]),
    st.integers(0, 99),
    st.sampled_from([0.1, 2.0, 8.0]),
)


# -- distribution -----------------------------------------------------------------------------------------


@given(distributions, filters, st.floats(0, 1, exclude_max=True))
def test_draw_equals_the_plain_reference(logits: F32, params: SamplingParams, u: float) -> None:
    ids, probabilities = reference(logits, params)
    reach = np.cumsum(probabilities)
    assume(np.abs(reach[:-1] - u).min(initial=1) > 1e-9)  # not on a border, where rounding decides
    got = _draw(logits, params, u)
    assert got == ids[min(int(np.searchsorted(reach, u, side="right")), len(ids) - 1)]


few_values = st.sampled_from([-1.0, 0.0, 1.0, 2.0])


@given(
    hnp.arrays(np.float32, st.integers(1, 400), elements=few_values),
    filters,
    st.floats(0, 1, exclude_max=True),
)
def test_ties_are_ranked_by_id(logits: F32, params: SamplingParams, u: float) -> None:
    ids, probabilities = reference(logits, params)
    reach = np.cumsum(probabilities)
    assume(np.abs(reach[:-1] - u).min(initial=1) > 1e-9)
    assert _draw(logits, params, u) == ids[min(int(np.searchsorted(reach, u, side="right")), len(ids) - 1)]


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 2048, 3000])
def test_the_ends_of_the_unit_interval(vocab: int, u: float) -> None:
    for sharpness in (0.0, 1.0, 500.0):  # flat, lively, and with most weights underflown to zero
        logits = random_logits(vocab, 1, sharpness)
        token = _draw(logits, SamplingParams(), u)
        assert logits.max() - logits[token] < 745  # a token of weight zero is never drawn
        if u == 0:
            assert token == int(logits.argmax())


@pytest.mark.parametrize("seed", range(20))
def test_filters_keep_what_transformers_keeps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    params = SamplingParams(
        temperature=float(rng.uniform(0.3, 2)),
        top_k=int(rng.integers(2, 200)),
        top_p=float(rng.uniform(0.3, 0.99)),
        min_p=float(rng.uniform(0.001, 0.2)),
        repetition_penalty=float(rng.uniform(0.5, 2)),
    )
    logits = random_logits(600, seed, 2.0)
    context = rng.integers(0, 600, 50).tolist()
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    for step in (
        hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
        hf.TemperatureLogitsWarper(params.temperature),
        hf.TopKLogitsWarper(params.top_k),
        hf.TopPLogitsWarper(params.top_p),
        hf.MinPLogitsWarper(params.min_p),
    ):
        scores = step(torch.tensor([context]), scores)
    expected = torch.softmax(scores[0], -1).numpy()
    penalised = TokenCounts(context[:30], context[30:]).penalise(logits, params)
    ids, probabilities = reference(penalised, params)
    assert set(ids) == set(np.flatnonzero(expected).tolist())
    np.testing.assert_allclose(probabilities, expected[ids], rtol=1e-9)
    # And the sampler walks that very distribution: the middle of each token's interval draws the token.
    middles = np.cumsum(probabilities) - np.array(probabilities) / 2
    assert [_draw(penalised, params, float(u)) for u in middles] == ids


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=0.7, top_k=5),
        SamplingParams(seed=3, temperature=1.3, top_p=0.9),
        SamplingParams(seed=4, choice=9, min_p=0.05, top_k=7, top_p=0.97),
    ],
)
def test_sampled_frequencies_pass_chi_square(params: SamplingParams) -> None:
    logits, n = logits_of(2.0, 1.0, 1.5, 0.0, 1.0, -1.0, 0.5, 1.9), 4000
    ids, probabilities = reference(logits, params)
    count = Counter(sample(logits, params, position=i).token for i in range(n))
    assert set(count) <= set(ids)
    # At most 7 degrees of freedom: 99.9 % lies below 24.3.
    assert chi_square([count[i] for i in ids], [p * n for p in probabilities]) < 24.3


def test_sampling_is_keyed_by_seed_choice_and_position() -> None:
    logits = random_logits(1000, 0, 1.0)

    def run(seed: int, choice: int) -> list[int]:
        params = SamplingParams(seed=seed, choice=choice)
        return [sample(logits, params, position=i).token for i in range(100, 140)]

    assert run(5, 0) == run(5, 0)
    assert len({tuple(run(s, c)) for s in (5, 6) for c in (0, 1)}) == 4
    replayed = sample(logits, SamplingParams(seed=5), position=120).token
    assert replayed == run(5, 0)[20]


def test_token_sequence_is_pinned() -> None:
    params = SamplingParams(seed=1234, temperature=0.8, top_k=50, top_p=0.95, min_p=0.01)
    logits = ((np.arange(2000) * 7919 % 2000) / 100).astype(np.float32)
    drawn = [sample(logits, params, position=i).token for i in range(8)]
    assert drawn == [1605, 346, 1210, 1951, 963, 1235, 1087, 1630]
    drawn = [sample(logits, SamplingParams(seed=7), position=i).token for i in range(8)]
    assert drawn == [1510, 1013, 321, 50, 1235, 1482, 323, 272]


# -- greedy and penalties ---------------------------------------------------------------------------------


def test_greedy_takes_the_lowest_of_equals_whatever_the_filters() -> None:
    logits = logits_of(1, 5, 3, 5)
    for params in (GREEDY, SamplingParams(temperature=0.0, top_k=2, top_p=0.1, min_p=0.9, seed=3)):
        assert sample(logits, params, position=0) == Sampled(1)


@pytest.mark.parametrize(
    "fields", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-310}], ids=str
)
def test_tight_filters_are_greedy(fields: dict[str, object]) -> None:
    params = SamplingParams.model_validate(fields)
    logits = random_logits(3000, 4)
    assert {sample(logits, params, position=i).token for i in range(50)} == {int(logits.argmax())}


def test_penalties_by_hand() -> None:
    logits = logits_of(4.0, -4.0, 3.0, 2.0, 1.0)
    counts = TokenCounts([0, 1, 1], [2, 2, 1])
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    # 0: prompt only; 1: prompt and once generated; 2: twice generated; 3 and 4: unseen.
    np.testing.assert_allclose(counts.penalise(logits, params), [2.0, -8.75, 0.25, 2.0, 1.0])
    assert logits[0] == 4.0


@pytest.mark.parametrize(
    ("params", "token"),
    [
        (SamplingParams(temperature=0.0), 0),
        (SamplingParams(temperature=0.0, repetition_penalty=3.0), 2),
        (SamplingParams(temperature=0.0, frequency_penalty=1.0), 1),
        (SamplingParams(temperature=0.0, presence_penalty=1.5), 1),
        (SamplingParams(temperature=0.0, presence_penalty=-2.0), 0),
    ],
)
def test_penalties_change_the_greedy_choice(params: SamplingParams, token: int) -> None:
    logits = logits_of(3.0, 2.5, 2.0)
    assert sample(logits, params, position=9, counts=TokenCounts([1], [0])).token == token


def test_repetition_penalty_equals_transformers() -> None:
    logits, ids = random_logits(500, 8), [3, 77, 3, 499, 0]
    expected = hf.RepetitionPenaltyLogitsProcessor(1.3)(
        torch.tensor([ids]), torch.from_numpy(logits.copy())[None]
    )
    got = TokenCounts(ids[:2], ids[2:]).penalise(logits, SamplingParams(repetition_penalty=1.3))
    np.testing.assert_allclose(got, expected[0].numpy(), rtol=1e-6)


@given(st.lists(st.integers(0, 200), max_size=100), st.lists(st.integers(0, 200), max_size=200))
def test_counts_grown_one_by_one_equal_counts_built_whole(prompt: list[int], output: list[int]) -> None:
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.1, presence_penalty=0.7)
    logits = random_logits(201, 0)
    grown = TokenCounts(prompt)
    for token in output:
        grown.add(token)
    got = grown.penalise(logits, params)
    np.testing.assert_array_equal(got, TokenCounts(prompt, output).penalise(logits, params))
    for token in range(201):
        value = float(logits[token])
        if token in prompt or token in output:
            value = value * 1.5 if value < 0 else value / 1.5
        n = output.count(token)
        assert got[token] == pytest.approx(value - 0.1 * n - 0.7 * (n > 0))


def test_no_context_yet_changes_nothing() -> None:
    logits = random_logits(50, 0)
    got = TokenCounts([]).penalise(logits, SamplingParams(repetition_penalty=2.0))
    np.testing.assert_array_equal(got, logits)


@pytest.mark.parametrize("token", [-1, 3])
def test_context_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(RequestError) as caught:
        sample(
            logits_of(1, 2, 3),
            SamplingParams(presence_penalty=1.0),
            position=0,
            counts=TokenCounts([0, token]),
        )
    assert caught.value.code == "bad_token_id"


def test_penalties_without_context_are_refused() -> None:
    with pytest.raises(RequestError) as caught:
        sample(logits_of(1, 2), SamplingParams(repetition_penalty=1.1), position=0)
    assert caught.value.code == "context_needed"


# -- only what is allowed ---------------------------------------------------------------------------------


@given(distributions, filters, st.floats(0.02, 1), st.integers(0, 99), st.integers(0, 9))
def test_among_the_allowed_as_if_there_were_no_others(
    logits: F32, params: SamplingParams, share: float, seed: int, position: int
) -> None:
    allowed = np.random.default_rng(seed).random(len(logits)) < share
    assume(allowed.any())
    ids = np.flatnonzero(allowed)
    for chosen in (params, GREEDY):
        alone = sample(logits[ids], chosen, position=position).token
        assert sample(logits, chosen, position=position, allowed=allowed).token == ids[alone]
    everything = np.ones(len(logits), bool)
    got = sample(logits, params, position=position, allowed=everything)
    assert got == sample(logits, params, position=position)


def test_penalties_know_the_tokens_by_their_ids_and_logprobs_stay_the_models() -> None:
    logits, allowed = logits_of(9.0, 3.0, 2.5), np.array([False, True, True])
    params = SamplingParams(temperature=0.0, presence_penalty=1.0, logprobs=2)
    got = sample(logits, params, position=0, counts=TokenCounts([], [1]), allowed=allowed)
    free = sample(logits, params, position=0, counts=TokenCounts([], [1]))
    assert (got.token, free.token) == (2, 0)
    assert got.top == free.top
    assert got.logprob == pytest.approx(2.5 - math.log(sum(math.exp(x) for x in (9.0, 3.0, 2.5))))


def test_nothing_allowed_is_refused() -> None:
    with pytest.raises(RequestError) as caught:
        sample(logits_of(1, 2), GREEDY, position=0, allowed=np.zeros(2, bool))
    assert caught.value.code == "nothing_allowed"


# -- logprobs ---------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = random_logits(300, 3)
    exact = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    params = SamplingParams(temperature=0.3, top_k=3, repetition_penalty=1.5, logprobs=4, seed=1)
    got = sample(logits, params, position=1, counts=TokenCounts([5, 6]))
    assert got.logprob == pytest.approx(exact[got.token], abs=1e-12)
    best = np.argsort(-exact)[:4]
    assert [i for i, _ in got.top] == best.tolist()
    assert [p for _, p in got.top] == pytest.approx(exact[best], abs=1e-12)


def test_how_many_logprobs() -> None:
    logits = logits_of(1.0, 1.0, 0.0)
    assert sample(logits, GREEDY, position=0) == Sampled(0, None, ())
    only = sample(logits, SamplingParams(temperature=0.0, logprobs=0), position=0)
    assert only.logprob == pytest.approx(-math.log(2 + math.exp(-1)))
    assert only.top == ()
    all_three = sample(logits, SamplingParams(temperature=0.0, logprobs=20), position=0)
    assert [i for i, _ in all_three.top] == [0, 1, 2]  # ties by id, and no more than there are
    assert sum(math.exp(p) for _, p in all_three.top) == pytest.approx(1)


# -- bad inputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_k=2)])
def test_logits_that_are_not_finite(bad: float, params: SamplingParams) -> None:
    for where in range(3):
        logits = logits_of(1, 2, 3)
        logits[where] = bad
        with pytest.raises(CodecError) as caught:
            sample(logits, params, position=0)
        assert caught.value.code == "bad_logits"


@pytest.mark.parametrize("shape", [(0,), (1, 5), ()])
def test_logits_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(CodecError) as caught:
        sample(np.zeros(shape, np.float32), GREEDY, position=0)
    assert caught.value.code == "bad_logits"


def test_huge_logits_do_not_overflow() -> None:
    top = float(np.finfo(np.float32).max)
    logits = logits_of(-top, top, 0.0)
    params = SamplingParams(temperature=0.01, repetition_penalty=100.0, logprobs=1)
    assert sample(logits, params, position=0, counts=TokenCounts([0, 1, 2])).token == 1


BAD_PARAMS: list[dict[str, object]] = [
    {"temperature": math.nan}, {"temperature": math.inf}, {"temperature": -0.1}, {"temperature": 101.0},
    {"temperature": "1"}, {"temperature": True}, {"top_k": -1}, {"top_k": 1.5}, {"top_p": 0.0},
    {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0.0},
    {"repetition_penalty": math.inf}, {"presence_penalty": 2.1},
    {"frequency_penalty": -2.1}, {"seed": -1}, {"seed": 2**64}, {"choice": -1},
    {"choice": 2**32}, {"logprobs": -2}, {"logprobs": MAX_LOGPROBS + 1}, {"top_q": 1},
]  # fmt: skip


@pytest.mark.parametrize("fields", BAD_PARAMS, ids=str)
def test_bad_params(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SamplingParams.model_validate(fields)


def test_params_round_trip_and_are_frozen() -> None:
    params = SamplingParams(temperature=0, seed=2**64 - 1, top_p=0.9)
    assert SamplingParams.model_validate_json(params.model_dump_json()) == params
    with pytest.raises(ValidationError):
        setattr(params, "seed", 3)  # noqa: B010  - an assignment would not pass mypy
    assert not params.needs_context
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert SamplingParams.model_validate({name: 1.5}).needs_context

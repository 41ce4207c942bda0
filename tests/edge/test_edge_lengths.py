"""How long answers will be, learned from earlier ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge.lengths import PRIOR_TOKENS, AnswerLengths, Forecast


def test_an_answer_that_nothing_ends_takes_all() -> None:
    lengths = AnswerLengths()
    lengths.observe(10, 5, True)
    assert lengths.forecast(10, 300, can_end=False) == Forecast(300.0, 300, 300)


def test_before_anything_is_known_the_prior_answers() -> None:
    forecast = AnswerLengths().forecast(10, 10_000, can_end=True)
    assert forecast.mean == pytest.approx(np.mean(PRIOR_TOKENS))
    assert (forecast.high, forecast.bound) == (1024, 10_000)
    assert AnswerLengths().forecast(10, 1, can_end=True) == Forecast(1.0, 1, 1)


def test_eight_answers_displace_most_of_the_prior() -> None:
    lengths, errors = AnswerLengths(), []
    for _ in range(8):
        errors.append(abs(lengths.forecast(10, 2000, can_end=True).mean - 40))
        lengths.observe(10, 40, True)
    assert errors == sorted(errors, reverse=True)
    for _ in range(40):
        lengths.observe(10, 40, True)
    forecast = lengths.forecast(10, 2000, can_end=True)
    assert forecast.mean == pytest.approx(40, abs=8)
    assert forecast.high == 40


def test_answers_to_prompts_of_about_the_same_length_count() -> None:
    lengths, rng = AnswerLengths(), np.random.default_rng(0)
    for _ in range(400):
        prompt = int(rng.integers(50, 4000))
        lengths.observe(prompt, 30 if prompt < 1000 else 300, True)
    assert lengths.forecast(200, 4000, can_end=True).mean == pytest.approx(30, abs=15)
    assert lengths.forecast(3000, 4000, can_end=True).mean == pytest.approx(300, abs=15)


def test_the_mean_of_what_max_tokens_cuts_is_right() -> None:
    rng = np.random.default_rng(1)
    lengths = AnswerLengths(neighbours=1024)
    drawn = rng.geometric(1 / 200, 1024)
    for tokens in drawn:
        lengths.observe(100, int(tokens), True)
    for most in (10, 100, 1000):
        forecast = lengths.forecast(100, most, can_end=True)
        assert forecast.mean == pytest.approx(np.minimum(drawn, most).mean(), rel=0.01)


def test_answers_that_were_cut_count_as_longer() -> None:
    """Lengths of mean 200, seen only up to bounds from 20 to 400: the whole mean comes out all the same."""
    rng = np.random.default_rng(2)
    honest, naive = AnswerLengths(neighbours=1024), AnswerLengths(neighbours=1024)
    for tokens in rng.geometric(1 / 200, 1024):
        bound = int(rng.integers(20, 400))
        honest.observe(100, min(int(tokens), bound), bool(tokens <= bound))
        naive.observe(100, min(int(tokens), bound), True)
    true = 200 * (1 - (1 - 1 / 200) ** 390)
    assert honest.forecast(100, 390, can_end=True).mean == pytest.approx(true, rel=0.06)
    assert naive.forecast(100, 390, can_end=True).mean < 0.8 * true


def test_nine_in_ten_end_by_the_high_one() -> None:
    rng = np.random.default_rng(3)
    lengths, held = AnswerLengths(), []
    for i, tokens in enumerate(rng.lognormal(4.5, 0.8, 3000).astype(int) + 1):
        if i >= 200:
            held.append(tokens <= lengths.forecast(100, 10_000, can_end=True).high)
        lengths.observe(100, int(tokens), True)
    assert 0.86 < np.mean(held) < 0.95


def test_the_window_forgets() -> None:
    lengths = AnswerLengths(window=64)
    for tokens in [500] * 200 + [20] * 64:
        lengths.observe(100, tokens, True)
    assert len(lengths) == 64
    assert lengths.forecast(100, 4000, can_end=True).mean == pytest.approx(20, abs=10)


def test_no_tokens_is_no_answer() -> None:
    lengths = AnswerLengths()
    lengths.observe(100, 0, True)
    assert len(lengths) == 0


@pytest.mark.parametrize(("window", "neighbours"), [(10, 0), (10, 11)])
def test_sizes_that_cannot_be(window: int, neighbours: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.10"):
        AnswerLengths(window=window, neighbours=neighbours)


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000), st.booleans()), max_size=80),
    st.integers(1, 6000),
    st.integers(1, 6000),
)
def test_forecasts_are_in_order(seen: list[tuple[int, int, bool]], prompt: int, most: int) -> None:
    lengths = AnswerLengths(window=40, neighbours=16)
    for prompt_tokens, tokens, finished in seen:
        lengths.observe(prompt_tokens, tokens, finished)
    forecast = lengths.forecast(prompt, most, can_end=True)
    assert 1 <= forecast.mean <= forecast.bound == most
    assert 1 <= forecast.high <= most
    assert forecast.mean <= lengths.forecast(prompt, most + 1, can_end=True).mean

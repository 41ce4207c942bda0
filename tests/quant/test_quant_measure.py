"""The measures against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.protocol.errors import UsageError
from isthmus.quant.measure import (
    kl_divergence,
    kl_per_position,
    log_softmax,
    max_rel_logit_error,
    relative_rms_error,
    top1_agreement,
)


def test_log_softmax_survives_large_logits() -> None:
    probabilities = np.exp(log_softmax(np.array([[1e4, 1e4, -1e4]], dtype=np.float32)))
    np.testing.assert_allclose(probabilities, [[0.5, 0.5, 0.0]])


def test_kl_of_two_coins() -> None:
    fair, biased = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert kl_divergence(fair, biased) == pytest.approx(expected)
    assert kl_divergence(fair, fair) == 0.0
    assert kl_per_position(np.repeat(fair, 3, axis=0), np.repeat(biased, 3, axis=0)).shape == (3,)


def test_kl_ignores_a_shift_of_the_logits() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 50))
    assert kl_divergence(logits, logits + 7.0) == pytest.approx(0.0, abs=1e-12)


def test_agreement_counts_rows() -> None:
    a = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 3.0], [2.0, 0.0]])
    b = np.array([[0.0, 2.0], [0.0, 1.0], [0.0, 3.0], [2.0, 1.0]])
    assert top1_agreement(a, b) == 0.75


def test_relative_errors() -> None:
    reference = np.array([3.0, -4.0])
    assert max_rel_logit_error(reference, np.array([3.0, -3.0])) == 0.25
    assert relative_rms_error(reference, np.array([3.0, -3.0])) == pytest.approx(0.2)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\(2, 3\) and \(3, 2\)"):
        kl_divergence(np.zeros((2, 3)), np.zeros((3, 2)))

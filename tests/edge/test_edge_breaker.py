"""Breaker, deadline, cloud search: the timing rules of recovery, without a network."""

from __future__ import annotations

import pytest

from isthmus.edge.breaker import CircuitBreaker
from isthmus.edge.deadline import LONGEST_S, SHORTEST_S, StepDeadline
from isthmus.edge.recovery import RecoveryConfig
from isthmus.protocol.errors import ConfigError


def test_a_breaker_lets_all_through_until_something_fails() -> None:
    breaker = CircuitBreaker()
    assert breaker.state(0.0) == "closed"
    assert breaker.may_try(0.0)
    breaker.failed(10.0)
    assert breaker.state(10.5) == "open"
    assert not breaker.may_try(10.5)
    assert breaker.retry_in_s(10.25) == 0.75
    assert breaker.may_try(11.0)


def test_one_probe_at_a_time_and_success_closes() -> None:
    breaker = CircuitBreaker()
    breaker.failed(0.0)
    breaker.trying(1.5)
    assert breaker.state(1.6) == "half-open"
    assert not breaker.may_try(1.6)
    breaker.succeeded()
    assert breaker.state(1.7) == "closed"
    assert breaker.retry_in_s(1.7) == 0.0


def test_each_failure_doubles_the_pause_up_to_a_bound() -> None:
    breaker = CircuitBreaker(first_pause_s=1.0, longest_pause_s=6.0)
    pauses = []
    for n in range(5):
        breaker.trying(float(n))
        breaker.failed(float(n))
        pauses.append(breaker.pause_s)
    assert pauses == [1.0, 2.0, 4.0, 6.0, 6.0]


def test_a_probe_that_never_ends_does_not_block_for_ever() -> None:
    breaker = CircuitBreaker(first_pause_s=1.0, longest_pause_s=6.0)
    breaker.failed(0.0)
    breaker.trying(2.0)
    assert breaker.retry_in_s(3.0) == 5.0
    assert not breaker.may_try(7.9)
    assert breaker.may_try(8.1)


def test_a_deadline_follows_the_steps_within_its_bounds() -> None:
    deadline = StepDeadline()
    assert deadline.seconds == LONGEST_S
    for _ in range(19):
        deadline.note(0.01)
    assert deadline.seconds == LONGEST_S, "19 samples tell no 99th percentile"
    deadline.note(0.01)
    assert deadline.seconds == SHORTEST_S
    for _ in range(10):
        deadline.note(1.5)
    assert deadline.seconds == 6.0
    for _ in range(300):
        deadline.note(20.0)
    assert deadline.seconds == LONGEST_S


@pytest.mark.parametrize("name", ["budget_s", "refused_grace_s", "first_pause_s", "longest_pause_s"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_recovery_times_are_checked(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        RecoveryConfig(**{name: value})

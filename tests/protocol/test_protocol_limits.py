"""Limits, the tenant's ledger, and the buckets that meter resumes and tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.protocol.errors import OverloadedError
from isthmus.protocol.limits import Limits, TenantUsage, TokenBucket


def test_usage_counts_sessions_and_bytes_and_charges_nothing_on_refusal() -> None:
    usage = TenantUsage(max_sessions=2, max_kv_bytes=100)
    usage.admit(60)
    with pytest.raises(OverloadedError, match="holds 60 of its quota of 100") as too_big:
        usage.admit(41)
    assert too_big.value.code == "tenant_kv_bytes"
    usage.admit(40)
    with pytest.raises(OverloadedError, match="2 sessions open, its quota is 2") as too_many:
        usage.admit(0)
    assert too_many.value.code == "tenant_sessions"
    usage.release(60)
    usage.release(40)
    assert (usage.num_sessions, usage.kv_bytes) == (0, 0)


def test_a_full_quota_takes_what_nobody_holds_first() -> None:
    usage = TenantUsage(max_sessions=2, max_kv_bytes=100)
    waiting = [30, 40]
    usage.admit(30)
    usage.admit(40)

    def give_up() -> bool:
        if waiting:
            usage.release(waiting.pop(0))
        return bool(waiting) or usage.num_sessions < 2

    usage.make_room = give_up
    usage.admit(20)
    assert (waiting, usage.num_sessions, usage.kv_bytes) == ([40], 2, 60)
    usage.admit(90 - 40 + 40 - 20)  # room for the bytes, too, where that is what is full
    assert (waiting, usage.num_sessions, usage.kv_bytes) == ([], 2, 90)
    usage.make_room = lambda: False
    with pytest.raises(OverloadedError, match="2 sessions open"):
        usage.admit(1)


def test_wire_limits_tell_the_smaller_session_count() -> None:
    assert Limits(max_sessions=3, max_sessions_per_tenant=9).wire().max_sessions == 3
    assert Limits(max_sessions=9, max_sessions_per_tenant=3).wire().max_sessions == 3
    usage = TenantUsage.from_limits(Limits(max_sessions_per_tenant=7, max_kv_bytes_per_tenant=8))
    assert (usage.max_sessions, usage.max_kv_bytes) == (7, 8)


def test_bucket_gives_its_burst_at_once_and_its_rate_for_ever() -> None:
    bucket = TokenBucket(2.0, 3.0)
    assert [bucket.take(10.0) for _ in range(3)] == [0, 0, 0]
    assert bucket.take(10.0) == pytest.approx(0.5)
    assert bucket.take(10.25) == pytest.approx(0.25)  # nothing was taken in vain
    assert bucket.take(10.5) == 0
    assert bucket.take(10.5) > 0
    assert [bucket.take(1000.0) == 0 for _ in range(4)] == [True, True, True, False]  # never above the burst


def test_a_reservation_always_succeeds_and_tells_the_wait() -> None:
    bucket = TokenBucket(10.0, 20.0)
    assert bucket.reserve(20, 0.0) == 0
    assert bucket.reserve(5, 0.0) == pytest.approx(0.5)
    assert bucket.reserve(5, 0.0) == pytest.approx(1.0)  # behind the one before
    assert bucket.reserve(0, 1.0) == 0
    assert bucket.reserve(100, 1.0) == pytest.approx(10.0)  # more than the burst ever holds


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_no_rate_is_no_limit(rate: float) -> None:
    bucket = TokenBucket(rate, 0.0)
    assert bucket.reserve(10**9, 0.0) == 0
    assert bucket.take(0.0) == 0
    usage = TenantUsage(1, 1)
    usage.admit_resume(0.0)
    assert usage.reserve_tokens(10**9, 0.0) == 0


def test_a_clock_that_jumps_back_refills_nothing() -> None:
    bucket = TokenBucket(1.0, 1.0)
    assert bucket.take(1000.0) == 0
    assert bucket.take(0.0) == pytest.approx(1.0)
    assert bucket.take(0.5) == pytest.approx(0.5)


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 9)), max_size=30))
def test_what_was_reserved_never_outruns_burst_and_rate(script: list[tuple[float, int]]) -> None:
    bucket, now, total = TokenBucket(4.0, 8.0), 0.0, 0
    for pause, n in script:
        now += pause
        total += n
        done = now + bucket.reserve(n, now)
        assert total <= 8.0 + 4.0 * done + 1e-6


def test_resumes_and_tokens_have_their_own_quota() -> None:
    limits = Limits(max_resumes_per_minute_per_tenant=2, max_tokens_per_s_per_tenant=5.0)
    usage = TenantUsage.from_limits(limits)
    usage.admit_resume(0.0)
    usage.admit_resume(0.0)
    with pytest.raises(OverloadedError, match="more than 2 sessions per minute") as caught:
        usage.admit_resume(0.0)
    assert caught.value.code == "tenant_resumes"
    assert caught.value.retry_after_s == pytest.approx(30.0)
    usage.admit_resume(30.0)
    assert usage.reserve_tokens(50, 0.0) == 0  # ten seconds' worth
    assert usage.reserve_tokens(5, 0.0) == pytest.approx(1.0)
    assert TenantUsage.from_limits(Limits()).reserve_tokens(10**6, 0.0) == 0


def test_several_are_taken_at_once_or_none() -> None:
    bucket = TokenBucket(10.0, 20.0)
    assert bucket.take(0.0, 15) == 0
    assert bucket.take(0.0, 15) == pytest.approx(1.0)
    assert bucket.take(0.0, 5) == 0

"""The estimator: smooth while a link is what it was, quick once it is another, and no figure is made up."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite, nan
from statistics import mean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge.link_estimate import PROBE_BYTES, RTT_STALE_S, STALE_S, LinkEstimator
from isthmus.protocol.events import ChunkArrived, ProbeDone
from isthmus.splitter.links import Estimate, LinkView

MOST = 256 * 1024
MBIT = 125_000.0  # bytes per second

seconds = st.floats(1e-4, 5.0)
rates = st.floats(1e4, 1e8)


def told(rtt_s: float = 0.02) -> LinkEstimator:
    """One that knows the round trip well."""
    link = LinkEstimator()
    for at in range(10):
        link.note_rtt(rtt_s, float(at))
    return link


def rtt_of(link: LinkEstimator, now: float = 0.0) -> Estimate:
    rtt = link.view(now).rtt
    assert rtt is not None
    return rtt


def up_of(link: LinkEstimator, now: float = 0.0) -> Estimate:
    up = link.view(now).up
    assert up is not None
    return up


def test_what_was_not_measured_is_none() -> None:
    link = LinkEstimator()
    assert link.view(0.0) == LinkView(None, None, None)
    assert link.rtt_s is None
    assert link.needs_ping(0.0)
    assert link.needs_probe(0.0)


@given(st.lists(seconds, min_size=1, max_size=60))
def test_the_round_trip_stays_within_its_samples(samples: list[float]) -> None:
    link = LinkEstimator()
    for at, sample in enumerate(samples):
        link.note_rtt(sample, float(at))
    rtt = rtt_of(link, float(len(samples)))
    assert min(samples) * (1 - 1e-9) <= rtt.value <= max(samples) * (1 + 1e-9)
    assert 0 <= rtt.deviation <= max(samples) - min(samples) + 1e-9
    assert 1 <= rtt.num_samples <= len(samples)
    assert link.rtt_s == rtt.value


@given(st.lists(rates, min_size=1, max_size=40), st.booleans())
def test_a_bandwidth_stays_within_its_samples(samples: list[float], up: bool) -> None:
    link = LinkEstimator()
    note = link.note_up if up else link.note_down
    for at, rate in enumerate(samples):
        note(rate, 1.0, float(at))
    view = link.view(float(len(samples)))
    found, other = (view.up, view.down) if up else (view.down, view.up)
    assert other is None
    assert found is not None
    assert min(samples) * (1 - 1e-9) <= found.value <= max(samples) * (1 + 1e-9)
    assert isfinite(found.deviation)


@given(
    before=st.floats(0.001, 0.3),
    factor=st.floats(1.6, 50) | st.floats(0.02, 0.6),
    noise=st.floats(0, 0.03),
    num_before=st.integers(3, 40),
)
def test_a_change_is_believed_within_three_samples(
    before: float, factor: float, noise: float, num_before: int
) -> None:
    after = before * factor
    link = LinkEstimator()
    for at in range(num_before):
        link.note_rtt(before * (1 + noise * (-1) ** at), float(at))
    for at in range(3):
        link.note_rtt(after, num_before + float(at))
    if abs(after - before) > 0.0015:  # below, a change of the round trip is noise
        assert rtt_of(link).value == pytest.approx(after, rel=1e-6)


def test_from_5_to_150_ms_and_back() -> None:
    link = told(0.005)
    for _ in range(3):
        link.note_rtt(0.150, 10.0)
    assert link.rtt_s == pytest.approx(0.150)
    for _ in range(3):
        link.note_rtt(0.005, 11.0)
    assert link.rtt_s == pytest.approx(0.005)


@given(st.floats(2, 1000), st.integers(1, 2))
def test_one_or_two_outliers_hardly_move_the_mean(factor: float, num_outliers: int) -> None:
    link = told(0.02)
    for _ in range(num_outliers):
        link.note_rtt(0.02 * factor, 10.0)
        assert link.rtt_s == pytest.approx(0.02)
    link.note_rtt(0.02, 10.0)
    assert link.rtt_s is not None
    assert 0.02 <= link.rtt_s <= 0.02 * 1.07


def test_samples_that_jump_to_both_sides_are_noise_and_not_a_change() -> None:
    link = told(0.1)
    for at in range(30):
        link.note_rtt(0.2 if at % 2 else 0.01, 10.0 + at)
    rtt = rtt_of(link)
    assert 0.08 < rtt.value < 0.13
    assert rtt.deviation > 0.01
    assert rtt.num_samples > 30  # never begun anew


def test_the_mean_is_that_of_the_newest_samples() -> None:
    link = LinkEstimator()
    for at, sample in enumerate(samples := [0.020, 0.021, 0.022, 0.019, 0.0205]):
        link.note_rtt(sample, float(at))
    assert link.rtt_s == pytest.approx(mean(samples))
    for at in range(40):
        link.note_rtt(0.0215, 10.0 + at)
    assert link.rtt_s == pytest.approx(0.0215, rel=0.001)


@pytest.mark.parametrize("wrong", [0.0, -1.0, nan, inf, -inf, 1e300, 1e-300])
def test_a_sample_that_is_no_amount_is_ignored(wrong: float) -> None:
    link = LinkEstimator()
    link.note_rtt(wrong, 0.0)
    for note in (link.note_up, link.note_down):
        note(wrong, 1.0, 0.0)
        note(1000, wrong, 0.0, "probe")
    assert link.view(0.0) == LinkView(None, None, None)


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_age_grows_with_time_and_never_falls_below_zero(first: float, second: float) -> None:
    link = LinkEstimator()
    link.note_rtt(0.02, 100.0)
    early, late = sorted((first, second))
    assert 0 <= rtt_of(link, early).age_s <= rtt_of(link, late).age_s
    assert rtt_of(link, late).age_s == max(0.0, late - 100.0)


def test_what_is_stale_asks_for_a_measurement_and_gives_way_to_it() -> None:
    link = told()
    now = 9.0
    for note in (link.note_up, link.note_down):
        note(MBIT, 1.0, now)
    assert not link.needs_probe(now)
    assert not link.needs_ping(now + RTT_STALE_S)
    assert link.needs_ping(now + RTT_STALE_S + 0.1)
    link.note_rtt(0.02, now + STALE_S)
    assert not link.needs_probe(now + STALE_S)
    link.note_rtt(0.02, now + STALE_S + 1)
    assert link.needs_up(now + STALE_S + 1)
    assert link.needs_down(now + STALE_S + 1)
    link.note_up(10 * MBIT, 1.0, now + STALE_S + 1, "probe")
    up = up_of(link, now + STALE_S + 1)
    assert up.value == pytest.approx(10 * MBIT)
    assert (up.num_samples, up.source) == (1, "probe")


def test_another_round_trip_means_another_link() -> None:
    link = told(0.02)
    for note in (link.note_up, link.note_down):
        note(MBIT, 1.0, 9.0)
    for _ in range(3):
        link.note_rtt(0.03, 9.0)
    assert not link.needs_probe(9.0)
    for _ in range(3):
        link.note_rtt(0.15, 9.0)
    assert link.needs_up(9.0)
    assert link.needs_down(9.0)
    assert up_of(link).value == pytest.approx(MBIT)  # better than nothing
    link.note_up(9 * MBIT, 1.0, 9.5)
    assert up_of(link).value == pytest.approx(9 * MBIT)
    assert not link.needs_up(9.5)


def test_the_deviation_of_a_bandwidth_is_in_its_unit() -> None:
    link = LinkEstimator()
    for at, rate in enumerate([9 * MBIT, 11 * MBIT] * 10):
        link.note_up(rate, 1.0, float(at))
    assert up_of(link).value == pytest.approx(10 * MBIT, rel=0.03)
    assert up_of(link).deviation == pytest.approx(MBIT, rel=0.2)


# ---- uploads of sessions


def test_an_upload_from_idle_took_its_time_less_a_round_trip() -> None:
    link = told(0.02)
    link.note_chunk(ChunkArrived(125_000, 0.12, 125_000, inf), 10.0)
    assert up_of(link).value == pytest.approx(125_000 / 0.1)


def test_an_upload_behind_another_is_timed_from_that_one() -> None:
    link = told(0.02)
    link.note_chunk(ChunkArrived(100_000, 0.5, 100_100, 0.1), 10.0)
    assert up_of(link).value == pytest.approx(100_100 / 0.1)


def test_an_upload_without_a_known_round_trip_tells_nothing() -> None:
    link = LinkEstimator()
    link.note_chunk(ChunkArrived(100_000, 0.5, 100_000, 0.1), 10.0)
    assert link.view(10.0).up is None


@pytest.mark.parametrize("since_sent_s", [0.0, 0.019, 0.021])
def test_an_upload_too_short_to_time_raises_a_figure_and_never_makes_one(since_sent_s: float) -> None:
    """100,000 bytes in next to no time: at least 12.5 MB/s."""
    link = told(0.02)
    chunk = ChunkArrived(100_000, since_sent_s, 100_000, inf)
    link.note_chunk(chunk, 10.0)
    assert link.view(10.0).up is None
    link.note_up(20e6, 1.0, 10.0)
    link.note_chunk(chunk, 10.0)
    assert up_of(link).value == pytest.approx(20e6)
    slow = told(0.02)
    slow.note_up(1e6, 1.0, 10.0)
    for _ in range(3):
        slow.note_chunk(chunk, 10.0)
    assert up_of(slow).value == pytest.approx(12.5e6)


# ---- steps


def test_a_step_shows_the_round_trip_and_nothing_else() -> None:
    link = told(0.05)
    link.note_up(MBIT, 1.0, 9.0)
    link.note_down(2 * MBIT, 1.0, 9.0)
    for _ in range(50):
        link.note_step(0.007 + 0.051 + 0.010 + 0.001, 0.007, 1250, 250, 10.0)
    assert link.rtt_s == pytest.approx(0.051, rel=0.01)
    link.note_step(0.001, 0.5, 1, 1, 10.0)  # a cloud that claims more than there was
    assert link.rtt_s == pytest.approx(0.051, rel=0.01)


def test_a_step_without_bandwidths_is_taken_as_it_is() -> None:
    link = LinkEstimator()
    link.note_step(0.03, 0.01, 1000, 100, 1.0)
    assert link.rtt_s == pytest.approx(0.02)


# ---- probes


def play_probe(link: LinkEstimator, rtt_s: float, rate: float, *, up: bool = True) -> list[int]:
    """A probe over a link without noise; the sizes it took."""
    sizes, size = [], PROBE_BYTES
    while True:
        sizes.append(size)
        done = ProbeDone(1, size if up else 0, 0 if up else size, rtt_s + size / rate)
        larger = link.next_probe(size, link.added_s(done), MOST)
        if larger is None:
            link.note_probe(done, 10.0)
            return sizes
        size = larger


@pytest.mark.parametrize(
    ("mbit", "sizes"),
    [
        (0.1, [PROBE_BYTES]),  # more would be in a request's way
        (1, [PROBE_BYTES]),
        (2, [PROBE_BYTES]),
        (10, [PROBE_BYTES, 4 * PROBE_BYTES, MOST]),
        (1000, [PROBE_BYTES, 4 * PROBE_BYTES, MOST]),
    ],
)
@pytest.mark.parametrize("up", [True, False])
def test_probes_grow_until_they_tell(mbit: float, sizes: list[int], up: bool) -> None:
    link = told(0.02)
    assert play_probe(link, 0.02, mbit * MBIT, up=up) == sizes
    found = link.view(10.0).up if up else link.view(10.0).down
    assert found is not None
    assert found.source == "probe"
    # What takes less than 8 ms is only known to be at least so fast.
    assert found.value == pytest.approx(min(mbit * MBIT, MOST / 0.008))


def test_a_probe_must_stand_out_of_the_round_trips_noise() -> None:
    link = LinkEstimator()
    for at in range(20):
        link.note_rtt(0.100 + 0.020 * (-1) ** at, float(at))
    assert 0.07 < link.resolution_s < 0.09
    assert link.next_probe(PROBE_BYTES, 0.05, MOST) == 4 * PROBE_BYTES


def test_an_empty_probe_is_a_round_trip() -> None:
    link = LinkEstimator()
    link.note_probe(ProbeDone(1, 0, 0, 0.03), 1.0)
    assert (link.rtt_s, rtt_of(link).source) == (0.03, "probe")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["rtt", "up", "down", "step", "chunk", "probe"]),
            st.lists(st.floats() | st.floats(0, 1), min_size=4, max_size=4),
        ),
        max_size=30,
    )
)
def test_whatever_is_noted_every_figure_is_an_amount(notes: list[tuple[str, list[float]]]) -> None:
    link = LinkEstimator()
    for at, (kind, (a, b, c, d)) in enumerate(notes):
        whole = int(c * 1e6) if isfinite(c) and abs(c) < 1e9 else 0
        calls: dict[str, Callable[[], Any]] = {
            "rtt": lambda: link.note_rtt(a, at),  # noqa: B023
            "up": lambda: link.note_up(a, b, at),  # noqa: B023
            "down": lambda: link.note_down(a, b, at, "probe"),  # noqa: B023
            "step": lambda: link.note_step(a, b, whole, whole, at),  # noqa: B023
            "chunk": lambda: link.note_chunk(ChunkArrived(whole, a, whole, b), at),  # noqa: B023
            "probe": lambda: link.note_probe(ProbeDone(1, whole, 0, d), at),  # noqa: B023
        }
        calls[kind]()
    for found in (view := link.view(100.0)).rtt, view.up, view.down:
        if found is not None:
            assert found.value > 0
            assert isfinite(found.value)
            assert isfinite(found.deviation)


def test_a_far_round_trip_is_in_doubt_until_others_agree_or_not() -> None:
    def doubt_after(seconds: float, now: float) -> bool:
        link.note_rtt(seconds, now)
        return link.in_doubt

    link = LinkEstimator()
    assert not any(doubt_after(0.01, float(number)) for number in range(5))
    assert doubt_after(0.1, 5.0)
    assert not doubt_after(0.01, 5.1), "it was a hiccup"
    assert [doubt_after(0.1, 6.0 + number) for number in range(3)] == [True, True, False]
    assert rtt_of(link, 9.0).value > 0.09, "it was not"

"""What the link is like now: smoothed samples of its round trip and bandwidths, quick to believe a change.

Pure: `now` is any monotonic time in seconds. What can be no sample (NaN,
nothing, less than nothing, beyond all measure) is ignored.
"""

from __future__ import annotations

from math import inf, sqrt
from typing import Final, Literal

from isthmus.protocol.events import ChunkArrived, ProbeDone
from isthmus.splitter.links import Estimate, LinkView

Source = Literal["passive", "probe"]

STALE_S: Final = 30.0
"""A bandwidth older than this is worth a probe, and gives way to the next sample at once."""
RTT_STALE_S: Final = 5.0

PROBE_BYTES: Final = 16 * 1024
_PROBE_GROWTH: Final = 4
# A probe is larger than the one before while the time it adds to a round trip is no more than this: a timer's
# and a scheduler's noise, the round trip's own, or the round trips that TCP needs to open its window.
_TELLING_S: Final = 0.008
_TELLING_DEVIATIONS: Final = 4.0
_TELLING_RTTS: Final = 3.0
# … and while the larger one is not expected to hold up a request that comes meanwhile for longer than this.
_LONGEST_PROBE_S: Final = 0.25

_CHANGED_AFTER: Final = 3
_FAR_DEVIATIONS: Final = 3.0
_FAR_SHARE: Final = 0.25
# What a transfer took that was over sooner than a round trip.
_NO_TIME_S: Final = 1e-9
# A round trip that changed by this factor says that the link is another one.
_OTHER_LINK: Final = 2.0


class _Mean:
    """An exponentially weighted mean and variance (West 1979). `_CHANGED_AFTER` samples in a row that are far
    off on the same side begin it anew; fewer of them count no further off than is not far."""

    def __init__(self, gain: float, least_far: float) -> None:
        self.mean = 0.0
        self.num_samples = 0
        self.noted_at = -inf
        self.source: Source = "passive"
        self._gain = gain
        self._least_far = least_far
        self._variance = 0.0
        self._far: list[float] = []  # samples that are held back, all on one side
        self._doubted = False

    @property
    def deviation(self) -> float:
        return sqrt(self._variance)

    @property
    def in_doubt(self) -> bool:
        """Far samples are held back."""
        return bool(self._far)

    def doubt(self) -> None:
        """The next sample begins anew."""
        self._doubted = True

    def is_due(self, now: float, stale_s: float) -> bool:
        """Nothing is known, or nothing that still counts."""
        return self.num_samples == 0 or self._doubted or now - self.noted_at > stale_s

    def note(self, sample: float, now: float, source: Source) -> bool:
        """Whether the mean began anew, with the far samples of late."""
        is_due = self.is_due(now, STALE_S)
        self.noted_at = max(self.noted_at, now)
        self.source = source
        if is_due:
            self._begin([sample])
            return False
        far = max(_FAR_DEVIATIONS * self.deviation, _FAR_SHARE * self.mean, self._least_far)
        off = sample - self.mean
        if self._far and (abs(off) <= far or (off > 0) != (self._far[0] > self.mean)):
            held, self._far = self._far, []
            for one in held:
                self._take(max(self.mean - far, min(self.mean + far, one)))
            off = sample - self.mean
        if abs(off) <= far:
            self._take(sample)
            return False
        self._far.append(sample)
        if len(self._far) < _CHANGED_AFTER:
            return False
        self._begin(self._far)
        return True

    def _begin(self, samples: list[float]) -> None:
        self._far, self._doubted = [], False
        self.mean, self._variance, self.num_samples = 0.0, 0.0, 0
        for sample in samples:
            self._take(sample)

    def _take(self, sample: float) -> None:
        self.num_samples += 1
        gain = max(1 / self.num_samples, self._gain)
        off = sample - self.mean
        self.mean += gain * off
        self._variance = (1 - gain) * (self._variance + gain * off * off)

    def estimate(self, now: float) -> Estimate | None:
        if self.num_samples == 0:
            return None
        return Estimate(
            self.mean, self.deviation, max(0.0, now - self.noted_at), self.num_samples, self.source
        )


class LinkEstimator:
    """Of one link, over all its connections. Bandwidths are averaged as seconds per byte, since what they are
    used for is times."""

    def __init__(self) -> None:
        self._rtt = _Mean(gain=1 / 8, least_far=0.0005)  # the gain of RFC 6298
        self._up = _Mean(gain=1 / 4, least_far=0.0)
        self._down = _Mean(gain=1 / 4, least_far=0.0)

    # ---- samples

    def note_rtt(self, seconds: float, now: float, source: Source = "passive") -> None:
        """A round trip of next to no bytes."""
        if not _is_amount(seconds):
            return
        before = self._rtt.mean
        if self._rtt.note(seconds, now, source):
            ratio = self._rtt.mean / before
            if max(ratio, 1 / ratio) >= _OTHER_LINK:
                self._up.doubt()
                self._down.doubt()

    def note_up(self, num_bytes: float, seconds: float, now: float, source: Source = "passive") -> None:
        """`num_bytes` took `seconds` to the cloud, beyond the round trip. A time too short to be told from
        the round trip's noise says "at least so many bytes per second": of a probe that counts, of what was
        sent anyway (and may be small) only where it is more than was known."""
        self._note(self._up, num_bytes, seconds, now, source)

    def note_down(self, num_bytes: float, seconds: float, now: float, source: Source = "passive") -> None:
        """As `note_up`, from the cloud."""
        self._note(self._down, num_bytes, seconds, now, source)

    def _note(self, bandwidth: _Mean, num_bytes: float, seconds: float, now: float, source: Source) -> None:
        if not (_is_amount(num_bytes) and _is_amount(seconds)):
            return
        least = self.resolution_s
        s_per_byte = max(seconds, least) / num_bytes
        if seconds < least and source == "passive" and s_per_byte >= bandwidth.mean:
            return
        bandwidth.note(s_per_byte, now, source)

    def note_chunk(self, chunk: ChunkArrived, now: float) -> None:
        """An upload of a session."""
        if self._rtt.num_samples == 0:
            return
        from_idle_s = chunk.since_sent_s - self._rtt.mean
        if from_idle_s < chunk.since_previous_s:
            self.note_up(chunk.num_bytes, max(from_idle_s, _NO_TIME_S), now)
        else:
            self.note_up(chunk.bytes_between, chunk.since_previous_s, now)

    def note_probe(self, done: ProbeDone, now: float) -> None:
        """A probe in one direction, or an empty one."""
        added_s = max(self.added_s(done), _NO_TIME_S)
        if done.up_bytes:
            self.note_up(done.up_bytes, added_s, now, "probe")
        elif done.down_bytes:
            self.note_down(done.down_bytes, added_s, now, "probe")
        else:
            self.note_rtt(done.seconds, now, "probe")

    def added_s(self, done: ProbeDone) -> float:
        """What a probe's padding added to a round trip, in seconds; may be below 0."""
        return done.seconds - self._rtt.mean

    def note_step(self, seconds: float, cloud_s: float, up_bytes: int, down_bytes: int, now: float) -> None:
        """A small step was answered after `seconds`, of which the cloud had it for `cloud_s`."""
        travel_s = up_bytes * self._up.mean + down_bytes * self._down.mean  # 0 while they are not known
        self.note_rtt(seconds - cloud_s - travel_s, now)

    # ---- what is known

    @property
    def rtt_s(self) -> float | None:
        """The smoothed round trip in seconds: what the next one is expected to take."""
        return self._rtt.mean if self._rtt.num_samples else None

    @property
    def in_doubt(self) -> bool:
        """The newest round trips were far off, and too few yet to be believed."""
        return self._rtt.in_doubt

    @property
    def resolution_s(self) -> float:
        """A transfer must add more than this to a round trip to be seen."""
        return max(_TELLING_S, _TELLING_DEVIATIONS * self._rtt.deviation)

    def view(self, now: float) -> LinkView:
        """All that is known, with its age."""
        up, down = (_bandwidth(mean.estimate(now)) for mean in (self._up, self._down))
        return LinkView(self._rtt.estimate(now), up, down)

    # ---- what should be measured

    def needs_ping(self, now: float) -> bool:
        """The round trip is not known, or was `RTT_STALE_S` ago."""
        return self._rtt.is_due(now, RTT_STALE_S)

    def needs_probe(self, now: float) -> bool:
        """Anything is not known or stale."""
        return self.needs_ping(now) or self.needs_up(now) or self.needs_down(now)

    def needs_up(self, now: float) -> bool:
        """No bandwidth to the cloud is known that still counts."""
        return self._up.is_due(now, STALE_S)

    def needs_down(self, now: float) -> bool:
        """As `needs_up`, from the cloud."""
        return self._down.is_due(now, STALE_S)

    def next_probe(self, num_bytes: int, seconds: float, most: int) -> int | None:
        """The size of the probe after one of `num_bytes` that added `seconds` to a round trip; None where
        that one told enough, and where a larger one would be above `most` bytes or take too long."""
        larger = min(num_bytes * _PROBE_GROWTH, most)
        enough_s = max(self.resolution_s, _TELLING_RTTS * (self.rtt_s or 0.0))
        too_long = seconds * larger / num_bytes > _LONGEST_PROBE_S
        return None if larger <= num_bytes or seconds > enough_s or too_long else larger


def _is_amount(value: float) -> bool:
    """A time or a number of bytes that something could take or have. Not of NaN."""
    return 1e-12 < value < 1e12


def _bandwidth(s_per_byte: Estimate | None) -> Estimate | None:
    """In bytes per second; the deviation to first order."""
    if s_per_byte is None:
        return None
    value = 1 / s_per_byte.value
    return Estimate(
        value,
        s_per_byte.deviation * value * value,
        s_per_byte.age_s,
        s_per_byte.num_samples,
        s_per_byte.source,
    )

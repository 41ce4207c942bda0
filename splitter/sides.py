"""How long one device takes for its part: a profile's curves, ready to be asked quickly. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from math import isfinite
from typing import Final

from isthmus.protocol.profiles import DeviceProfile

_KEPT: Final = 16


class Piecewise:
    """Linear between points (x rising); level before the first, along the last slope behind the last.
    `proportional`: a single point stands for a line through the origin instead of a constant."""

    __slots__ = ("_slopes", "_xs", "_ys")

    def __init__(self, points: Sequence[tuple[float, float]], *, proportional: bool = False) -> None:
        if len(points) == 1 and proportional:
            points = [(0.0, 0.0), *points]
        self._xs = [float(x) for x, _ in points]
        self._ys = [float(y) for _, y in points]
        # A slope below zero is noise of the measurement; beyond the last point it would end below zero.
        self._slopes = [
            (y1 - y0) / (x1 - x0)
            for x0, x1, y0, y1 in zip(self._xs, self._xs[1:], self._ys, self._ys[1:], strict=False)
        ]
        if self._slopes:
            self._slopes.append(max(0.0, self._slopes[-1]))

    def __call__(self, x: float) -> float:
        xs = self._xs
        if x <= xs[0] or not self._slopes:
            return self._ys[0]
        i = bisect_left(xs, x) - 1
        return self._ys[i] + self._slopes[i] * (x - xs[i])


class Side:
    """One device, by its profile. All results are seconds (bytes for memory)."""

    __slots__ = ("_batch", "_decode", "_prefill", "num_layers", "profile", "share_below")

    def __init__(self, profile: DeviceProfile) -> None:
        self.profile = profile
        self.num_layers = profile.num_layers
        self.share_below = (0.0, *accumulate(profile.layer_share))
        """share_below[k]: time of layers 0 … k - 1, in mean layers."""
        self._prefill = Piecewise(profile.prefill, proportional=True)
        self._decode = Piecewise(profile.decode)
        self._batch = Piecewise(profile.batch)

    def layers(self, start: int, stop: int) -> float:
        """Layers start … stop - 1, in mean layers."""
        return self.share_below[stop] - self.share_below[start]

    def layer_s(self, context: float) -> float:
        """One mean layer over one row behind `context` tokens."""
        return self._decode(context)

    def chunk_layer_s(self, rows: float, context: float) -> float:
        """One mean layer over a chunk of `rows` rows behind `context` tokens."""
        return self._prefill(rows) + self.profile.prefill_context_s * rows * context

    def crowding(self, sessions: float) -> float:
        """How much longer a step takes when `sessions` decode at once than when one does."""
        return self._batch(max(1.0, sessions))

    def weight_bytes(self, split: int, *, head: bool) -> int:
        """What layers 0 … split - 1 (and norm, head) add to an idle process, KV apart; 0 for no layer."""
        if split == 0:
            return 0
        profile = self.profile
        bytes_ = profile.embed_bytes + split * profile.layer_bytes + profile.scratch_bytes
        return bytes_ + (profile.head_bytes if head else 0)


_sides: OrderedDict[int, Side] = OrderedDict()


def side_of(profile: DeviceProfile) -> Side:
    """The Side of a profile; made once per profile object."""
    found = _sides.get(id(profile))
    if found is None:
        found = _sides[id(profile)] = Side(profile)  # holds the profile, so that its id stays its own
        while len(_sides) > _KEPT:
            _sides.popitem(last=False)
    return found


def finite(value: float | None) -> float | None:
    """`value` if it is a number that one can reckon with; sensors give NaN."""
    return value if value is not None and isfinite(value) else None

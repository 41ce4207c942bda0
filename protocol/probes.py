"""PROBE and its reply: padding, sent to see how long it takes.

PROBE's `pos` is the number of bytes wanted back. The cloud answers at once: with that many bytes or, where
this connection has asked for too many of late, with none. At most `Limits.max_probe_bytes` travel either way.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

from isthmus.protocol.errors import FrameError
from isthmus.protocol.frames import Dtype, Frame, MsgType


def check_sizes(up_bytes: int, down_bytes: int, *, most: int) -> None:
    """FrameError for a probe whose padding is not 0 to `most` bytes each way."""
    if min(up_bytes, down_bytes) < 0 or max(up_bytes, down_bytes) > most:
        raise FrameError(
            f"a probe of {up_bytes} bytes up and {down_bytes} down, allowed are {most} each way",
            code="probe_too_large",
            hint="measure with less",
        )


def padded_frame(kind: MsgType, seq: int, size: int, *, most: int, pos: int = 0) -> Frame:
    """PROBE or PROBE_REPLY with `size` bytes of padding, of which there are `most`."""
    return Frame(kind, seq=seq, pos=pos, dtype=Dtype.PADDING, raw_len=size, body=_padding(most)[:size])


@lru_cache(maxsize=4)
def _padding(size: int) -> bytes:
    """Bytes that no compressor on the way can shrink."""
    return hashlib.shake_256(b"isthmus").digest(size)

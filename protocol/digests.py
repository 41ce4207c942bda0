"""The digest chain over the rows of a session: both ends keep one, and RESUME compares them."""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BYTES: Final = 16
_ID_BYTES: Final = 4


class RowDigests:
    """One digest per row, over everything from the chain's start to that row:
    d[i + 1] = blake2b(d[i] + row, 16 bytes), d[0] from the position of the first row.

    Rows are taken as they are before compression, so that it does not matter how they were cut into chunks.
    Positions are those of the KV: behind a cached prefix, the chain starts where the upload does.
    """

    def __init__(self, start: int = 0) -> None:
        self._start = start
        self._chain = bytearray(struct.pack("<QQ", 0, start))  # d[0], d[1], …: 16 bytes each

    def __len__(self) -> int:
        """How many rows the chain covers."""
        return len(self._chain) // _BYTES - 1

    @property
    def stop(self) -> int:
        """One beyond the position of the newest row."""
        return self._start + len(self)

    @property
    def state(self) -> tuple[int, str]:
        """Number of rows and the digest there: what RESUME and RESUMED tell."""
        rows = len(self)
        return rows, self.at(rows)

    def append(self, raw: NDArray[np.uint8] | bytes) -> None:
        """Rows behind the newest: uint8[n, row_bytes] (RowCodec.encode_raw or unpack), or ids as <i4."""
        row_bytes, whole = (_ID_BYTES, raw) if isinstance(raw, bytes) else (raw.shape[1], raw.tobytes())
        link = bytes(self._chain[-_BYTES:])
        for begin in range(0, len(whole), row_bytes):
            link = hashlib.blake2b(link + whole[begin : begin + row_bytes], digest_size=_BYTES).digest()
            self._chain += link

    def truncate(self, pos: int) -> None:
        """Cut off the rows from position `pos` on, so that the next one lies there. Below the chain's start a
        new one begins. Rows between its end and `pos` are the cloud's own: they change no digest."""
        if pos < self._start:
            self._start = pos
            self._chain = bytearray(struct.pack("<QQ", 0, pos))
            return
        del self._chain[(pos - self._start + 1) * _BYTES :]
        self._chain += self._chain[-_BYTES:] * (pos - self.stop)

    def at(self, rows: int) -> str:
        """The digest over the first `rows` <= len rows, in hex; "" for none."""
        return self._chain[rows * _BYTES : (rows + 1) * _BYTES].hex() if rows else ""

"""Where websocket messages begin in one direction of an unencrypted connection (RFC 6455, read lightly)."""

from __future__ import annotations

from typing import Final

# A request or response head longer than this is no upgrade that we would see.
MAX_HEAD_BYTES: Final = 64 * 1024
_END_OF_HEAD: Final = b"\r\n\r\n"


class MessageScanner:
    """Feed it all bytes of one direction in order. Control frames and continuations are no messages of
    their own. A connection that is no websocket, or is encrypted, has none."""

    def __init__(self) -> None:
        self._head: bytearray | None = bytearray()  # None once the upgrade's head is over
        self._frame = bytearray()  # the frame header so far
        self._skip = 0  # payload bytes still to come
        self._blind = False

    def feed(self, data: bytes) -> list[int]:
        """Offsets in `data` of first bytes of messages."""
        starts: list[int] = []
        at = 0 if self._head is None else self._past_head(data)
        while at < len(data) and not self._blind:
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip -= step
                at += step
                continue
            if not self._frame and data[at] & 0x0F in (1, 2):
                starts.append(at)
            self._frame.append(data[at])
            at += 1
            if (length := _payload_bytes(self._frame)) is not None:
                self._skip = length
                self._frame.clear()
        return starts

    def _past_head(self, data: bytes) -> int:
        """How many bytes of `data` still belong to the upgrade's head."""
        head = self._head
        assert head is not None
        before = len(head)
        head += data[: MAX_HEAD_BYTES + 1]
        end = head.find(_END_OF_HEAD, max(0, before - 3))
        if end < 0:
            self._blind = len(head) > MAX_HEAD_BYTES
            return len(data)
        lines = bytes(head[:end]).lower()
        self._blind = not (lines.startswith(b"http/1.1 101") or b"\r\nupgrade: websocket" in lines)
        self._head = None
        return end + len(_END_OF_HEAD) - before


def _payload_bytes(header: bytearray) -> int | None:
    """The payload's length, once `header` is a whole frame header."""
    if len(header) < 2:
        return None
    short = header[1] & 0x7F
    wide = {126: 2, 127: 8}.get(short, 0)
    if len(header) < 2 + wide + (4 if header[1] & 0x80 else 0):
        return None
    return int.from_bytes(header[2 : 2 + wide], "big") if wide else short

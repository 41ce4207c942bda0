"""What a running relay is told, one line each: `shape RTT_MS UP_MBPS DOWN_MBPS` makes it another link."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from isthmus.protocol.errors import ConfigError
from isthmus.relay.server import Relay
from isthmus.relay.shape import LinkShape

MAX_LINE_BYTES: Final = 4096
_HINT: Final = "shape RTT_MS UP_MBPS DOWN_MBPS, for example: shape 40 10 50 (a bandwidth of 0: no limit)"


class Lines:
    """Whole lines out of what a pipe delivers in pieces; the last one counts once the pipe has ended."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Lines that `data` completes, empty ones left out; b"" ends the pipe. One that does not end within
        MAX_LINE_BYTES is cut there."""
        whole = self._rest + data if data else self._rest + b"\n"
        *lines, self._rest = whole.split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            lines, self._rest = [*lines, self._rest], b""
        return [text for line in lines if (text := line.decode(errors="replace").strip())]


def obey(line: str, relay: Relay) -> LinkShape:
    """Do what `line` says; the shape from now on, whose jitter stays. ConfigError `bad_relay_command` for
    another command, `bad_setting` for an impossible shape; then nothing has changed."""
    word, *numbers = line.split()
    if word != "shape" or len(numbers) != 3:
        raise _bad(f"{line[:60]!r} is no command of a relay")
    try:
        rtt_ms, up_mbps, down_mbps = map(float, numbers)
    except ValueError:
        raise _bad(f"{line[:60]!r} holds what is no number") from None
    relay.shape = replace(relay.shape, rtt_ms=rtt_ms, up_mbps=up_mbps, down_mbps=down_mbps)
    return relay.shape


def _bad(message: str) -> ConfigError:
    return ConfigError(message, code="bad_relay_command", hint=_HINT)

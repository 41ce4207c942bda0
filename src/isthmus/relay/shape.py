"""How an emulated link behaves while nothing is wrong with it: addresses, delay, jitter, bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.protocol.errors import ConfigError


@dataclass(frozen=True)
class LinkShape:
    """How the emulated link behaves. Zero means "no limit" for bandwidth and "none" for delay."""

    rtt_ms: float = 0.0
    jitter_ms: float = 0.0
    up_mbps: float = 0.0
    down_mbps: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rtt_ms", "jitter_ms", "up_mbps", "down_mbps"):
            value = getattr(self, name)
            if not 0 <= value < 1e6:
                raise ConfigError(
                    f"{name} = {value} is not between 0 and 1e6", hint="give a finite, positive number"
                )

    @property
    def one_way_s(self) -> tuple[float, float]:
        """Delay, and most jitter on top of it, of one direction, in seconds."""
        return self.rtt_ms / 2000, self.jitter_ms / 2000


def parse_address(text: str, *, what: str) -> tuple[str, int]:
    """`host:port`, `:port`, `port`, or a ws:// URL, as (host, port)."""
    bare = text.removeprefix("ws://").removeprefix("tcp://").rstrip("/")
    host, _, port = bare.rpartition(":")
    if not port.isdigit() or not 0 <= int(port) < 65536:
        raise ConfigError(
            f"{what} {text!r} names no port", hint="write host:port, for example 127.0.0.1:8078"
        )
    return host.strip("[]") or "127.0.0.1", int(port)

"""Which addresses stay on this machine, and what a server needs before it may listen on another one."""

from __future__ import annotations

import ipaddress

from isthmus.protocol.errors import ConfigError


def is_loopback(host: str) -> bool:
    """True for `localhost` and loopback addresses. Other names count as reachable from outside."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(
    host: str, *, keys: bool, tls: bool, insecure: bool, key_option: str = "--api-key-file"
) -> str:
    """What to warn of at this start, "" if of nothing.

    Raises ConfigError `insecure_bind` for listening beyond loopback without keys (`key_option` gives them)
    and TLS. `insecure` allows it, but is never silent.
    """
    if is_loopback(host):
        return f"--insecure changes nothing: only this machine reaches {host}" if insecure else ""
    wanted = ((key_option, keys), ("--tls-cert/--tls-key", tls))
    missing = " and ".join(name for name, there in wanted if not there)
    if not missing:
        return f"--insecure changes nothing: {host} has keys and TLS" if insecure else ""
    if not insecure:
        raise ConfigError(
            f"listening on {host} would be open to the network without {missing}",
            code="insecure_bind",
            hint="give them, or --insecure if something in front of this port does that work",
        )
    dangers = []
    if not keys:
        dangers.append("everybody who reaches this port may use it")
    if not tls:
        dangers.append("everybody on the way can read and change what passes")
    return f"--insecure: listening on {host} without {missing}; {' and '.join(dangers)}"

"""Who may connect (a file of `label:key` lines, compared in constant time) and which hosts may be bound."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from isthmus.protocol.errors import ConfigError

LOCAL_TENANT: Final = "local"
_MAX_FILE_BYTES: Final = 1 << 20
_MAX_HEADER_CHARS: Final = 4096


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class KeyRing:
    """The keys this cloud accepts, by label. The label is the tenant: KV is never shared across labels.

    Only digests are kept, so a memory dump or a log line of this object shows no key. A ring without keys
    admits everyone as tenant `local`; `check_bind` lets that listen on loopback only.
    """

    def __init__(self, keys: Mapping[str, str] | None = None) -> None:
        self._digests = {label: _digest(key) for label, key in (keys or {}).items()}

    def __len__(self) -> int:
        return len(self._digests)

    def __repr__(self) -> str:
        return f"KeyRing(labels={sorted(self._digests)})"

    @property
    def open(self) -> bool:
        """True when no key is needed."""
        return not self._digests

    def authenticate(self, authorization: str | None) -> str | None:
        """The tenant's label for the value of an `Authorization` header, None if it is not to be let in.

        Every key is compared in constant time and none is skipped, so the time tells neither how much of a
        key was right nor which label it belongs to.
        """
        if self.open:
            return LOCAL_TENANT
        if authorization is None or len(authorization) > _MAX_HEADER_CHARS:
            return None
        scheme, _, presented = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest = _digest(presented.strip())
        found: str | None = None
        for label, known in self._digests.items():
            if hmac.compare_digest(digest, known):
                found = label
        return found

    def holds(self, label: str, other: KeyRing) -> bool:
        """True while `label` has the same key in the reloaded ring `other`, false once it was revoked."""
        mine, theirs = self._digests.get(label), other._digests.get(label)
        return mine is not None and theirs is not None and hmac.compare_digest(mine, theirs)


def parse_keys(lines: Iterable[str], *, source: str) -> KeyRing:
    """`label:key` a line; blank lines and `#` comments are skipped.

    Raises ConfigError naming `source` and the line number for a malformed line, a repeated label or a key
    given to two labels (their tenants could not be told apart).
    """
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        label, colon, key = text.partition(":")
        label, key = label.strip(), key.strip()
        where = f"{source}:{number}"
        hint = "one `label:key` a line, e.g. `alice:…`; make keys with `openssl rand -hex 32`"
        if not colon or not label or not key:
            raise ConfigError(f"{where}: not of the form label:key", code="bad_key_file", hint=hint)
        if label in keys:
            raise ConfigError(f"{where}: label {label!r} appears twice", code="bad_key_file", hint=hint)
        if key in keys.values():
            raise ConfigError(
                f"{where}: this key belongs to another label too", code="bad_key_file", hint=hint
            )
        keys[label] = key
    if not keys:
        raise ConfigError(
            f"{source}: no key in it", code="bad_key_file", hint="leave the option out to need none"
        )
    return KeyRing(keys)


def load_keys(path: Path) -> KeyRing:
    """The ring of a key file. Raises ConfigError if it cannot be read or is malformed."""
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise ConfigError(
                f"key file {path} has {size} bytes, more than {_MAX_FILE_BYTES}", code="bad_key_file"
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"key file {path} cannot be read: {error}",
            code="bad_key_file",
            hint="check the path and its mode",
        ) from error
    return parse_keys(text.splitlines(), source=str(path))


class KeyFile:
    """A key file that is read again when it changes, so that a key can be revoked without a restart."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._stamp = self._stat()
        self.ring = load_keys(path) if path is not None else KeyRing()

    def _stat(self) -> tuple[int, int] | None:
        if self._path is None:
            return None
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size

    def refresh(self) -> KeyRing | None:
        """The new ring if the file changed since it was last read, else None.

        A file that vanished or no longer parses raises ConfigError once per change and leaves the old ring
        in force: a half-written file must not lock every edge out.
        """
        stamp = self._stat()
        if self._path is None or stamp == self._stamp:
            return None
        self._stamp = stamp
        self.ring = load_keys(self._path)
        return self.ring


def is_loopback(host: str) -> bool:
    """True for `localhost` and loopback addresses. Other names count as reachable from outside."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, *, keys: bool, tls: bool, insecure: bool) -> None:
    """Raises ConfigError `insecure_bind` for listening beyond loopback without keys and TLS."""
    if is_loopback(host) or insecure or (keys and tls):
        return
    missing = " and ".join(
        name for name, there in (("--api-key-file", keys), ("--tls-cert/--tls-key", tls)) if not there
    )
    raise ConfigError(
        f"listening on {host} would be open to the network without {missing}",
        code="insecure_bind",
        hint="give them, or --insecure if something in front of this port does that work",
    )

"""API keys: a file of `label:key` lines, plain or hashed, compared in constant time, reread when it changes.

Only digests are kept in memory. A key made by `make_key` is 256 random bits, so one plain SHA-256 is enough
at rest: nobody can try 2^256 keys, and a slow hash would only make every request slow. It would not be
enough for passwords that people choose, which is why short unhashed keys are remarked upon. They are not
refused: a server that won't start after an update locks out everybody, the owner of good keys too.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from isthmus.protocol.errors import ConfigError

LOCAL_TENANT: Final = "local"
SHORTEST_KEY: Final = 16
_HASHED: Final = "sha256:"
_MAX_FILE_BYTES: Final = 1 << 20
_MAX_HEADER_CHARS: Final = 4096
_LINE_HINT: Final = "one `label:key` or `label:sha256:HEX` a line; `isthmus key LABEL --file FILE` makes one"


def make_key() -> str:
    """A new random key: 256 bits as 64 hex digits."""
    return secrets.token_hex(32)


def hashed_line(label: str, key: str) -> str:
    """The key as a key file should hold it. The key cannot be computed from the line."""
    return f"{label}:{_HASHED}{_digest(key).hex()}"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _stored_digest(entry: str) -> bytes:
    """The digest of a key as it stands in a file. ValueError for `sha256:` without 64 hex digits."""
    if not entry.startswith(_HASHED):
        return _digest(entry)
    digest = bytes.fromhex(entry.removeprefix(_HASHED))
    if len(digest) != hashlib.sha256().digest_size:
        raise ValueError
    return digest


class KeyRing:
    """The keys a server accepts, by label. The label is the tenant: KV is never shared across labels.

    `entries`: by label, a key or `sha256:` and its digest in hex. Only digests are kept, so a memory dump or
    a log line of this object shows no key. A ring without keys admits everyone as tenant `local`;
    `addresses.check_bind` lets that listen on loopback only.
    """

    def __init__(self, entries: Mapping[str, str] | None = None) -> None:
        entries = entries or {}
        self._digests = {label: _stored_digest(entry) for label, entry in entries.items()}
        plain = [entry for entry in entries.values() if not entry.startswith(_HASHED)]
        self._num_plain = len(plain)
        self._num_short = sum(len(entry) < SHORTEST_KEY for entry in plain)

    def __len__(self) -> int:
        return len(self._digests)

    def __repr__(self) -> str:
        return f"KeyRing(labels={sorted(self._digests)})"

    @property
    def labels(self) -> frozenset[str]:
        """Whom the keys belong to."""
        return frozenset(self._digests)

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

    def remarks(self) -> list[str]:
        """What the owner should know about the keys; counts only, no key and no label."""
        found = []
        if self._num_plain:
            found.append(f"{self._num_plain} of {len(self)} keys stand unhashed in the key file")
        if self._num_short:
            found.append(
                f"{self._num_short} of {len(self)} keys have fewer than {SHORTEST_KEY} characters: "
                "they may be guessed"
            )
        return found


def parse_keys(lines: Iterable[str], *, source: str) -> KeyRing:
    """`label:key` or `label:sha256:HEX` a line; blank lines and `#` comments are skipped.

    Raises ConfigError naming `source` and the line number for a malformed line, a repeated label or a key
    given to two labels (their tenants could not be told apart); and for no key at all.
    """
    entries = _entries(lines, source=source)
    if not entries:
        raise ConfigError(
            f"{source}: no key in it", code="bad_key_file", hint="leave the option out to need none"
        )
    return KeyRing(entries)


def _entries(lines: Iterable[str], *, source: str) -> dict[str, str]:
    entries: dict[str, str] = {}
    digests: set[bytes] = set()
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        label, _, entry = (part.strip() for part in text.partition(":"))
        where = f"{source}:{number}"
        if not label or not entry:
            raise ConfigError(f"{where}: not of the form label:key", code="bad_key_file", hint=_LINE_HINT)
        try:
            digest = _stored_digest(entry)
        except ValueError:
            raise ConfigError(
                f"{where}: `sha256:` is not followed by 64 hex digits", code="bad_key_file", hint=_LINE_HINT
            ) from None
        if label in entries:
            raise ConfigError(f"{where}: label {label!r} appears twice", code="bad_key_file", hint=_LINE_HINT)
        if digest in digests:
            raise ConfigError(
                f"{where}: this key belongs to another label too", code="bad_key_file", hint=_LINE_HINT
            )
        entries[label] = entry
        digests.add(digest)
    return entries


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise ConfigError(
                f"key file {path} has {size} bytes, more than {_MAX_FILE_BYTES}", code="bad_key_file"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"key file {path} cannot be read: {error}",
            code="bad_key_file",
            hint="check the path and its mode",
        ) from error


def load_keys(path: Path) -> KeyRing:
    """The ring of a key file. Raises ConfigError if it cannot be read or is malformed."""
    return parse_keys(_read(path).splitlines(), source=str(path))


def add_key(path: Path, label: str, key: str) -> None:
    """Append a key, hashed, to a key file, which is made (readable by its owner only) if need be.

    Raises ConfigError for a label that a line cannot carry or that the file has already, and for a file
    that cannot be read, is malformed or cannot be written.
    """
    if not label.isprintable() or label != label.strip() or ":" in label or label[:1] in ("", "#"):
        raise ConfigError(
            f"the label {label!r} would not be read back from a key file",
            code="bad_label",
            hint="printable characters without a colon, the first one no #",
        )
    text = _read(path) if path.exists() else ""
    if label in _entries(text.splitlines(), source=str(path)):
        raise ConfigError(
            f"{path} has a key for {label!r} already",
            code="label_taken",
            hint="choose another label, or delete that line first",
        )
    gap = "" if text.endswith("\n") or not text else "\n"
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(handle, "a", encoding="utf-8") as file:
            file.write(f"{gap}{hashed_line(label, key)}\n")
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}",
            code="bad_key_file",
            hint="check the path and its mode",
        ) from error


class KeyFile:
    """A key file that is read again when it changes, so that a key can be revoked without a restart."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._stamp = self._stat()
        self.ring = load_keys(path) if path is not None else KeyRing()

    def _stat(self) -> tuple[int, int, int] | None:
        if self._path is None:
            return None
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def refresh(self) -> KeyRing | None:
        """The new ring if the file changed since it was last read, else None.

        A file that vanished or no longer parses raises ConfigError once per change and leaves the old ring
        in force: a half-written file must not lock everybody out.
        """
        stamp = self._stat()
        if self._path is None or stamp == self._stamp:
            return None
        self._stamp = stamp
        self.ring = load_keys(self._path)
        return self.ring

    def remarks(self) -> list[str]:
        """What to warn of at the start: who else may read the file, unhashed and short keys."""
        if self._path is None:
            return []
        found = self.ring.remarks()
        mode = os.stat(self._path).st_mode & 0o777
        if mode & 0o077:
            found.insert(0, f"other users may read the key file {self._path} (mode {mode:o}); chmod 600 it")
        return found

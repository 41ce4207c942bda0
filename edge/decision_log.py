"""The record of routing decisions: what each rested on and what came out, enough to decide the same again.

JSON lines, one file, without content: no prompt, no ids, no text. A device profile is written once per file

    {"sha": "…", "profile": {…}}

and each decision refers to those of its inputs

    {"request_id": "…", "when": 1.7e9, "edge": "<sha>", "cloud": "<sha>", "inputs": {…}, "decision": {…}}

Floats are written so that they read back exactly; Infinity and NaN are spelled, as Python's json does.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter

from isthmus.edge.constraints import RouterInputs
from isthmus.edge.requests import Decision
from isthmus.protocol.errors import ConfigError
from isthmus.protocol.profiles import DeviceProfile

MAX_BYTES: Final = 64 << 20
"""A file that would grow beyond is set aside as NAME.1, over the one that was there."""
_log: Final = logging.getLogger("isthmus.edge")
_SIDES: Final = ("edge", "cloud")
_KEPT: Final = 16


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[RouterInputs]:
    """Builds a validator of everything below RouterInputs: once, and only where a log is wanted."""
    return TypeAdapter(RouterInputs)


class DecisionLog:
    """Appends to `path`. A log that cannot be written is told of once, then no more is written: it must not
    cost a request."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self._broken = False
        self._file: int | None = None
        self._size = 0
        self._shas: dict[
            int, tuple[DeviceProfile, str]
        ] = {}  # by id; holds the profile, so the id stays its own
        self._written: set[str] = set()

    def append(self, request_id: str, inputs: RouterInputs, decision: Decision, when: float) -> None:
        """One decision, at `when` in seconds since 1970."""
        if self._broken:
            return
        shas = self._profiles(inputs)
        line = _line(
            {
                "request_id": request_id,
                "when": when,
                **{side: sha for side, (_, sha) in shas.items()},
                "inputs": _adapter().dump_python(inputs, exclude={"world": set(_SIDES)}),
                "decision": decision.to_dict(),
            }
        )
        try:
            self._write(line, shas)
        except OSError as error:
            self._broken = True
            self.close()
            _log.error("the decision log %s is off from now on: %s", self.path, error.strerror or error)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _profiles(self, inputs: RouterInputs) -> dict[str, tuple[DeviceProfile, str]]:
        """The profiles of `inputs` with their hashes, by side."""
        found = {}
        for side in _SIDES if inputs.world is not None else ():
            profile: DeviceProfile | None = getattr(inputs.world, side)
            if profile is not None:
                if id(profile) not in self._shas:
                    if len(self._shas) == _KEPT:  # each new connection brings an object of its own
                        self._shas.clear()
                    self._shas[id(profile)] = (profile, profile_sha(profile))
                found[side] = self._shas[id(profile)]
        return found

    def _write(self, line: bytes, shas: dict[str, tuple[DeviceProfile, str]]) -> None:
        if self._file is None:
            self._open()
        data = self._missing(shas) + line
        if self._size and self._size + len(data) > self.max_bytes:
            self.close()
            self.path.replace(self.path.with_name(self.path.name + ".1"))
            self._open()
            data = self._missing(shas) + line
        assert self._file is not None
        written = os.write(self._file, data)
        if written < len(data):  # the disk is full: no half lines
            os.ftruncate(self._file, self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += written
        self._written.update(sha for _, sha in shas.values())

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._file).st_size
        self._written.clear()

    def _missing(self, shas: dict[str, tuple[DeviceProfile, str]]) -> bytes:
        lines = {
            sha: _line({"sha": sha, "profile": profile.model_dump(mode="json")})
            for profile, sha in shas.values()
            if sha not in self._written
        }
        return b"".join(lines.values())


def profile_sha(profile: DeviceProfile) -> str:
    """SHA-256 of what a profile says."""
    return hashlib.sha256(profile.model_dump_json().encode()).hexdigest()


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


# ---- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A decision as it was logged; `decision` is `Decision.to_dict()` as JSON holds it."""

    request_id: str
    when: float
    inputs: RouterInputs
    decision: dict[str, Any]


def read_log(path: Path) -> Iterator[Entry]:
    """Every decision of a log, in order. ConfigError `bad_log` names the line that is none."""
    profiles: dict[str, DeviceProfile] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                entry = _parsed(text, profiles, f"{path} line {number}")
                if entry is not None:
                    yield entry
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the decision log {path}: {error}", code="bad_log") from error


def _parsed(text: str, profiles: dict[str, DeviceProfile], where: str) -> Entry | None:
    """The entry of a line; None for a profile, which is remembered."""
    try:
        line = json.loads(text)
        if "profile" in line:
            profile = DeviceProfile.model_validate_json(json.dumps(line["profile"]))
            if profile_sha(profile) != line["sha"]:
                raise ValueError("the profile is not the one that its hash names")
            profiles[line["sha"]] = profile
            return None
        inputs = line["inputs"]
        if inputs["world"] is not None:
            for side in _SIDES:
                inputs["world"][side] = profiles[line[side]] if side in line else None
        checked = _adapter().validate_python(inputs)
        return Entry(str(line["request_id"]), float(line["when"]), checked, dict(line["decision"]))
    except KeyError as error:
        raise _bad(where, f"{error} is missing, or not yet told of") from error
    except (ValueError, TypeError, RecursionError, ConfigError) as error:  # of json, pydantic, and a policy
        raise _bad(where, str(error).replace("\n", " ")[:300]) from error


def _bad(where: str, what: str) -> ConfigError:
    return ConfigError(
        f"{where} is no logged decision: {what}",
        code="bad_log",
        hint="a line cut short or edited? take it out of the file",
    )

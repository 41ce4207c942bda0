"""Profiles as files: those of this machine, kept in the cache, and the examples that come with the package.

Public: edge_profile profile_path load_profile save_profile with_watts EXAMPLES example.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from isthmus.protocol.errors import ConfigError, NotFoundError
from isthmus.protocol.profiles import DeviceProfile
from isthmus.splitter.atomic import file_errors
from isthmus.splitter.machine import cpu_name
from isthmus.splitter.power import check_watts
from isthmus.splitter.store import cache_root, write_atomically

if TYPE_CHECKING:
    from isthmus.splitter.pack import Pack
    from isthmus.splitter.profiling import Progress

EXAMPLES_FOLDER: Final = Path(__file__).parent / "example_profiles"
_DISTURBED_S: Final = 3600.0
_MAX_BYTES: Final = 1 << 20  # a profile of 1024 layers has 30 KB

EXAMPLES: Final = tuple(sorted(file.stem for file in EXAMPLES_FOLDER.glob("*.json")))
"""Names that `example` takes: <device>-<model>."""


def profile_path(pack: Pack, provider: str, threads: int | None) -> Path:
    """Where the profile of `pack` on this machine lies, or would lie. A file per model, weights, scheme,
    provider, number of threads (None: the default's) and processor."""
    from isthmus.splitter.sessions import default_threads

    identity = pack.identity
    key = [
        identity.key,
        identity.weights_hash,
        pack.scheme,
        provider,
        threads or default_threads(),
        cpu_name(),
    ]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{identity.base_name}-{pack.scheme}-{provider}")
    return cache_root() / "profiles" / f"{name}-{digest}.json"


def load_profile(path: Path | str) -> DeviceProfile:
    """The profile in a file. NotFoundError (`no_profile`), or ConfigError (`bad_profile`) naming the file and
    what is wrong with it."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise NotFoundError(
            f"cannot read the profile {path}: {error.strerror}",
            code="no_profile",
            hint=f"make one with `isthmus profile --out {path}`",
        ) from error
    if len(data) > _MAX_BYTES:
        raise ConfigError(
            f"{path} is no device profile: it has more than {_MAX_BYTES} bytes",
            code="bad_profile",
            hint="make one with `isthmus profile`",
        )
    return DeviceProfile.from_json(data, name=str(path))


def save_profile(path: Path | str, profile: DeviceProfile) -> None:
    """Write a profile so that readers see the old one or the new one. Raises what `file_errors` does."""
    with file_errors(f"the profile {path}"):
        write_atomically(Path(path), profile.to_json().encode())


def edge_profile(
    pack: Pack,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    memory_mb: float | None = None,
    watts: tuple[float, float] | None = None,
    progress: Progress | None = None,
) -> DeviceProfile:
    """This machine's profile for `pack`: the kept one; where there is none, or a damaged one, quickly
    measured now (a few seconds) and kept, if the cache can be written. One that was measured while other
    work ran is good for an hour. `watts`: declared (idle, active), which stand where no sensor told. Raises
    what `measure_edge` does."""
    from isthmus.splitter.profiling import DISTURBED, measure_edge

    check_watts(watts)
    path = profile_path(pack, provider, threads)
    with contextlib.suppress(ConfigError, NotFoundError, OSError):
        kept = load_profile(path)
        stale = DISTURBED in kept.note and time.time() - path.stat().st_mtime > _DISTURBED_S
        if _is_of(kept, pack) and not stale:
            return with_watts(kept, watts)
    profile = measure_edge(
        pack, provider=provider, threads=threads, quick=True, memory_mb=memory_mb, progress=progress
    )
    with contextlib.suppress(OSError):
        write_atomically(path, profile.to_json().encode())
    return with_watts(profile, watts)


def with_watts(profile: DeviceProfile, watts: tuple[float, float] | None) -> DeviceProfile:
    """The profile with declared (idle, active) watts, unless its own are measured."""
    check_watts(watts)
    if watts is None or profile.labels["power"] == "measured":
        return profile
    labels = {**profile.labels, "power": "modelled"}
    return profile.model_copy(update={"idle_w": watts[0], "active_w": watts[1], "labels": labels})


def example(name: str) -> DeviceProfile:
    """One of EXAMPLES: a modelled device, see its `note`. NotFoundError (`no_profile`) for another name."""
    if name not in EXAMPLES:
        raise NotFoundError(
            f"no example profile {name!r}", code="no_profile", hint=f"there are: {', '.join(EXAMPLES)}"
        )
    return load_profile(EXAMPLES_FOLDER / f"{name}.json")


def _is_of(profile: DeviceProfile, pack: Pack) -> bool:
    """Someone may have put another one in its place."""
    spec = pack.spec
    return (profile.side, profile.num_layers, profile.hidden, profile.precision) == (
        "edge",
        spec.num_layers,
        spec.hidden,
        pack.scheme,
    )

"""What `isthmus doctor` looks at on this machine: what is so, and the way out where it is not."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from isthmus.commands.output import human_bytes
from isthmus.commands.running import served_processes
from isthmus.commands.setup import agent_options, declared_watts
from isthmus.config import SETTINGS, Settings
from isthmus.protocol.errors import ConfigError, IsthmusError, NotFoundError

if TYPE_CHECKING:
    from isthmus.splitter.pack import Pack

Status = Literal["ok", "warn", "fail"]

# Variables that are no settings: where files lie.
PLACES: Final = ("ISTHMUS_CONFIG", "ISTHMUS_CACHE", "ISTHMUS_STATE", "ISTHMUS_DATA")
_REQUIREMENT: Final = re.compile(r"(?P<name>[\w.-]+)\s*>=\s*(?P<least>[\d.]+)$")
# A build holds the source and the pack, whose weights may be wider than the source's.
_BUILD_OVER_SOURCE: Final = 2.0


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `hint`: what to do about it; `cloud`: of which cloud, None for this machine."""

    name: str
    status: Status
    detail: str
    hint: str = ""
    cloud: str | None = None


def failed(name: str, error: IsthmusError, *, cloud: str | None = None) -> Check:
    """The check that ended in `error`."""
    return Check(name, "fail", error.message, error.hint, cloud)


# ---- the program --------------------------------------------------------------------------------------


def check_python() -> Check:
    """The interpreter against what the package asks for."""
    wanted = metadata.metadata("isthmus")["Requires-Python"]
    said = f"{platform.python_version()} on {platform.platform(terse=True)}, {platform.machine()}"
    if _numbers(platform.python_version()) < _numbers(wanted):
        return Check("python", "fail", said, f"install Python {wanted}")
    if sys.maxsize < 1 << 32:
        return Check("python", "fail", f"{said}: 32 bits", "install a 64-bit Python: models are mapped whole")
    return Check("python", "ok", said)


def check_packages() -> Check:
    """Every package that the edge needs: installed, new enough, and can be imported."""
    wrong: list[str] = []
    found: list[str] = []
    for requirement in metadata.requires("isthmus") or ():
        match = _REQUIREMENT.match(requirement)
        if match is None:  # of an extra
            continue
        name, least = match["name"], match["least"]
        try:
            version = metadata.version(name)
            importlib.import_module(name.replace("-", "_"))  # true of all that the edge needs
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed")
        except Exception as error:  # whatever a broken installation does
            wrong.append(f"{name} {version} cannot be imported: {error}")
        else:
            found.append(f"{name} {version}")
            if _numbers(version) < _numbers(least):
                wrong.append(f"{name} is {version}, {least} is needed")
    if wrong:
        return Check("packages", "fail", "; ".join(wrong), "install anew: pip install --upgrade isthmus")
    return Check("packages", "ok", ", ".join(found))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def check_config(settings: Settings | None, error: ConfigError | None, env: Mapping[str, str]) -> Check:
    """The settings, or why they cannot be read (`error`)."""
    if settings is None or error is not None:
        assert error is not None
        return failed("config", error)
    names = {setting.env for setting in SETTINGS} | set(PLACES)
    if unknown := sorted(name for name in env if name.startswith("ISTHMUS_") and name not in names):
        return Check(
            "config", "warn", f"{', '.join(unknown)}: no setting is called so", "see: isthmus config show"
        )
    if not settings.path.exists():
        return Check("config", "ok", f"no {settings.path}: defaults, flags and the environment count")
    if "api_key" in settings.file and (mode := _open_to_others(settings.path)):
        return Check(
            "config",
            "warn",
            f"{settings.path} holds a key and has mode {mode:o}",
            f"chmod 600 {settings.path}",
        )
    return Check("config", "ok", f"{settings.path}, settings in it: {len(settings.file)}")


# ---- computing ----------------------------------------------------------------------------------------


def check_provider(name: str, threads: int | None) -> Check:
    """Multiplies two small matrices by the execution provider `name`, and looks who really did it."""
    import numpy as np

    from isthmus.splitter.providers import available_providers, choose_provider, provider_used
    from isthmus.splitter.sessions import configure_threads, open_session

    here = ", ".join(available_providers())
    try:
        choice = choose_provider(name)
        used_threads = configure_threads(threads)
        session = open_session(_product_graph(), Path(tempfile.gettempdir()), choice, "a small product")
    except IsthmusError as error:
        return failed("provider", error)
    ones = np.ones((4, 4), np.float32)
    used = provider_used(session.get_providers())
    if used != name:
        return Check(
            "provider", "fail", f"{name} was asked for, {used} computes",
            f"the libraries of {name} could not be loaded; install them, or set --provider {used}",
        )  # fmt: skip
    if not np.array_equal(session.run(None, {"x": ones, "w": ones})[0], ones * 4):
        return Check("provider", "fail", f"{name} multiplies wrongly", "use another --provider")
    return Check("provider", "ok", f"{name} computes, on {used_threads} threads; available: {here}")


def _product_graph() -> bytes:
    """ONNX: y = x w, float32 [4, 4]."""
    import onnx_ir as ir

    from isthmus.splitter.graph import IR_VERSION, OPSETS

    kind, shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([4, 4])
    x, w = (ir.Value(name=name, type=kind, shape=shape) for name in ("x", "w"))
    node = ir.Node("", "MatMul", [x, w], num_outputs=1)
    (y,) = node.outputs
    y.name, y.type, y.shape = "y", kind, shape
    graph = ir.Graph([x, w], [y], nodes=[node], opset_imports=OPSETS, name="product")
    return bytes(ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString())


def check_energy(settings: Settings) -> Check:
    """A sensor by which the energy of requests is measured, or declared watts."""
    from isthmus.splitter.power import find_meter

    try:
        watts = declared_watts(settings)
    except ConfigError as error:
        return failed("energy", error)
    meter = find_meter()
    if meter is not None:
        return Check("energy", "ok", meter.source)
    if watts is not None:
        return Check("energy", "ok", f"no sensor; declared are {watts[0]:g} W idle, {watts[1]:g} W active")
    return Check(
        "energy", "warn", "no sensor that can be read: the energy of requests is not known",
        "declare idle_watts and active_watts, if it matters",
    )  # fmt: skip


# ---- files --------------------------------------------------------------------------------------------


def find_pack(model: str, bits: str) -> tuple[Check, Pack | None]:
    """The pack of MODEL, all its hashes checked; None where there is none that could be used."""
    from isthmus.splitter.pack import Pack
    from isthmus.splitter.provide import describe
    from isthmus.splitter.sources import resolve
    from isthmus.splitter.store import pack_path

    try:
        resolved = resolve(model)
        path = resolved.path if resolved.kind == "pack" else None
        pack = Pack.open(path or pack_path(model, bits))
        pack.verify()
    except NotFoundError as error:
        if error.code != "no_pack":
            return failed("model", error), None
        pulled = describe(model)["path"]
        so_far = f"pulled to {pulled}, but no pack of it is built" if pulled else "not pulled yet"
        build = f"isthmus build {model} --bits {bits}"
        return Check(
            "model", "warn", f"{model}: {so_far}", f"{build} (`run` and `serve edge` do so too)"
        ), None
    except IsthmusError as error:
        return failed("model", error), None
    said = f"{pack.path}: {pack.spec.num_layers} layers, {pack.scheme}, {human_bytes(pack.weights_bytes)}"
    return Check("model", "ok", f"{said}, hashes right, identity {pack.identity.key[:12]}"), pack


def check_cache(model: str, pack: Pack | None) -> Check:
    """Where models lie: can be written, and has room for this one."""
    from isthmus.splitter.store import cache_root

    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
        free = shutil.disk_usage(root).free
    except OSError as error:
        return Check(
            "cache", "fail", f"{root} cannot be written: {error.strerror or error}",
            "set ISTHMUS_CACHE to a folder you may write",
        )  # fmt: skip
    needed = 0 if pack is not None else _needed_bytes(model)
    said = f"{root}, {human_bytes(free)} free"
    if needed > free:
        return Check(
            "cache", "fail", f"{said}, {model} needs about {human_bytes(needed)}",
            "free some space (`isthmus rm` removes a model), or set ISTHMUS_CACHE to a larger disk",
        )  # fmt: skip
    return Check("cache", "ok", said + (f", {model} needs about {human_bytes(needed)}" if needed else ""))


def _needed_bytes(model: str) -> int:
    """What pulling and building MODEL takes, roughly; 0 where nobody knows before it is pulled."""
    from isthmus.splitter.catalog import CATALOG, WheelModel
    from isthmus.splitter.sources import resolve
    from isthmus.splitter.store import model_path

    try:
        path = resolve(model).path or model_path(model)
    except NotFoundError:
        return 0
    files = [path] if path.is_file() else list(path.glob("*"))
    if source := sum(file.stat().st_size for file in files if file.is_file()):
        return int(_BUILD_OVER_SOURCE * source)
    entry = CATALOG.get(model)
    if not isinstance(entry, WheelModel):
        return 0
    return int(entry.wheel_bytes + (1 + _BUILD_OVER_SOURCE) * entry.member_bytes)


def check_key_files(settings: Settings) -> Iterator[Check]:
    """The files with keys and certificates: readable, of the right form, and nobody else's to read."""
    from isthmus.protocol.keys import KeyFile

    set_files = {
        name: Path(path)
        for name in ("api_key_file", "tls_client_key", "tls_ca", "tls_client_cert", "serve_key_file")
        if (path := settings.text(name))
    }
    if not set_files:
        yield Check("key_files", "ok", "none is set")
        return
    try:
        agent_options(settings)
        remarks = KeyFile(set_files.get("serve_key_file")).remarks()
    except ConfigError as error:
        yield failed("key_files", error)
        return
    secret = [path for name, path in set_files.items() if name in ("api_key_file", "tls_client_key")]
    remarks += [
        f"{path} has mode {mode:o}; chmod 600 {path}" for path in secret if (mode := _open_to_others(path))
    ]
    if remarks:
        yield Check("key_files", "warn", "; ".join(remarks), "let nobody else read keys")
    else:
        yield Check("key_files", "ok", ", ".join(str(path) for path in set_files.values()))


def _open_to_others(path: Path) -> int:
    """The file's mode where others may read or write it, else 0."""
    mode = os.stat(path).st_mode & 0o777
    return mode if os.name == "posix" and mode & 0o077 else 0


def check_port(port: int) -> Check:
    """Could `serve edge` listen on 127.0.0.1:`port`? Or does it already?"""
    from isthmus.edge.server import bind

    try:
        bind("127.0.0.1", port).close()
    except ConfigError as error:
        for process in served_processes():
            if process.url.endswith(f":{port}"):
                said = f"{port} is ours: serve {process.kind}, process {process.pid}"
                return Check("port", "ok", said)
        return Check("port", "warn", error.message, error.hint)
    return Check("port", "ok", f"127.0.0.1:{port} is free")
